"""Seeded random projections that keep scalar products on average: of rows, and of products factor by factor.

Each row is projected on its own, with the same random numbers: the result does not depend on how rows are batched.
A column of the sketch of a matrix G is ``u^T G v`` with u, v ~ N(0, 1) (Holzmueller et al., J. Mach. Learn. Res. 24,
164 (2023), section 4.2.4): where G is a sum of products of factors, these are projected and G is never formed.
"""

from __future__ import annotations

from typing import TypeAlias

import jax
import jax.numpy as jnp

from almlip_jax.keys import in_a_row

Factors: TypeAlias = tuple[jax.Array, jax.Array]
"""Random factors u [..., p, m] and v [..., p, n] of the columns of a sketch."""

COLUMNS = 512
"""Columns p of a sketch: scalar products of matrices are off by at most sqrt(8 / p) = 0.125 of their scale."""


def sketch(features: jax.Array, key: jax.Array, size: int = COLUMNS) -> jax.Array:
    """Random projection of rows to p columns that keeps scalar products on average: phi R / sqrt(p), R ~ N(0, 1).

    Args:
        features: [n, d].
        key: decides R.
        size: p; features of at most this many columns are returned as they are.

    Returns:
        [n, min(d, p)].
    """
    if features.shape[-1] <= size:
        return features
    projection = jax.random.normal(in_a_row(key), (features.shape[-1], size), features.dtype)
    return features @ projection / jnp.sqrt(size)


def random_factors(key: jax.Array, shape: tuple[int, ...], size: int, dtype: jnp.dtype | type = jnp.float32) -> Factors:
    """Factors for the sketches of matrices [..., m, n], each with random numbers of its own."""
    *leading, rows, columns = shape
    left, right = in_a_row(jax.random.split(key))
    return (
        jax.random.normal(left, (*leading, size, rows), dtype),
        jax.random.normal(right, (*leading, size, columns), dtype),
    )


def sketch_matrices(matrices: jax.Array, factors: Factors) -> jax.Array:
    """The sketch of matrices [..., m, n] side by side as one vector: ``sum over ... of u^T G v / sqrt(p)``, [p].

    Scalar products of such sketches are on average those of the vectors of all elements of the matrices.
    """
    left, right = factors
    size = left.shape[-2]
    products = jnp.sum((left @ matrices) * right, axis=-1)
    return jnp.sum(products.reshape(-1, size), axis=0) / jnp.sqrt(size)
