"""Gates whose thresholds stay as they are during a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

import jax
import jax.numpy as jnp
from pydantic import model_validator

from almlip_jax.dynamics.gates.base import GateSettings
from almlip_jax.dynamics.gates.protocol import Decision, Gate, compared
from almlip_jax.dynamics.seen import Observables, RunContext, Thresholds


@dataclass(frozen=True)
class ThresholdGate:
    """Compares one score with the thresholds of the run.

    Attributes:
        score: name of a score.
    """

    score: str

    def init(self, context: RunContext) -> Thresholds:
        """The thresholds are all there is to keep."""
        return context.thresholds

    def apply(self, state: Thresholds, seen: Observables) -> tuple[jax.Array, Thresholds]:
        """RECORD above the record threshold, STOP above the stop threshold."""
        return compared(seen.scores[self.score], state.record, state.stop), state


@dataclass(frozen=True)
class TrustBandGate:
    """Frames between the thresholds are recorded; those above are too far off to be worth a label.

    Attributes:
        score: name of a score.
        ends: whether a walker above the band ends, or goes on unrecorded.
    """

    score: str
    ends: bool

    def init(self, context: RunContext) -> Thresholds:
        """The thresholds are all there is to keep."""
        return context.thresholds

    def apply(self, state: Thresholds, seen: Observables) -> tuple[jax.Array, Thresholds]:
        """RECORD where ``record <= score < stop``."""
        score = seen.scores[self.score]
        above = int(Decision.LEAVE if self.ends else Decision.GO_ON)
        inside = jnp.where(score >= state.record, int(Decision.RECORD), int(Decision.GO_ON))
        return jnp.where(score >= state.stop, above, inside), state


class AbsoluteGate(GateSettings):
    """Compares a score with two thresholds that stay as they are during a run."""

    kind: Literal["absolute"] = "absolute"

    def plain(self) -> Gate:
        """See `ThresholdGate`."""
        return ThresholdGate(self.score)


class BandGate(GateSettings):
    """Trust band: frames between the thresholds are recorded, those above are not worth a label."""

    kind: Literal["band"] = "band"
    above: Literal["end", "go_on"] = "end"
    """What a walker does above the band: it ends unrecorded, or goes on unrecorded."""

    @model_validator(mode="after")
    def _somebody_ends(self) -> Self:
        if self.above == "go_on" and self.persistence != 1:
            raise ValueError("persistence counts with above 'end' only: no walker ends above the band; leave it out.")
        return self

    def plain(self) -> Gate:
        """See `TrustBandGate`."""
        return TrustBandGate(self.score, self.above == "end")
