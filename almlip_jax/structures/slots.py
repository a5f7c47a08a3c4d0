"""Edges of walkers in slots, and the lattice of their cells: what every search for neighbours on the device returns."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import struct

from almlip_jax.precision import full_precision


@struct.dataclass
class Slots:
    """Edges of W walkers of N atoms each (padded), in K slots an atom.

    Attributes:
        neighbors: [W, N, K] int32, atom j within its walker (the atom itself in padding slots).
        shifts: [W, N, K, 3] int32, the edge vector is ``R_j + shift . cell - R_i``.
        mask: [W, N, K] bool, true where the slot holds an edge.
        reverse: [W, N, K] int32, slot at atom j that holds the opposite edge.
    """

    neighbors: jax.Array
    shifts: jax.Array
    mask: jax.Array
    reverse: jax.Array


@struct.dataclass
class Layout:
    """Where the atoms of W walkers of N atoms each are when their neighbours are searched for.

    Attributes:
        positions: [W, N, 3] Angstrom.
        cells: [W, 3, 3] Angstrom, rows are the cell vectors.
        pbc: [W, 3] bool.
        atom_mask: [W, N] bool, true for real atoms.
    """

    positions: jax.Array
    cells: jax.Array
    pbc: jax.Array
    atom_mask: jax.Array


@functools.partial(jax.jit, static_argnums=1)
@full_precision
def empty_slots(atom_mask: jax.Array, capacity: int) -> Slots:
    """No edge at all, of walkers with an atom mask [W, N]."""
    shape = (*atom_mask.shape, capacity)
    number = jnp.zeros(shape, jnp.int32)
    return Slots(number, jnp.zeros((*shape, 3), jnp.int32), jnp.zeros(shape, bool), number)


def periodic_and_dual(cells: jax.Array, pbc: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cell vectors of the periodic directions (zero elsewhere), and their dual vectors, both [..., 3, 3] in rows."""
    periodic = jnp.where(pbc[..., None], cells, 0)
    # Through their Gram matrix.  Sums are written out rather than matrix products, which some devices round to fewer
    # digits than float32 has.
    gram = jnp.sum(periodic[..., :, None, :] * periodic[..., None, :, :], axis=-1)
    gram = gram + jnp.eye(3, dtype=cells.dtype) * (1 - pbc.astype(cells.dtype))[..., None, :]
    inverse = jnp.linalg.inv(gram)
    return periodic, jnp.sum(inverse[..., None] * periodic[..., None, :, :], axis=-2)
