"""Mean, fluctuation and drift of what a run has written into its table, in memory that does not grow with the run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd

from almlip_jax.files import understood

_ROWS = 100_000  # that are looked at together


class Line:
    """A straight line through points (t, y) that come a few at a time; points that are not finite are passed over.

    Sums are taken about the first point, so that a small drift of a large energy is not lost in rounding.
    """

    def __init__(self) -> None:
        self.number = 0
        self._origin = (0.0, 0.0)
        self._sums = np.zeros(5)  # of t, y, t t, t y, y y

    def add(self, times: np.ndarray, values: np.ndarray) -> None:
        """Takes points, [n] each."""
        finite = np.isfinite(values)
        if not finite.any():
            return
        t, y = times[finite].astype(float), values[finite].astype(float)
        if self.number == 0:
            self._origin = (float(t[0]), float(y[0]))
        t, y = t - self._origin[0], y - self._origin[1]
        self._sums += [t.sum(), y.sum(), t @ t, t @ y, y @ y]
        self.number += len(t)

    @property
    def mean(self) -> float:
        """Of the values; NaN where there are none."""
        return self._origin[1] + self._sums[1] / self.number if self.number else float("nan")

    @property
    def fluctuation(self) -> float:
        """Standard deviation of the values, with 1/n."""
        if not self.number:
            return float("nan")
        _, y, _, _, yy = self._sums / self.number
        return float(np.sqrt(max(yy - y * y, 0.0)))

    @property
    def drift(self) -> float:
        """Slope of the least-squares line; NaN where fewer than two times are known."""
        if self.number < 2:
            return float("nan")
        t, y, tt, ty, _ = self._sums / self.number
        spread = tt - t * t
        return float((ty - t * y) / spread) if spread > 0 else float("nan")


Averages: TypeAlias = dict[str, dict[str, Any]]
"""Of a walker: name -> ``mean``, ``fluctuation``, ``drift`` and ``unit``."""


def table_averages(table: Path, units: Mapping[str, str], walkers: int) -> list[Averages]:
    """Averages over a whole table of a run, one mapping a walker.

    Args:
        table: CSV with ``time_ps`` and a column ``<name>_<walker>`` for each quantity, empty where there is no value.
        units: name -> unit of each quantity.
        walkers: number of walkers.

    Returns:
        for each walker, name -> ``mean``, ``fluctuation`` (standard deviation), ``drift`` (slope of the least-squares
        line, per ps) and ``unit``.  Quantities without a value are left out.

    Raises:
        InputError: the table is not one of such a run.
    """
    lines = {(name, w): Line() for w in range(walkers) for name in units}
    with understood(table):
        for part in pd.read_csv(table, chunksize=_ROWS, float_precision="round_trip"):
            times = part["time_ps"].to_numpy(float)
            for (name, w), line in lines.items():
                line.add(times, part[f"{name}_{w}"].to_numpy(float))
    return [
        {name: averages(lines[name, w], unit) for name, unit in units.items() if lines[name, w].number}
        for w in range(walkers)
    ]


def averages(line: Line, unit: str) -> dict[str, Any]:
    """What a line says, as plain data; None where it says nothing."""
    found = {"mean": line.mean, "fluctuation": line.fluctuation, "drift": line.drift}
    return {name: value if np.isfinite(value) else None for name, value in found.items()} | {"unit": unit}
