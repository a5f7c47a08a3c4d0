"""The course of a training, from its table ``training.csv``: the curve of each model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from almlip_jax.targets import further_targets
from almlip_jax.unit_names import spelt

Floats = NDArray[np.float64]
Value = str | int | float | None

_KINDS: Final = (
    ("validation_forces_rmse_", "validation force RMSE", "meV/Å", 1e3),
    ("validation_energy_rmse_", "validation energy RMSE", "meV/atom", 1e3),
    ("train_loss_", "training loss", "", 1.0),
)
"""What is looked for in this order: prefix of the columns, name, unit shown, units shown per one of the column."""


def _besides() -> list[tuple[str, str, str, float]]:
    """What is shown besides, where models give it."""
    return [
        (f"validation_{one.label}_rmse_", f"validation {one.label} RMSE", spelt(one.shown), 1e3)
        for one in further_targets()
    ]


@dataclass(frozen=True)
class TrainingCurves:
    """The course of a training.

    Attributes:
        name: what is shown: the validation error of the forces; of the energies, or the training loss, where no
            structure with forces, or none at all, was held out; or the error of what else the models give.
        unit: of it; empty for a plain number.
        models: name of each model -> optimiser steps [n] and values [n]; only numbers above 0.
    """

    name: str
    unit: str
    models: Mapping[str, tuple[Floats, Floats]]

    @property
    def label(self) -> str:
        """Name and unit."""
        return f"{self.name} ({self.unit})" if self.unit else self.name


def training_curves(rows: Sequence[Mapping[str, Value]]) -> tuple[TrainingCurves, ...]:
    """What the table of a training shows: one course, and those of the errors of what models give besides the energy.

    Args:
        rows: of ``training.csv``, as `files.read_csv` reads it.
    """
    usual = [found for kind in _KINDS if (found := _of_kind(rows, *kind)) is not None]
    further = [found for kind in _besides() if (found := _of_kind(rows, *kind)) is not None]
    return (*usual[:1], *further)


def _of_kind(
    rows: Sequence[Mapping[str, Value]], prefix: str, name: str, unit: str, factor: float
) -> TrainingCurves | None:
    """None where no column has a number above 0."""
    columns = [column for column in (rows[0] if rows else ()) if column.startswith(prefix)]
    models = {}
    for column in columns:
        points = [(_number(row.get("step")), factor * _number(row.get(column))) for row in rows]
        shown = np.array([p for p in points if p[1] > 0 and math.isfinite(p[0] + p[1])], np.float64).reshape(-1, 2)
        if len(shown):
            models[column.removeprefix(prefix)] = shown[:, 0], shown[:, 1]
    return TrainingCurves(name, unit, models) if models else None


def _number(value: Value) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
