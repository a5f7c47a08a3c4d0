"""Tables of the study: errors, label factors, and whether what was wanted is reached."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from almlip_jax.evaluation.statistics import labels_to_target, t_interval

WANTED = {"acac": (160, 20), "zundel": (170, 30), "silicon": (214, 24)}
"""Labels of a training from scratch, and those with which a teacher and a selector should do as well."""
CELL = ["system", "seed", "labels", "selector", "way", "test"]


def merged(files: Sequence[Path]) -> pd.DataFrame:
    """The rows of some tables, each once; of the same training the first counts."""
    table = pd.concat([pd.read_csv(file) for file in files if file.exists()], ignore_index=True)
    return table.drop_duplicates(CELL).sort_values(CELL, ignore_index=True)


def factor(scratch: pd.Series, labels: float, error: float) -> tuple[float, bool]:
    """How many times as many labels a training from scratch needs for an error, and whether that is a lower bound."""
    needed = labels_to_target(scratch.index, scratch, error)
    return float(needed.finite) / labels, bool(needed.beyond)


def curves(cells: pd.DataFrame, quantity: str) -> dict[int, pd.Series]:
    """Errors by labels of each seed."""
    trained = cells[cells.labels > 0]
    return {seed: own.set_index("labels")[quantity].sort_index() for seed, own in trained.groupby("seed")}


def told(pairs: Sequence[tuple[float, bool]]) -> str:
    """Mean and interval of factors; a lower bound where some are."""
    if not pairs:
        return "-"
    return f"{'at least ' if any(beyond for _, beyond in pairs) else ''}{t_interval([value for value, _ in pairs]):.2f}"


def errors(table: pd.DataFrame, quantity: str = "forces_rmse") -> str:
    """Mean errors, and label factors against random labels from scratch."""
    lines = _head("system", "test", "labels", "chosen by", "trained", quantity, "seeds", "label factor")
    for (system, test), own in table.groupby(["system", "test"], sort=False):
        scratch = curves(own[(own.way == "scratch") & (own.selector == "random")], quantity)
        for (size, kind, way), cell in own.groupby(["labels", "selector", "way"]):
            values = cell.set_index("seed")[quantity]
            pairs = [factor(scratch[n], size, value) for n, value in values.items() if n in scratch and size]
            cells = (system, test, size, kind, way, f"{values.mean():.1f}", len(values), told(pairs))
            lines.append(_line(*cells))
    return "\n".join(lines)


def wanted(table: pd.DataFrame, quantity: str = "forces_rmse") -> str:
    """Whether few labels with a teacher reach the error of many random ones from scratch, seeds paired.

    The factor compares numbers of labels at the error of the training from scratch on all that it has; where the fewest
    labels tried are enough in a seed it is a lower bound, and where the most are not, an upper one.
    """
    head = ("system", "test", "chosen by", "trained", f"{quantity}, few / all from scratch")
    lines = _head(*head, "label factor", "all / all from scratch", "seeds")
    for (system, test), own in table.groupby(["system", "test"], sort=False):
        most, few = WANTED[str(system).partition(",")[0]]
        scratch = curves(own[(own.way == "scratch") & (own.selector == "random")], quantity)
        for (kind, way), cell in own[own.way != "scratch"].groupby(["selector", "way"]):
            mine = curves(cell, quantity)
            paired = [n for n in mine if n in scratch and most in scratch[n].index and few in mine[n].index]
            if not paired:
                continue
            few_over = [mine[n][few] / scratch[n][most] for n in paired]
            reached = [labels_to_target(mine[n].index, mine[n], scratch[n][most]) for n in paired]
            above, below = any(labels.beyond for labels in reached), any(labels.low == 0 for labels in reached)
            bound = "at most " if above else "at least " if below else ""
            found = t_interval([most / labels.finite for labels in reached])
            factors = "-" if above and below else f"{bound}{found:.1f}"
            whole = [mine[n][most] / scratch[n][most] for n in paired if most in mine[n].index]
            told_whole = f"{t_interval(whole):.2f}" if whole else "-"
            cells = (f"{few} / {most}: {t_interval(few_over):.2f}", factors, told_whole)
            lines.append(_line(system, test, kind, way, *cells, len(paired)))
    return "\n".join(lines)


def _head(*names: str) -> list[str]:
    return [_line(*names), "|" + " --- |" * len(names)]


def _line(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"
