"""The compiled programs of explorations: equal loops share theirs, whichever explorer they belong to."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import lru_cache
from types import MethodType
from typing import Any, NamedTuple

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


def traced_once(evaluate: Evaluate) -> Evaluate:
    """The ensemble, in blocks and gathered from all devices, traced once for the first evaluation and the loop.

    Methods of equal ensembles are one: each potential makes an ensemble of its own, and methods themselves are equal
    only where they are of the same object.
    """
    if isinstance(evaluate, MethodType) and isinstance(evaluate.__self__, Hashable):
        return _traced_once(evaluate.__func__, evaluate.__self__)
    return _traced_once(evaluate)


@lru_cache(maxsize=_REMEMBERED)
def _traced_once(function: Callable[..., Any], *owner: Any) -> Evaluate:
    evaluate = MethodType(function, *owner) if owner else function
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
