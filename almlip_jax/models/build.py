"""The model that some settings describe, with all that is added to it."""

from __future__ import annotations

from collections.abc import Collection

from almlip_jax.models.anchored import Anchored
from almlip_jax.models.base import Model, ModelSettings, check_attributes
from almlip_jax.models.charge_energy import WithChargeEnergy
from almlip_jax.models.repulsion import WithRepulsion
from almlip_jax.structures.species import SpeciesTable


def build_model(settings: ModelSettings, species: SpeciesTable, isolated: Collection[int] = ()) -> Model:
    """The model that some settings describe, for a species table, with all that is added to it.

    That is its repulsion, what charges cost where it sees them, and the energies of isolated atoms.

    Args:
        settings: of the model.
        species: the species table.
        isolated: atomic numbers of the elements whose isolated atoms have exactly their reference energies.

    Raises:
        InputError: as `ModelSettings.build`, or its model lacks something that models have (of other packages).
    """
    model = settings.build(species)
    check_attributes(model, f"kind '{settings.kind}' builds a model")
    if settings.repulsion:
        model = WithRepulsion(model)
    if getattr(model, "sees_state", False):  # models of users need not say so
        model = WithChargeEnergy(model)
    return Anchored(model, tuple(sorted(isolated))) if isolated else model
