"""Thresholds of the gate: fixed, relative to the training set, or from the true errors on a labelled set.

Each rule is a pure function of arrays; `resolve_thresholds` takes what a rule asks for, and nothing else, from its
caller.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, Self

import numpy as np
from ase.data import chemical_symbols
from pydantic import Field, model_validator

from almlip_jax.errors import InputError
from almlip_jax.scores import largest_of, with_atoms
from almlip_jax.settings import Settings, unit
from almlip_jax.uncertainty.calibration import slope

FRAMES = 5
"""Frames that a campaign draws in a round for thresholds from true errors, where its config does not say."""


class FixedThresholds(Settings):
    """The gate's thresholds in the unit of its score, the same in every round."""

    kind: Literal["fixed"] = "fixed"
    record: float = Field(gt=0, le=1e9)
    """Frames above are recorded as candidates."""
    stop: float = Field(gt=0, le=1e9)
    """A walker above is stopped."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.stop < self.record:
            raise ValueError(f"the stop threshold {self.stop:g} is below the record threshold {self.record:g}.")
        return self


class RelativeThresholds(Settings):
    """The gate's thresholds as multiples of the score that the ensemble has on what it was trained on.

    ``record = max(floor, record_factor * q)`` with q a quantile of the gate's score over the training set, and
    ``stop = stop_factor * record``.  The floor is the uncertainty that is tolerated: without it the thresholds would
    follow the ensemble down for ever, and exploration would never come to rest.
    """

    kind: Literal["relative"] = "relative"
    quantile: float = Field(default=0.9, gt=0, le=1)
    """Which quantile of the training set's scores."""
    record_factor: float = Field(default=1.5, gt=0, le=1e6)
    """Multiple of it above which frames are recorded."""
    stop_factor: float = Field(default=4.0, ge=1, le=1e6)
    """Multiple of the record threshold above which a walker is stopped."""
    floor: float = Field(default=0.05, gt=0, le=1e6)
    """Least record threshold, in the unit of the score (eV/Angstrom for forces)."""


class _FromErrors(Settings):
    """Thresholds from true errors of atoms' forces, species by species, on structures that were not trained on.

    A campaign draws ``frames`` at random from each exploration and labels them: they are counted, never trained on, and
    all of earlier rounds together make the thresholds.  Until there are enough, scores are taken at their face value:
    the record threshold is the tolerance.
    """

    frames: int = Field(default=FRAMES, ge=1, le=10**4)
    """In a campaign: frames drawn in each round, uniformly from the trajectories of all walkers, and labelled."""


class CalibratedThresholds(_FromErrors):
    """The score at which the force error that is expected of an atom reaches a tolerance.

    ``record = tolerance / a`` with a the least-squares slope, through the origin, of the true error of an atom's force
    against its score, of the atoms of each species.
    """

    kind: Literal["calibrated"] = "calibrated"
    tolerance: float = Field(gt=0, le=1000.0, json_schema_extra=unit("eV/Angstrom"))
    """True error of an atom's force, as the length of a vector, that is tolerated; eV/Angstrom."""
    stop_factor: float = Field(default=4.0, ge=1, le=1e6)
    """Multiple of the record threshold above which a walker is stopped."""


class ConformalThresholds(_FromErrors):
    """The score up to which the force error of an atom stays below a tolerance with a probability.

    ``record = tolerance / q`` with q the conformal quantile of error over score, over the atoms of each species.  The
    probability is exact where these are exchangeable with the atoms that are judged: drawn at random from an
    exploration like the one to come, and not selected for their uncertainty.  A species with fewer than
    ``1 / alpha - 1`` atoms takes the threshold of all atoms together, which promises nothing for it alone.
    """

    kind: Literal["conformal"] = "conformal"
    tolerance: float = Field(gt=0, le=1000.0, json_schema_extra=unit("eV/Angstrom"))
    """True error of an atom's force, as the length of a vector, that is tolerated; eV/Angstrom."""
    alpha: float = Field(default=0.05, gt=0, lt=1)
    """Share of atoms whose error may exceed q times their score."""
    stop_factor: float = Field(default=4.0, ge=1, le=1e6)
    """Multiple of the record threshold above which a walker is stopped."""


ThresholdSettings = Annotated[
    FixedThresholds | RelativeThresholds | CalibratedThresholds | ConformalThresholds, Field(discriminator="kind")
]
"""What the gate compares its score with; the field ``kind`` decides."""


def check_thresholds(rule: ThresholdSettings, score: str) -> None:
    """Refuses a rule that does not go with the gate's score.

    Raises:
        ValueError: errors of atoms' forces are compared with a score that atoms do not have.
    """
    if isinstance(rule, CalibratedThresholds | ConformalThresholds) and largest_of(score) is None:
        raise ValueError(f"{rule.kind} thresholds need a gate score of atoms ({', '.join(with_atoms())}), not {score}.")


def relative_record(scores: np.ndarray, rule: RelativeThresholds) -> float:
    """Record threshold from the scores [n] of the training structures; see `RelativeThresholds`."""
    return max(rule.floor, rule.record_factor * float(np.quantile(scores, rule.quantile)))


def calibrated_record(errors: np.ndarray, sigma: np.ndarray, tolerance: float) -> float:
    """Score at which the expected error reaches a tolerance; infinite where there is no error at all.

    Args:
        errors: [n] lengths of the error vectors of atoms, eV/Angstrom.
        sigma: [n] their scores.
        tolerance: eV/Angstrom.

    Raises:
        InputError: a value is not finite, or no atom has a score.
    """
    _check(errors, sigma)
    found = slope(errors, sigma)
    return tolerance / found if found > 0 else math.inf


def conformal_factor(errors: np.ndarray, sigma: np.ndarray, alpha: float) -> float:
    """The ``ceil((n + 1)(1 - alpha)) / n`` quantile of ``|error| / sigma``: split conformal prediction.

    A further pair that is exchangeable with the n given ones has ``|error| <= q sigma`` with a probability of at least
    ``1 - alpha``.  Source: Vovk, Gammerman and Shafer, Algorithmic Learning in a Random World (2005).

    Args:
        errors: [n] lengths of the error vectors of atoms, eV/Angstrom.
        sigma: [n] their scores; infinite ratios, of an error without any score, are allowed.
        alpha: share that may be missed.

    Raises:
        InputError: fewer than ``1 / alpha - 1`` pairs, a value is not finite, or no atom has a score.
    """
    _check(errors, sigma)
    n = len(errors)
    rank = math.ceil(round((n + 1) * (1 - alpha), 9))
    if rank > n:
        needed = math.ceil(round(1 / alpha - 1, 9))
        raise InputError(f"conformal thresholds with alpha {alpha:g} need {needed} labelled atoms at least, not {n}.")
    ratios = np.divide(errors, sigma, out=np.where(errors > 0, np.inf, 0.0), where=sigma > 0)
    return float(np.sort(ratios)[rank - 1])


@dataclass(frozen=True)
class AtomErrors:
    """True errors of atoms' forces beside their scores; A atoms.

    Attributes:
        errors: [A] lengths of the error vectors, eV/Angstrom.
        scores: [A] of the gate.
        numbers: [A] atomic numbers.
    """

    errors: np.ndarray
    scores: np.ndarray
    numbers: np.ndarray


@dataclass(frozen=True)
class Resolved:
    """Thresholds of a run, in the unit of the gate's score.

    Attributes:
        record: frames above are recorded.
        stop: walkers above are stopped.
        relative: thresholds of elements, relative to these, by symbol; None where a rule knows no elements.
    """

    record: float
    stop: float
    relative: Mapping[str, float] | None = None

    @property
    def levels(self) -> tuple[float, float]:
        """Record and stop threshold."""
        return self.record, self.stop


def face_value(rule: CalibratedThresholds | ConformalThresholds) -> Resolved:
    """Thresholds before any error is known: the score is taken for the error."""
    return Resolved(rule.tolerance, rule.stop_factor * rule.tolerance, {})


def atoms_needed(rule: CalibratedThresholds | ConformalThresholds) -> int:
    """Atoms without which a rule says nothing: ``1 / alpha - 1`` for a conformal quantile, two for a slope."""
    return max(math.ceil(round(1 / rule.alpha - 1, 9)), 1) if isinstance(rule, ConformalThresholds) else 2


def resolve_thresholds(
    rule: ThresholdSettings, scores: Callable[[], np.ndarray], calibration: Callable[[], AtomErrors]
) -> Resolved:
    """The thresholds of a run.

    Args:
        rule: how they come about.
        scores: gives the gate's score of the structures trained on, [n].
        calibration: gives the errors and scores of atoms of structures that were not trained on.

    Raises:
        InputError: the calibration set is too small or says nothing.
    """
    match rule:
        case FixedThresholds():
            return Resolved(rule.record, rule.stop)
        case RelativeThresholds():
            record = relative_record(scores(), rule)
            return Resolved(record, rule.stop_factor * record)
        case CalibratedThresholds() | ConformalThresholds():
            return _by_species(rule, calibration())


def _by_species(rule: CalibratedThresholds | ConformalThresholds, found: AtomErrors) -> Resolved:
    """The threshold of all atoms together, and those of the species with enough atoms relative to it."""
    record = _record_of(rule, found.errors, found.scores)
    relative: dict[str, float] = {}
    for number in np.unique(found.numbers).tolist():
        mine = found.numbers == number
        if np.sum(mine) < atoms_needed(rule) or not np.any(found.scores[mine] > 0):
            continue
        own = _record_of(rule, found.errors[mine], found.scores[mine])
        if math.isfinite(own) and math.isfinite(record):
            relative[chemical_symbols[number]] = own / record
    return Resolved(record, rule.stop_factor * record, relative)


def _record_of(rule: CalibratedThresholds | ConformalThresholds, errors: np.ndarray, sigma: np.ndarray) -> float:
    if isinstance(rule, CalibratedThresholds):
        record = calibrated_record(errors, sigma, rule.tolerance)
    else:
        factor = conformal_factor(errors, sigma, rule.alpha)
        record = rule.tolerance / factor if factor > 0 else math.inf
    if record == 0:
        raise InputError("some atoms of the calibration set have errors but no spread; more members would help.")
    return record


def _check(errors: np.ndarray, sigma: np.ndarray) -> None:
    if not (np.isfinite(errors).all() and np.isfinite(sigma).all()):
        raise InputError("an error or score on the calibration set is not a number.")
    if not np.any(sigma > 0):
        raise InputError("the members agree on all of the calibration set, which then calibrates nothing.")
