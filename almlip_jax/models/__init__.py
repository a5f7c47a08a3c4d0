"""Models: a graph goes in, per-atom energies and invariant features come out."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any, TypeAlias

from pydantic import Discriminator, Tag

from almlip_jax.models.anchored import Anchored
from almlip_jax.models.base import AtomicOutput, Geometry, LinearLast, Model, Params, Survey
from almlip_jax.models.mace import Mace, MaceSettings
from almlip_jax.models.nequip import Nequip, NequipSettings
from almlip_jax.models.repulsion import WithRepulsion, zbl_pair_energy
from almlip_jax.models.shared_density import SharedDensity, SharedDensitySettings
from almlip_jax.structures.species import SpeciesTable


def _kind(given: Any) -> str:
    kind = given.get("kind", "shared_density") if isinstance(given, dict) else getattr(given, "kind", "")
    return str(kind)


ModelSettings: TypeAlias = Annotated[
    Annotated[SharedDensitySettings, Tag("shared_density")]
    | Annotated[MaceSettings, Tag("mace")]
    | Annotated[NequipSettings, Tag("nequip")],
    Discriminator(_kind),
]
"""Settings of any model, told apart by ``kind``; the shared-density model where there is none."""


def build_model(
    settings: SharedDensitySettings | MaceSettings | NequipSettings,
    species: SpeciesTable,
    isolated: Collection[int] = (),
) -> Model:
    """The model that some settings describe, for a species table.

    Args:
        settings: of the model.
        species: the species table.
        isolated: atomic numbers of the elements whose isolated atoms have exactly their reference energies.
    """
    model: Model
    match settings:
        case SharedDensitySettings():
            model = SharedDensity(settings, species)
        case MaceSettings():
            model = Mace(settings, species)
        case NequipSettings():
            model = Nequip(settings, species)
    if settings.repulsion:
        model = WithRepulsion(model)
    return Anchored(model, tuple(sorted(isolated))) if isolated else model


__all__ = [
    "Anchored",
    "AtomicOutput",
    "Geometry",
    "LinearLast",
    "Mace",
    "MaceSettings",
    "Model",
    "ModelSettings",
    "Nequip",
    "NequipSettings",
    "Params",
    "SharedDensity",
    "SharedDensitySettings",
    "Survey",
    "WithRepulsion",
    "build_model",
    "zbl_pair_energy",
]
