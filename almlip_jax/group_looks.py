"""One look for each test group, in every figure of a report or an evaluation: a colour, and beyond ten a dash too."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final, NamedTuple

COLORS: Final = (
    "#0b6fb8",
    "#d1570b",
    "#338855",
    "#a53c5a",
    "#4b2db4",
    "#f09600",
    "#0f8f83",
    "#780000",
    "#c378ff",
    "#7d858d",
)
"""Told apart by colour."""

_DASHES: Final = ("solid", "dash", "dot", "dashdot")
_MARKERS: Final = ("circle", "square", "diamond", "triangle-up")


class Look(NamedTuple):
    """How a group is drawn."""

    color: str
    """#rrggbb."""
    dash: str
    """Of its lines, as plotly names it: ``solid``, ``dash``, ``dot`` or ``dashdot``."""
    marker: str
    """Of its points, as plotly names it: ``circle``, ``square``, ``diamond`` or ``triangle-up``."""


def group_looks(names: Iterable[str]) -> dict[str, Look]:
    """The look of each group, in the order people sort them: 300K, 600K, 1000K.

    Args:
        names: of all groups that a page or a set of figures shows; the looks follow from all of them together.
    """
    ordered = sorted({str(name) for name in names}, key=_natural)
    return {
        name: Look(
            COLORS[n % len(COLORS)],
            _DASHES[n // len(COLORS) % len(_DASHES)],
            _MARKERS[n // len(COLORS) % len(_MARKERS)],
        )
        for n, name in enumerate(ordered)
    }


def _natural(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """Numbers by their size, the rest as text."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts], name
