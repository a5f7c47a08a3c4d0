"""A whole sweep: what is asked for and not done yet, in this process or in others, and the table of all of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import jax
import pandas as pd
from rich.table import Table

from almlip_jax.campaign.consistency import check_columns
from almlip_jax.config import config_text
from almlip_jax.evaluation.tables import aligned, number
from almlip_jax.files import Cell, write_text
from almlip_jax.kinds import check_user_code
from almlip_jax.progress import Progress, SilentProgress
from almlip_jax.run_log import logged
from almlip_jax.sweep.bench import Bench, check_others
from almlip_jax.sweep.course import rounds_left, run_points, train_firsts
from almlip_jax.sweep.points import First, Group, Only, all_points, first_groups, is_wanted, point_groups
from almlip_jax.sweep.records import FINISHED, SweepDirectory, write_table
from almlip_jax.sweep.settings import SweepConfig
from almlip_jax.targets import further_targets
from almlip_jax.work_directory import write_versions


@dataclass(frozen=True)
class SweepResult:
    """What a sweep has come to.

    Attributes:
        out: its folder.
        rows: of ``results.csv``.
        points: in all.
        complete: points with all their rounds.
        cut: points that ended early.
    """

    out: Path
    rows: list[dict[str, Cell]]
    points: int
    complete: int
    cut: int

    def summary(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "out": str(self.out),
            "results": str(self.out / "results.csv"),
            "points": self.points,
            "complete": self.complete,
            "ended_early": self.cut,
            "curves_end": _ends(self.rows),
        }


def run_sweep(
    config: SweepConfig, out: Path, *, only: Only | None = None, progress: Progress | None = None
) -> SweepResult:
    """Runs a sweep, or what is left of it.

    Args:
        config: of the sweep; its folder as `SweepConfig.based` gives it.
        out: folder of the sweep.  What is there already is kept; points whose settings differ from it are refused.
        only: which points are asked for; all by default.
        progress: tells the user; nothing is told by default.

    Returns:
        what all points in the folder have come to, those of earlier calls included.

    Raises:
        InputError: a file or setting cannot be used, or the folder holds points that were made otherwise.
    """
    check_user_code(config)
    folder = SweepDirectory(out)
    wanted = [point for point in all_points(config) if is_wanted(point, only or {})]
    bench = Bench(config, folder)
    for name in dict.fromkeys(point.system for point in wanted):
        notes = bench.system(
            name
        ).pool.notes  # whatever is wrong with its files is said before anything runs or is written
        for note in notes:
            (progress or SilentProgress()).message(f"{name}: {note}")
    for name, settings in config.selectors.items():
        check_columns(settings, max(config.batch_sizes), f"selectors.{name}")
    with (
        folder.lock(),
        jax.enable_x64(config.precision == "float64"),
        logged(progress or SilentProgress(), folder.log) as shown,
    ):
        groups = [*first_groups(config, wanted), *point_groups(config, wanted)]
        check_others(bench, wanted)
        session = _Session(bench, groups, shown)
        write_text(folder.config, config_text(config))
        if said := write_versions(folder):
            shown.message(said)
        session.work()
        return _result(bench)


class _Session:
    """One call of a sweep at work.

    Args:
        bench: tools.
        groups: all that is asked for, what others begin with first.
        progress: tells the user.
    """

    def __init__(self, bench: Bench, groups: Sequence[Group], progress: Progress) -> None:
        self.bench = bench
        self.progress = progress
        left = {group: rounds_left(bench, group) for group in groups}
        self.phases = [
            [group for group in groups if left[group] and isinstance(group.members[0], First) is first]
            for first in (True, False)
        ]
        self.total = sum(left.values())
        self.done = 0

    def work(self) -> None:
        """All groups, in this process or in others."""
        if not self.phases[1]:
            return
        if self.bench.config.executor.in_process:
            self._alone()
        else:
            self._together()

    def _alone(self) -> None:
        self.progress.round(0, self.total)

        def on_round() -> None:
            self._count(1)
            if self.done < self.total:
                self.progress.round(self.done, self.total)

        for group in self.phases[0]:
            train_firsts(self.bench, group, self.progress, on_round)
        for group in self.phases[1]:
            run_points(self.bench, group, self.progress, on_round)

    def _together(self) -> None:
        most = max(len(phase) for phase in self.phases)
        workers = self.bench.config.executor.crew(self.bench, most, self.progress.message)
        with workers, self.progress.stage("sweep", self.total, unit="rounds") as advance:

            def on_rounds(number: int) -> None:
                self._count(number)
                advance(number)

            for phase in self.phases:
                workers.work(phase, on_rounds)

    def _count(self, number: int) -> None:
        self.done += number
        write_table(self.bench.folder, self.bench.config, all_points(self.bench.config))


def _result(bench: Bench) -> SweepResult:
    points = all_points(bench.config)
    rows = write_table(bench.folder, bench.config, points)
    ends = [state.ended for point in points if (state := bench.folder.state(point)) is not None]
    complete = ends.count(FINISHED)
    return SweepResult(bench.folder.path, rows, len(points), complete, len(ends) - ends.count(None) - complete)


def _ends(rows: Sequence[Mapping[str, Cell]]) -> list[dict[str, Any]]:
    """Where the learning curves end: mean errors over the seeds at the most labels that any of them has."""
    if not rows:
        return []
    table, errors = pd.DataFrame(rows), list(_errors())
    known = table[table["labels"].notna() & table[errors].notna().any(axis=1)]
    ends = []
    for key, curve in known.groupby(list(_CURVE), sort=False):
        last = curve[curve["labels"] == curve["labels"].max()]
        means = {name: float(found.mean()) if len(found := last[name].dropna()) else None for name in errors}
        labels = int(curve["labels"].max())
        ends.append(dict(zip(_CURVE, key, strict=True)) | {"seeds": len(last), "labels": labels} | means)
    return ends


def render_result(result: SweepResult) -> Table:
    """A result as a table for a terminal."""
    title = f"{result.complete} of {result.points} points complete"
    if result.cut:
        title += f", {result.cut} ended early (empty rows)"
    ends = _ends(result.rows)
    shown = [name for name in _errors() if name == "forces_rmse" or any(end[name] is not None for end in ends)]
    titles = ("system", "selector", "members", "batch", "test", "seeds", "labels", *(_errors()[name] for name in shown))
    table = aligned(f"{title}; {result.out / 'results.csv'}", titles, ("system", "selector", "test"))
    for end in ends:
        numbers = [number(None if end[name] is None else 1e3 * end[name]) for name in shown]
        table.add_row(*(str(end[name]) for name in (*_CURVE, "seeds", "labels")), *numbers)
    return table


_CURVE: Final = ("system", "selector", "ensemble_size", "batch_size", "test")
"""What tells learning curves apart, the seeds apart."""


def _errors() -> dict[str, str]:
    """Errors that are shown where curves end; those of stresses, dipoles and the like where some system has them."""
    further = {f"{one.label}_rmse": f"{one.label} RMSE {one.shown}" for one in further_targets()}
    return {"forces_rmse": "F RMSE meV/A", "stress_rmse": "S RMSE meV/A^3"} | further
