"""Models: a graph goes in, per-atom energies and invariant features come out."""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

from pydantic import Discriminator, Tag

from almlip_jax.models.base import AtomicOutput, Geometry, Model, Params
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


def build_model(settings: SharedDensitySettings | MaceSettings | NequipSettings, species: SpeciesTable) -> Model:
    """The model that some settings describe, for a species table."""
    model: Model
    match settings:
        case SharedDensitySettings():
            model = SharedDensity(settings, species)
        case MaceSettings():
            model = Mace(settings, species)
        case NequipSettings():
            model = Nequip(settings, species)
    return WithRepulsion(model) if settings.repulsion else model


__all__ = [
    "AtomicOutput",
    "Geometry",
    "Mace",
    "MaceSettings",
    "Model",
    "ModelSettings",
    "Nequip",
    "NequipSettings",
    "Params",
    "SharedDensity",
    "SharedDensitySettings",
    "WithRepulsion",
    "build_model",
    "zbl_pair_energy",
]
