"""From values of atoms to values of structures: mean, maximum, sum or quantile over the atoms of each."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp


def aggregate(
    values: jax.Array,
    structure: jax.Array,
    num_structures: int,
    mode: Literal["mean", "max", "sum", "quantile"] = "mean",
    *,
    mask: jax.Array | None = None,
    quantile: float = 0.9,
) -> jax.Array:
    """One value for each structure from those of its atoms.

    A value that is not a number stays visible in the structure it belongs to.

    Args:
        values: [A] or [A, C], columns apart.
        structure: [A] int, which structure an atom belongs to.
        num_structures: S, static.
        mode: mean, maximum, sum, or a quantile interpolated linearly between the two nearest atoms.
        mask: [A] bool, which atoms are real; all by default.
        quantile: between 0 and 1, of ``quantile``.

    Returns:
        [S] or [S, C]; 0 for a structure without atoms.
    """
    if values.ndim > 1:
        columns = jax.vmap(
            lambda one: aggregate(one, structure, num_structures, mode, mask=mask, quantile=quantile), 1, 1
        )
        return columns(values)
    real = jnp.ones(values.shape, bool) if mask is None else mask
    counts = jax.ops.segment_sum(real.astype(jnp.int32), structure, num_structures)
    if mode == "max":
        largest = jax.ops.segment_max(jnp.where(real, values, -jnp.inf), structure, num_structures)
        return jnp.where(counts > 0, largest, 0)
    total = jax.ops.segment_sum(jnp.where(real, values, 0), structure, num_structures)
    if mode == "sum":
        return total
    if mode == "mean":
        return total / jnp.maximum(counts, 1)
    order = jnp.lexsort((values, structure, ~real))
    first = jnp.cumsum(counts) - counts
    place = quantile * jnp.maximum(counts - 1, 0)
    below = jnp.floor(place).astype(jnp.int32)
    above = jnp.minimum(below + 1, jnp.maximum(counts - 1, 0))
    lower, upper = (values[order[jnp.minimum(first + one, values.shape[0] - 1)]] for one in (below, above))
    found = jnp.where(upper == lower, lower, lower + (place - below) * (upper - lower))
    return jnp.where(counts > 0, jnp.where(jnp.isnan(total), jnp.nan, found), 0)
