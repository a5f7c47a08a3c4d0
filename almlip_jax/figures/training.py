"""The course of a training, from its table ``training.csv``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from almlip_jax.evaluation.training_curves import TrainingCurves
from almlip_jax.figures.style import GROUP_DASHES, legend_below, panel_grid, plain_log_ticks, style
from almlip_jax.group_looks import group_looks


def training(trainings: Mapping[str, Sequence[TrainingCurves]]) -> Figure:
    """Draws the curve of each model against optimiser steps, a panel for each training and quantity.

    Args:
        trainings: name of each training -> its curves, of one quantity or several.

    Returns:
        The figure; the caller saves and closes it.

    Raises:
        ValueError: there is no training.
    """
    if not trainings:
        raise ValueError("there is no training to draw.")
    shown = [(name if len(trainings) > 1 else "", curves) for name, all_of in trainings.items() for curves in all_of]
    looks = group_looks({model for _, curves in shown for model in curves.models})
    handles = {}
    with style():
        figure, panels = panel_grid(len(shown), width=3.6, height=2.8)
        for axes, (name, curves) in zip(panels, shown, strict=True):
            for model, (steps, values) in curves.models.items():
                (handles[model],) = axes.plot(
                    steps,
                    values,
                    color=looks[model].color,
                    linestyle=GROUP_DASHES[looks[model].dash],
                    linewidth=1.0,
                    marker="o" if len(steps) < 30 else "",
                    markersize=2.0,
                    label=f"model {model}",
                )
            axes.set(yscale="log", xlabel="optimiser steps", ylabel=curves.label, title=name)
            plain_log_ticks(axes, "y")
        if len(looks) > 1:
            legend_below(figure, [handles[model] for model in looks])
    return figure
