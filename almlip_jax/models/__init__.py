"""Models: a graph goes in, per-atom energies and invariant features come out."""

from __future__ import annotations

from typing import TypeAlias

from almlip_jax.models.base import AtomicOutput, Geometry, Model, Params
from almlip_jax.models.shared_density import SharedDensity, SharedDensitySettings

ModelSettings: TypeAlias = SharedDensitySettings
"""Settings of any model, told apart by ``kind``."""


def build_model(settings: ModelSettings, num_species: int) -> Model:
    """The model that some settings describe, for a species table of the given length."""
    return SharedDensity(settings, num_species)


__all__ = [
    "AtomicOutput",
    "Geometry",
    "Model",
    "ModelSettings",
    "Params",
    "SharedDensity",
    "SharedDensitySettings",
    "build_model",
]
