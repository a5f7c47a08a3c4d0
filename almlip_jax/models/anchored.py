"""Energies of atoms relative to what a model says of them alone: isolated atoms have exactly their own energies."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from almlip_jax.models.base import AtomicOutput, Geometry, Model, Params, Survey
from almlip_jax.models.species_code import exact_code
from almlip_jax.structures.graph import Graph, lone_atoms
from almlip_jax.structures.species import SpeciesTable


@dataclass(frozen=True)
class Anchored:
    """A model minus its own value for the isolated atom of some elements.

    Their reference energies then are those of isolated atoms, and what is left to the model is what binds them.
    Features are shifted alike, so that the last layer stays linear in them.

    Attributes:
        inner: the model underneath.
        isolated: atomic numbers of these elements, in increasing order.
    """

    inner: Model
    isolated: tuple[int, ...]

    @property
    def cutoff(self) -> float:
        """Angstrom."""
        return self.inner.cutoff

    @property
    def species(self) -> SpeciesTable:
        """The species table."""
        return self.inner.species

    @property
    def num_species(self) -> int:
        """Length of the species table."""
        return self.inner.num_species

    @property
    def small_members(self) -> bool:
        """As for the model underneath."""
        return self.inner.small_members

    def geometry(self, graph: Graph) -> Geometry:
        """That of the model underneath."""
        return self.inner.geometry(graph)

    def init(self, key: Params) -> Params:
        """Fresh parameters of the model underneath."""
        return self.inner.init(key)

    def survey(self, graph: Graph) -> Survey:
        """That of the model underneath."""
        return self.inner.survey(graph)

    def standardise(self, params: Params, survey: Survey, energy_scale: float) -> Params:
        """That of the model underneath."""
        return self.inner.standardise(params, survey, energy_scale)

    def with_species(self, params: Params, fresh: Params, wanted: SpeciesTable) -> Params:
        """That of the model underneath."""
        return self.inner.with_species(params, fresh, wanted)

    def apply(self, params: Params, geometry: Geometry, graph: Graph) -> AtomicOutput:
        """Energies and features of the model underneath, minus those of the isolated atoms."""
        output = self.inner.apply(params, geometry, graph)
        lone = lone_atoms(self.num_species, output.energy.dtype)
        alone = self.inner.apply(params, self.inner.geometry(lone), lone)
        code = exact_code(graph, self.species, output.energy.dtype)
        code = code * jnp.asarray(np.isin(self.species.numbers, self.isolated), code.dtype)
        return AtomicOutput(output.energy - code @ alone.energy, output.features - code @ alone.features)
