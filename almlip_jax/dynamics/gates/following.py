"""Gates whose record threshold follows the walker: the mean of its scores, or what it recorded last."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import jax
import jax.numpy as jnp
from flax import struct
from pydantic import Field

from almlip_jax.dynamics.gates.base import GateSettings
from almlip_jax.dynamics.gates.protocol import Decision, Gate, compared
from almlip_jax.dynamics.seen import MOST_STEPS, Observables, RunContext, Thresholds


@struct.dataclass
class RunningMean:
    """Thresholds and the running mean of each walker.

    Attributes:
        thresholds: of the run.
        mean: [W] exponential running mean of the score.
        weight: [W] how much of the mean is known, from 0 to 1.
        share: scalar, weight of a new score in the mean.
        fading: scalar, ``1 - share``.
        factor: scalar, record threshold over mean.
    """

    thresholds: Thresholds
    mean: jax.Array
    weight: jax.Array
    share: jax.Array
    fading: jax.Array
    factor: jax.Array


@dataclass(frozen=True)
class RunningMeanGate:
    """The record threshold is the running mean of the walker's score times ``1 + excess``, or that of the run.

    Attributes:
        score: name of a score.
        window: steps of the exponential mean.
        excess: fraction.
    """

    score: str
    window: int = field(compare=False)
    excess: float = field(compare=False)

    def init(self, context: RunContext) -> RunningMean:
        """Nothing is known of any walker."""
        thresholds = context.thresholds
        zero = jnp.zeros_like(thresholds.record)
        share, dtype = 1 / self.window, thresholds.record.dtype
        numbers = (jnp.asarray(value, dtype) for value in (share, 1 - share, 1 + self.excess))
        return RunningMean(thresholds, zero, zero, *numbers)

    def apply(self, state: RunningMean, seen: Observables) -> tuple[jax.Array, RunningMean]:
        """Compares with the mean of the steps before, then takes the new score into it."""
        score = seen.scores[self.score]
        known = state.mean / jnp.maximum(state.weight, 1e-6)
        record = jnp.maximum(state.thresholds.record, jnp.where(state.weight > 0, state.factor * known, 0))
        usable = jnp.isfinite(score)
        mean = jnp.where(usable, state.fading * state.mean + state.share * score, state.mean)
        weight = jnp.where(usable, state.fading * state.weight + state.share, state.weight)
        decision = compared(score, record, state.thresholds.stop)
        return decision, replace(state, mean=mean, weight=weight)


@struct.dataclass
class Raised:
    """Thresholds of the run, and how far the record threshold of each walker lies above.

    Attributes:
        thresholds: of the run.
        raised: [W] above the record threshold of the run.
        fading: scalar, what is left of it after a step.
        factor: scalar, raised threshold over the score recorded.
    """

    thresholds: Thresholds
    raised: jax.Array
    fading: jax.Array
    factor: jax.Array


@dataclass(frozen=True)
class DecayGate:
    """A recorded frame raises the walker's record threshold above its score; it then decays to that of the run.

    A frame that the buffer did not take raises nothing.

    Attributes:
        score: name of a score.
        half_life: steps in which half of the raise is gone.
        excess: fraction by which the raised threshold exceeds the score recorded.
    """

    score: str
    half_life: float = field(compare=False)
    excess: float = field(compare=False)

    def init(self, context: RunContext) -> Raised:
        """Not raised."""
        thresholds = context.thresholds
        dtype = thresholds.record.dtype
        fading, factor = jnp.asarray(0.5 ** (1 / self.half_life), dtype), jnp.asarray(1 + self.excess, dtype)
        return Raised(thresholds, jnp.zeros_like(thresholds.record), fading, factor)

    def apply(self, state: Raised, seen: Observables) -> tuple[jax.Array, Raised]:
        """Compares with the decayed threshold."""
        score = seen.scores[self.score]
        floor = state.thresholds.record
        left = state.raised * state.fading
        decision = compared(score, floor + left, state.thresholds.stop)
        above = (decision == int(Decision.RECORD)) & seen.kept
        return decision, replace(state, raised=jnp.where(above, state.factor * score - floor, left))


class AdaptiveGate(GateSettings):
    """The record threshold follows the walker: the mean of its last scores times ``1 + excess``.

    It never falls below the threshold given for the run, and the stop threshold is not adapted.
    """

    kind: Literal["adaptive"] = "adaptive"
    window: int = Field(default=400, ge=1, le=MOST_STEPS)
    """Steps over which the exponential running mean extends."""
    excess: float = Field(default=0.5, ge=0, le=1000.0)
    """By how much, as a fraction, a score must exceed the mean."""

    def plain(self) -> Gate:
        """See `RunningMeanGate`."""
        return RunningMeanGate(self.score, self.window, self.excess)


class DecayingGate(GateSettings):
    """A recorded frame raises the walker's record threshold above its score; the raise decays."""

    kind: Literal["decaying"] = "decaying"
    half_life: float = Field(default=200.0, gt=0, le=1e9)
    """Steps in which half of the raise is gone."""
    excess: float = Field(default=0.2, ge=0, le=1000.0)
    """By how much, as a fraction, the raised threshold exceeds the recorded score."""

    def plain(self) -> Gate:
        """See `DecayGate`."""
        return DecayGate(self.score, self.half_life, self.excess)
