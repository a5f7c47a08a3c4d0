"""What may stand around any gate: a walker ends after several decisions in a row, and records again after a release."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from almlip_jax.dynamics.gates.protocol import Decision, Gate
from almlip_jax.dynamics.seen import Observables, RunContext


@struct.dataclass
class Memory:
    """What `Hysteresis` keeps.

    Attributes:
        inner: of the gate inside.
        low: [W] score below which a walker may record again.
        persistence: scalar int.
        high: [W] int, steps in a row that the gate inside wanted to end the walker.
        armed: [W] bool, whether the score has been low enough since the last frame that went into the buffer.
    """

    inner: Any
    low: jax.Array
    persistence: jax.Array
    high: jax.Array
    armed: jax.Array


@dataclass(frozen=True)
class Hysteresis:
    """A walker ends only after several such decisions in a row, and records again only after its score came down.

    Args:
        inner: the gate inside.
        score: name of its score.
        persistence: decisions in a row to end a walker; until then such a frame is a candidate like others.
        release: fraction of the record threshold below which the score must fall between two recorded frames; None
            asks for nothing between them.
    """

    inner: Gate
    score: str
    persistence: int = field(compare=False)
    release: float | None = field(compare=False)
    releases: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "releases", self.release is not None)

    def init(self, context: RunContext) -> Memory:
        """Nothing has happened yet."""
        record = context.thresholds.record
        return Memory(
            inner=self.inner.init(context),
            low=jnp.asarray(self.release or 1, record.dtype) * record,
            persistence=jnp.asarray(self.persistence, jnp.int32),
            high=jnp.zeros(record.shape, jnp.int32),
            armed=jnp.ones(record.shape, bool),
        )

    def apply(self, state: Memory, seen: Observables) -> tuple[jax.Array, Memory]:
        """The decision of the gate inside, unless it must wait."""
        armed = jnp.ones_like(state.armed)
        if self.releases:
            armed = state.armed | (seen.scores[self.score] < state.low)
        kept = seen.kept & armed
        decision, inner = self.inner.apply(state.inner, seen.replace(kept=kept))  # type: ignore[attr-defined]
        ends = (decision == int(Decision.STOP)) | (decision == int(Decision.LEAVE))
        before = jnp.where(seen.begun_again, 0, state.high)
        high = jnp.where(ends, before + 1, 0)
        waits = ends & (high < state.persistence)
        softer = jnp.where(decision == int(Decision.STOP), int(Decision.RECORD), int(Decision.GO_ON))
        decision = jnp.where(waits, softer, decision)
        decision = jnp.where((decision == int(Decision.RECORD)) & ~armed, int(Decision.GO_ON), decision)
        if self.releases:
            armed = armed & ~((decision == int(Decision.RECORD)) & kept)
        return decision, replace(state, inner=inner, high=high, armed=armed)
