"""Square distances between rows: to one row by a matrix-vector product, to a whole set in blocks."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from almlip_jax.selection.rows import Rows

_ENTRIES = 2**24  # of a block of distances


class Points(NamedTuple):
    """Candidates as points.

    Attributes:
        x: [n, d], seen from the mean of the candidates: distances are the same, and lose fewer digits.
        norms: [n] square norms of x.
        usable: [n] bool, which rows are candidates.
    """

    x: jax.Array
    norms: jax.Array
    usable: jax.Array


class Nearest(NamedTuple):
    """How far candidates are from everything labelled or chosen.

    Attributes:
        square: [n] square distance to the nearest; at first, without anything labelled, the square norm.
        owner: [n] int, which one that is: rows of the labelled set, then choices in their order.
        number: of labelled rows and choices so far (padding of the labelled set included).
        fresh: the squares are norms still.
    """

    square: jax.Array
    owner: jax.Array
    number: jax.Array
    fresh: jax.Array


def start(rows: Rows) -> tuple[Points, Nearest]:
    """Distances to the labelled set."""
    raw = jnp.sum(rows.x**2, axis=1)
    mean = jnp.sum(rows.x, axis=0) / jnp.maximum(jnp.sum(rows.usable), 1)
    x = jnp.where(rows.usable[:, None], rows.x - mean, 0)
    points = Points(x, jnp.sum(x**2, axis=1), rows.usable)
    square, owner = _to_set(points, rows.known - mean, rows.counts)
    fresh = ~jnp.any(rows.counts)
    number = jnp.asarray(rows.known.shape[0], jnp.int32)
    return points, Nearest(jnp.where(fresh, raw, square), owner, number, fresh)


def update(points: Points, nearest: Nearest, row: jax.Array) -> Nearest:
    """Distances after a row was chosen, by one matrix-vector product."""
    square = squares(points, points.x[row]).at[row].set(0)
    closer = nearest.fresh | (square < nearest.square)
    return Nearest(
        square=jnp.where(closer, square, nearest.square),
        owner=jnp.where(closer, nearest.number, nearest.owner),
        number=nearest.number + 1,
        fresh=jnp.zeros((), bool),
    )


def squares(points: Points, centre: jax.Array) -> jax.Array:
    """Square distances [n] of points from a centre [d]; 0 where they are no more than rounding."""
    return _without_rounding(points.norms, jnp.sum(centre**2), points.x @ centre)


def _without_rounding(norms: jax.Array, norm: jax.Array, products: jax.Array) -> jax.Array:
    square, reach = norms + norm - 2 * products, norms + norm
    return jnp.where(square > 16 * jnp.finfo(norms.dtype).eps * reach, square, 0)


def _to_set(points: Points, known: jax.Array, counts: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Square distance [n] to the nearest row of a set [t, d] and which row that is; infinite where there is none."""
    n, t = points.x.shape[0], known.shape[0]
    found = jnp.full((n,), jnp.inf, points.x.dtype), jnp.zeros((n,), jnp.int32)
    if t == 0:
        return found
    size = max(min(_ENTRIES // max(n, 1), t), 1)
    blocks = -(-t // size)
    known = jnp.pad(known, ((0, blocks * size - t), (0, 0))).reshape(blocks, size, -1)
    counts = jnp.pad(counts, (0, blocks * size - t)).reshape(blocks, size)

    def look(found: tuple[jax.Array, jax.Array], block: tuple) -> tuple[tuple[jax.Array, jax.Array], None]:
        first, rows, there = block
        norms = jnp.sum(rows**2, axis=1)
        square = _without_rounding(points.norms[:, None], norms[None, :], points.x @ rows.T)
        square = jnp.where(there, square, jnp.inf)
        which = jnp.argmin(square, axis=1).astype(jnp.int32)
        least = jnp.min(square, axis=1)
        closer = least < found[0]
        return (jnp.where(closer, least, found[0]), jnp.where(closer, first + which, found[1])), None

    starts = size * jnp.arange(blocks, dtype=jnp.int32)
    return jax.lax.scan(look, found, (starts, known, counts))[0]
