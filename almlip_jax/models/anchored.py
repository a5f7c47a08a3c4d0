"""Energies of atoms relative to what a model predicts for isolated ones: these have exactly their own energies."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from almlip_jax.models.around import Around
from almlip_jax.models.base import AtomicOutput, Geometry, LastLayer, Params
from almlip_jax.models.constants import CONSTANTS, mean_level, with_levels_of
from almlip_jax.models.radial import polynomial_cutoff
from almlip_jax.models.species_code import exact_code
from almlip_jax.structures.graph import Graph, lone_atoms
from almlip_jax.structures.species import SpeciesTable

_BINDING = "binding"
_SHARPNESS = 6.0  # an atom with one neighbour well within the cutoff is bound but for a share of exp(-6)


@struct.dataclass
class AnchoredGeometry:
    """Geometry of the model underneath, and how far each atom is bound, [A]: 0 for an isolated one, 1 in a molecule."""

    inner: Geometry
    bound: jax.Array


@dataclass(frozen=True)
class Anchored(Around):
    """A model minus its own value for the isolated atom of some elements.

    Their reference energies then are those of isolated atoms.  What binds an atom on the average, an energy of each
    element that is fitted to the training set and held among the constants, comes in with its first neighbours, by the
    factor ``1 - exp(-6 n)``, n the sum of the cutoff function over them: what is left to the model is no larger than
    with fitted reference energies.  Features are relative to those of isolated atoms too, so that the last layer stays
    linear in them.  What a model gives isolated atoms alone, a constant of each species (`Model.constant_alone`), comes
    back by the same factor: it is a binding energy, which the last layer learns.  Of a model that sees charge and spin,
    its own value is that for the neutral atom with the spin of the structure: neutral isolated atoms have their
    energies whatever their spin, and what a charge costs is left to the model.

    Attributes:
        isolated: atomic numbers of these elements, in increasing order.
    """

    isolated: tuple[int, ...]

    def geometry(self, graph: Graph) -> AnchoredGeometry:
        """That of the model underneath, and how far each atom is bound."""
        far = jnp.asarray([0.0, 0.0, self.cutoff], graph.vectors.dtype)
        vectors = jnp.where(graph.edge_mask[..., None], graph.vectors, far)
        distance = jnp.sqrt(jnp.sum(vectors**2, axis=-1))
        count = jnp.sum(jnp.where(graph.edge_mask, polynomial_cutoff(distance, self.cutoff), 0), axis=1)
        return AnchoredGeometry(self.inner.geometry(graph), -jnp.expm1(-_SHARPNESS * count))

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters of the model underneath, and no binding energies."""
        params = self.inner.init(key)
        return params | {CONSTANTS: params.get(CONSTANTS, {}) | {_BINDING: jnp.zeros((self.num_species,))}}

    def with_species(self, params: Params, fresh: Params, wanted: SpeciesTable) -> Params:
        """See `Model.with_species`; binding energies of new elements are those of ``fresh``."""
        grown = self.inner.with_species(params, fresh, wanted)
        places = wanted.index(np.asarray(self.species.numbers))
        binding = fresh[CONSTANTS][_BINDING].at[places].set(params[CONSTANTS][_BINDING])
        return grown | {CONSTANTS: grown[CONSTANTS] | {_BINDING: binding}}

    def apply(self, params: Params, geometry: AnchoredGeometry, graph: Graph) -> AtomicOutput:
        """Energies and features of the model underneath, minus those of isolated atoms, and what binds on average."""
        output = self._relative(params, self.inner.apply(params, geometry.inner, graph), geometry.bound, graph)
        binding = jax.lax.stop_gradient(params[CONSTANTS][_BINDING])[graph.species]
        return replace(output, energy=output.energy + binding * geometry.bound)

    def last(self, params: Params) -> LastLayer:
        """That of the model underneath, whose levels cancel for the elements that are counted from isolated atoms."""
        inner = super().last(params)
        known = jnp.asarray(np.isin(self.species.numbers, self.isolated))
        return inner._replace(levels=jnp.where(known, 0, inner.levels))

    @property
    def constant_alone(self) -> bool:
        """No: features of isolated atoms are 0."""
        return False

    def own_shares(self, graph: Graph, bound: jax.Array) -> jax.Array:
        """How much of what each isolated atom has is taken off each atom [A, S], of a model that sees no state.

        Args:
            graph: of the atoms.
            bound: [A] of `geometry`.
        """
        code = exact_code(graph, self.species, bound.dtype)
        code = code * jnp.asarray(np.isin(self.species.numbers, self.isolated), code.dtype)
        return code * (1 - bound)[:, None] if super().constant_alone else code

    def _relative(self, params: Params, output: AtomicOutput, bound: jax.Array, graph: Graph) -> AtomicOutput:
        if self.sees_state:
            return self._less_its_own(params, output, graph)
        lone = lone_atoms(self.num_species, output.energy.dtype)
        alone = self.inner.apply(params, self.inner.geometry(lone), lone)
        code = self.own_shares(graph, bound)
        energy, features = output.energy - code @ alone.energy, output.features - code @ alone.features
        return replace(output, energy=energy, features=features)

    def _less_its_own(self, params: Params, output: AtomicOutput, graph: Graph) -> AtomicOutput:
        """As `_relative`, where isolated atoms of each species differ from structure to structure by their spin."""
        count, number = self.num_species, graph.num_structures
        lone = lone_atoms(count, output.energy.dtype, jnp.asarray(graph.spin, output.energy.dtype))
        alone = self.inner.apply(params, self.inner.geometry(lone), lone)
        chosen = graph.structure * count + graph.species
        known = jnp.asarray(np.isin(self.species.numbers, self.isolated), output.energy.dtype)[graph.species]
        assert alone.energy.shape == (number * count,)
        features = output.features - known[:, None] * alone.features[chosen]
        return replace(output, energy=output.energy - known * alone.energy[chosen], features=features)


def with_binding(params: Params, energies: np.ndarray, *, added: bool = False) -> Params:
    """Parameters of models or ensembles with the binding energies of each species [S], eV, where they hold any.

    Args:
        params: of the models.
        energies: in place of those that are there.
        added: to those that are there, instead.
    """
    return with_levels_of(params, _BINDING, energies, added=added)


def binding_of(params: Params, number: int) -> np.ndarray:
    """Binding energies of each species [number], eV, mean over the models; 0 where they hold none."""
    return mean_level(params, _BINDING, number)
