"""Uncertainty and its calibration over the rounds of active learning, with intervals over seeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from almlip_jax.evaluation.comparison import Evolution
from almlip_jax.evaluation.statistics import LEVEL, t_interval
from almlip_jax.evaluation.tidy import CALIBRATION, Case
from almlip_jax.figures.style import INK, legend_below, panel_grid, plain_log_ticks, selector_lines, style

Evolutions = Mapping[Case, Mapping[str, Evolution]]
"""Of each case and selector."""


def uncertainty_evolution(batch: Evolutions, pool: Evolutions, *, unit: str = "eV/Å", level: float = LEVEL) -> Figure:
    """Draws the mean uncertainty of the selected batch (full lines) and of the rest of the pool (dashed) per round.

    Lines are geometric means over seeds.  Learning has converged where the batch comes down to the pool.

    Args:
        batch: of ``sigma_batch``, positive.
        pool: of ``sigma_pool``, positive.
        unit: of both.
        level: confidence level of the bands.

    Returns:
        The figure; the caller saves and closes it.
    """
    cases = list(dict.fromkeys([*batch, *pool]))
    if not cases:
        raise ValueError("there is no uncertainty to draw.")
    lines = selector_lines(name for part in (batch, pool) for case in cases for name in part.get(case, {}))
    handles: dict[str, Line2D] = {}
    with style():
        figure, panels = panel_grid(len(cases))
        for axes, case in zip(panels, cases, strict=True):
            for name, one in batch.get(case, {}).items():
                handles[name] = _draw(axes, one, {**lines[name], "linestyle": "-"}, level, log=True)
            for name, one in pool.get(case, {}).items():
                look = {**lines[name], "linestyle": (0, (4, 2)), "mfc": "white", "label": f"{name}, pool"}
                line = _draw(axes, one, look, level, log=True)
                handles.setdefault(name, line)
            axes.set(yscale="log", title=case.title(cases), xlabel="round", ylabel=f"uncertainty ({unit})")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            plain_log_ticks(axes, "y")
        styles = [Line2D([], [], color=INK, label="batch"), Line2D([], [], color=INK, ls=(0, (4, 2)), label="pool")]
        legend_below(figure, [*(handles[name] for name in lines), *styles])
    return figure


def calibration_evolution(metrics: Mapping[str, Evolutions], *, level: float = LEVEL) -> Figure:
    """Draws metrics of calibration per round: a row of panels for each case, a column for each metric.

    Lines are means over seeds; an arrow at the name says in which direction a metric is better.

    Args:
        metrics: one of `tidy.CALIBRATION` -> its evolution.
        level: confidence level of the bands.

    Returns:
        The figure; the caller saves and closes it.
    """
    cases = list(dict.fromkeys(case for part in metrics.values() for case in part))
    if not cases:
        raise ValueError("there is no metric of calibration to draw.")
    lines = selector_lines(name for part in metrics.values() for case in cases for name in part.get(case, {}))
    handles: dict[str, Line2D] = {}
    with style():
        figure, panels = panel_grid(len(cases) * len(metrics), columns=len(metrics))
        places = ((case, metric) for case in cases for metric in metrics)
        for axes, (case, metric) in zip(panels, places, strict=True):
            shown = CALIBRATION[metric]
            for name, one in metrics[metric].get(case, {}).items():
                in_units = replace(one, values=shown.factor * one.values)
                handles[name] = _draw(axes, in_units, lines[name], level, log=False)
            better = "↑" if shown.rises else "↓"
            axes.set(title=case.title(cases), xlabel="round", ylabel=f"{shown.label} {better}")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        legend_below(figure, [handles[name] for name in lines])
    return figure


def _draw(axes: Axes, one: Evolution, look: dict[str, object], level: float, *, log: bool) -> Line2D:
    found = t_interval(one.values, level, log=log)
    (line,) = axes.plot(one.rounds, found.center, **look)  # type: ignore[arg-type]
    band = np.isfinite(found.low)
    axes.fill_between(
        one.rounds[band], found.low[band], found.high[band], color=line.get_color(), alpha=0.12, linewidth=0
    )
    return line
