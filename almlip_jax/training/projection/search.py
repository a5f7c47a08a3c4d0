"""Searches side by side for the parameters that are not linear, as data: where each stands, and its next step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from almlip_jax.training.projection.algebra import Solved, Step, damped_step, solve

_FIRST_DAMPING = 1e-2
_LEAST_DAMPING, _MOST_DAMPING = 1e-12, 1e8
_TRUSTED = (0.3, 2.0)  # gains relative to what was promised, beyond which linear parameters are not as expected
_PATIENCE = 3  # steps of little gain in a row after which a search ends


@dataclass(frozen=True)
class Search:
    """One search of Levenberg and Marquardt, its linear parameters always the best ones.

    Attributes:
        others: [P] parameters where it stands.
        factor: [M, M] what the data have come to there.
        point: what follows from it.
        scale: [P] largest curvature of each parameter so far.
        damping: of the next step.
        growth: what the damping is multiplied by if the step fails.
        waited: steps of little gain in a row.
        exact: whether derivatives were taken at the best linear parameters, not at what was expected of them.
        stale: whether they have to be taken again before another step.
        active: whether it goes on.
    """

    others: np.ndarray
    factor: np.ndarray
    point: Solved
    scale: np.ndarray
    damping: float = _FIRST_DAMPING
    growth: float = 2.0
    waited: int = 0
    exact: bool = True
    stale: bool = False
    active: bool = True

    def step(self) -> Step:
        """The next step to try; none where derivatives have to be taken again."""
        if self.stale:
            return Step(np.zeros_like(self.others), self.point.linear, 0.0)
        least = 1e-12 * max(float(self.scale.max(initial=0.0)), np.finfo(float).tiny)
        return damped_step(self.point, np.maximum(self.scale, least), self.damping)

    def after(self, step: Step, factor: np.ndarray, point: Solved, tolerance: float) -> Search:
        """Where it stands once the end of a step has been looked at (damping by Nielsen, report IMM-REP-1999-05)."""
        gain = self.point.objective - point.objective
        if self.stale:
            scale = np.maximum(self.scale, np.diag(point.curvature))
            return replace(self, factor=factor, point=point, scale=scale, exact=True, stale=False)
        if not point.finite or gain < 0:
            return self._refused(step, tolerance)
        ratio = gain / step.gain if step.gain > 0 else 0.0
        waited = self.waited + 1 if gain < tolerance * self.point.objective else 0
        return Search(
            others=self.others + step.others,
            factor=factor,
            point=point,
            scale=np.maximum(self.scale, np.diag(point.curvature)),
            damping=max(self.damping * max(1 / 3, 1 - (2 * ratio - 1) ** 3), _LEAST_DAMPING),
            waited=waited,
            exact=False,
            stale=not _TRUSTED[0] < ratio < _TRUSTED[1],
            active=waited < _PATIENCE,
        )

    def _refused(self, step: Step, tolerance: float) -> Search:
        """Where it stands after a step that did not lower the objective; a second one blames the derivatives too."""
        damping = self.damping * self.growth
        waited = self.waited + 1 if step.gain < tolerance * self.point.objective else self.waited
        return replace(
            self,
            damping=damping,
            growth=2 * self.growth,
            waited=waited,
            stale=not self.exact and self.growth > 2,
            active=damping < _MOST_DAMPING and waited < _PATIENCE,
        )


Look = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""Others [C, P], linear ones [C, N] that derivatives by them are for, active [C] -> factors [C, M, M]."""


def begun(look: Look, others: np.ndarray, linear: int, active: np.ndarray, ridge: float) -> list[Search]:
    """Searches before their first step, from parameters [C, P], in two passes over the data.

    Linear parameters are found first, since derivatives by the others depend on them.
    """
    nothing = np.zeros((len(others), linear))
    first = [solve(factor, linear, ridge) for factor in look(others, nothing, active)]
    found = np.stack([one.linear if on else zero for one, on, zero in zip(first, active, nothing, strict=True)])
    factors = look(others, found, active)
    points = [solve(factor, linear, ridge) for factor in factors]
    return [
        Search(one, factor, point, np.diag(point.curvature), active=bool(on and point.finite))
        for one, factor, point, on in zip(others, factors, points, active, strict=True)
    ]


def advanced(look: Look, searches: Sequence[Search], ridge: float, tolerance: float) -> list[Search]:
    """Searches after one more pass over the data, in which each that is active tries a step."""
    active = np.array([one.active for one in searches])
    if not active.any():
        return list(searches)
    steps = [one.step() if one.active else None for one in searches]
    others = np.stack(
        [one.others if s is None else one.others + s.others for one, s in zip(searches, steps, strict=True)]
    )
    linear = np.stack([one.point.linear if s is None else s.linear for one, s in zip(searches, steps, strict=True)])
    factors = look(others, np.nan_to_num(linear), active)
    return [
        one if step is None else one.after(step, factor, solve(factor, linear.shape[1], ridge), tolerance)
        for one, step, factor in zip(searches, steps, factors, strict=True)
    ]


def best(searches: Sequence[Search]) -> int:
    """Place of the search with the lowest objective; the first where none is a number."""
    return _ranked(searches)[0]


def starts_left(starts: int, share: float) -> int:
    """How many of a number of starts go on after a share of the trial: half of them, time and again, to its end.

    The parts between are of equal length (successive halving: Jamieson and Talwalkar, AISTATS 2016).
    """
    halvings = max(starts - 1, 1).bit_length()  # that leave one
    return math.ceil(starts / 2 ** math.floor(min(share, 1.0) * halvings + 1e-9))


def the_best(searches: Sequence[Search], count: int) -> tuple[Search, ...]:
    """Searches of which only so many, the best, go on."""
    kept = _ranked(searches)[:count]
    return tuple(replace(one, active=one.active and n in kept) for n, one in enumerate(searches))


def _ranked(searches: Sequence[Search]) -> list[int]:
    """Places of searches from the lowest objective to the highest, those last where it is no number.

    Searches for which there was nothing to begin with have looked at no data, and come last too.
    """
    known = (one.point.finite and one.factor.any() for one in searches)
    objectives = [one.point.objective if k else np.inf for k, one in zip(known, searches, strict=True)]
    return [int(n) for n in np.argsort(objectives, kind="stable")]
