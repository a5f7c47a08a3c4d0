"""Named random streams: every random number of a run comes from its one seed through a path of names.

The path, not the order of calls, decides the stream, so that a resumed or reordered run draws the same numbers.
"""

from __future__ import annotations

import hashlib
import math
from typing import Final

import jax
import numpy as np
from jax.extend.random import define_prng_impl, threefry_prng_impl


def _digest(names: tuple[str | int, ...]) -> bytes:
    return hashlib.sha256("\x1f".join(str(name) for name in names).encode()).digest()


def named_key(seed: int, *names: str | int) -> jax.Array:
    """The jax random key of the stream ``names`` (for example ``named_key(0, "explore", 3)``) under a seed."""
    return named_stream(jax.random.key(seed), *names)


def named_stream(key: jax.Array, *names: str | int) -> jax.Array:
    """The random key of the stream ``names`` under another key.

    A key is either split, once, or given to named streams: `jax.random.split` and `jax.random.fold_in` of one key by
    small numbers are the same keys.
    """
    return jax.random.fold_in(key, int.from_bytes(_digest(names)[:4], "little"))


def numpy_generator(seed: int, *names: str | int) -> np.random.Generator:
    """The numpy generator of the stream ``names`` under a seed."""
    return np.random.default_rng([seed, *np.frombuffer(_digest(names), dtype=np.uint32).tolist()])


def _bits_in_a_row(key: jax.Array, width: int, shape: tuple[int, ...]) -> jax.Array:
    return threefry_prng_impl.random_bits(key, width, (math.prod(shape),)).reshape(shape)


_IN_A_ROW: Final = define_prng_impl(
    key_shape=threefry_prng_impl.key_shape,
    seed=threefry_prng_impl.seed,
    split=threefry_prng_impl.split,
    random_bits=_bits_in_a_row,
    fold_in=threefry_prng_impl.fold_in,
    name="threefry2x32_in_a_row",
    tag="row",
)


def in_a_row(keys: jax.Array) -> jax.Array:
    """Keys of the same streams whose arrays are drawn as a row of numbers, and given their shape afterwards.

    The numbers are the same.  jax counts the elements of an array along each of its axes, and such counts take the
    compiler for CPUs seconds: 5 s for arrays [72, 12] of four keys, 0.4 s for rows.  Keys of other generators than
    jax's own come back as they are.
    """
    if jax.random.key_impl(keys) != "threefry2x32":
        return keys
    return jax.random.wrap_key_data(jax.random.key_data(keys), impl=_IN_A_ROW)
