"""Taking arrays apart and putting them together, in ways whose derivatives are the same two operations.

Differentiation turns a slice into a padded array and a sum of slices into a sum of padded arrays.  Here the derivative
of taking apart is putting together, and the reverse, at every order.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def unstack(values: jax.Array, axis: int) -> tuple[jax.Array, ...]:
    """The slices of an array along an axis, without that axis."""
    return tuple(jnp.unstack(values, axis=axis))


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def stack(parts: tuple[jax.Array, ...], axis: int) -> jax.Array:
    """Arrays of equal shape side by side along a new axis."""
    return jnp.stack(parts, axis)


unstack.defvjp(
    lambda values, axis: (unstack(values, axis), None),
    lambda axis, _, cotangent: (stack(cotangent, axis),),
)
stack.defvjp(
    lambda parts, axis: (stack(parts, axis), None),
    lambda axis, _, cotangent: (unstack(cotangent, axis),),
)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def split(values: jax.Array, sizes: tuple[int, ...], axis: int) -> tuple[jax.Array, ...]:
    """Consecutive parts of an array along an axis."""
    ends = np.cumsum(sizes).tolist()
    return tuple(
        jax.lax.slice_in_dim(values, end - size, end, axis=axis) for end, size in zip(ends, sizes, strict=True)
    )


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def join(parts: tuple[jax.Array, ...], sizes: tuple[int, ...], axis: int) -> jax.Array:
    """Arrays one after the other along an axis; the inverse of `split`."""
    return jnp.concatenate(parts, axis)


split.defvjp(
    lambda values, sizes, axis: (split(values, sizes, axis), None),
    lambda sizes, axis, _, cotangent: (join(cotangent, sizes, axis),),
)
join.defvjp(
    lambda parts, sizes, axis: (join(parts, sizes, axis), None),
    lambda sizes, axis, _, cotangent: (split(cotangent, sizes, axis),),
)


def side_by_side(parts: Sequence[jax.Array]) -> jax.Array:
    """Arrays one after the other along their last axis."""
    return join(tuple(parts), tuple(part.shape[-1] for part in parts), -1)
