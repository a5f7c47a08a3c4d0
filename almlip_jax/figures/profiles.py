"""Dolan-More performance profiles: how often a selector is how far from the one that needs the fewest labels."""

from __future__ import annotations

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from almlip_jax.evaluation.comparison import Profiles
from almlip_jax.evaluation.statistics import profile
from almlip_jax.figures.style import legend_below, plain_log_ticks, selector_lines, style


def profiles(performance: Profiles) -> Figure:
    """Draws, for each selector, the share of problems that it solves within a multiple of the fewest labels.

    A step begins where the share changes; what is never reached keeps a curve below 1.

    Args:
        performance: of `evaluation.comparison.performance_profiles`.

    Returns:
        The figure; the caller saves and closes it.
    """
    finite = performance.ratios[np.isfinite(performance.ratios)]
    end = 1.08 * float(finite.max(initial=1.0))
    x = np.concatenate([np.unique(np.append(finite, 1.0)), [end]])
    shares = profile(performance.ratios, x)
    lines = selector_lines(performance.selectors)
    with style():
        figure, axes = plt.subplots(figsize=(4.2, 3.6))
        handles = []
        for n, name in enumerate(performance.selectors):
            look = lines[name] | {"markersize": 3.0, "markevery": max(1, len(x) // 8)}
            handles += axes.plot(x, shares[:, n], drawstyle="steps-post", clip_on=False, **look)
        axes.set(xscale="log", xlim=(1.0, end), ylim=(0.0, 1.0), xlabel="labels / fewest labels")
        axes.set(ylabel=f"share of {len(performance.problems)} problems")
        plain_log_ticks(axes, "x")
        legend_below(figure, handles)
    return figure
