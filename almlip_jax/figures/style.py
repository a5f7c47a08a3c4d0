"""The look of every figure: fonts, vector text, sizes, and one colour for each selector and each test group."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import matplotlib as mpl
from matplotlib import ticker
from matplotlib.axes import Axes

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
    "threshold": "#56a8dd",
    "max_dist": "#00876c",
    "max_det": "#d1570b",
    "chain": "#8e4fa8",
}
"""Colours of the selectors by name: what is compared with chance stands out against its grey."""

GROUP_COLORS: Final[tuple[str, ...]] = ("#0b6fb8", "#d1570b", "#00876c", "#8e4fa8", "#a88600", "#56a8dd")
"""Colours of test groups, in the order of `order_groups`."""

UNCERTAINTY_SCALE: Final[tuple[tuple[float, str], ...]] = (
    (0.0, "#d5dee6"),
    (0.35, "#f2c14e"),
    (0.7, "#e0691f"),
    (1.0, "#a3161a"),
)
"""Colour scale of an atom's uncertainty: pale is sure, red is not."""

_OTHERS: Final = ("#a88600", "#b0447b", "#4b5fc4", "#5d7a12", "#1f8a9c")

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


def selector_color(name: str) -> str:
    """The colour of a selector, the same in every figure; ``top_k (force_std_mean)`` has that of ``top_k``."""
    base = re.split(r"[^A-Za-z0-9_.]", name.strip(), maxsplit=1)[0]
    if base in SELECTOR_COLORS:
        return SELECTOR_COLORS[base]
    return _OTHERS[zlib.crc32(name.encode()) % len(_OTHERS)]


def order_groups(names: Sequence[str]) -> list[str]:
    """Distinct test groups in the order that people expect: by the number a name begins with, then by name."""

    def place(name: str) -> tuple[float, str]:
        number = re.match(r"\d+(\.\d+)?", name)
        return (float(number.group()) if number else float("inf"), name)

    return sorted(set(names), key=place)


def group_color(name: str, names: Sequence[str]) -> str:
    """The colour of a test group among all groups of a figure."""
    return GROUP_COLORS[order_groups(names).index(name) % len(GROUP_COLORS)]


def temperature_color(temperature: float, temperatures: Sequence[float]) -> str:
    """The colour of a walker by its temperature: blue for the coldest, red for the hottest."""
    low, high = min(temperatures), max(temperatures)
    place = 0.5 if high == low else (temperature - low) / (high - low)
    stops = ((0.0, (0x1F, 0x6F, 0xB2)), (0.5, (0x7D, 0x55, 0x9C)), (1.0, (0xC8, 0x40, 0x28)))
    for (a, first), (b, second) in zip(stops[:-1], stops[1:], strict=True):
        if place <= b:
            share = (place - a) / (b - a)
            mixed = [round(x + share * (y - x)) for x, y in zip(first, second, strict=True)]
            return "#{:02x}{:02x}{:02x}".format(*mixed)
    raise AssertionError("the place on the scale is at most 1")


def plain_log_ticks(axes: Axes, which: str = "both") -> None:
    """Writes the ticks of logarithmic axes as plain numbers (20, 50, 100) instead of powers of ten."""
    for name, axis in (("x", axes.xaxis), ("y", axes.yaxis)):
        if which in (name, "both"):
            axis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
            axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(ticker.NullFormatter())
