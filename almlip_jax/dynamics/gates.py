"""Gates: pure functions that look at the committee of each new frame and decide whether to go on, record or stop.

A gate is a pair of functions, `Gate.init` and `Gate.decide`, with its memory as data between them; `Hysteresis` puts
persistence and release around any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct

from almlip_jax.dynamics.sanity import Cause, SanityLimits
from almlip_jax.dynamics.settings import AdaptiveGate, BandGate, DecayingGate, GateSettings
from almlip_jax.scores import largest_of


class Decision(IntEnum):
    """What a gate decides on a frame."""

    GO_ON = 0
    RECORD = 1
    STOP = 2
    """The frame is recorded, and the walker ends."""
    LEAVE = 3
    """The walker ends, and the frame is not worth a label."""
    UNPHYSICAL = 4


@struct.dataclass
class Observables:
    """What a gate may look at; one entry a walker, of the unbiased committee at the new positions.

    Attributes:
        scores: name -> [W], every score that needs no training set, and of novelty what was asked for (`scores`).
        atom_scores: name -> [W, N], the scores of atoms, likewise; 0 in padding.
        energy: [W] eV, relative to the reference energies.
        max_force: [W] eV/Angstrom, of the committee mean.
        closest_contact: [W], shortest distance as a fraction of the sum of the covalent radii.
        temperature: [W] K.
        bath_temperature: [W] K, what the walker should have.
        new_fragments: [W] int, parts more than at the start.
        finite: [W] bool, positions, energy, forces, spread and the gate's score are all numbers.
        kept: [W] bool, whether a frame that the gate records now goes into the buffer; a frame that the spacing or the
            buffer refuses does not.  It decides on the gate's memory, never on its decision.
        begun_again: [W] bool, whether the walker was put elsewhere after the step before: nothing goes on in a row.
    """

    scores: Mapping[str, jax.Array]
    atom_scores: Mapping[str, jax.Array]
    energy: jax.Array
    max_force: jax.Array
    closest_contact: jax.Array
    temperature: jax.Array
    bath_temperature: jax.Array
    new_fragments: jax.Array
    finite: jax.Array
    kept: jax.Array | bool = True
    begun_again: jax.Array | bool = False


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
    """``init`` makes the state of W walkers, ``decide`` looks at one step; both are pure and jittable.

    In the loop a decision is asked for first, and the next state once it is known what became of the frame
    (`Observables.kept`).  A walker that is over, that stays where it was, or whose Monte Carlo trial was refused keeps
    its state.
    """

    def init(self, thresholds: Thresholds) -> Any:
        """State of the gate, a pytree whose leaves lead with W."""
        ...

    def decide(self, observables: Observables, state: Any) -> tuple[jax.Array, Any]:
        """Decisions [W] (int of `Decision`) and the next state."""
        ...


class ThresholdGate:
    """Compares one score with the thresholds of the run.

    Args:
        score: name of a score.
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
class RunningMean:
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
        score: name of a score.
        window: steps of the exponential mean.
        excess: fraction.
    """

    def __init__(self, score: str, window: int, excess: float) -> None:
        self.score, self.window, self.excess = score, window, excess

    def init(self, thresholds: Thresholds) -> RunningMean:
        """Nothing is known of any walker."""
        zero = jnp.zeros_like(thresholds.record)
        return RunningMean(thresholds, zero, zero)

    def decide(self, observables: Observables, state: RunningMean) -> tuple[jax.Array, RunningMean]:
        """Compares with the mean of the steps before, then takes the new score into it."""
        score = observables.scores[self.score]
        known = state.mean / jnp.maximum(state.weight, 1e-6)
        record = jnp.maximum(state.thresholds.record, jnp.where(state.weight > 0, (1 + self.excess) * known, 0))
        share = 1 / self.window
        usable = jnp.isfinite(score)
        mean = jnp.where(usable, (1 - share) * state.mean + share * score, state.mean)
        weight = jnp.where(usable, (1 - share) * state.weight + share, state.weight)
        decision = _compare(score, record, state.thresholds.stop)
        return decision, RunningMean(state.thresholds, mean, weight)


@struct.dataclass
class Raised:
    """Thresholds of the run, and how far the record threshold is raised above its floor, [W]."""

    thresholds: Thresholds
    raised: jax.Array


class DecayGate:
    """A recorded frame raises the walker's record threshold above its score; it then decays to that of the run.

    A frame that the buffer did not take raises nothing.

    Args:
        score: name of a score.
        half_life: steps in which half of the raise is gone.
        excess: fraction by which the raised threshold exceeds the score recorded.
    """

    def __init__(self, score: str, half_life: float, excess: float) -> None:
        self.score, self.half_life, self.excess = score, half_life, excess

    def init(self, thresholds: Thresholds) -> Raised:
        """Not raised."""
        return Raised(thresholds, jnp.zeros_like(thresholds.record))

    def decide(self, observables: Observables, state: Raised) -> tuple[jax.Array, Raised]:
        """Compares with the decayed threshold."""
        score = observables.scores[self.score]
        floor = state.thresholds.record
        left = state.raised * 0.5 ** (1 / self.half_life)
        decision = _compare(score, floor + left, state.thresholds.stop)
        above = (decision == int(Decision.RECORD)) & observables.kept
        return decision, Raised(state.thresholds, jnp.where(above, (1 + self.excess) * score - floor, left))


class TrustBandGate:
    """Frames between the thresholds are recorded; those above are too far off to be worth a label.

    Args:
        score: name of a score.
        ends: whether a walker above the band ends, or goes on unrecorded.
    """

    def __init__(self, score: str, ends: bool) -> None:
        self.score, self.ends = score, ends

    def init(self, thresholds: Thresholds) -> Thresholds:
        """The thresholds are all there is to keep."""
        return thresholds

    def decide(self, observables: Observables, state: Thresholds) -> tuple[jax.Array, Thresholds]:
        """RECORD where ``record <= score < stop``."""
        score = observables.scores[self.score]
        above = int(Decision.LEAVE if self.ends else Decision.GO_ON)
        inside = jnp.where(score >= state.record, int(Decision.RECORD), int(Decision.GO_ON))
        return jnp.where(score >= state.stop, above, inside), state


@struct.dataclass
class Memory:
    """What `Hysteresis` keeps.

    Attributes:
        inner: of the gate inside.
        thresholds: of the run.
        high: [W] int, steps in a row that the gate inside wanted to end the walker.
        armed: [W] bool, whether the score has been low enough since the last frame that went into the buffer.
    """

    inner: Any
    thresholds: Thresholds
    high: jax.Array
    armed: jax.Array


class Hysteresis:
    """A walker ends only after several such decisions in a row, and records again only after its score came down.

    Args:
        inner: the gate inside.
        score: name of its score.
        persistence: decisions in a row to end a walker; until then such a frame is a candidate like others.
        release: fraction of the record threshold below which the score must fall between two recorded frames.
    """

    def __init__(self, inner: Gate, score: str, persistence: int, release: float | None) -> None:
        self.inner, self.score, self.persistence, self.release = inner, score, persistence, release

    def init(self, thresholds: Thresholds) -> Memory:
        """Nothing has happened yet."""
        return Memory(
            inner=self.inner.init(thresholds),
            thresholds=thresholds,
            high=jnp.zeros(thresholds.record.shape, jnp.int32),
            armed=jnp.ones(thresholds.record.shape, bool),
        )

    def decide(self, observables: Observables, state: Memory) -> tuple[jax.Array, Memory]:
        """The decision of the gate inside, unless it must wait."""
        armed = jnp.ones_like(state.armed)
        if self.release is not None:
            low = observables.scores[self.score] < self.release * state.thresholds.record
            armed = state.armed | low
        kept = observables.kept & armed
        within = observables.replace(kept=kept)  # type: ignore[attr-defined]
        decision, inner = self.inner.decide(within, state.inner)
        ends = (decision == int(Decision.STOP)) | (decision == int(Decision.LEAVE))
        before = jnp.where(observables.begun_again, 0, state.high)
        high = jnp.where(ends, before + 1, 0)
        waits = ends & (high < self.persistence)
        softer = jnp.where(decision == int(Decision.STOP), int(Decision.RECORD), int(Decision.GO_ON))
        decision = jnp.where(waits, softer, decision)
        decision = jnp.where((decision == int(Decision.RECORD)) & ~armed, int(Decision.GO_ON), decision)
        if self.release is not None:
            armed = armed & ~((decision == int(Decision.RECORD)) & kept)
        return decision, Memory(inner, state.thresholds, high, armed)


def build_gate(settings: GateSettings) -> Gate:
    """The gate that some settings describe."""
    gate = _plain(settings)
    if settings.persistence == 1 and settings.release is None:
        return gate
    return Hysteresis(gate, settings.score, settings.persistence, settings.release)


def _plain(settings: GateSettings) -> Gate:
    match settings:
        case AdaptiveGate():
            return RunningMeanGate(settings.score, settings.window, settings.excess)
        case DecayingGate():
            return DecayGate(settings.score, settings.half_life, settings.excess)
        case BandGate():
            return TrustBandGate(settings.score, settings.above == "end")
        case _:
            return ThresholdGate(settings.score)


def scaled_by_species(observables: Observables, score: str, factors: jax.Array) -> Observables:
    """The observables with a score that is the largest of atom scores times the factor of each atom.

    Args:
        observables: of a step.
        score: one that is the largest value of an atom (`scores.largest_of`).
        factors: [W, N], 1 over the relative threshold of an atom's species.
    """
    of_atoms = largest_of(score)
    assert of_atoms is not None  # settings refuse any other score
    largest = jnp.max(observables.atom_scores[of_atoms] * factors, axis=1)
    scores = dict(observables.scores) | {score: largest}
    return observables.replace(scores=scores)  # type: ignore[attr-defined, no-any-return]


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
