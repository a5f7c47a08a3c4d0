"""What a model is to the rest of the package: geometry without parameters, then per-atom energies and features."""

from __future__ import annotations

from typing import Annotated, Any, Protocol, TypeAlias

import jax
from flax import struct
from pydantic import Field

from almlip_jax.structures.graph import Graph
from almlip_jax.structures.species import SpeciesTable

Width = Annotated[int, Field(ge=1, le=4096)]
"""Of a layer of an MLP."""

Params: TypeAlias = Any
"""A pytree of parameter arrays; with a leading member axis it belongs to an ensemble."""

Geometry: TypeAlias = Any
"""A pytree of arrays that a model derives from a graph without using a parameter."""


@struct.dataclass
class AtomicOutput:
    """What a model says of each atom.

    Attributes:
        energy: [A] eV, contribution of each atom relative to its reference energy (padding atoms: any finite number).
        features: [A, F] invariant features: the inputs of the last, linear layer.
    """

    energy: jax.Array
    features: jax.Array


class Model(Protocol):
    """A graph goes in, per-atom energies and features come out; pure functions throughout.

    `geometry` depends on no parameter.  An ensemble therefore computes it once for all of its members, and in the
    backward pass each member pays only for its transposed map.
    """

    @property
    def cutoff(self) -> float:
        """Angstrom; edges beyond it do not exist."""
        ...

    @property
    def species(self) -> SpeciesTable:
        """The elements it knows."""
        ...

    @property
    def num_species(self) -> int:
        """Length of the species table."""
        ...

    @property
    def small_members(self) -> bool:
        """Whether parameters act only on what has been summed over neighbours, so that a member's arrays are small."""
        ...

    def geometry(self, graph: Graph) -> Geometry:
        """Differentiable functions of ``graph.vectors`` that hold no parameter."""
        ...

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters of one model, for densities and energies of order one."""
        ...

    def standardise(self, params: Params, sample: Graph, energy_scale: float) -> Params:
        """The parameters with their constants set from data: training does not change them again.

        Args:
            params: of one model.
            sample: typical structures; inputs are scaled to order one on them.
            energy_scale: eV, by how much the energy of an atom varies.
        """
        ...

    def with_species(self, params: Params, fresh: Params, wanted: SpeciesTable) -> Params:
        """Parameters for more species that say of the old ones what they said before.

        Args:
            params: of one model.
            fresh: parameters of the same architecture for ``wanted``: what new species begin with.
            wanted: species table that holds all of the old ones.

        Raises:
            InputError: a species would be lost, or so many cannot be told apart as the old ones are.
        """
        ...

    def apply(self, params: Params, geometry: Geometry, graph: Graph) -> AtomicOutput:
        """Energies and features from the geometry; must not read ``graph.vectors``."""
        ...
