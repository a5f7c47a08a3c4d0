"""Is the uncertainty honest: the reliability diagram, and error against sigma."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm

from almlip_jax.figures.style import GROUP_COLORS, MUTED, plain_log_ticks, style

Floats = NDArray[np.float64]


def observed_coverage(error: ArrayLike, sigma: ArrayLike, expected: ArrayLike) -> Floats:
    """Share of errors inside the central intervals of a normal distribution, ``mean[|z| <= ppf(1/2 + p/2)]``.

    Args:
        error: [n] predicted minus true.
        sigma: [n] standard deviation claimed for it; an error of exactly 0 is inside even at sigma 0.
        expected: [k] probabilities p of the intervals.

    Returns:
        [k] shares.
    """
    magnitude, width = np.abs(np.asarray(error, dtype=float)), np.asarray(sigma, dtype=float)
    half_widths = norm.ppf(0.5 + 0.5 * np.asarray(expected, dtype=float))
    # one comparison a level: [n, k] at once would be large for many forces
    return np.array([np.mean(magnitude <= half_width * width) for half_width in half_widths])


def error_in_bins(error: ArrayLike, sigma: ArrayLike, bins: int = 12) -> tuple[Floats, Floats]:
    """Root mean variance and root mean square error in bins of equal count, sorted by sigma.

    Args:
        error: [n] predicted minus true.
        sigma: [n] standard deviation claimed for it.
        bins: how many, at most one a value.

    Returns:
        sigma and error of each bin, [bins] each.
    """
    e, s = np.asarray(error, dtype=float), np.asarray(sigma, dtype=float)
    order = np.argsort(s, kind="stable")
    parts = [part for part in np.array_split(order, min(bins, max(1, e.size))) if part.size]
    claimed = np.array([np.sqrt(np.mean(s[part] ** 2)) for part in parts])
    found = np.array([np.sqrt(np.mean(e[part] ** 2)) for part in parts])
    return claimed, found


def reliability(
    error: ArrayLike, sigma: Mapping[str, ArrayLike], *, unit: str = "meV/Å", factor: float = 1e3, bins: int = 12
) -> Figure:
    """Draws the reliability diagram beside the error found in bins of the uncertainty claimed.

    Args:
        error: [n] predicted minus true, for example of force components.
        sigma: name -> [n] standard deviation claimed for it (raw, calibrated, ...), of the same quantity: a force
            component has ``force_std / sqrt(3)``.
        unit: unit of the right panel.
        factor: how many of them make one of ``error``.
        bins: number of bins of equal count.

    Returns:
        The figure; the caller saves and closes it.
    """
    expected = np.linspace(0.0, 1.0, 101)[:-1]  # a normal distribution holds 1 only at infinity
    with style():
        figure, (left, right) = plt.subplots(1, 2, figsize=(6.6, 3.2))
        left.plot([0, 1], [0, 1], color=MUTED, linewidth=1.0)
        limits: list[float] = []
        for (name, values), color in zip(sigma.items(), GROUP_COLORS * len(sigma), strict=False):
            left.plot(expected, observed_coverage(error, values, expected), color=color, label=name)
            claimed, found = (factor * part for part in error_in_bins(error, values, bins))
            right.plot(claimed, found, "o-", color=color, markersize=3.2, linewidth=1.0, label=name)
            limits += [*claimed[claimed > 0], *found[found > 0]]
        if limits:
            right.plot([min(limits), max(limits)], [min(limits), max(limits)], color=MUTED, linewidth=1.0, zorder=0)
        left.set(xlabel="expected share", ylabel="observed share", title="reliability", aspect="equal")
        left.legend(loc="upper left")
        right.set(xscale="log", yscale="log", xlabel=f"sigma claimed ({unit})", ylabel=f"RMSE found ({unit})")
        right.set_title("error against sigma")
        plain_log_ticks(right)
    return figure
