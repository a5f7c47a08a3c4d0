"""Test error against the number of labels, one panel for each test group, one colour for each selector."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from almlip_jax.figures.style import MUTED, order_groups, plain_log_ticks, selector_color, style


@dataclass(frozen=True)
class Curve:
    """The errors of one selector on one test group.

    Attributes:
        selector: its name.
        group: the test group.
        labels: [n], number of labels paid for.
        errors: [n] or [seeds, n] in the unit of the figure; NaN where a seed has no value.
    """

    selector: str
    group: str
    labels: ArrayLike
    errors: ArrayLike


def learning_curve(
    curves: Sequence[Curve],
    *,
    quantity: str = "force RMSE",
    unit: str = "meV/Å",
    target: float | None = None,
) -> Figure:
    """Draws learning curves on logarithmic axes.

    The line is the median over the seeds, the band reaches from the best to the worst seed; a single seed has no
    band.  Panels share their axes, so that test groups can be compared.

    Args:
        curves: any number of selectors and groups.
        quantity: what the errors are.
        unit: their unit.
        target: an error to mark by a dashed line.

    Returns:
        The figure; the caller saves and closes it.
    """
    if not curves:
        raise ValueError("there is no curve to draw.")
    groups = order_groups([curve.group for curve in curves])
    with style():
        figure, grid = plt.subplots(
            1, len(groups), sharex=True, sharey=True, squeeze=False, figsize=(1.0 + 3.1 * len(groups), 3.1)
        )
        for axes, group in zip(grid[0], groups, strict=True):
            for curve in (curve for curve in curves if curve.group == group):
                _draw(axes, curve)
            if target is not None:
                axes.axhline(target, color=MUTED, linewidth=1.0, linestyle=(0, (4, 3)), label=f"target {target:g}")
            axes.set(xscale="log", yscale="log", title=group, xlabel="labels")
            plain_log_ticks(axes)
        grid[0][0].set_ylabel(f"{quantity} ({unit})")
        grid[0][-1].legend()
    return figure


def _draw(axes: Axes, curve: Curve) -> None:
    labels = np.asarray(curve.labels, dtype=float)
    errors = np.atleast_2d(np.asarray(curve.errors, dtype=float))
    if errors.shape[1:] != labels.shape:
        raise ValueError(f"the curve of '{curve.selector}' has {labels.size} labels but errors {errors.shape}.")
    known = np.isfinite(errors).any(axis=0)  # a point that no seed has is no point
    labels, errors = labels[known], errors[:, known]
    color = selector_color(curve.selector)
    seeds = len(errors)
    name = curve.selector if seeds == 1 else f"{curve.selector} ({seeds} seeds)"
    axes.plot(labels, np.nanmedian(errors, axis=0), color=color, marker="o", markersize=3.2, label=name)
    if seeds > 1:
        low, high = np.nanmin(errors, axis=0), np.nanmax(errors, axis=0)
        axes.fill_between(labels, low, high, color=color, alpha=0.15, linewidth=0)
