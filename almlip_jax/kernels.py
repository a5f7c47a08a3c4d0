"""Linear kernels as maps of their feature rows: scaling, posterior, sum over models.

A kernel ``k(a, b) = phi(a)^T phi(b)`` is changed by changing the rows phi: every function here is pure, jittable, and
works row by row on any precision.  What is only d x d, and has to be factorised, is kept in the widest precision that
JAX has at hand.  Source: Holzmueller et al., J. Mach. Learn. Res. 24, 164 (2023), section 4.2.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from almlip_jax.precision import full_precision

_BLOCK = 4096  # rows that are widened at a time
_ROUNDING = 4.0  # square noise below that many times the rounding of the training rows' power would leave no factor


def ensemble_sum(features: jax.Array) -> jax.Array:
    """Rows of the mean of the kernels of M models: theirs side by side, over sqrt(M).

    Args:
        features: [M, n, d].

    Returns:
        [n, M * d].
    """
    return jnp.moveaxis(features, 0, 1).reshape(features.shape[1], -1) / jnp.sqrt(features.shape[0])


def unit_diagonal(rows: jax.Array, known: jax.Array, counts: jax.Array, usable: jax.Array | None = None) -> jax.Array:
    """Factor that gives the training rows a mean square norm of 1; the rows themselves, where these have none.

    Training rows that are all zero set no scale, as if there were none; the factor is 1 where all rows are zero.

    Args:
        rows: [n, d] candidates.
        known: [t, d] training rows.
        counts: [t] bool, which of them count; the others hold zeros.
        usable: [n] bool, likewise for the candidates; all by default.

    Returns:
        [], to be multiplied with rows of both kinds.
    """
    least = jnp.finfo(rows.dtype).tiny
    candidates = rows.shape[0] if usable is None else jnp.sum(usable)
    of_known = jnp.sum(known**2) / jnp.maximum(jnp.sum(counts), 1)
    power = jnp.where(of_known > least, of_known, jnp.sum(rows**2) / jnp.maximum(candidates, 1))
    return jnp.where(power > least, jax.lax.rsqrt(jnp.maximum(power, least)), 1)


@full_precision
def information_factor(known: jax.Array, sigma: float, scale: jax.Array | float = 1.0) -> tuple[jax.Array, jax.Array]:
    """The matrix that takes rows phi to ``scale phi L^-T``, and the noise that it was made with.

    ``L L^T = scale^2 Phi^T Phi + noise^2 I`` over the training rows Phi.  The noise is sigma, or where rounding would
    hide that (many rows that lie in few directions) the least that does not: ``2 sqrt(eps tr(scale^2 Phi^T Phi))``.

    Args:
        known: [t, d] training rows; zeros do not count.
        sigma: standard deviation of the noise.
        scale: multiplied with all rows beforehand.

    Returns:
        [d, d] in the widest precision there is, and [].
    """
    scale = jnp.asarray(scale, wide())
    information = scale**2 * gram(known)
    least = _ROUNDING * jnp.finfo(information.dtype).eps * jnp.trace(information)
    square = jnp.maximum(jnp.asarray(sigma, wide()) ** 2, least)
    identity = jnp.eye(known.shape[1], dtype=wide())
    factor = jnp.linalg.cholesky(information + square * identity)
    return scale * jax.scipy.linalg.solve_triangular(factor, identity, lower=True).T, jnp.sqrt(square)


@full_precision
def posterior_map(known: jax.Array, sigma: float, scale: jax.Array | float = 1.0) -> jax.Array:
    """The matrix that takes rows phi to those of the posterior, ``scale phi -> sigma scale phi L^-T``.

    ``L L^T = scale^2 Phi^T Phi + sigma^2 I`` over the training rows Phi.  The square norm of a row is then the variance
    of a Bayesian linear regression with prior N(0, 1) and noise sigma, after the training rows have been seen.  Where
    rounding would hide sigma it is raised, see `information_factor`.

    Args:
        known: [t, d] training rows; zeros do not count.
        sigma: standard deviation of the noise.
        scale: multiplied with all rows beforehand.

    Returns:
        [d, d] in the widest precision there is.
    """
    made, noise = information_factor(known, sigma, scale)
    return noise * made


@full_precision
def posterior(rows: jax.Array, known: jax.Array, sigma: float) -> jax.Array:
    """Rows [n, d] of the posterior after training rows [t, d] were seen with noise sigma; see `posterior_map`."""
    return rows @ posterior_map(known, sigma).astype(rows.dtype)


@full_precision
def gram(rows: jax.Array) -> jax.Array:
    """``rows^T rows`` of rows [n, d], summed in the widest precision there is, a block of them at a time: [d, d]."""

    def add(total: jax.Array, block: jax.Array) -> jax.Array:
        block = block.astype(wide())
        return total + block.T @ block

    full = rows.shape[0] // _BLOCK
    total = jnp.zeros((rows.shape[1], rows.shape[1]), wide())
    if full:
        total = jax.lax.fori_loop(
            0, full, lambda n, so_far: add(so_far, jax.lax.dynamic_slice_in_dim(rows, n * _BLOCK, _BLOCK)), total
        )
    return add(total, rows[full * _BLOCK :]) if rows.shape[0] % _BLOCK else total


def wide() -> Any:
    """The widest precision there is: float64 where JAX allows it."""
    return jax.dtypes.canonicalize_dtype(np.float64)
