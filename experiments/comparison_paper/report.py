"""The table of the study for people: paired ratios with intervals, and figures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from sources import SOURCES
from study import KEY

from almlip_jax.evaluation.comparison import compare, learning_curves
from almlip_jax.evaluation.statistics import (
    Interval,
    Paired,
    SeedCurves,
    holm,
    labels_ratio,
    log_error_area,
    paired,
    paired_curves,
    t_interval,
)
from almlip_jax.evaluation.summary import bound, number
from almlip_jax.figures.learning_curves import learning_curves as draw_curves
from almlip_jax.figures.paired_ratio import paired_ratio
from almlip_jax.figures.style import save

HEAD = (
    "set, test, descriptors, members, batch",
    "strategy",
    "seeds",
    "MAE at the end",
    "R2",
    "MAE / random at the end",
    "p (t)",
    "p (Wilcoxon)",
    "MAE / random over the curve",
    "labels of random / own",
    "Spearman of spread and error",
)


def curves(part: pd.DataFrame) -> SeedCurves:
    """MAE against labels of each seed of one strategy."""
    own = part.sort_values("labels").groupby("seed")
    return SeedCurves.from_points({int(seed): (rows.labels.to_numpy(), rows.mae.to_numpy()) for seed, rows in own})


def summary(table: pd.DataFrame) -> str:
    """Each strategy of each cell against random selection, in Markdown; p values after Holm within a cell."""
    lines = [f"| {' | '.join(HEAD)} |", "|" + " --- |" * len(HEAD)]
    for key, cell in table.groupby(list(KEY), sort=False):
        for cells in _rows(cell):
            lines.append(f"| {' | '.join([', '.join(map(str, key)), *cells])} |")
    return "\n".join(lines)


def _rows(cell: pd.DataFrame) -> Iterator[list[str]]:
    parts = dict(iter(cell.groupby("strategy", sort=False)))
    others = [name for name in parts if name != "random"] if "random" in parts else []
    pairs = {name: paired_curves(curves(parts[name]), curves(parts["random"])) for name in others}
    pairs = {name: both for name, both in pairs.items() if len(both[0].seeds) > 1}
    ends = {name: paired(*(np.log(one.errors[:, -1]) for one in both)) for name, both in pairs.items()}
    areas = {n: paired(*(log_error_area(one.labels, one.errors) for one in both)) for n, both in pairs.items()}
    adjusted = [holm([getattr(end, test) for end in ends.values()]) for test in ("p_t", "p_wilcoxon")]
    tests = {name: [f"{p[n]:.3f}" for p in adjusted] for n, name in enumerate(ends)}
    for name, part in parts.items():
        last = part[part.labels == part.labels.max()]
        mae, r2 = (t_interval(last[column].to_numpy(), log=column == "mae") for column in ("mae", "r2"))
        told = [name, str(len(last))]
        told += [_bracketed(one) for one in (mae, r2)]
        if name in ends:
            saved, (low, high) = bound(labels_ratio(*pairs[name])[0]), _interval(pairs[name])
            told += [_ratio(ends[name]), *tests[name], _ratio(areas[name]), f"{saved} [{low}, {high}]"]
        else:
            told += ["-"] * 5
        yield [*told, f"{last.spearman.mean():.2f}"]


def _bracketed(one: Interval) -> str:
    center, low, high = (number(float(end)) for end in (one.center, one.low, one.high))
    return f"{center} [{low}, {high}]"


def _interval(both: tuple[SeedCurves, SeedCurves]) -> tuple[str, str]:
    ends = labels_ratio(*both)[1]
    return number(float(ends.low)), number(float(ends.high))


def _ratio(found: Paired) -> str:
    return f"{found.ratio:.3f} [{found.low:.3f}, {found.high:.3f}]"


def draw(table: pd.DataFrame, folder: Path) -> list[Path]:
    """Learning curves and paired ratios of the cells of the main study whose labels are energies, eV/atom."""
    plain = (table.descriptors == "paper") & (table.members == 5) & (table.batch == 15) & (table.set == table.test)
    unit = table.set.map(lambda name: SOURCES[name].unit if name in SOURCES else "")
    shown = table[plain & (unit == "eV/atom") & ~table.strategy.str.contains(" ")]
    shown = shown.rename(columns={"mae": "energy_mae", "members": "ensemble_size", "batch": "batch_size"})
    shown = shown.rename(columns={"strategy": "selector"}).assign(system=shown.set, test="test")
    shown = shown.assign(round=(shown.labels - shown.labels.min()) // 15)
    written = save(draw_curves(learning_curves(shown, "energy_mae"), quantity="energy_mae"), folder / "learning_curves")
    return written + save(paired_ratio(compare(shown, quantity="energy_mae")), folder / "paired_ratio")
