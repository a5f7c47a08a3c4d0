"""What models that wrap another model leave to it."""

from __future__ import annotations

from dataclasses import dataclass

import jax

from almlip_jax.models.base import Geometry, LastLayer, LinearLast, Model, Params, Survey, silent_last
from almlip_jax.structures.graph import Graph
from almlip_jax.structures.species import SpeciesTable


@dataclass(frozen=True)
class Around(LinearLast):
    """A model with the parameters and the reach of another one; subclasses say what comes to its energies.

    Attributes:
        inner: the model underneath.
    """

    inner: Model

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
    def targets(self) -> tuple[str, ...]:
        """As for the model underneath."""
        given: tuple[str, ...] = getattr(self.inner, "targets", ())  # models of users need not say so
        return given

    @property
    def small_members(self) -> bool:
        """As for the model underneath."""
        return self.inner.small_members

    @property
    def sees_state(self) -> bool:
        """As for the model underneath."""
        sees: bool = getattr(self.inner, "sees_state", False)
        return sees

    @property
    def constant_alone(self) -> bool:
        """As for the model underneath."""
        constant: bool = getattr(self.inner, "constant_alone", False)
        return constant

    @property
    def long_range(self) -> bool:
        """As for the model underneath."""
        return self.inner.long_range

    @property
    def local(self) -> bool:
        """As for the model underneath."""
        return self.inner.local

    def geometry(self, graph: Graph) -> Geometry:
        """That of the model underneath."""
        return self.inner.geometry(graph)

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters of the model underneath."""
        return self.inner.init(key)

    def survey(self, graph: Graph) -> Survey:
        """That of the model underneath."""
        return self.inner.survey(graph)

    def standardise(self, params: Params, survey: Survey, energy_scale: float) -> Params:
        """That of the model underneath."""
        return self.inner.standardise(params, survey, energy_scale)

    def last_scale(self, params: Params) -> jax.Array:
        """That of the model underneath."""
        return self.inner.last_scale(params)

    def last(self, params: Params) -> LastLayer:
        """That of the model underneath."""
        if not isinstance(self.inner, LinearLast):  # of a user's own, which need not say
            raise silent_last(self.inner)
        return self.inner.last(params)

    def with_species(self, params: Params, fresh: Params, wanted: SpeciesTable) -> Params:
        """That of the model underneath."""
        return self.inner.with_species(params, fresh, wanted)
