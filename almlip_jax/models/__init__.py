"""Models: a graph goes in, per-atom energies and invariant features come out."""

from __future__ import annotations

from almlip_jax.models.anchored import Anchored
from almlip_jax.models.base import (
    AtomicOutput,
    Geometry,
    LastLayer,
    LinearLast,
    Model,
    ModelSettings,
    Params,
    Survey,
    how_given,
)
from almlip_jax.models.build import build_model
from almlip_jax.models.delta import Delta, DeltaSettings, corrects
from almlip_jax.models.mace import Mace, MaceSettings
from almlip_jax.models.mtp import Mtp, MtpSettings
from almlip_jax.models.nequip import Nequip, NequipSettings
from almlip_jax.models.repulsion import WithRepulsion, zbl_pair_energy
from almlip_jax.models.shared_density import SharedDensity, SharedDensitySettings
from almlip_jax.models.species_code import with_more_species
from almlip_jax.models.user import UserModelSettings

__all__ = [
    "Anchored",
    "AtomicOutput",
    "Delta",
    "DeltaSettings",
    "Geometry",
    "LastLayer",
    "LinearLast",
    "Mace",
    "MaceSettings",
    "Model",
    "ModelSettings",
    "Mtp",
    "MtpSettings",
    "Nequip",
    "NequipSettings",
    "Params",
    "SharedDensity",
    "SharedDensitySettings",
    "Survey",
    "UserModelSettings",
    "WithRepulsion",
    "build_model",
    "corrects",
    "how_given",
    "with_more_species",
    "zbl_pair_energy",
]
