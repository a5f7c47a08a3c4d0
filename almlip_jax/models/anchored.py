"""Energies of atoms relative to what a model predicts for isolated ones: these have exactly their own energies."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np

from almlip_jax.models.around import Around
from almlip_jax.models.base import AtomicOutput, Geometry, Params
from almlip_jax.models.species_code import exact_code
from almlip_jax.structures.graph import Graph, lone_atoms


@dataclass(frozen=True)
class Anchored(Around):
    """A model minus its own value for the isolated atom of some elements.

    Their reference energies then are those of isolated atoms, and what is left to the model is what binds them.
    Features are shifted alike, so that the last layer stays linear in them.  Of a model that sees charge and spin, that
    is its value for the neutral atom with the spin of the structure: neutral isolated atoms have their energies
    whatever their spin, and what a charge costs is left to the model.

    Attributes:
        isolated: atomic numbers of these elements, in increasing order.
    """

    isolated: tuple[int, ...]

    def apply(self, params: Params, geometry: Geometry, graph: Graph) -> AtomicOutput:
        """Energies and features of the model underneath, minus those of the isolated atoms."""
        output = self.inner.apply(params, geometry, graph)
        if self.sees_state:
            return self._less_its_own(params, output, graph)
        lone = lone_atoms(self.num_species, output.energy.dtype)
        alone = self.inner.apply(params, self.inner.geometry(lone), lone)
        code = exact_code(graph, self.species, output.energy.dtype)
        code = code * jnp.asarray(np.isin(self.species.numbers, self.isolated), code.dtype)
        energy, features = output.energy - code @ alone.energy, output.features - code @ alone.features
        return replace(output, energy=energy, features=features)

    def _less_its_own(self, params: Params, output: AtomicOutput, graph: Graph) -> AtomicOutput:
        """As `apply`, where isolated atoms of each species differ from structure to structure by their spin."""
        count, number = self.num_species, graph.num_structures
        lone = lone_atoms(count, output.energy.dtype, jnp.asarray(graph.spin, output.energy.dtype))
        alone = self.inner.apply(params, self.inner.geometry(lone), lone)
        chosen = graph.structure * count + graph.species
        known = jnp.asarray(np.isin(self.species.numbers, self.isolated), output.energy.dtype)[graph.species]
        assert alone.energy.shape == (number * count,)
        features = output.features - known[:, None] * alone.features[chosen]
        return replace(output, energy=output.energy - known * alone.energy[chosen], features=features)
