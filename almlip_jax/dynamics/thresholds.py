"""Thresholds of the gate: fixed, relative to the training set, or from the true errors on a labelled set.

Each rule is a pure function of arrays; `ThresholdSettings.resolve` takes what a rule asks for, and nothing else, from
its caller.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
from ase.data import chemical_symbols
from pydantic import Field, model_validator

from almlip_jax.errors import InputError
from almlip_jax.kinds import Spec, UserCode
from almlip_jax.scores import largest_of, with_atoms
from almlip_jax.settings import unit
from almlip_jax.uncertainty.calibration import slope

_GRADES = ("extrapolation_grade", "configuration_grade")

FRAMES = 5
"""Frames that a campaign draws in a round for thresholds from true errors, where its config does not say."""


@dataclass(frozen=True)
class AtomErrors:
    """True errors of atoms' forces, and their scores; A atoms.

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


Scores = Callable[[], np.ndarray]
"""Gives the gate's score of the structures trained on, [n]."""
Errors = Callable[[int], AtomErrors | None]
"""Gives true errors of at least that many atoms that were not trained on; None until there are as many."""


class ThresholdSettings(Spec):
    """What the gate compares its score with."""

    @property
    def looks_at_training_set(self) -> bool:
        """Whether it asks for the scores of the structures trained on."""
        return False

    @property
    def frames_drawn(self) -> int:
        """In a campaign: frames drawn at random in each round, and labelled, for their true errors; 0 needs none."""
        return 0

    def check(self, score: str) -> None:
        """Refuses a gate's score that does not suit the rule.

        Raises:
            ValueError: errors of atoms' forces are compared with a score that atoms do not have.
        """

    @abstractmethod
    def resolve(self, scores: Scores, errors: Errors) -> Resolved:
        """The thresholds of a run.

        Args:
            scores: gives the gate's score of the structures trained on.
            errors: gives true errors, where there are enough of them.

        Raises:
            InputError: the calibration set is too small or says nothing.
        """


class FixedThresholds(ThresholdSettings):
    """The gate's thresholds in the unit of its score, the same in every round."""

    kind: Literal["fixed"] = "fixed"
    record: float = Field(gt=0, le=1e9)
    """Frames above are recorded as candidates."""
    stop: float = Field(gt=0, le=1e9)
    """A walker above is stopped."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.stop < self.record:
            raise ValueError(
                f"the stop threshold {self.stop:g} is below the record threshold {self.record:g}; raise stop."
            )
        return self

    def resolve(self, scores: Scores, errors: Errors) -> Resolved:
        """These."""
        return Resolved(self.record, self.stop)


class GradeThresholds(ThresholdSettings):
    """Extrapolation grades above which frames are recorded, and walkers stopped: those of MLIP-2, by its names."""

    kind: Literal["grade"] = "grade"
    gamma_select: float = Field(default=2.0, gt=0, le=1e9)
    """Frames of a larger grade are recorded as candidates; up to 1 the potential interpolates."""
    gamma_break: float = Field(default=10.0, gt=0, le=1e9)
    """A walker that comes to a larger grade is stopped."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.gamma_break < self.gamma_select:
            raise ValueError(
                f"gamma_break {self.gamma_break:g} is below gamma_select {self.gamma_select:g}; raise gamma_break."
            )
        return self

    def check(self, score: str) -> None:
        """The score must be a grade."""
        if score not in _GRADES:
            raise ValueError(
                f"grade thresholds compare extrapolation grades, and the gate looks at {score}; set the score of the "
                f"gate to {' or '.join(_GRADES)}."
            )

    def resolve(self, scores: Scores, errors: Errors) -> Resolved:
        """These."""
        return Resolved(self.gamma_select, self.gamma_break)


class RelativeThresholds(ThresholdSettings):
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

    @property
    def looks_at_training_set(self) -> bool:
        """It does."""
        return True

    def resolve(self, scores: Scores, errors: Errors) -> Resolved:
        """By the scores of the training structures."""
        record = max(self.floor, self.record_factor * float(np.quantile(scores(), self.quantile)))
        return Resolved(record, self.stop_factor * record)


class FromErrors(ThresholdSettings):
    """Thresholds from true errors of atoms' forces, species by species, on structures that were not trained on.

    A campaign draws ``frames`` at random from each exploration and labels them: they are counted, never trained on, and
    all of earlier rounds together make the thresholds.  Until there are enough, scores are taken at their face value:
    the record threshold is the tolerance.
    """

    tolerance: float = Field(gt=0, le=1000.0, json_schema_extra=unit("eV/Angstrom"))
    """True error of an atom's force, as the length of a vector, that is tolerated; eV/Angstrom."""
    frames: int = Field(default=FRAMES, ge=1, le=10**4)
    """In a campaign: frames drawn in each round, uniformly from the trajectories of all walkers, and labelled."""
    stop_factor: float = Field(default=4.0, ge=1, le=1e6)
    """Multiple of the record threshold above which a walker is stopped."""

    @property
    def frames_drawn(self) -> int:
        """Those."""
        return self.frames

    @property
    @abstractmethod
    def atoms_needed(self) -> int:
        """Atoms without which the rule says nothing."""

    @abstractmethod
    def record_of(self, errors: np.ndarray, sigma: np.ndarray) -> float:
        """The record threshold from the errors [n] of atoms and their scores [n]."""

    def check(self, score: str) -> None:
        """The score must be one of atoms."""
        _check_of_atoms(self.kind, score)

    def resolve(self, scores: Scores, errors: Errors) -> Resolved:
        """The threshold of all atoms together, and those of the species with enough atoms relative to it.

        Before errors are known the score is taken for the error.
        """
        known = errors(self.atoms_needed)
        if known is None:
            return Resolved(self.tolerance, self.stop_factor * self.tolerance, {})
        record = self._record(known.errors, known.scores)
        relative: dict[str, float] = {}
        for number in np.unique(known.numbers).tolist():
            mine = known.numbers == number
            if np.sum(mine) < self.atoms_needed or not np.any(known.scores[mine] > 0):
                continue
            own = self._record(known.errors[mine], known.scores[mine])
            if math.isfinite(own) and math.isfinite(record):
                relative[chemical_symbols[number]] = own / record
        return Resolved(record, self.stop_factor * record, relative)

    def _record(self, errors: np.ndarray, sigma: np.ndarray) -> float:
        record = self.record_of(errors, sigma)
        if record == 0:
            raise InputError("some atoms of the calibration set have errors but no spread; more members would help.")
        return record


class CalibratedThresholds(FromErrors):
    """The score at which the force error that is expected of an atom reaches a tolerance.

    ``record = tolerance / a`` with a the least-squares slope, through the origin, of the true error of an atom's force
    against its score, of the atoms of each species.
    """

    kind: Literal["calibrated"] = "calibrated"

    @property
    def atoms_needed(self) -> int:
        """Two for a slope."""
        return 2

    def record_of(self, errors: np.ndarray, sigma: np.ndarray) -> float:
        """See `calibrated_record`."""
        return calibrated_record(errors, sigma, self.tolerance)


class ConformalThresholds(FromErrors):
    """The score up to which the force error of an atom stays below a tolerance with a probability.

    ``record = tolerance / q`` with q the conformal quantile of error over score, over the atoms of each species.  The
    probability is exact where these are exchangeable with the atoms that are judged: drawn at random from an
    exploration like the one to come, and not selected for their uncertainty.  A species with fewer than
    ``1 / alpha - 1`` atoms takes the threshold of all atoms together, which promises nothing for it alone.
    """

    kind: Literal["conformal"] = "conformal"
    alpha: float = Field(default=0.05, gt=0, lt=1)
    """Share of atoms whose error may exceed q times their score."""

    @property
    def atoms_needed(self) -> int:
        """``1 / alpha - 1`` for the quantile."""
        return _atoms_for(self.alpha)

    def record_of(self, errors: np.ndarray, sigma: np.ndarray) -> float:
        """See `conformal_factor`."""
        factor = conformal_factor(errors, sigma, self.alpha)
        return self.tolerance / factor if factor > 0 else math.inf


class UserThresholds(UserCode, ThresholdSettings):
    """A user's own factory ``(**parameters)`` of a rule ``(scores, errors) -> Resolved``.

    ``scores()`` gives the gate's score of the structures trained on, [n]; ``errors(atoms)`` the `AtomErrors` of at
    least that many atoms that were not trained on, or None before there are.
    """

    kind: Literal["user"] = "user"
    looks_at: tuple[Literal["training_set", "errors"], ...] = ("training_set",)
    """What the rule asks for: the scores of the training set, true errors, or both."""
    frames: int = Field(default=FRAMES, ge=1, le=10**4)
    """In a campaign, for a rule that looks at errors: frames drawn at random in each round, and labelled."""

    @property
    def looks_at_training_set(self) -> bool:
        """As `looks_at` says."""
        return "training_set" in self.looks_at

    @property
    def frames_drawn(self) -> int:
        """`frames`, of a rule that looks at errors."""
        return self.frames if "errors" in self.looks_at else 0

    def check(self, score: str) -> None:
        """With errors of atoms the score must be one of atoms."""
        if self.frames_drawn:
            _check_of_atoms(self.kind, score)

    def check_code(self) -> None:
        """Makes the rule."""
        self.call_for_function("scores", "errors")

    def resolve(self, scores: Scores, errors: Errors) -> Resolved:
        """What the rule gives; raises InputError where it asks for what `looks_at` lacks, or gives no thresholds."""
        rule = self.call_for_function("scores", "errors")
        told = rule(
            scores if self.looks_at_training_set else self._unasked("training_set"),
            errors if self.frames_drawn else self._unasked("errors"),
        )
        if not isinstance(told, Resolved):
            raise InputError(f"'{self.function}' must return Resolved, but returns a {type(told).__name__}.")
        if not 0 < told.record <= told.stop or not all(factor > 0 for factor in (told.relative or {}).values()):
            raise InputError(
                f"'{self.function}' gives the record threshold {told.record:g} and the stop threshold {told.stop:g}; "
                "all must be above 0, and stop not below record."
            )
        return told

    def _unasked(self, name: str) -> Callable[..., Any]:
        def refuse(*_: Any) -> Any:
            raise InputError(f"'{self.function}' asks for what looks_at of thresholds does not name; add {name}.")

        return refuse


def _check_of_atoms(kind: str, score: str) -> None:
    if largest_of(score) is None:
        raise ValueError(f"{kind} thresholds need a gate score of atoms ({', '.join(with_atoms())}), not {score}.")


def calibrated_record(errors: np.ndarray, sigma: np.ndarray, tolerance: float) -> float:
    """Score at which the expected error reaches a tolerance; infinite where there is no error at all.

    Args:
        errors: [n] lengths of the error vectors of atoms, eV/Angstrom.
        sigma: [n] their scores.
        tolerance: eV/Angstrom.

    Raises:
        InputError: a value is not finite, or no atom has a score.

    >>> import numpy as np
    >>> calibrated_record(np.array([0.2, 0.4]), np.array([0.1, 0.2]), tolerance=0.3)  # errors are twice the score
    0.15
    """
    _check(errors, sigma)
    factor = slope(errors, sigma)
    return tolerance / factor if factor > 0 else math.inf


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

    >>> import numpy as np
    >>> conformal_factor(np.array([0.1, 0.3, 0.2, 0.4]), np.full(4, 0.1), alpha=0.25)  # the largest of four ratios
    4.0
    """
    _check(errors, sigma)
    n = len(errors)
    rank = math.ceil(round((n + 1) * (1 - alpha), 9))
    if rank > n:
        raise InputError(
            f"conformal thresholds with alpha {alpha:g} need at least {_atoms_for(alpha)} labelled atoms, not {n}."
        )
    ratios = np.divide(errors, sigma, out=np.where(errors > 0, np.inf, 0.0), where=sigma > 0)
    return float(np.sort(ratios)[rank - 1])


def _atoms_for(alpha: float) -> int:
    return max(math.ceil(round(1 / alpha - 1, 9)), 1)


def _check(errors: np.ndarray, sigma: np.ndarray) -> None:
    if not (np.isfinite(errors).all() and np.isfinite(sigma).all()):
        raise InputError("an error or score on the calibration set is not a number.")
    if not np.any(sigma > 0):
        raise InputError("the members agree on all of the calibration set, which then calibrates nothing.")
