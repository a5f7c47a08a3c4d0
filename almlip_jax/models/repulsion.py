"""Repulsion of bare nuclei at short distances, added to any model."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from ase.data import covalent_radii
from ase.units import _e, _eps0
from flax import struct

from almlip_jax.models.around import Around
from almlip_jax.models.base import AtomicOutput, Geometry, Params
from almlip_jax.models.radial import polynomial_cutoff
from almlip_jax.structures.graph import Graph

_COULOMB = _e / (4 * np.pi * _eps0) * 1e10  # eV Angstrom, of two unit charges
_AMPLITUDES = (0.18175, 0.50986, 0.28022, 0.02817)
_EXPONENTS = (3.19980, 0.94229, 0.40290, 0.20162)
_CUTOFF_POWER = 6


def zbl_pair_energy(distance: jax.Array, first: jax.Array, second: jax.Array) -> jax.Array:
    """Screened Coulomb energy of two nuclei by Ziegler, Biersack and Littmark, eV.

    ``E = Z1 Z2 e^2 / (4 pi eps0 r) phi(r / a)`` with the universal screening function phi and the length
    ``a = 0.46850 / (Z1^0.23 + Z2^0.23)`` Angstrom.  Source: The Stopping and Range of Ions in Solids, Pergamon 1985.

    Args:
        distance: Angstrom, greater than 0.
        first: atomic numbers, float; shapes broadcast.
        second: atomic numbers, float.
    """
    length = 0.46850 / (first**0.23 + second**0.23)
    screening = sum(a * jnp.exp(-b * distance / length) for a, b in zip(_AMPLITUDES, _EXPONENTS, strict=True))
    return jnp.asarray(_COULOMB, distance.dtype) * first * second / distance * screening


@struct.dataclass
class RepulsionGeometry:
    """Geometry of the model underneath, and the repulsion energy of each atom, [A] eV."""

    inner: Geometry
    energy: jax.Array


@dataclass(frozen=True)
class WithRepulsion(Around):
    """A model plus the ZBL repulsion, which fades out smoothly at the sum of the covalent radii of a pair.

    The repulsion holds no parameter: the members of an ensemble share it.
    """

    def geometry(self, graph: Graph) -> RepulsionGeometry:
        """That of the model underneath, and the repulsion."""
        return RepulsionGeometry(self.inner.geometry(graph), self.alone(graph))

    def alone(self, graph: Graph) -> jax.Array:
        """The repulsion energy of each atom, [A] eV, in the precision of the graph's vectors."""
        dtype = graph.vectors.dtype
        charge = jnp.asarray(self.species.numbers, dtype)[graph.species]
        reach = jnp.asarray(covalent_radii[list(self.species.numbers)], dtype)[graph.species]
        reach = jnp.minimum(reach[:, None] + reach[graph.neighbors], self.cutoff)
        far = jnp.asarray([0.0, 0.0, self.cutoff], dtype)
        vectors = jnp.where(graph.edge_mask[..., None], graph.vectors, far)
        distance = jnp.sqrt(jnp.sum(vectors**2, axis=-1))
        pair = zbl_pair_energy(distance, charge[:, None], charge[graph.neighbors])
        pair = pair * polynomial_cutoff(distance, reach, _CUTOFF_POWER)
        return 0.5 * jnp.sum(jnp.where(graph.edge_mask, pair, 0), axis=1)

    def apply(self, params: Params, geometry: RepulsionGeometry, graph: Graph) -> AtomicOutput:
        """The energies of the model underneath plus the repulsion; its features."""
        output = self.inner.apply(params, geometry.inner, graph)
        return replace(output, energy=output.energy + geometry.energy)
