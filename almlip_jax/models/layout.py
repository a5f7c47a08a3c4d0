"""Taking arrays apart and putting them together, in ways whose derivatives are the same two operations.

Differentiation turns a slice into a padded array and a sum of slices into a sum of padded arrays.  Here the derivative
of taking apart is putting together, and the reverse, at every order.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def unstack(values: jax.Array, axis: int) -> tuple[jax.Array, ...]:
    """The slices of an array along an axis, without that axis."""
    return tuple(jax.lax.index_in_dim(values, n, axis, keepdims=False) for n in range(values.shape[axis]))


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


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def split(values: jax.Array, sizes: tuple[int, ...]) -> tuple[jax.Array, ...]:
    """Consecutive parts of an array along its first axis."""
    ends = np.cumsum(sizes).tolist()
    return tuple(values[end - size : end] for end, size in zip(ends, sizes, strict=True))


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def join(parts: tuple[jax.Array, ...], sizes: tuple[int, ...]) -> jax.Array:
    """Arrays one after the other along their first axis; the inverse of `split`."""
    return jnp.concatenate(parts)


split.defvjp(
    lambda values, sizes: (split(values, sizes), None),
    lambda sizes, _, cotangent: (join(cotangent, sizes),),
)
join.defvjp(
    lambda parts, sizes: (join(parts, sizes), None),
    lambda sizes, _, cotangent: (split(cotangent, sizes),),
)
