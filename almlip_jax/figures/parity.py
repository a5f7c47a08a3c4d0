"""Predicted against true values, one colour for each test group."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from almlip_jax.figures.style import MUTED, group_color, order_groups, style


def parity(
    true: ArrayLike,
    predicted: ArrayLike,
    groups: Sequence[str] | None = None,
    *,
    quantity: str = "force component",
    unit: str = "eV/Å",
    error_unit: tuple[str, float] = ("meV/Å", 1e3),
) -> Figure:
    """Draws predicted against true values with the diagonal, and the RMSE of each group in the legend.

    Args:
        true: [n] or [n, 3].
        predicted: the same shape.
        groups: [n] test group of each row; default one group.
        quantity: what the values are.
        unit: their unit.
        error_unit: name of the unit of the RMSE, and how many of them make one of ``unit``.

    Returns:
        The figure; the caller saves and closes it.
    """
    x, y = np.asarray(true, dtype=float), np.asarray(predicted, dtype=float)
    if x.shape != y.shape or x.size == 0:
        raise ValueError(f"true values {x.shape} and predicted ones {y.shape} must have one shape, and not be empty.")
    names = np.asarray(groups if groups is not None else ["test"] * len(x), dtype=str)
    unit_name, factor = error_unit
    with style():
        figure, axes = plt.subplots(figsize=(3.6, 3.4))
        low, high = float(min(np.nanmin(x), np.nanmin(y))), float(max(np.nanmax(x), np.nanmax(y)))
        axes.plot([low, high], [low, high], color=MUTED, linewidth=1.0, zorder=1)
        for name in reversed(order_groups(list(names))):  # the hottest, widest group lies behind
            rows = names == name
            rmse = factor * float(np.sqrt(np.nanmean((x[rows] - y[rows]) ** 2)))
            axes.plot(
                x[rows].ravel(),
                y[rows].ravel(),
                linestyle="none",
                marker=".",
                markersize=2.5,
                alpha=0.5,
                color=group_color(name, list(names)),
                label=f"{name}: RMSE {rmse:.1f} {unit_name}",
                rasterized=True,  # thousands of dots: the rest of the figure stays vector
            )
        axes.set(xlabel=f"true {quantity} ({unit})", ylabel=f"predicted ({unit})", aspect="equal")
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(handles[::-1], labels[::-1], loc="upper left", markerscale=3)
    return figure
