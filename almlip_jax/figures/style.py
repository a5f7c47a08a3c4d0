"""The look of every figure: fonts, vector text, sizes, files, and one colour for each selector and each test group."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from matplotlib import ticker
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from almlip_jax.evaluation.statistics import LEVEL, t_interval

INK: Final = "#1d2733"
"""Text and axes."""
MUTED: Final = "#68737f"
"""Secondary text, reference lines."""
GRID: Final = "#e6e9ed"
"""Grid lines."""
RECORD: Final = "#c77700"
"""The gate's record threshold, and recorded frames."""
STOP: Final = "#b3261e"
"""The gate's stop threshold, and stopped walkers."""

SELECTOR_COLORS: Final[dict[str, str]] = {
    "random": "#8a9099",
    "top_k": "#0b6fb8",
    "max_det": "#d1570b",
    "max_dist": "#78b487",
    "lcmd": "#4b2db4",
    "bait": "#780000",
    "kmeans_pp": "#f09600",
    "maxvol": "#a53c5a",
    "frank_wolfe": "#96693c",
    "kmeans_fps": "#c3a55a",
    "hybrid": "#c378ff",
    "dpp": "#5a1e4b",
    "max_diag": "#4b1e78",
    "chain": "#5ab4e1",
    "threshold": "#5ab4e1",
    "top_fraction": "#5ab4e1",
}
"""Colours of the selectors by name: what is compared with chance stands out against its grey.

Those of different selectors stay at least 17 units of CIELAB apart with normal sight and without red, green or blue
cones; filters have the colour of the chains that they are part of.
"""

SELECTOR_MARKERS: Final[dict[str, str]] = {
    "random": "o",
    "top_k": "s",
    "max_det": "D",
    "max_dist": "^",
    "lcmd": "v",
    "bait": "P",
    "kmeans_pp": "X",
    "maxvol": "<",
    "frank_wolfe": ">",
    "kmeans_fps": "p",
    "hybrid": "h",
    "dpp": "*",
    "max_diag": "d",
    "chain": "8",
}
"""Markers of the selectors by name, so that figures can be read in grey as well."""

_OTHERS: Final = ("#1e4b2d", "#5ab4e1", "#a53c5a", "#96693c", "#5a1e4b", "#0f8f83", "#e06aa3", "#8a8f12")
_DASHES: Final = ("-", (0, (5, 1.6)), (0, (2, 1.2)), (0, (6, 1.4, 1.2, 1.4)), (0, (1, 1)))

GROUP_DASHES: Final[dict[str, Any]] = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-."}
"""Dashes of `group_looks`, which are named as in plotly."""

_RC: Final[dict[Any, Any]] = {
    "font.family": "sans-serif",
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.color": INK,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "figure.dpi": 120.0,
    "savefig.dpi": 200.0,
    "savefig.bbox": "tight",
    "figure.constrained_layout.use": True,
    "svg.fonttype": "none",  # text stays text in vector files
    "pdf.fonttype": 42,
    "ps.fonttype": 42,
}


@contextmanager
def style() -> Iterator[None]:
    """Draws within the look of the package and leaves the user's own settings as they were."""
    with mpl.rc_context(_RC):
        yield


def selector_lines(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """How the line of each selector of a figure is drawn: keyword arguments of ``Axes.plot``.

    A selector of this package has the same colour and marker in every figure, and ``top_k (force_std_mean)`` has those
    of ``top_k``.  Other names keep theirs in the figures of one study.  Selectors that share both, such as variants of
    one kind, are told apart by their dashes.
    """
    names = list(dict.fromkeys(names))
    colors, markers = _own_looks({_kind(name) for name in names})
    seen: dict[str, int] = {}
    lines = {}
    for name in names:
        kind = _kind(name)
        seen[kind] = seen.get(kind, -1) + 1
        dashes = _DASHES[seen[kind] % len(_DASHES)]
        look = {"color": colors[kind], "marker": markers[kind], "linestyle": dashes, "markersize": 3.6, "label": name}
        lines[name] = look
    return lines


def _own_looks(kinds: set[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Colours and markers of kinds of selectors; each of the names that have none takes the next that is free."""
    colors = {kind: SELECTOR_COLORS[kind] for kind in kinds if kind in SELECTOR_COLORS}
    markers = {kind: SELECTOR_MARKERS.get(kind, "8") for kind in colors}
    for kind in sorted(kinds - set(colors)):
        place = zlib.crc32(kind.encode())
        colors[kind] = _first_free(_OTHERS, place, set(colors.values()))
        markers[kind] = _first_free(tuple(SELECTOR_MARKERS.values()), place, set(markers.values()))
    return colors, markers


def _first_free(among: Sequence[str], place: int, taken: set[str]) -> str:
    """What stands at a place of a circle, or the first after it that is not taken, if there is one."""
    circle = [among[(place + step) % len(among)] for step in range(len(among))]
    return next((one for one in circle if one not in taken), circle[0])


def _kind(name: str) -> str:
    return re.split(r"[^A-Za-z0-9_.]", name.strip(), maxsplit=1)[0]


FEWEST_FOR_BAND: Final = 4
"""Seeds below which there are points instead of a band: the t interval of 2 seeds is 13 standard errors wide."""


def draw_seeds(
    axes: Axes,
    x: np.ndarray,
    values: np.ndarray,
    look: Mapping[str, Any],
    *,
    log: bool,
    level: float = LEVEL,
    factor: float = 1.0,
) -> Line2D:
    """Draws the mean over seeds, where all of them have a value, and how they differ.

    That is the t interval as a band, or with fewer than `FEWEST_FOR_BAND` seeds the value of each as a point.

    Args:
        axes: to draw into.
        x: [n].
        values: [seeds, n]; NaN where a seed has no value.
        look: keyword arguments of ``Axes.plot``.
        log: whether the mean is geometric.
        level: confidence level of the band.
        factor: to the unit shown.

    Returns:
        the line of the mean.
    """
    whole = np.isfinite(values).all(axis=0)
    found = t_interval(values[:, whole], level, log=log)
    (line,) = axes.plot(x[whole], factor * found.center, **look)
    if len(values) < FEWEST_FOR_BAND:
        if len(values) > 1:
            points = {"marker": look.get("marker", "o"), "markersize": 3.0, "markeredgewidth": 0, "alpha": 0.6}
            for row in values:
                axes.plot(x, factor * row, linestyle="none", color=line.get_color(), zorder=1.5, **points)
        return line
    low, high = (factor * end for end in (found.low, found.high))
    axes.fill_between(x[whole], low, high, color=line.get_color(), alpha=0.13, linewidth=0)
    return line


def panel_grid(count: int, width: float = 3.0, height: float = 2.5, columns: int = 3) -> tuple[Figure, list[Axes]]:
    """A figure of equal panels in rows, without empty ones.

    Args:
        count: number of panels.
        width: of each, in inches.
        height: of each, in inches.
        columns: the most in a row.
    """
    across = 2 if count == 4 and columns == 3 else min(count, columns)
    down = -(-count // across)
    figure, grid = plt.subplots(down, across, squeeze=False, figsize=(0.4 + width * across, 0.5 + height * down))
    panels = list(grid.ravel())
    for empty in panels[count:]:
        empty.remove()
    return figure, panels[:count]


def legend_below(figure: Figure, handles: Sequence[Artist]) -> None:
    """One legend for all panels, under them; the figure grows by what more than two lines of it need."""
    columns = min(len(handles), max(2, int(figure.get_figwidth() / 1.4)))
    lines = -(-len(handles) // columns)
    figure.set_figheight(figure.get_figheight() + 0.19 * max(0, lines - 2))
    figure.legend(handles=list(handles), loc="outside lower center", ncols=columns)


def save(figure: Figure, stem: Path) -> list[Path]:
    """Writes a figure as PDF, with text as text, and as PNG: the same bytes whenever the same figure is drawn.

    Args:
        figure: of one of the functions of this package.
        stem: path without its ending.

    Returns:
        the two files.
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_name(f"{stem.name}{ending}") for ending in (".pdf", ".png")]
    with style():
        figure.savefig(paths[0], metadata={"CreationDate": None, "Creator": "almlip-jax"})
        figure.savefig(paths[1])
    return paths


def plain_log_ticks(axes: Axes, which: str = "both") -> None:
    """Writes the ticks of logarithmic axes as plain numbers (20, 50, 100) instead of powers of ten."""
    for name, axis in (("x", axes.xaxis), ("y", axes.yaxis)):
        if which in (name, "both"):
            low, high = sorted(axis.get_view_interval())
            narrow = low > 0 and high < 6 * low  # too few of 1, 2 and 5 lie between
            axis.set_major_locator(
                ticker.MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]) if narrow else ticker.LogLocator(subs=(1.0, 2.0, 5.0))
            )
            axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(ticker.NullFormatter())
