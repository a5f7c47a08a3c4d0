"""What selectors share: rows in order of their id, the labelled context, the best row, a random row."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from almlip_jax.kernels import wide
from almlip_jax.selection.base import Candidates
from almlip_jax.selection.scores import column

_TIES = {4: 1e-6, 8: 1e-9}  # bytes of a number -> values that differ by less, relative to the best, are equal


@struct.dataclass
class Rows:
    """A pool in order of id and its context, with zeros where a row does not count.

    Attributes:
        x: [n, d] features of the candidates.
        usable: [n] bool, which rows are candidates; they come first.
        score: [n] their score, where a selector asks for one.
        cost: [n] price of their labels.
        known: [t, d] features of the labelled set.
        counts: [t] bool, which of them are labelled structures.
    """

    x: jax.Array
    usable: jax.Array
    score: jax.Array
    cost: jax.Array
    known: jax.Array
    counts: jax.Array


def arrange(pool: Candidates, labelled: Candidates, features: str, score: str | None = None) -> tuple[jax.Array, Rows]:
    """Rows of a pool with the candidates first and by id, and the order [n] that they were taken in.

    In that order the smallest id comes first among equals, and rounding is the same however the pool was ordered.
    Features or a score that are not finite cannot be judged: such a row is not a candidate, and does not spoil the
    others.
    """
    x = column(pool.features, features, "features")
    usable = pool.valid & jnp.all(jnp.isfinite(x), axis=1)
    values = jnp.zeros(x.shape[:1], x.dtype)
    if score is not None:
        values = column(pool.scores, score, "score")
        usable = usable & jnp.isfinite(values)
    order = jnp.lexsort((pool.id, ~usable)).astype(jnp.int32)
    known, counts = context(labelled, features)
    rows = Rows(
        x=jnp.where(usable[:, None], x, 0)[order],
        usable=usable[order],
        score=jnp.where(usable, values, 0)[order],
        cost=pool.cost[order],
        known=known,
        counts=counts,
    )
    return order, rows


def context(labelled: Candidates, features: str) -> tuple[jax.Array, jax.Array]:
    """Features of the labelled set (0 in rows that do not count), and which rows count."""
    known = column(labelled.features, features, "features")
    counts = labelled.valid & jnp.all(jnp.isfinite(known), axis=1)
    return jnp.where(counts[:, None], known, 0), counts


def ties(values: jax.Array) -> float:
    """Relative difference below which values of their precision count as equal."""
    return _TIES[values.dtype.itemsize]


def first_best(values: jax.Array, free: jax.Array) -> jax.Array:
    """First row of the largest value among the free ones.

    Values that differ by rounding are equal: where in a matrix a row stands must not decide.  What is not a number
    comes last.
    """
    masked = jnp.where(free & ~jnp.isnan(values), values, -jnp.inf)
    best = jnp.max(masked)
    bound = best - jnp.where(jnp.isfinite(best), ties(values) * jnp.abs(best), 0)
    number = values.shape[0]
    first = jnp.min(jnp.where(free & (masked >= bound), jnp.arange(number, dtype=jnp.int32), number))
    return jnp.where(first < number, first, 0)  # a minimum is compiled to faster code than an argmax


def drawn(key: jax.Array, weights: jax.Array, free: jax.Array) -> jax.Array:
    """A free row at random, with probability proportional to its weight; any of them where all weights are zero."""
    weights = jnp.where(free, jnp.maximum(weights, 0), 0).astype(wide())
    weights = jnp.where(jnp.any(weights > 0), weights, free)
    below = jnp.cumsum(weights)
    row = jnp.searchsorted(below, jax.random.uniform(key, dtype=wide()) * below[-1], side="right")
    last = weights.shape[0] - 1 - jnp.argmax(weights[::-1] > 0)  # rounding must not lead beyond it
    return jnp.minimum(row, last).astype(jnp.int32)
