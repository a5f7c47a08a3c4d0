"""Arrays that the compiler may not compute again inside every operation that reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from almlip_jax.compilation import backend


def materialised(function: Callable[..., Any], condition: jax.Array, *operands: Any) -> Any:
    """What a function gives for some operands, as arrays of their own where the backend is a CPU.

    XLA's CPU compiler merges cheap operations into each of their users, where they are computed again: once for every
    member that reads them, and inside loops that then are no longer vectorised.  What goes in and out of a condition
    are arrays of their own.

    Args:
        function: pure; returns a pytree of arrays.
        condition: bool scalar that the compiler cannot know.  Where it is false the result is zero.
        operands: pytrees of arrays.
    """
    if backend() != "cpu":  # elsewhere a condition waits for the host, and operations are merged well
        return function(*operands)
    shapes = jax.eval_shape(function, *operands)

    def nothing(*_: Any) -> Any:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    return jax.lax.cond(condition, function, nothing, *operands)
