"""Error of each selector over that of the baseline, seed by seed: a forest plot."""

from __future__ import annotations

from typing import Literal

from matplotlib import ticker
from matplotlib.figure import Figure

from almlip_jax.evaluation.comparison import Comparison, ComparisonTable
from almlip_jax.evaluation.tidy import Case, error_columns
from almlip_jax.figures.style import MUTED, panel_grid, selector_lines, style

MEASURES = {"area": "over the whole curve", "final": "at the last number of labels"}


def paired_ratio(table: ComparisonTable, *, measure: Literal["area", "final"] = "area") -> Figure:
    """Draws the geometric mean ratio of each selector with its interval, and the number of seeds behind it.

    Args:
        table: of `evaluation.comparison.compare`.
        measure: mean error over the curve, or error at its end.

    Returns:
        The figure; the caller saves and closes it.
    """
    cases: dict[Case, list[Comparison]] = {}
    for row in table.rows:
        if getattr(row, measure) is not None:
            cases.setdefault(row.case, []).append(row)
    if not cases:
        raise ValueError("there is no ratio to draw.")
    lines = selector_lines([table.baseline, *(row.selector for row in table.rows)])
    tallest = max(len(rows) for rows in cases.values())
    with style():
        figure, panels = panel_grid(len(cases), height=0.9 + 0.24 * tallest, columns=3)
        for axes, (case, rows) in zip(panels, cases.items(), strict=True):
            axes.axvline(1.0, color=MUTED, linewidth=1.0, zorder=1)
            for height, row in enumerate(rows):
                found = getattr(row, measure)
                axes.errorbar(
                    found.ratio,
                    height,
                    xerr=[[found.ratio - found.low], [found.high - found.ratio]],
                    color=lines[row.selector]["color"],
                    marker=lines[row.selector]["marker"],
                    markersize=4.5,
                    elinewidth=1.6,
                    capsize=2.0,
                    label=row.selector,
                )
                axes.annotate(
                    f"n = {found.seeds}",
                    (1.0, height),
                    xycoords=("axes fraction", "data"),
                    xytext=(4, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=7.5,
                    color=MUTED,
                )
            axes.set_yticks(range(len(rows)), [row.selector for row in rows])
            axes.set(xscale="log", ylim=(len(rows) - 0.5, -0.5), title=case.title(cases))
            axes.set_xlabel(f"{error_columns()[table.quantity].name} / {table.baseline}")
            axes.xaxis.set_major_locator(ticker.MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
            axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
            axes.xaxis.set_minor_locator(ticker.NullLocator())
            axes.grid(False, axis="y")
        figure.supxlabel(f"left of 1: better than {table.baseline}, {MEASURES[measure]}", fontsize=8.0, color=MUTED)
    return figure
