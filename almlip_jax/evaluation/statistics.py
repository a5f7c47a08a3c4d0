"""Statistics of comparisons: intervals over seeds, areas, labels to a target, paired tests, performance profiles.

Numpy and scipy on plain arrays; the first axis runs over seeds, the last over numbers of labels.  Errors are positive
and judged by their logarithm, because their spread over seeds grows with their size: means are geometric means,
differences are ratios.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from almlip_jax.errors import InputError

Floats = NDArray[np.float64]

LEVEL = 0.95
"""Confidence level where none is given."""


# -------------------------------------------------------------------------------------------------------------- curves


@dataclass(frozen=True)
class SeedCurves:
    """Learning curves of one selector: one row for each seed, all on one grid of labels.

    Attributes:
        labels: [n] ascending.
        seeds: their numbers, ascending.
        errors: [seeds, n]; NaN before a seed's first point and after its last.
    """

    labels: Floats
    seeds: tuple[int, ...]
    errors: Floats

    @staticmethod
    def from_points(points: Mapping[int, tuple[ArrayLike, ArrayLike]]) -> SeedCurves:
        """Curves from each seed's labels [n] and errors [n], which need not be the same numbers of labels.

        The grid holds every number of labels that occurs.  A seed that has no point there is interpolated, the
        logarithm of its error linearly in the logarithm of the labels, and never extrapolated.  Of two points of a
        seed at one number of labels the later counts; missing errors are not points.

        Raises:
            InputError: an error is not positive, or there is no point at all.
        """
        known: dict[int, tuple[Floats, Floats]] = {}
        for seed in sorted(points):
            labels, errors = (np.asarray(part, dtype=np.float64) for part in points[seed])
            if np.any(errors <= 0) or np.any(labels <= 0):
                raise InputError(f"seed {seed} has an error or a number of labels that is not positive.")
            last = {float(n): float(e) for n, e in zip(labels, errors, strict=True) if np.isfinite(e)}
            if last:
                grid = np.array(sorted(last))
                known[seed] = grid, np.array([last[n] for n in grid])
        if not known:
            raise InputError("there is no error to draw a learning curve from.")
        every = np.unique(np.concatenate([grid for grid, _ in known.values()]))
        rows = [_interpolated(every, *known[seed]) for seed in known]
        return SeedCurves(every, tuple(known), np.stack(rows))

    def on(self, labels: Floats) -> Floats:
        """Errors [seeds, n] at other numbers of labels, interpolated."""
        rows = []
        for row in self.errors:
            own = np.isfinite(row)
            rows.append(_interpolated(labels, self.labels[own], row[own]))
        return np.stack(rows)

    def of(self, seeds: Sequence[int]) -> SeedCurves:
        """The curves of some of the seeds."""
        rows = [self.seeds.index(seed) for seed in seeds]
        return SeedCurves(self.labels, tuple(seeds), self.errors[rows])

    def common(self) -> SeedCurves:
        """The part of the grid on which every seed has an error."""
        whole = np.isfinite(self.errors).all(axis=0)
        return SeedCurves(self.labels[whole], self.seeds, self.errors[:, whole])


def _interpolated(labels: Floats, own: Floats, errors: Floats) -> Floats:
    found = np.exp(np.interp(np.log(labels), np.log(own), np.log(errors), left=np.nan, right=np.nan))
    place = np.searchsorted(own, labels).clip(max=len(own) - 1)
    return np.where(own[place] == labels, errors[place], found)  # a measured point stays what it is, to the last bit


def paired_curves(selector: SeedCurves, baseline: SeedCurves) -> tuple[SeedCurves, SeedCurves]:
    """The seeds that both have, on one grid; NaN where either of the two has no error."""
    seeds = tuple(seed for seed in selector.seeds if seed in baseline.seeds)
    grid = np.union1d(selector.labels, baseline.labels)
    if not seeds:
        nothing = np.empty((0, len(grid)))
        return SeedCurves(grid, (), nothing), SeedCurves(grid, (), nothing)
    a, b = selector.of(seeds).on(grid), baseline.of(seeds).on(grid)
    both: NDArray[np.bool_] = np.isfinite(a) & np.isfinite(b)
    kept = np.flatnonzero(both.any(axis=1))
    a, b = np.where(both, a, np.nan)[kept], np.where(both, b, np.nan)[kept]
    seeds = tuple(seeds[row] for row in kept)
    return SeedCurves(grid, seeds, a), SeedCurves(grid, seeds, b)


def final_errors(curves: SeedCurves) -> Floats:
    """[seeds] error at the largest number of labels of each seed."""
    if not curves.seeds:
        return np.empty(0)
    last = curves.errors.shape[1] - 1 - np.argmax(np.isfinite(curves.errors)[:, ::-1], axis=1)
    return curves.errors[np.arange(len(last)), last]


def log_error_area(labels: ArrayLike, errors: ArrayLike) -> Floats:
    """Mean of the logarithm of the error over a learning curve, by the trapezoidal rule.

    ``A = 1 / (x_n - x_1) * integral of ln e dx`` with x = ln(labels), in which every doubling of the labels weighs the
    same.  The normalisation makes exp(A) the geometric mean error of the curve, and exp(A - A') the mean ratio of the
    errors of two curves.

    Args:
        labels: [n] ascending.
        errors: [..., n]; NaN at the ends is left out, a curve of one point has the logarithm of that.

    Returns:
        [...], NaN where there is no error.
    """
    n, e = np.asarray(labels, dtype=np.float64), np.asarray(errors, dtype=np.float64)
    x = np.log(n)
    flat = e.reshape(-1, len(n))
    areas = np.full(len(flat), np.nan)
    for place, row in enumerate(flat):
        own = np.isfinite(row)
        if own.sum() == 1:
            areas[place] = np.log(row[own][0])
        elif own.any():
            areas[place] = np.trapezoid(np.log(row[own]), x[own]) / np.ptp(x[own])
    return areas.reshape(e.shape[:-1])


# ----------------------------------------------------------------------------------------------------------- intervals


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its interval; numbers or arrays of one shape.

    Attributes:
        center: geometric mean (or mean).
        low: lower end; NaN with fewer than two seeds.
        high: upper end.
        count: number of seeds.
    """

    center: Floats
    low: Floats
    high: Floats
    count: NDArray[np.int_]

    def __format__(self, spec: str) -> str:
        """The mean with its interval in brackets, by a format of numbers; alone where there is no interval.

        >>> f"{t_interval([1.0, 1.1]):.2f}, {t_interval([2.0]):.1f}"
        '1.05 (0.57 to 1.92), 2.0'
        """
        center, low, high = (format(float(end), spec) for end in (self.center, self.low, self.high))
        return f"{center} ({low} to {high})" if self.count > 1 else center


def t_interval(values: ArrayLike, level: float = LEVEL, *, log: bool = True) -> Interval:
    """Student's interval of the mean over seeds: of the logarithms, and taken back (``log``), or of the values.

    ``mean +- t(1/2 + level/2; n - 1) * s / sqrt(n)``.

    Args:
        values: [seeds, ...]; NaN where a seed has no value.
        level: confidence level.
        log: whether it is the geometric mean of positive values.

    Returns:
        center, ends and counts, [...] each.
    """
    x = _logarithms(values) if log else np.asarray(values, dtype=np.float64)
    known = np.isfinite(x)
    count = known.sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = np.where(known, x, 0.0).sum(axis=0) / count
        variance = np.where(known, (x - mean) ** 2, 0.0).sum(axis=0) / (count - 1)
        half = stats.t.ppf(0.5 + 0.5 * level, count - 1) * np.sqrt(variance / count)
    ends = mean, mean - half, mean + half
    center, low, high = (np.exp(end) if log else end for end in ends)
    return Interval(center, low, high, count)


def _logarithms(values: ArrayLike) -> Floats:
    x = np.asarray(values, dtype=np.float64)
    if np.any(x <= 0):
        raise InputError("only positive values have a geometric mean.")
    return np.log(x)


# ---------------------------------------------------------------------------------------------------- labels to target


@dataclass(frozen=True)
class Bounds:
    """A number that is known, ``low == high``, or only bounded; numbers or arrays of one shape.

    A curve that never reaches its target needs more labels than it has: (last, inf).  One that is there from its first
    point on needs at most those: (0, first).
    """

    low: Floats
    high: Floats

    @property
    def finite(self) -> Floats:
        """The number, or the bound that there is."""
        return np.where(np.isfinite(self.high), self.high, self.low)

    @property
    def beyond(self) -> NDArray[np.bool_]:
        """Whether it is bounded from below alone."""
        return np.isinf(self.high)

    def over(self, other: Bounds) -> Bounds:
        """Bounds of the ratio of two positive numbers."""
        with np.errstate(divide="ignore"):
            return Bounds(np.divide(self.low, other.high), np.divide(self.high, other.low))


def labels_to_target(labels: ArrayLike, errors: ArrayLike, target: ArrayLike) -> Bounds:
    """Number of labels at which a learning curve first reaches a target.

    Between two points the logarithm of the error is linear in the logarithm of the labels.

    Args:
        labels: [n] ascending.
        errors: [..., n]; NaN at the ends is not a point.
        target: [...] error to reach, of each curve or one for all.

    Returns:
        [...]; a curve without any point is bounded by 0 and inf.
    """
    n, e = np.asarray(labels, dtype=np.float64), np.asarray(errors, dtype=np.float64)
    goal = np.broadcast_to(np.asarray(target, dtype=np.float64), e.shape[:-1])
    known = np.isfinite(e)
    reached = known & (e <= goal[..., None] * (1 + 1e-12))
    there = np.argmax(reached, axis=-1)
    first = np.argmax(known, axis=-1)
    last = e.shape[-1] - 1 - np.argmax(known[..., ::-1], axis=-1)
    before = np.maximum(there - 1, 0)

    def take(index: NDArray[np.int_]) -> Floats:
        return np.take_along_axis(e, index[..., None], axis=-1)[..., 0]

    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.log(goal / take(before)) / np.log(take(there) / take(before))
        crossing = np.exp(np.log(n[before]) + np.clip(share, 0, 1) * np.log(n[there] / n[before]))
    some, ever, at_once = known.any(axis=-1), reached.any(axis=-1), reached.any(axis=-1) & (there == first)
    low = np.where(at_once, 0.0, np.where(ever, crossing, np.where(some, n[last], 0.0)))
    high = np.where(at_once, n[first], np.where(ever, crossing, np.inf))
    return Bounds(low, high)


def labels_ratio(
    selector: SeedCurves, baseline: SeedCurves, level: float = LEVEL, *, resamples: int = 1000, seed: int = 0
) -> tuple[Bounds, Bounds]:
    """Labels that the baseline needs over those that the selector needs, for the baseline's final error.

    Both are read off the geometric mean curve over the seeds, where every seed of both has an error.  The interval
    comes from resampled seeds, the same ones for both: quantiles of the lower and of the upper bounds, so that what is
    only bounded stays so.

    Args:
        selector: of `paired_curves`.
        baseline: of `paired_curves`.
        level: confidence level.
        resamples: how many.
        seed: of the resampling.

    Returns:
        the ratio, above 1 where the selector saves labels; and its interval, (0, inf) with fewer than two seeds.
    """
    whole = np.isfinite(selector.errors).all(axis=0) & np.isfinite(baseline.errors).all(axis=0)
    nothing = Bounds(np.array(0.0), np.array(np.inf))
    if not selector.seeds or not whole.any():
        return nothing, nothing
    labels, logs = selector.labels[whole], [np.log(curves.errors[:, whole]) for curves in (selector, baseline)]

    def ratio(picked: NDArray[np.int_]) -> Bounds:  # [..., seeds] rows
        ours, theirs = (np.exp(log[picked].mean(axis=-2)) for log in logs)
        target = theirs[..., -1]
        return labels_to_target(labels, theirs, target).over(labels_to_target(labels, ours, target))

    count = len(selector.seeds)
    found = ratio(np.arange(count))
    if count < 2:
        return found, nothing
    again = ratio(np.random.default_rng(seed).integers(0, count, size=(resamples, count)))
    rank = int(np.floor(0.5 * (1 - level) * resamples))  # a rank and no interpolation: some of these are infinite
    return found, Bounds(np.sort(again.low)[rank], np.sort(again.high)[resamples - 1 - rank])


# --------------------------------------------------------------------------------------------------------- paired tests


@dataclass(frozen=True)
class Paired:
    """A selector against the baseline over their common seeds.

    Attributes:
        ratio: geometric mean of selector / baseline; below 1 the selector is better.
        low: lower end of the t interval of the ratio.
        high: upper end.
        p_t: two-sided p of the paired t-test on the logarithms.
        p_wilcoxon: two-sided p of Wilcoxon's signed-rank test on the logarithms; exact, or asymptotic for more than 14
            pairs with ties.
        seeds: number of pairs.
        least_p: the smallest ``p_wilcoxon`` that this number of pairs can give, 2^(1 - pairs that differ).
    """

    ratio: float
    low: float
    high: float
    p_t: float
    p_wilcoxon: float
    seeds: int
    least_p: float


def paired(log_selector: ArrayLike, log_baseline: ArrayLike, level: float = LEVEL) -> Paired:
    """Compares logarithms of errors, or of areas, seed by seed.

    Args:
        log_selector: [seeds].
        log_baseline: [seeds], of the same seeds in the same order.
        level: confidence level.

    Raises:
        InputError: there are fewer than two seeds.
    """
    d = np.asarray(log_selector, dtype=np.float64) - np.asarray(log_baseline, dtype=np.float64)
    d = d[np.isfinite(d)]
    if len(d) < 2:
        seeds = "1 seed has" if len(d) == 1 else "no seed has"
        raise InputError(f"{seeds} both the selector and the baseline; a paired comparison needs at least 2.")
    ratio = t_interval(np.exp(d), level)
    different = int(np.count_nonzero(d))
    if not different:
        return Paired(1.0, 1.0, 1.0, 1.0, 1.0, len(d), 1.0)
    with warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore"):
        warnings.simplefilter("ignore")  # equal differences: t is infinite and p 0, as it should be
        p_t = float(stats.ttest_1samp(d, 0.0).pvalue)
    return Paired(
        float(ratio.center),
        float(ratio.low),
        float(ratio.high),
        p_t,
        _wilcoxon(d[d != 0]),
        len(d),
        2.0 ** (1 - different),
    )


def _wilcoxon(differences: Floats) -> float:
    """p of the signed-rank test; its usual distribution holds without ties; with ties all signs are tried."""
    tied = len(np.unique(np.abs(differences))) < len(differences)
    if not tied:
        return float(stats.wilcoxon(differences, method="exact").pvalue)
    if len(differences) > 14:
        return float(stats.wilcoxon(differences, method="asymptotic").pvalue)
    every_sign = stats.PermutationMethod(n_resamples=2 ** len(differences))
    return float(stats.wilcoxon(differences, method=every_sign).pvalue)


def holm(p: ArrayLike) -> Floats:
    """p values adjusted for their number after Holm, Scand. J. Stat. 6, 65 (1979).

    The i-th smallest of m becomes ``max over j <= i of (m - j + 1) p_j``, at most 1.  NaN is not a test and stays NaN.
    """
    values = np.asarray(p, dtype=np.float64)
    adjusted = np.full(values.shape, np.nan)
    tested = np.flatnonzero(np.isfinite(values))
    order = tested[np.argsort(values[tested], kind="stable")]
    steps = np.arange(len(order), 0, -1) * values[order]
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted


def seeds_needed(tests: int, alpha: float = 0.05) -> int:
    """Smallest number of pairs with which Wilcoxon's test can stay below alpha among that many tests after Holm."""
    return int(np.ceil(1 + np.log2(tests / alpha) - 1e-12))


# ------------------------------------------------------------------------------------------------------------- profiles


def performance_ratios(costs: ArrayLike) -> Floats:
    """Cost over the smallest cost of each problem, after Dolan and More, Math. Program. 91, 201 (2002).

    Args:
        costs: [problems, solvers] positive; inf where a problem is not solved.

    Returns:
        [problems, solvers]; inf where it is not solved.
    """
    cost = np.asarray(costs, dtype=np.float64)
    best = cost.min(axis=1, keepdims=True)
    return np.divide(cost, best, out=np.full_like(cost, np.inf), where=np.isfinite(cost))


def profile(ratios: ArrayLike, x: ArrayLike) -> Floats:
    """Share of the problems that each solver solves within x times the smallest cost, [len(x), solvers].

    Args:
        ratios: [problems, solvers] of `performance_ratios`.
        x: [k] factors, 1 and above.
    """
    r, factors = np.asarray(ratios, dtype=np.float64), np.asarray(x, dtype=np.float64)
    return np.mean(r[None] <= factors[:, None, None], axis=1)
