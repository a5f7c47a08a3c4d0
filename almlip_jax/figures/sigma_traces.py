"""Uncertainty along each walker of an exploration, with the gate's thresholds and what it recorded."""

from __future__ import annotations

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from almlip_jax.figures.style import RECORD, STOP, style, temperature_color


def sigma_traces(
    time: ArrayLike,
    sigma: ArrayLike,
    temperature: ArrayLike,
    *,
    record: float | None = None,
    stop: float | None = None,
    recorded: tuple[ArrayLike, ArrayLike] | None = None,
    score: str = "force_std_max",
    unit: str = "eV/Å",
) -> Figure:
    """Draws the score of every walker against time.

    Args:
        time: [T] fs.
        sigma: [T, W] score of each walker; NaN once it has ended.
        temperature: [W] K, of each walker's thermostat; gives the colours.
        record: threshold above which frames are recorded.
        stop: threshold above which a walker is stopped.
        recorded: walker [R] and row of ``time`` [R] of each recorded frame.
        score: name of the score.
        unit: its unit.

    Returns:
        The figure; the caller saves and closes it.
    """
    t, s, kelvin = np.asarray(time, dtype=float), np.asarray(sigma, dtype=float), np.asarray(temperature, dtype=float)
    if s.shape != (t.size, kelvin.size):
        raise ValueError(f"sigma {s.shape} must be [time, walker] = {(t.size, kelvin.size)}.")
    with style():
        figure, axes = plt.subplots(figsize=(6.4, 3.0))
        seen: set[float] = set()
        for walker in np.argsort(kelvin, kind="stable"):
            value = float(kelvin[walker])
            color = temperature_color(value, kelvin.tolist())
            label = None if value in seen else f"{value:g} K"
            seen.add(value)
            axes.plot(t, s[:, walker], color=color, linewidth=0.9, alpha=0.9, label=label)
        if recorded is not None:
            walkers, rows = (np.asarray(part, dtype=int) for part in recorded)
            axes.plot(t[rows], s[rows, walkers], "o", markersize=3.5, color=RECORD, mfc="white", label="recorded")
        for threshold, color, name in ((record, RECORD, "record"), (stop, STOP, "stop")):
            if threshold is not None:
                axes.axhline(threshold, color=color, linewidth=1.0, linestyle=(0, (4, 3)), label=name)
        axes.set(yscale="log", xlabel="time (fs)", ylabel=f"{score} ({unit})")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
