"""Gates: pure functions that look at the committee of each new frame and decide whether to go on, record or stop."""

from __future__ import annotations

from enum import IntEnum
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct

from almlip_jax.dynamics.sanity import Cause, SanityLimits
from almlip_jax.dynamics.settings import AdaptiveGate, GateSettings


class Decision(IntEnum):
    """What a gate decides on a frame."""

    GO_ON = 0
    RECORD = 1
    STOP = 2
    UNPHYSICAL = 3


@struct.dataclass
class Observables:
    """What a gate may look at; one entry a walker, of the unbiased committee at the new positions.

    Attributes:
        scores: name -> [W], every committee score.
        energy: [W] eV, relative to the reference energies.
        max_force: [W] eV/Angstrom, of the committee mean.
        closest_contact: [W], shortest distance as a fraction of the sum of the covalent radii.
        temperature: [W] K.
        bath_temperature: [W] K, what the walker should have.
        new_fragments: [W] int, parts more than at the start.
        finite: [W] bool, positions, energy, forces and spread are all numbers.
    """

    scores: dict[str, jax.Array]
    energy: jax.Array
    max_force: jax.Array
    closest_contact: jax.Array
    temperature: jax.Array
    bath_temperature: jax.Array
    new_fragments: jax.Array
    finite: jax.Array


@struct.dataclass
class Thresholds:
    """The thresholds of a run, in the unit of the gate's score.

    Attributes:
        record: [W] frames above are candidates.
        stop: [W] a walker above ends.
    """

    record: jax.Array
    stop: jax.Array


class Gate(Protocol):
    """``init`` makes the state of W walkers, ``decide`` is called once a step; both are pure and jittable."""

    def init(self, thresholds: Thresholds) -> Any:
        """State of the gate, a pytree."""
        ...

    def decide(self, observables: Observables, state: Any) -> tuple[jax.Array, Any]:
        """Decisions [W] (GO_ON, RECORD or STOP as int) and the next state."""
        ...


class ThresholdGate:
    """Compares one score with the thresholds of the run.

    Args:
        score: name of a committee score.
    """

    def __init__(self, score: str) -> None:
        self.score = score

    def init(self, thresholds: Thresholds) -> Thresholds:
        """The thresholds are all there is to keep."""
        return thresholds

    def decide(self, observables: Observables, state: Thresholds) -> tuple[jax.Array, Thresholds]:
        """RECORD above the record threshold, STOP above the stop threshold."""
        return _compare(observables.scores[self.score], state.record, state.stop), state


@struct.dataclass
class AdaptiveState:
    """Thresholds and the running mean of each walker.

    Attributes:
        thresholds: of the run.
        mean: [W] exponential running mean of the score.
        weight: [W] how much of the mean is known, from 0 to 1.
    """

    thresholds: Thresholds
    mean: jax.Array
    weight: jax.Array


class RunningMeanGate:
    """The record threshold is the running mean of the walker's score times ``1 + excess``, or that of the run.

    Args:
        score: name of a committee score.
        window: steps of the exponential mean.
        excess: fraction.
    """

    def __init__(self, score: str, window: int, excess: float) -> None:
        self.score, self.window, self.excess = score, window, excess

    def init(self, thresholds: Thresholds) -> AdaptiveState:
        """Nothing is known of any walker."""
        zero = jnp.zeros_like(thresholds.record)
        return AdaptiveState(thresholds, zero, zero)

    def decide(self, observables: Observables, state: AdaptiveState) -> tuple[jax.Array, AdaptiveState]:
        """Compares with the mean of the steps before, then takes the new score into it."""
        score = observables.scores[self.score]
        known = state.mean / jnp.maximum(state.weight, 1e-6)
        record = jnp.maximum(state.thresholds.record, jnp.where(state.weight > 0, (1 + self.excess) * known, 0))
        share = 1 / self.window
        usable = jnp.isfinite(score)
        mean = jnp.where(usable, (1 - share) * state.mean + share * score, state.mean)
        weight = jnp.where(usable, (1 - share) * state.weight + share, state.weight)
        decision = _compare(score, record, state.thresholds.stop)
        return decision, AdaptiveState(state.thresholds, mean, weight)


def build_gate(settings: GateSettings) -> Gate:
    """The gate that some settings describe."""
    if isinstance(settings, AdaptiveGate):
        return RunningMeanGate(settings.score, settings.window, settings.excess)
    return ThresholdGate(settings.score)


def unphysical_cause(observables: Observables, limits: SanityLimits) -> jax.Array:
    """Which check finds a frame unphysical, [W] int of `Cause`; 0 where none does."""
    checks = [
        (Cause.NOT_FINITE, ~observables.finite),
        (Cause.CLOSE_CONTACT, observables.closest_contact < limits.closest_contact),
        (Cause.LARGE_FORCE, observables.max_force > limits.max_force),
        (Cause.HOT, observables.temperature > limits.max_temperature * observables.bath_temperature),
        (Cause.DISSOCIATED, observables.new_fragments > 0),
    ]
    cause = jnp.zeros(observables.energy.shape, jnp.int32)
    for code, failed in reversed(checks):
        cause = jnp.where(failed, int(code), cause)
    return cause


def _compare(score: jax.Array, record: jax.Array, stop: jax.Array) -> jax.Array:
    decision = jnp.where(score > record, int(Decision.RECORD), int(Decision.GO_ON))
    return jnp.where(score > stop, int(Decision.STOP), decision)
