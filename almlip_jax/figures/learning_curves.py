"""Learning curves of a sweep with intervals over seeds: a panel for each case, one look for each selector."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure

from almlip_jax.evaluation.statistics import LEVEL, SeedCurves
from almlip_jax.evaluation.tidy import Case, error_columns
from almlip_jax.figures.style import draw_seeds, legend_below, panel_grid, plain_log_ticks, selector_lines, style


def learning_curves(
    curves: Mapping[Case, Mapping[str, SeedCurves]],
    *,
    quantity: str = "forces_rmse",
    level: float = LEVEL,
) -> Figure:
    """Draws geometric means over seeds, with their intervals as bands, on logarithmic axes.

    Few seeds are points instead of a band (`style.draw_seeds`), and means reach as far as every seed does.  Panels have
    axes of their own: systems differ in size.

    Args:
        curves: of `evaluation.comparison.learning_curves`, of seeds that all selectors share
            (`evaluation.comparison.shared_seeds`).
        quantity: column that the errors are of.
        level: confidence level of the bands.

    Returns:
        The figure; the caller saves and closes it.
    """
    if not curves:
        raise ValueError("there is no curve to draw.")
    shown = error_columns()[quantity]
    lines = selector_lines(name for selectors in curves.values() for name in selectors)
    handles = {}
    with style():
        figure, panels = panel_grid(len(curves))
        for axes, (case, selectors) in zip(panels, curves.items(), strict=True):
            for name, one in selectors.items():
                handles[name] = draw_seeds(
                    axes, one.labels, one.errors, lines[name], log=True, level=level, factor=shown.factor
                )
            axes.set(xscale="log", yscale="log", title=case.title(curves), xlabel="labels", ylabel=shown.label)
            plain_log_ticks(axes)
        legend_below(figure, [handles[name] for name in lines])
    return figure
