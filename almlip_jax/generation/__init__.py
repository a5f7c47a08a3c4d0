"""Structures that are made rather than found by dynamics: deformed, cut, with vacancies, or drawn at random."""

from almlip_jax.generation.base import GenerationInputs, GeneratorSettings, UserGenerator
from almlip_jax.generation.clusters import ClustersSettings
from almlip_jax.generation.conformers import ConformersSettings
from almlip_jax.generation.cut import SurfacesSettings, VacanciesSettings
from almlip_jax.generation.deformed import RattledSettings, StrainedSettings
from almlip_jax.generation.random_search import RandomSearchSettings

__all__ = [
    "ClustersSettings",
    "ConformersSettings",
    "GenerationInputs",
    "GeneratorSettings",
    "RandomSearchSettings",
    "RattledSettings",
    "StrainedSettings",
    "SurfacesSettings",
    "UserGenerator",
    "VacanciesSettings",
]
