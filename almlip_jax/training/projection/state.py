"""Where a training by projection stands, and that as arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

import numpy as np

from almlip_jax.training.projection.algebra import solve
from almlip_jax.training.projection.search import Search

TRIAL, ALONE, MEMBERS = range(3)
"""Parts of a training: searches from several starts, the best of them alone, and the members by themselves."""


@dataclass(frozen=True)
class State:
    """Where a training stands.

    Attributes:
        searches: C of them.
        origins: [C] with the constants of which of the first parameters each goes.
        part: `TRIAL`, `ALONE` or `MEMBERS`.
        step: passes over the data so far.
        best: [L, N + P] linear and other parameters of each model that validated best.
        best_origins: [L] like ``origins``.
        best_loss: [L] their validation loss.
        waited: [L] validations since then.
        stopped: [L] models that have ended.
    """

    searches: tuple[Search, ...]
    origins: np.ndarray
    part: int
    step: int
    best: np.ndarray
    best_origins: np.ndarray
    best_loss: np.ndarray
    waited: np.ndarray
    stopped: np.ndarray

    @property
    def linear(self) -> int:
        """Number N of linear parameters."""
        return len(self.searches[0].point.linear)


_OF_SEARCH: Final = ("others", "factor", "scale", "damping", "growth", "waited", "exact", "stale", "active")
_OF_STATE: Final = tuple(one.name for one in fields(State) if one.name != "searches")


def leaves(state: State) -> list[np.ndarray]:
    """All that a state holds; points follow from the factors."""
    own = [np.asarray(getattr(state, name)) for name in _OF_STATE]
    return own + [np.stack([np.asarray(getattr(one, name)) for one in state.searches]) for name in _OF_SEARCH]


def restored(arrays: Sequence[np.ndarray], linear: int, ridge: float) -> State:
    """The state that `leaves` gave these for."""
    own: dict[str, Any] = dict(zip(_OF_STATE, arrays, strict=False))
    columns = dict(zip(_OF_SEARCH, arrays[len(_OF_STATE) :], strict=True))
    searches = tuple(
        Search(
            point=solve(columns["factor"][n], linear, ridge),
            **{name: column[n] if column.ndim > 1 else column[n].item() for name, column in columns.items()},
        )
        for n in range(len(columns["others"]))
    )
    own |= {name: int(own[name]) for name in ("part", "step")}
    return State(searches, **own)
