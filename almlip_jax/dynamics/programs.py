"""The compiled programs of explorations: equal loops share theirs, whichever explorer they belong to."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import jax

from almlip_jax.dynamics.loop import Evaluate, Loop
from almlip_jax.dynamics.state import State, Traces
from almlip_jax.ensembles import blocked, gathered
from almlip_jax.errors import InputError
from almlip_jax.precision import full_precision

_REMEMBERED = 16  # loops; a campaign has two, or four where elements come to have thresholds of their own


class Programs(NamedTuple):
    """`Loop.begin` and `Loop.run_chunk`, compiled once for each shape of their arrays."""

    begin: Callable[..., State]
    run_chunk: Callable[..., tuple[State, Traces]]


@lru_cache(maxsize=_REMEMBERED)
def traced_once(evaluate: Evaluate) -> Evaluate:
    """The ensemble, in blocks and gathered from all devices, traced once for the first evaluation and the loop."""
    return jax.jit(full_precision(gathered(blocked(evaluate))))


def programs(loop: Loop) -> Programs:
    """The programs of a loop, or of an equal one before it.

    Raises:
        InputError: a part of a user's own cannot be compared with others.
    """
    try:
        return _programs(loop)
    except TypeError as error:
        raise InputError(
            f"what a user's function returns must be hashable ({error}); make it a frozen dataclass whose fields are "
            "hashable, or leave fields out of comparisons."
        ) from error


@lru_cache(maxsize=_REMEMBERED)
def _programs(loop: Loop) -> Programs:
    return Programs(jax.jit(full_precision(loop.begin)), jax.jit(full_precision(loop.run_chunk)))
