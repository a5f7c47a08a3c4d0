"""What commands show, and write as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.panel import Panel
from rich.table import Table

console = Console()
if not console.is_terminal:
    console.width = 10_000  # a file has no line width


def show(content: RenderableType) -> None:
    """Writes tables: whole words in a terminal however narrow, and as wide as they are into files and pipes."""
    _fold(content)
    console.print(content, width=Measurement.get(console, console.options, content).maximum)


def _fold(content: RenderableType) -> None:
    """Continues what does not fit on the next line instead of cutting it off."""
    if isinstance(content, Table):
        for column in content.columns:
            column.overflow = "fold"
    elif isinstance(content, Panel):
        content.expand = False
        _fold(content.renderable)
    elif isinstance(content, Group):
        for part in content.renderables:
            _fold(part)


def print_pairs(title: str, rows: Mapping[str, str]) -> None:
    """Writes a table of names and values."""
    table = Table(title=title, show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    show(table)


def rounded(value: float) -> str:
    """A number with four digits, a dash where there is none."""
    return "-" if isinstance(value, float) and math.isnan(value) else f"{value:.4g}"


def write_result(path: Path | None, content: Mapping[str, Any]) -> None:
    """Writes what a command found as JSON, where a file was asked for."""
    from almlip_jax.files import write_json

    if path is not None:
        write_json(path, content)


def say_left_out(names: Sequence[str]) -> None:
    """Names what the format of a file that was written has no place for."""
    if names:
        complain(f"left out, as the format has no place for it: {', '.join(names)}")


def say(sentence: str) -> None:
    """Writes a sentence to standard output."""
    console.print(sentence, markup=False, highlight=False)


def complain(sentence: str) -> None:
    """Writes a sentence to standard error."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(sentence, markup=False)
