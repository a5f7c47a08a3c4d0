"""Products of matrices in the precision of their numbers, on every device.

GPUs multiply float32 matrices with 10 bits of mantissa (TF32) and TPUs with 7 (bfloat16) unless a program asks for
more: edges across a periodic boundary would be wrong by hundredths of an Angstrom, forces by parts of a thousand, and
determinants of nearly equal candidates would mean nothing.  What this package compiles asks for more.  If you want
less, say so by jax's own means (``JAX_DEFAULT_MATMUL_PRECISION``), which is left as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax

P = ParamSpec("P")
R = TypeVar("R")


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """The function, traced or called so that matrices are multiplied in the precision of their numbers."""

    @functools.wraps(function)
    def exact(*args: P.args, **kwargs: P.kwargs) -> R:
        chosen = getattr(jax.config, "jax_default_matmul_precision", None)
        with jax.default_matmul_precision(chosen or "highest"):
            return function(*args, **kwargs)

    return exact
