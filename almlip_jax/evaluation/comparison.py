"""Comparison of selectors with a baseline, from the table of a sweep: summary rows, profiles, evolution over rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Self, TypeVar

import numpy as np
import pandas as pd

from almlip_jax.errors import InputError
from almlip_jax.evaluation.statistics import (
    LEVEL,
    Bounds,
    Floats,
    Interval,
    Paired,
    SeedCurves,
    final_errors,
    holm,
    labels_ratio,
    labels_to_target,
    log_error_area,
    paired,
    paired_curves,
    performance_ratios,
    seeds_needed,
    t_interval,
)
from almlip_jax.evaluation.tidy import Case, by_case, by_selector, error_columns, require

Curves = Mapping[Case, Mapping[str, SeedCurves]]
"""Learning curves of each case and selector."""

ALPHA = 0.05
"""Significance level that notes refer to."""


def learning_curves(table: pd.DataFrame, quantity: str = "forces_rmse") -> dict[Case, dict[str, SeedCurves]]:
    """Learning curves of each case and selector.

    Args:
        table: of `tidy.read_tables`.
        quantity: one of `tidy.error_columns`.

    Raises:
        InputError: there is no such quantity, or it has no value.
    """
    if quantity not in error_columns():
        raise InputError(f"there is no error '{quantity}'; choose one of {', '.join(error_columns())}.")
    require(table, [quantity])
    curves: dict[Case, dict[str, SeedCurves]] = {}
    for case, part in by_case(table[table[quantity].notna()]):
        for selector, rows in by_selector(part):
            points = {
                int(seed): (own["labels"].to_numpy(float), own[quantity].to_numpy(float))
                for seed, own in rows.sort_values("round").groupby("seed")
            }
            curves.setdefault(case, {})[selector] = SeedCurves.from_points(points)
    return curves


class Seeded(Protocol):
    """What there is of each of some seeds."""

    @property
    def seeds(self) -> tuple[int, ...]:
        """Their numbers."""
        ...

    def of(self, seeds: Sequence[int]) -> Self:
        """The part of some of them."""
        ...


AnySeeded = TypeVar("AnySeeded", bound=Seeded)


def shared_seeds(
    drawn: Mapping[Case, Mapping[str, AnySeeded]], *others: Mapping[Case, Mapping[str, Seeded]]
) -> tuple[dict[Case, dict[str, AnySeeded]], list[str]]:
    """What is drawn side by side, for the seeds that all of it shares: seeds differ more than selectors do.

    Where no seed is common to all selectors of a case, those with the fewest seeds are left out until one is.

    Args:
        drawn: of each case and selector.
        others: what is drawn in the same panels.

    Returns:
        the same of the shared seeds, and sentences on what was left out.
    """
    shared: dict[Case, dict[str, AnySeeded]] = {}
    notes = []
    for case, selectors in drawn.items():
        known = {name: set(one.seeds) for name, one in selectors.items()}
        for other in others:
            for name, one in other.get(case, {}).items():
                known[name] = known.get(name, set(one.seeds)) & set(one.seeds)
        every = set().union(*known.values())
        while known and not set.intersection(*known.values()):
            fewest = min(reversed(known), key=lambda name: len(known[name]))
            notes.append(f"{case.title(drawn)}: {fewest} is not drawn, since it shares no seed with the others.")
            del known[fewest]
        seeds = sorted(set.intersection(*known.values())) if known else []
        if seeds and len(seeds) < len(every):
            notes.append(f"{case.title(drawn)}: only the {len(seeds)} of {len(every)} seeds that all share are drawn.")
        shared[case] = {name: selectors[name].of(seeds) for name in selectors if name in known}
    return {case: selectors for case, selectors in shared.items() if selectors}, notes


# ------------------------------------------------------------------------------------------------------------- summary


@dataclass(frozen=True)
class Comparison:
    """One selector in one case.

    Attributes:
        case: what it was compared in.
        selector: its name.
        seeds: number of seeds; of pairs with the baseline where there are any.
        labels: largest number of labels that all its seeds reach.
        error: error there, in the unit of the table, with its t interval over seeds.
        area_error: geometric mean error over the curve (`statistics.log_error_area` in ln(labels)).
        final: error over the baseline's at the last number of labels of both; None where nothing is paired.
        area: ``area_error`` over the baseline's, likewise.
        final_holm: p of the t-test and of Wilcoxon's test for ``final``, adjusted for the selectors of the case.
        area_holm: the same for ``area``.
        saving: labels that the baseline needs over those that the selector needs, for the baseline's final error.
        saving_interval: its interval.
        reached: number of pairs in which the selector comes down to the baseline's final error.
    """

    case: Case
    selector: str
    seeds: int
    labels: int
    error: Interval
    area_error: Interval
    final: Paired | None = None
    area: Paired | None = None
    final_holm: tuple[float, float] = (np.nan, np.nan)
    area_holm: tuple[float, float] = (np.nan, np.nan)
    saving: Bounds | None = None
    saving_interval: Bounds | None = None
    reached: int | None = None


@dataclass(frozen=True)
class ComparisonTable:
    """Every selector in every case, against one baseline.

    Attributes:
        rows: case by case, the baseline first.
        quantity: column of the errors.
        baseline: name of the selector that the others are compared with.
        level: confidence level of the intervals.
        notes: sentences on what the numbers cannot show.
    """

    rows: tuple[Comparison, ...]
    quantity: str
    baseline: str
    level: float
    notes: tuple[str, ...]

    def frame(self) -> pd.DataFrame:
        """One tidy row for each row, in the units of the sweep's table; NaN where there is nothing to say."""
        return pd.DataFrame([self._flat(row) for row in self.rows])

    def _flat(self, row: Comparison) -> dict[str, object]:
        flat: dict[str, object] = {**row.case._asdict(), "selector": row.selector, "baseline": self.baseline}
        flat |= {"quantity": self.quantity, "seeds": row.seeds, "labels": row.labels}
        for name, interval in (("error", row.error), ("area_error", row.area_error)):
            flat |= {name: float(interval.center), f"{name}_low": float(interval.low)}
            flat[f"{name}_high"] = float(interval.high)
        for name, pair, adjusted in (("final", row.final, row.final_holm), ("area", row.area, row.area_holm)):
            fields = ("ratio", "low", "high", "p_t", "p_wilcoxon")
            flat |= {f"{name}_{field}": getattr(pair, field) if pair else np.nan for field in fields}
            flat |= {f"{name}_p_t_holm": adjusted[0], f"{name}_p_wilcoxon_holm": adjusted[1]}
        for name, bounds in (("labels_ratio", row.saving), ("labels_ratio_interval", row.saving_interval)):
            flat |= {f"{name}_low": float(bounds.low) if bounds else np.nan}
            flat |= {f"{name}_high": float(bounds.high) if bounds else np.nan}
        flat["reached"] = np.nan if row.reached is None else row.reached
        return flat


def compare(
    table: pd.DataFrame, baseline: str = "random", *, quantity: str = "forces_rmse", level: float = LEVEL
) -> ComparisonTable:
    """Compares every selector with a baseline, seed by seed.

    A selector with fewer than two seeds in common with the baseline has no ratios, and a note says so.

    Args:
        table: of `tidy.read_tables`.
        baseline: a selector of the table.
        quantity: one of `tidy.error_columns`.
        level: confidence level of the intervals.

    Raises:
        InputError: no case has the baseline, nothing at all can be compared, or the quantity has no value.
    """
    curves = learning_curves(table, quantity)
    _require_baseline(curves, baseline)
    rows: list[Comparison] = []
    notes: dict[str, list[str]] = {}  # sentence -> the cases that it is true of
    for case, selectors in curves.items():
        said: list[str] = []
        if baseline not in selectors:
            said.append(f"there is no '{baseline}' to compare with.")
        order = [name for name in (baseline,) if name in selectors] + [name for name in selectors if name != baseline]
        rows += _adjusted([_row(case, name, selectors, baseline, level, said) for name in order], said)
        for sentence in said:
            notes.setdefault(sentence, []).append(case.title(curves))
    if not any(row.final for row in rows):
        raise InputError(
            f"no selector has 2 seeds in common with '{baseline}'; a paired comparison needs at least 2 seeds of both."
        )
    return ComparisonTable(tuple(rows), quantity, baseline, level, tuple(_merged(notes, len(curves))))


def _merged(notes: Mapping[str, Sequence[str]], cases: int) -> list[str]:
    places = {text: "everywhere" if 1 < len(own) == cases else "; ".join(own) for text, own in notes.items()}
    return [f"{place}: {text}" for text, place in places.items()]


def _require_baseline(curves: Curves, baseline: str) -> None:
    names = sorted({name for selectors in curves.values() for name in selectors})
    if baseline not in names:
        raise InputError(f"there is no selector '{baseline}' to compare with; the table has {', '.join(names)}.")
    if names == [baseline]:
        raise InputError(f"the table has no selector other than '{baseline}'; there is nothing to compare with it.")


def _row(
    case: Case,
    name: str,
    selectors: Mapping[str, SeedCurves],
    baseline: str,
    level: float,
    said: list[str],
) -> Comparison:
    curves = selectors[name]
    summary = _summary(case, name, curves, level)
    whole = curves.common()
    ends = {float(curves.labels[np.isfinite(row)][-1]) for row in curves.errors}
    if len(ends) > 1 or not len(whole.labels):
        said.append(f"seeds of {name} end at {min(ends):g} to {max(ends):g} labels.")
    if name == baseline or baseline not in selectors:
        return summary
    ours, theirs = paired_curves(curves, selectors[baseline])
    own, other = (np.log(final_errors(both)) for both in (ours, theirs))
    try:
        final = paired(own, other, level)
    except InputError as error:
        said.append(f"{name}: {error}")
        return summary
    if final.seeds < len(curves.seeds):
        said.append(f"{final.seeds} of {len(curves.seeds)} seeds of {name} are paired with {baseline}.")
    areas = [log_error_area(both.labels, both.errors) for both in (ours, theirs)]
    saving, interval = labels_ratio(ours, theirs, level)
    reached = labels_to_target(ours.labels, ours.errors, np.exp(other))
    return replace(
        summary,
        seeds=final.seeds,
        final=final,
        area=paired(areas[0], areas[1], level),
        saving=saving,
        saving_interval=interval,
        reached=int(np.isfinite(reached.high).sum()),
    )


def _summary(case: Case, name: str, curves: SeedCurves, level: float) -> Comparison:
    whole = curves.common()
    last = int(whole.labels[-1]) if len(whole.labels) else int(curves.labels[-1])
    errors = whole.errors[:, -1] if len(whole.labels) else curves.errors[:, -1]
    area = np.exp(log_error_area(curves.labels, curves.errors))
    return Comparison(case, name, len(curves.seeds), last, t_interval(errors, level), t_interval(area, level))


def _adjusted(rows: Sequence[Comparison], said: list[str]) -> list[Comparison]:
    """Holm's correction over the selectors of one case, and what it leaves no chance to."""

    def column(measure: str, test: str) -> Floats:
        pairs = [getattr(row, measure) for row in rows]
        return np.array([getattr(pair, test) if pair else np.nan for pair in pairs])

    p = {(m, t): holm(column(m, t)) for m in ("final", "area") for t in ("p_t", "p_wilcoxon")}
    least = holm(column("area", "least_p"))
    hopeless = [n for n in range(len(rows)) if least[n] > ALPHA]
    if hopeless:
        tests = int(np.isfinite(least).sum())
        names = ", ".join(rows[n].selector for n in hopeless)
        seeds = sorted({rows[n].seeds for n in hopeless})
        told = str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
        said.append(
            f"with {told} seeds Wilcoxon's test cannot fall below p = {min(least[hopeless]):.2g} for {names}, "
            f"corrected for {tests} selector{'s' if tests > 1 else ''}; {seeds_needed(tests, ALPHA)} seeds could."
        )
    return [
        replace(
            row,
            final_holm=(float(p["final", "p_t"][n]), float(p["final", "p_wilcoxon"][n])),
            area_holm=(float(p["area", "p_t"][n]), float(p["area", "p_wilcoxon"][n])),
        )
        for n, row in enumerate(rows)
    ]


# ------------------------------------------------------------------------------------------------------------ profiles


@dataclass(frozen=True)
class Profiles:
    """Labels that each selector needs, relative to the best one, problem by problem.

    A problem is a case and a seed; it is solved at the baseline's final error there.

    Attributes:
        selectors: their names, the baseline first.
        problems: case and seed of each row.
        ratios: [problems, selectors], 1 for the best; inf where the target is not reached.
        notes: sentences on what was left out.
    """

    selectors: tuple[str, ...]
    problems: tuple[tuple[Case, int], ...]
    ratios: Floats
    notes: tuple[str, ...]


def performance_profiles(curves: Curves, baseline: str = "random") -> Profiles:
    """Dolan-More profiles of the number of labels to the baseline's final error.

    Problems count in which every selector has a run that reached the target, or went as far as the baseline without
    reaching it.  A run that is at the target from its first point on is charged for that point.

    Args:
        curves: of `learning_curves`.
        baseline: sets the targets.

    Raises:
        InputError: there is no baseline, or no problem that every selector has been tried on.
    """
    _require_baseline(curves, baseline)
    every = dict.fromkeys([baseline, *(name for selectors in curves.values() for name in selectors)])
    problems: list[tuple[Case, int]] = []
    costs: list[list[float]] = []
    left_out = 0
    for case, selectors in curves.items():
        for seed in sorted({seed for one in selectors.values() for seed in one.seeds}):
            cost = _costs(seed, selectors, list(every), baseline)
            if cost is None:
                left_out += 1
            else:
                problems.append((case, seed))
                costs.append(cost)
    if not problems:
        raise InputError("there is no system and seed on which every selector has been run to the end.")
    notes = [f"{left_out} of {left_out + len(problems)} problems lack a run of some selector."] if left_out else []
    return Profiles(tuple(every), tuple(problems), performance_ratios(costs), tuple(notes))


def _costs(seed: int, selectors: Mapping[str, SeedCurves], names: Sequence[str], baseline: str) -> list[float] | None:
    if any(name not in selectors or seed not in selectors[name].seeds for name in names):
        return None
    own = {name: selectors[name].of([seed]).common() for name in names}
    target, end = own[baseline].errors[0, -1], own[baseline].labels[-1]
    needed = {name: labels_to_target(one.labels, one.errors[0], target) for name, one in own.items()}
    if any(not np.isfinite(needed[name].high) and own[name].labels[-1] < end for name in names):
        return None
    return [float(needed[name].high) if needed[name].high <= end else np.inf for name in names]


# ----------------------------------------------------------------------------------------------------------- evolution


@dataclass(frozen=True)
class Evolution:
    """A column of the table over the rounds of one selector.

    Attributes:
        rounds: [n].
        values: [seeds, n]; NaN where a seed has no value.
        seeds: their numbers.
    """

    rounds: Floats
    values: Floats
    seeds: tuple[int, ...]

    def of(self, seeds: Sequence[int]) -> Evolution:
        """The part of some of the seeds."""
        rows = [self.seeds.index(seed) for seed in seeds]
        return Evolution(self.rounds, self.values[rows], tuple(seeds))


def evolution(
    table: pd.DataFrame, column: str, *, positive: bool = False, by_test: bool = True
) -> dict[Case, dict[str, Evolution]]:
    """A column over the rounds, for each case and selector that has values of it.

    Args:
        table: of `tidy.read_tables`.
        column: which one.
        positive: whether values of 0 and below are no values, because logarithms are to be taken.
        by_test: False for what does not depend on the test set: one case then stands for all tests of a system, and
            its ``test`` is empty.

    Raises:
        InputError: the column is missing or has no value.
    """
    require(table, [column])
    known = table[table[column].notna() & ((table[column] > 0) | (not positive))]
    if known.empty:
        raise InputError(f"column '{column}' of the table has no value above 0.")
    if not by_test:
        known = known.assign(test="")
        known = known.drop_duplicates(["system", "ensemble_size", "batch_size", "selector", "seed", "round"])
    evolutions: dict[Case, dict[str, Evolution]] = {}
    for case, part in by_case(known):
        for selector, rows in by_selector(part):
            grid = rows.pivot(index="seed", columns="round", values=column)
            evolutions.setdefault(case, {})[selector] = Evolution(
                grid.columns.to_numpy(float), grid.to_numpy(float), tuple(int(seed) for seed in grid.index)
            )
    return evolutions
