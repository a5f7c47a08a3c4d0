"""Gates: pure functions that look at the committee of each new frame and decide whether to go on, record or stop."""

from __future__ import annotations

from enum import IntEnum
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from almlip_jax.dynamics.seen import Observables, RunContext


class Decision(IntEnum):
    """What a gate decides on a frame."""

    GO_ON = 0
    RECORD = 1
    STOP = 2
    """The frame is recorded, and the walker ends."""
    LEAVE = 3
    """The walker ends, and the frame is not worth a label."""
    UNPHYSICAL = 4


class Gate(Protocol):
    """Looks at each new frame and decides whether a walker goes on, records or stops; see `dynamics.seen`.

    A walker that is over, that stays where it was, or whose Monte Carlo trial was refused keeps its state.
    """

    def init(self, context: RunContext) -> Any:
        """State of the gate, a pytree whose leaves lead with W or are scalars that do not change."""
        ...

    def apply(self, state: Any, seen: Observables) -> tuple[jax.Array, Any]:
        """Decisions [W] (int of `Decision`) and the next state."""
        ...


def compared(score: jax.Array, record: jax.Array, stop: jax.Array) -> jax.Array:
    """RECORD above the record threshold, STOP above the stop threshold, else GO_ON, [W]."""
    decision = jnp.where(score > record, int(Decision.RECORD), int(Decision.GO_ON))
    return jnp.where(score > stop, int(Decision.STOP), decision)
