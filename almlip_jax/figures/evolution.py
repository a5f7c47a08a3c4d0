"""Uncertainty and its calibration over the rounds of active learning, with intervals over seeds."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from almlip_jax.evaluation.comparison import Evolution
from almlip_jax.evaluation.statistics import LEVEL
from almlip_jax.evaluation.tidy import CALIBRATION, Case
from almlip_jax.figures.style import INK, draw_seeds, legend_below, panel_grid, plain_log_ticks, selector_lines, style
from almlip_jax.scores import score_units
from almlip_jax.unit_names import spelt

Evolutions = Mapping[Case, Mapping[str, Evolution]]
"""Of each case and selector."""


def uncertainty_evolution(
    batch: Evolutions, pool: Evolutions, *, monitors: Mapping[Case, str] | None = None, level: float = LEVEL
) -> Figure:
    """Draws the mean uncertainty of the selected batch (full lines) and of the rest of the pool (dashed) per round.

    Lines are geometric means over seeds, few of which are points (`style.draw_seeds`).  Learning has converged where
    the batch comes down to the pool.

    Args:
        batch: of ``sigma_batch``, positive.
        pool: of ``sigma_pool``, positive.
        monitors: the score that both are of, by case (`tidy.monitors`); where it is not said, no unit is.
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
                handles[name] = draw_seeds(
                    axes, one.rounds, one.values, {**lines[name], "linestyle": "-"}, log=True, level=level
                )
            for name, one in pool.get(case, {}).items():
                look = {**lines[name], "linestyle": (0, (4, 2)), "mfc": "white", "label": f"{name}, pool"}
                line = draw_seeds(axes, one.rounds, one.values, look, log=True, level=level)
                handles.setdefault(name, line)
            axes.set(yscale="log", title=case.title(cases), xlabel="round", ylabel=_named((monitors or {}).get(case)))
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            plain_log_ticks(axes, "y")
        styles = [Line2D([], [], color=INK, label="batch"), Line2D([], [], color=INK, ls=(0, (4, 2)), label="pool")]
        legend_below(figure, [*(handles[name] for name in lines), *styles])
    return figure


def _named(monitor: str | None) -> str:
    """A score with its unit."""
    if monitor is None:
        return "uncertainty"
    unit = score_units().get(monitor)
    return f"{monitor} ({spelt(unit)})" if unit else monitor


def calibration_evolution(metrics: Mapping[str, Evolutions], *, level: float = LEVEL) -> Figure:
    """Draws metrics of calibration per round: a row of panels for each case, a column for each metric.

    Lines are means over seeds, few of which are points (`style.draw_seeds`); an arrow at the name says in which
    direction a metric is better.

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
                handles[name] = draw_seeds(
                    axes, one.rounds, one.values, lines[name], log=False, level=level, factor=shown.factor
                )
            better = "↑" if shown.rises else "↓"
            axes.set(title=case.title(cases), xlabel="round", ylabel=f"{shown.label} {better}")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        legend_below(figure, [handles[name] for name in lines])
    return figure
