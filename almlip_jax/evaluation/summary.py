"""The table of a comparison for people: Markdown, and LaTeX with booktabs."""

from __future__ import annotations

import math

from almlip_jax.evaluation.comparison import Comparison, ComparisonTable
from almlip_jax.evaluation.statistics import Bounds, Interval, Paired
from almlip_jax.evaluation.tidy import error_columns

NOTHING = "-"
"""Where there is no number."""

_LATEX = {
    "\\": r"\textbackslash{}",
    **{sign: f"\\{sign}" for sign in "_%&#${}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "≥": r"$\geq$",
    "≤": r"$\leq$",
    "Å": r"\AA{}",
    "³": "$^3$",
}


def cells(table: ComparisonTable) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a comparison as text, in the unit that people read.

    Sizes of ensemble and batch have columns where they differ.  p values are those of the area, after Holm.
    """
    quantity = error_columns()[table.quantity]
    several = [name for name in ("ensemble_size", "batch_size") if len({getattr(r.case, name) for r in table.rows}) > 1]
    titles = {"ensemble_size": "members", "batch_size": "batch"}
    header = ["system", "test", *(titles[name] for name in several), "selector", "seeds", "labels", quantity.label]
    header += [f"final error / {table.baseline}", f"mean error / {table.baseline}", "p (t)", "p (Wilcoxon)"]
    header += [f"labels of {table.baseline} / own", "reached"]
    body = []
    for row in table.rows:
        sizes = [NOTHING if getattr(row.case, n) is None else str(getattr(row.case, n)) for n in several]
        line = [row.case.system, row.case.test, *sizes, row.selector, str(row.seeds), str(row.labels)]
        line += [_interval(row.error, quantity.factor), _ratio(row.final), _ratio(row.area)]
        line += [_p(p) for p in row.area_holm]
        body.append([*line, _saving(row), NOTHING if row.reached is None else f"{row.reached}/{row.seeds}"])
    return header, body


def markdown(table: ComparisonTable) -> str:
    """The table in Markdown, with a line on what it shows and its notes."""
    header, body = cells(table)
    left = header.index("seeds")
    lines = [_piped(header), _piped(["---"] * left + ["---:"] * (len(header) - left)), *(_piped(row) for row in body)]
    notes = [f"- {note}" for note in table.notes]
    return "\n".join([*lines, "", caption(table), *(["", *notes] if notes else [])]) + "\n"


def latex(table: ComparisonTable) -> str:
    """The table as a LaTeX ``tabular`` with booktabs; caption and notes are comments above it."""
    header, body = cells(table)
    left = header.index("seeds")
    lines = [f"% {text}" for text in (caption(table), *table.notes)]
    lines += [rf"\begin{{tabular}}{{{'l' * left + 'r' * (len(header) - left)}}}", r"\toprule"]
    lines += [_ampersands(header), r"\midrule"]
    for n, row in enumerate(body):
        if n and row[: left - 1] != body[n - 1][: left - 1]:
            lines.append(r"\addlinespace")
        lines.append(_ampersands(row))
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def caption(table: ComparisonTable) -> str:
    """What the columns are, in a few sentences."""
    level = f"{100 * table.level:g} %"
    return (
        f"Errors are geometric means over seeds at the last number of labels; ratios below 1 are better than "
        f"{table.baseline}, over seeds in common; the mean error is that over the whole curve in ln(labels), and the p "
        f"values, adjusted after Holm for the selectors of a row's case, are of its ratio; labels are those to the "
        f"final error of {table.baseline}, above 1 is better; brackets: {level} intervals (t; bootstrap for labels)."
    )


def number(value: float, digits: int = 3) -> str:
    """A number with the given significant digits and without an exponent."""
    if math.isnan(value):
        return NOTHING
    if math.isinf(value):
        return "inf"
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits - 1}e}")
    decimals = digits - 1 - math.floor(math.log10(abs(rounded)))
    return f"{rounded:.{max(decimals, 0)}f}"


def _interval(interval: Interval, factor: float) -> str:
    center, low, high = (factor * float(end) for end in (interval.center, interval.low, interval.high))
    return _bracketed(number(center), low, high)


def _bracketed(center: str, low: float, high: float) -> str:
    return center if math.isnan(low) else f"{center} [{number(low)}, {number(high)}]"


def _ratio(pair: Paired | None) -> str:
    return NOTHING if pair is None else _bracketed(number(pair.ratio), pair.low, pair.high)


def _saving(row: Comparison) -> str:
    if row.saving is None or row.saving_interval is None:
        return NOTHING
    return _bracketed(bound(row.saving), float(row.saving_interval.low), float(row.saving_interval.high))


def bound(bounds: Bounds) -> str:
    """A number that is known, or what bounds it."""
    low, high = float(bounds.low), float(bounds.high)
    if low <= 0 and math.isinf(high):
        return NOTHING
    if low <= 0:
        return f"≤ {number(high)}"
    if math.isinf(high):
        return f"≥ {number(low)}"
    return number(low) if math.isclose(low, high, rel_tol=1e-9) else f"{number(low)} to {number(high)}"


def _p(value: float) -> str:
    if math.isnan(value):
        return NOTHING
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _piped(row: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"


def _ampersands(row: list[str]) -> str:
    escaped = ("--" if cell == NOTHING else "".join(_LATEX.get(sign, sign) for sign in cell) for cell in row)
    return " & ".join(escaped) + r" \\"
