"""Models whose energy is linear in some of their parameters and depends otherwise on a few others alone.

Their linear parameters follow from least squares wherever the others stand, so that a fit has to search for the few
(`training.projection`).  It asks for derivatives by every parameter, of energies and of their derivatives by the edges.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import jax
from flax import struct

from almlip_jax.models.base import Params
from almlip_jax.structures.graph import Graph


@struct.dataclass
class Derivatives:
    """Derivatives by parameters, on the last axis: the linear ones [N], then the others [P].

    Attributes:
        energy: [A, N + P] of the energy of each atom; padding atoms: any finite number.
        edges: [A, K, 3, N + P] of its derivative by the vector of each edge, 1/Angstrom; 0 in padding slots.
    """

    energy: jax.Array
    edges: jax.Array


@runtime_checkable
class Separable(Protocol):
    """What such a model can do besides what every `Model` does."""

    def separate(self, params: Params) -> tuple[jax.Array, jax.Array]:
        """The linear parameters [N] and the others [P] of one model."""
        ...

    def put_together(self, params: Params, linear: jax.Array, others: jax.Array) -> Params:
        """Parameters with other values of these, and with the constants of the given ones."""
        ...

    def derivatives(self, params: Params, graph: Graph) -> Derivatives:
        """Derivatives by all parameters."""
        ...
