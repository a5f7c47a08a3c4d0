"""Named random streams: every random number of a run comes from its one seed through a path of names.

The path, not the order of calls, decides the stream, so that a resumed or reordered run draws the same numbers.
"""

from __future__ import annotations

import hashlib

import jax
import numpy as np


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
