"""The free energy of a metadynamics run along its variables."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from almlip_jax.figures.style import INK, style


def free_energy_figure(
    labels: Sequence[str], axes: Sequence[np.ndarray], mean: np.ndarray, error: np.ndarray
) -> Figure:
    """A line with its standard error for one variable, a filled map for two.

    Args:
        labels: name and unit of each variable.
        axes: points along each variable.
        mean: [n_1, .., n_D] eV.
        error: the same shape; NaN where it is not known.

    Returns:
        The figure; the caller saves and closes it.

    Raises:
        ValueError: there are more than two variables.
    """
    if len(labels) > 2:
        raise ValueError("a free energy of three variables cannot be drawn; look at the table.")
    with style():
        figure, panel = plt.subplots(figsize=(5.0, 3.4))
        if len(labels) == 1:
            panel.plot(axes[0], mean, color=INK)
            if np.isfinite(error).all():
                panel.fill_between(axes[0], mean - error, mean + error, color=INK, alpha=0.2, linewidth=0)
            panel.set(xlabel=labels[0], ylabel="free energy (eV)")
        else:
            filled = panel.contourf(*axes, mean.T, levels=20, cmap="viridis")
            figure.colorbar(filled, ax=panel, label="free energy (eV)")
            panel.set(xlabel=labels[0], ylabel=labels[1])
            panel.grid(False)
    return figure
