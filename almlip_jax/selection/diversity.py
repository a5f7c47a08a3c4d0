"""Batch selectors on features, with the labelled set as context: farthest points and greedy D-optimality."""

from __future__ import annotations

from typing import TypeAlias

import jax
import jax.numpy as jnp

from almlip_jax.selection.base import Candidates, Selection, Selector
from almlip_jax.selection.scores import column

_Carry: TypeAlias = tuple[jax.Array, jax.Array, jax.Array]


def max_dist(k: int, features: str = "last_layer_gradient") -> Selector:
    """Farthest-point sampling: each choice is the candidate farthest from everything labelled or chosen before.

    Without labelled structures the first choice is the candidate of largest norm.  ``gain`` is the distance (of the
    first choice, without context, the norm).  Source: Sener and Savarese, ICLR 2018 (core-set, greedy k-center).
    """

    def select(key: jax.Array, pool: Candidates, labelled: Candidates) -> Selection:
        order, x, usable = _in_order_of_id(pool, features)
        known, there_already = _context(labelled, features)
        norms = jnp.sum(x**2, axis=1)
        to_known = norms[:, None] + jnp.sum(known**2, axis=1)[None, :] - 2 * x @ known.T
        nearest = jnp.min(jnp.where(there_already[None, :], to_known, jnp.inf), axis=1, initial=jnp.inf)
        start = jnp.where(jnp.any(there_already), nearest, norms)

        def step(carry: _Carry, _: None) -> tuple[_Carry, _Carry]:
            gain, free, first = carry
            row = _argmax(gain, free)
            distance = jnp.maximum(norms + norms[row] - 2 * x @ x[row], 0)
            reset = first & ~jnp.any(there_already)  # the first choice's rank was by norm, the others' is by distance
            left = jnp.where(reset, distance, jnp.minimum(gain, distance))
            found = (row, jnp.any(free), jnp.sqrt(jnp.maximum(gain[row], 0)))
            return (left, free.at[row].set(False), jnp.zeros((), bool)), found

        _, (rows, there, gain) = jax.lax.scan(step, (start, usable, jnp.ones((), bool)), None, length=k)
        return Selection(indices=order[rows], valid=there, gain=jnp.where(there, gain, jnp.nan))

    return select


def max_det(k: int, features: str = "last_layer_gradient", sigma: float = 1e-2) -> Selector:
    """Greedy D-optimal design: each choice adds most to ``log det(Phi^T Phi + sigma^2 I)`` over labelled and chosen.

    Features are scaled to a mean square norm of 1 over the labelled set (over the pool, without one).  With the inverse
    C of the regularised information matrix of the labelled set, the gain of a candidate is
    ``log(1 + phi^T C phi)``; after each choice a pivoted-Cholesky step brings the gains of all candidates up to date at
    the cost of one matrix-vector product.  ``gain`` is that of each choice when it was made, in nats.

    The information matrix is inverted: use float64 (`selection.select` does).  Sources: Holzmueller et al., J. Mach.
    Learn. Res. 24, 164 (2023), section 5 (MaxDet with the posterior transformation); Wynn, Ann. Math. Stat. 41, 1655.

    Args:
        k: number of choices.
        features: which features.
        sigma: regularisation, relative to the scaled features.
    """

    def select(key: jax.Array, pool: Candidates, labelled: Candidates) -> Selection:
        order, x, usable = _in_order_of_id(pool, features)
        known, there_already = _context(labelled, features)
        number = jnp.sum(there_already)
        power = jnp.where(
            number > 0, jnp.sum(known**2) / jnp.maximum(number, 1), jnp.sum(x**2) / jnp.maximum(jnp.sum(usable), 1)
        )
        scale = jax.lax.rsqrt(jnp.maximum(power, jnp.finfo(x.dtype).tiny))
        x, known = scale * x, scale * known
        information = known.T @ known + sigma**2 * jnp.eye(x.shape[1], dtype=x.dtype)
        factor = jnp.linalg.cholesky(information)
        # rows of the posterior: phi^T C psi is the scalar product of two of them
        posterior = jax.scipy.linalg.solve_triangular(factor, x.T, lower=True).T
        variance = jnp.sum(posterior**2, axis=1)
        columns = jnp.zeros((k, x.shape[0]), x.dtype)

        def step(n: jax.Array, carry: tuple) -> tuple:
            variance, free, columns, rows, there, gain = carry
            row = _argmax(variance, free)
            pivot = jnp.maximum(variance[row], 0)
            covariance = posterior @ posterior[row] - columns.T @ columns[:, row]
            column = covariance * jax.lax.rsqrt(1 + pivot)
            return (
                variance - column**2,
                free.at[row].set(False),
                columns.at[n].set(column),
                rows.at[n].set(row),
                there.at[n].set(jnp.any(free)),
                gain.at[n].set(jnp.log1p(pivot)),
            )

        blank = (jnp.zeros((k,), jnp.int32), jnp.zeros((k,), bool), jnp.zeros((k,), x.dtype))
        *_, rows, there, gain = jax.lax.fori_loop(0, k, step, (variance, usable, columns, *blank))
        return Selection(indices=order[rows], valid=there, gain=jnp.where(there, gain, jnp.nan))

    return select


def _in_order_of_id(pool: Candidates, features: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rows of a pool with the candidates first and by id, their features (0 elsewhere), and which are candidates.

    In that order the smallest id comes first among equals, and rounding is the same however the pool was ordered.
    Features that are not finite cannot be judged: such a row is no candidate, and does not spoil the others.
    """
    x = column(pool.features, features, "features")
    usable = pool.valid & jnp.all(jnp.isfinite(x), axis=1)
    order = jnp.lexsort((pool.id, ~usable)).astype(jnp.int32)
    return order, jnp.where(usable[:, None], x, 0)[order], usable[order]


def _context(labelled: Candidates, features: str) -> tuple[jax.Array, jax.Array]:
    """Features of the labelled set (0 in rows that do not count), and which rows count."""
    known = column(labelled.features, features, "features")
    counts = labelled.valid & jnp.all(jnp.isfinite(known), axis=1)
    return jnp.where(counts[:, None], known, 0), counts


def _argmax(values: jax.Array, free: jax.Array) -> jax.Array:
    """First row of the largest value among the free ones."""
    return jnp.argmax(jnp.where(free, values, -jnp.inf)).astype(jnp.int32)
