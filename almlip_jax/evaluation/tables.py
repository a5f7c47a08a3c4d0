"""Errors of a potential as tables for a terminal: a row for each group of structures, and one for each element."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from rich.table import Table

from almlip_jax.targets import further_targets


def error_table(metrics: Mapping[str, Any], title: str) -> Table:
    """Errors of all structures and of each group; stresses, dipoles where some structure has one.

    Args:
        metrics: of `error_metrics`.
        title: above the table.
    """
    return rows_of_errors({"all": metrics, **metrics["by_group"]}, title, "group")


def rows_of_errors(rows: Mapping[str, Mapping[str, Any]], title: str, first: str) -> Table:
    """Errors by name, a row each.

    Args:
        rows: of `error_metrics` or `plain_errors`.
        title: above the table.
        first: heads the column of the names.
    """
    with_stress = any(math.isfinite(values["stress_rmse"]) for values in rows.values())
    columns = ["E RMSE\nmeV/atom", "no offset\nmeV/atom", "F MAE\nmeV/A", "F RMSE\nmeV/A"]
    columns += ["S MAE\nmeV/A^3", "S RMSE\nmeV/A^3"] * with_stress
    names = ["energy_rmse", "energy_offset_free_rmse", "forces_mae", "forces_rmse"]
    names += ["stress_mae", "stress_rmse"] * with_stress
    for target in further_targets():
        if any(math.isfinite(values.get(f"{target.label}_rmse", math.nan)) for values in rows.values()):
            columns += [f"{target.label} {kind}\n{target.shown}" for kind in ("MAE", "RMSE")]
            names += [f"{target.label}_{kind}" for kind in ("mae", "rmse")]
    table = aligned(title, [first, "n", *columns], [first])
    for name, values in rows.items():
        table.add_row(name, str(values["num_structures"]), *(number(1e3 * values.get(one, math.nan)) for one in names))
    return table


def partly_labelled(metrics: Mapping[str, Any]) -> list[str]:
    """Sentences on labels that only some of the structures have, whose errors the table shows beside the number of all.

    Args:
        metrics: of `error_metrics`.
    """
    total = metrics["num_structures"]
    told = []
    for label, count in metrics["num_labelled"].items():
        if 0 < count < total:
            told.append(f"{count} of {total} structures have the label {label}; its errors are of these alone.")
        elif not count and label in ("energy", "forces"):
            told.append(f"no structure has the label {label} to compare with.")
    return told


def uncertainty_table(metrics: Mapping[str, Any]) -> Table | None:
    """The uncertainty of forces next to their errors: of all, of each group and of each element.

    Args:
        metrics: of `error_metrics`.

    Returns:
        None where nothing has forces.
    """
    if not metrics["by_species"]:
        return None
    rows = {"all": metrics, **metrics["by_group"]}
    parts = [(name, values, values["calibration"]["forces"]) for name, values in rows.items() if values["num_atoms"]]
    parts += [(f"element {symbol}", one, one["calibration"]) for symbol, one in metrics["by_species"].items()]
    columns = ["of", "atoms", "F MAE\nmeV/A", "F RMSE\nmeV/A", "force_total\nmeV/A", "slope", "Spearman", "ENCE"]
    table = aligned("uncertainty of forces", columns, ["of"])
    for name, values, calibration in parts:
        numbers = [number(1e3 * values[one]) for one in ("forces_mae", "forces_rmse", "force_total_mean")]
        numbers += [f"{calibration[one]:.3g}" if math.isfinite(calibration[one]) else "-" for one in _CALIBRATION]
        table.add_row(name, str(values["num_atoms"]), *numbers)
    return table


_CALIBRATION = ("slope", "spearman", "ence")


def aligned(title: str, columns: Sequence[str], left: Collection[str]) -> Table:
    """A table without rows, whose columns are aligned to the right but for some."""
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right")
    return table


def number(value: float | None) -> str:
    """A number with four digits; a dash for None, and what is not finite."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.4g}"
