"""What an elementary charge costs, beside the reference energies of the elements, for models that see charge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from almlip_jax.models.around import Around
from almlip_jax.models.base import AtomicOutput, Geometry, Params
from almlip_jax.models.constants import CONSTANTS, mean_level, with_levels_of
from almlip_jax.models.electronic import amounts
from almlip_jax.structures.graph import Graph, atom_counts
from almlip_jax.structures.species import SpeciesTable

CHARGE_ENERGY = "charge_energy"
"""Name of the constant."""


@dataclass(frozen=True)
class WithChargeEnergy(Around):
    """A model plus an energy for each positive and each negative elementary charge of a structure.

    To ionise a molecule takes some ten electron-volts, which the reference energies of its elements cannot give and
    which say nothing of its geometry.  Both energies are fitted together with those of the elements, held among the
    constants, and shared out evenly among the atoms: no force depends on them, and neutral structures have exactly the
    energies that they have without.
    """

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters of the model underneath, and charges that cost nothing."""
        return without_cost(self.inner.init(key))

    def with_species(self, params: Params, fresh: Params, wanted: SpeciesTable) -> Params:
        """See `Model.with_species`."""
        grown = self.inner.with_species(params, fresh, wanted)
        return grown | {CONSTANTS: grown[CONSTANTS] | {CHARGE_ENERGY: params[CONSTANTS][CHARGE_ENERGY]}}

    def apply(self, params: Params, geometry: Geometry, graph: Graph) -> AtomicOutput:
        """Energies of the model underneath, each with its share of what the charge of its structure costs."""
        output = self.inner.apply(params, geometry, graph)
        costs = jax.lax.stop_gradient(params[CONSTANTS][CHARGE_ENERGY])
        shares = (amounts(graph)[:, :2] @ costs / atom_counts(graph))[graph.structure]
        return replace(output, energy=output.energy + shares)


def without_cost(params: Params) -> Params:
    """Parameters of one model, with charges that cost nothing."""
    return params | {CONSTANTS: params.get(CONSTANTS, {}) | {CHARGE_ENERGY: jnp.zeros((2,))}}


def with_charge_energy(params: Params, energies: np.ndarray, *, added: bool = False) -> Params:
    """Parameters of models or ensembles with the energies of a positive and a negative charge, eV, where they hold any.

    Args:
        params: of the models.
        energies: [2], in place of those that are there.
        added: to those that are there, instead.
    """
    return with_levels_of(params, CHARGE_ENERGY, energies, added=added)


def without_charge_energy(params: Params) -> Any:
    """Parameters, or shapes of them, without what charges cost: those of a potential of an earlier version."""
    if isinstance(params, Mapping):
        return {name: without_charge_energy(part) for name, part in params.items() if name != CHARGE_ENERGY}
    return tuple(map(without_charge_energy, params)) if isinstance(params, tuple) else params


def with_charges_for_nothing(params: Params, shapes: Params) -> Any:
    """Parameters of certain shapes, with charges that cost nothing where an earlier version had no place for that."""
    if isinstance(shapes, Mapping):
        return {
            name: with_charges_for_nothing(params[name], part) if name in params else np.zeros(part.shape, part.dtype)
            for name, part in shapes.items()
        }
    if isinstance(shapes, tuple):
        return tuple(with_charges_for_nothing(*pair) for pair in zip(params, shapes, strict=True))
    return params


def charge_energy_of(params: Params) -> np.ndarray:
    """Energies of a positive and a negative charge [2], eV, mean over the models; 0 where they hold none."""
    return mean_level(params, CHARGE_ENERGY, 2)
