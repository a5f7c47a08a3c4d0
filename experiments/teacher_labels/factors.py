"""Tables of the study: errors, label factors, and whether what was wanted is reached."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

WANTED = {"acac": (160, 20), "zundel": (170, 30), "silicon": (214, 24)}
"""Labels of a training from scratch, and those with which a teacher and a selector should do as well."""
CELL = ["system", "seed", "labels", "selector", "way", "test"]


def merged(files: Sequence[Path]) -> pd.DataFrame:
    """The rows of some tables, each once; of the same training the first counts."""
    table = pd.concat([pd.read_csv(file) for file in files if file.exists()], ignore_index=True)
    return table.drop_duplicates(CELL).sort_values(CELL, ignore_index=True)


def factor(scratch: pd.Series, labels: float, error: float) -> tuple[float, bool]:
    """How many times as many labels a training from scratch needs for an error, and whether that is a lower bound."""
    needed, beyond = labels_for(scratch, error)
    return needed / labels, beyond


def labels_for(errors: pd.Series, wanted: float) -> tuple[float, bool]:
    """Labels with which an error is reached, and whether that is more than any known.

    Errors, by the number of labels, are interpolated in logarithms; fewer labels than the fewest are not inferred.
    """
    x, y = np.log(errors.index.to_numpy(float)), np.minimum.accumulate(np.log(errors.to_numpy(float)))
    if np.log(wanted) < y[-1]:
        return float(np.exp(x[-1])), True
    return float(np.exp(np.interp(-np.log(wanted), -y, x))), False


def curves(cells: pd.DataFrame, quantity: str) -> dict[int, pd.Series]:
    """Errors by labels of each seed."""
    trained = cells[cells.labels > 0]
    return {seed: own.set_index("labels")[quantity].sort_index() for seed, own in trained.groupby("seed")}


def interval(values: Sequence[float], digits: int = 2) -> str:
    """Geometric mean, and the interval of 95 % (Student's t of the logarithms)."""
    logs = np.log(values)
    mean = f"{np.exp(logs.mean()):.{digits}f}"
    if len(logs) < 2:
        return mean
    width = stats.t.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / np.sqrt(len(logs))
    return f"{mean} ({np.exp(logs.mean() - width):.{digits}f} to {np.exp(logs.mean() + width):.{digits}f})"


def told(pairs: Sequence[tuple[float, bool]]) -> str:
    """Mean and interval of factors; a lower bound where some are."""
    if not pairs:
        return "-"
    return f"{'at least ' if any(beyond for _, beyond in pairs) else ''}{interval([value for value, _ in pairs])}"


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
        most, few = WANTED[str(system)]
        scratch = curves(own[(own.way == "scratch") & (own.selector == "random")], quantity)
        for (kind, way), cell in own[own.way != "scratch"].groupby(["selector", "way"]):
            mine = curves(cell, quantity)
            paired = [n for n in mine if n in scratch and most in scratch[n].index and few in mine[n].index]
            if not paired:
                continue
            few_over = [mine[n][few] / scratch[n][most] for n in paired]
            reached = [labels_for(mine[n], scratch[n][most]) for n in paired]
            least = min(mine[paired[0]].index)
            above, below = any(beyond for _, beyond in reached), any(labels <= 1.001 * least for labels, _ in reached)
            bound = "at most " if above else "at least " if below else ""
            factors = "-" if above and below else bound + interval([most / labels for labels, _ in reached], 1)
            whole = [mine[n][most] / scratch[n][most] for n in paired if most in mine[n].index]
            cells = (f"{few} / {most}: {interval(few_over)}", factors)
            lines.append(_line(system, test, kind, way, *cells, interval(whole) if whole else "-", len(paired)))
    return "\n".join(lines)


def _head(*names: str) -> list[str]:
    return [_line(*names), "|" + " --- |" * len(names)]


def _line(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"
