"""Errors of a potential on labelled structures: parity, and how well its uncertainties predict them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from almlip_jax.evaluation.pairs import Pairs
from almlip_jax.figures.style import GROUP_DASHES, MUTED, legend_below, panel_grid, plain_log_ticks, style
from almlip_jax.group_looks import Look, group_looks
from almlip_jax.targets import target_named
from almlip_jax.uncertainty import reliability
from almlip_jax.unit_names import spelt

_MOST_POINTS: Final = 20_000  # of a group in a panel
_BINS: Final = 12
_LEAST_IN_BIN: Final = 15  # atoms: a root mean square of fewer says little
_MARKERS: Final = {"circle": "o", "square": "s", "diamond": "D", "triangle-up": "^"}

_PARITY: Final[dict[str, tuple[str, float, str]]] = {
    "energy": ("energy - mean label", 1e3, "meV/atom"),
    "forces": ("force component", 1.0, "eV/Å"),
    "stress": ("stress component", 1e3, "meV/Å³"),
}


def parity(pairs: Mapping[str, Pairs]) -> Figure:
    """Draws predictions against labels, a panel for each kind of label, a colour for each group.

    Args:
        pairs: of `evaluation.pairs.label_pairs`.

    Returns:
        The figure; the caller saves and closes it.

    Raises:
        ValueError: there is nothing to draw.
    """
    if not pairs:
        raise ValueError("there is no label to draw.")
    looks = _looks(pairs)
    with style():
        figure, panels = panel_grid(len(pairs), width=3.2, height=3.0)
        for axes, (kind, labels) in zip(panels, pairs.items(), strict=True):
            name, factor, unit = _PARITY.get(kind) or _further(kind)
            middle = labels.label.mean() if kind == "energy" else 0.0
            for group, look in looks.items():
                own = labels.of(group)
                x, y = (factor * (part - middle).ravel() for part in (own.label, own.predicted))
                some = np.random.default_rng(0).permutation(len(x))[:_MOST_POINTS]
                size = 2.0 if len(labels.label) > 500 else 4.0
                axes.plot(x[some], y[some], _MARKERS[look.marker], ms=size, mew=0, color=look.color, rasterized=True)
            _diagonal(axes, factor * (labels.label - middle))
            axes.set(xlabel=_with_unit(f"labelled {name}", unit), ylabel=_with_unit("predicted", unit))
        _legend(figure, looks, lines=False)
    return figure


def calibration(pairs: Mapping[str, Pairs]) -> Figure:
    """Draws how well the uncertainty predicts the errors: on the diagonal it does.

    Forces: the share of error components within central intervals of the Gaussian that is promised; and, in bins of
    equal count, the root mean square error vector against the root mean square ``force_total``.  Energies: the errors
    of structures against ``energy_total``, both for each atom.

    Args:
        pairs: of `evaluation.pairs.label_pairs`.

    Returns:
        The figure; the caller saves and closes it.

    Raises:
        ValueError: no uncertainty is larger than 0, as with one member that says nothing about its errors.
    """
    known = {kind: _with_spread(labels) for kind, labels in pairs.items()}
    known = {kind: labels for kind, labels in known.items() if len(labels.label)}
    draw: list[tuple[Callable[[Axes, Pairs, Look], None], str]] = []
    if "forces" in known:
        draw += [(_draw_reliability, "forces"), (_draw_bins, "forces")]
    if "energy" in known:
        draw.append((_draw_energies, "energy"))
    if not draw:
        raise ValueError("there is no uncertainty larger than 0 to draw.")
    looks = _looks(known)
    with style():
        figure, panels = panel_grid(len(draw), width=3.2, height=3.0)
        for axes, (one, kind) in zip(panels, draw, strict=True):
            for group, look in looks.items():
                own = known[kind].of(group)
                if len(own.label):
                    one(axes, own, look)
            _finish(axes, one)
        _legend(figure, looks, lines=any(one is not _draw_energies for one, _ in draw))
    return figure


def _with_unit(name: str, unit: str) -> str:
    return f"{name} ({unit})" if unit else name


def _further(label: str) -> tuple[str, float, str]:
    target = target_named(label)
    assert target is not None  # pairs are of declared ones
    return f"{label} component" if target.shape else label, 1.0, spelt(target.unit)


def _with_spread(pairs: Pairs) -> Pairs:
    rows = (pairs.sigma > 0) & np.isfinite(pairs.sigma) & np.isfinite(pairs.predicted).all(axis=1)
    return Pairs(pairs.group[rows], pairs.label[rows], pairs.predicted[rows], pairs.sigma[rows])


def _draw_reliability(axes: Axes, own: Pairs, look: Look) -> None:
    errors = own.predicted - own.label
    expected, observed = reliability(errors.ravel(), np.repeat(own.sigma, 3) / np.sqrt(3.0))
    axes.plot(expected, observed, color=look.color, linestyle=GROUP_DASHES[look.dash])


def _draw_bins(axes: Axes, own: Pairs, look: Look) -> None:
    lengths = np.linalg.norm(own.predicted - own.label, axis=1)
    bins = min(_BINS, max(1, len(lengths) // _LEAST_IN_BIN))
    parts = np.array_split(np.argsort(own.sigma, kind="stable"), bins)
    told, found = (
        np.array([1e3 * np.sqrt(np.mean(values[part] ** 2)) for part in parts]) for values in (own.sigma, lengths)
    )
    axes.plot(told, found, _MARKERS[look.marker], color=look.color, linestyle=GROUP_DASHES[look.dash], ms=3.6)


def _draw_energies(axes: Axes, own: Pairs, look: Look) -> None:
    errors = np.abs(own.predicted - own.label)[:, 0]
    axes.plot(1e3 * own.sigma, 1e3 * errors, _MARKERS[look.marker], color=look.color, ms=3.0, mew=0)


_AXES: Final[dict[Any, tuple[str, str]]] = {
    _draw_reliability: ("expected share of force errors", "observed share"),
    _draw_bins: ("force_total (meV/Å)", "RMS force error (meV/Å)"),
    _draw_energies: ("energy_total (meV/atom)", "|energy error| (meV/atom)"),
}


def _finish(axes: Axes, drawn: Callable[[Axes, Pairs, Look], None]) -> None:
    x, y = _AXES[drawn]
    axes.set(xlabel=x, ylabel=y)
    if drawn is _draw_reliability:
        axes.set(xlim=(0, 1), ylim=(0, 1))
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, zorder=1)
        return
    shown = np.concatenate([np.concatenate([line.get_xdata(), line.get_ydata()]) for line in axes.lines])
    shown = shown[shown > 0]
    axes.set(xscale="log", yscale="log")
    if len(shown):
        ends = [0.7 * shown.min(), 1.4 * shown.max()]
        axes.plot(ends, ends, color=MUTED, linewidth=0.8, zorder=1)
        plain_log_ticks(axes)


def _looks(pairs: Mapping[str, Pairs]) -> dict[str, Look]:
    return group_looks({group for found in pairs.values() for group in found.group.tolist()})


def _diagonal(axes: Axes, labels: np.ndarray) -> None:
    low, high = float(labels.min()), float(labels.max())
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    axes.plot([low - room, high + room], [low - room, high + room], color=MUTED, linewidth=0.8, zorder=1)


def _legend(figure: Figure, looks: Mapping[str, Look], *, lines: bool) -> None:
    """Nothing where there is but one group."""
    if len(looks) > 1:
        legend_below(
            figure,
            [
                Line2D(
                    [],
                    [],
                    color=look.color,
                    linestyle=GROUP_DASHES[look.dash] if lines else "none",
                    marker=_MARKERS[look.marker],
                    markersize=4,
                    label=name,
                )
                for name, look in looks.items()
            ],
        )
