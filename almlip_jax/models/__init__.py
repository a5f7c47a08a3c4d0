"""Models: a graph goes in, per-atom energies and invariant features come out."""

from __future__ import annotations

from collections.abc import Collection

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
from almlip_jax.models.mace import Mace, MaceSettings
from almlip_jax.models.mtp import Mtp, MtpSettings
from almlip_jax.models.nequip import Nequip, NequipSettings
from almlip_jax.models.repulsion import WithRepulsion, zbl_pair_energy
from almlip_jax.models.shared_density import SharedDensity, SharedDensitySettings
from almlip_jax.models.user import UserModelSettings
from almlip_jax.structures.species import SpeciesTable


def build_model(settings: ModelSettings, species: SpeciesTable, isolated: Collection[int] = ()) -> Model:
    """The model that some settings describe, for a species table, with its repulsion and its isolated atoms.

    Args:
        settings: of the model.
        species: the species table.
        isolated: atomic numbers of the elements whose isolated atoms have exactly their reference energies.

    Raises:
        InputError: as `ModelSettings.build`.
    """
    model = settings.build(species)
    if settings.repulsion:
        model = WithRepulsion(model)
    return Anchored(model, tuple(sorted(isolated))) if isolated else model


__all__ = [
    "Anchored",
    "AtomicOutput",
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
    "how_given",
    "zbl_pair_energy",
]
