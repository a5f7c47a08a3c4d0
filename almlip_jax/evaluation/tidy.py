"""The table of a sweep: one row for each system, selector, seed, round and test set, and its typed reader.

Files are CSV; an empty field is a value that is missing.  What tells rows apart (`KEYS`) is never missing, except the
sizes of ensemble and batch, which a whole table may leave empty.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
import pandas as pd

from almlip_jax.errors import InputError
from almlip_jax.targets import further_targets, target_errors
from almlip_jax.unit_names import spelt

if TYPE_CHECKING:
    from collections.abc import Iterator

_NAMES: Final = ("system", "selector", "test")
_COUNTS: Final = ("seed", "round", "labels")
_SIZES: Final = ("ensemble_size", "batch_size")

_POINT: Final = ("system", "selector", "seed", "ensemble_size", "batch_size", "round", "labels", "test")
_SIGMA: Final = ("sigma_batch", "sigma_pool")
_MONITOR: Final = "monitor"
"""Name of the score that these are means of; tables of earlier versions do not say it."""

SECONDS: Final = ("seconds_train", "seconds_select", "seconds_label", "seconds")
"""Wall time of a round, columns of the table; ``seconds`` is all of it."""

KEYS: Final = ("system", "test", "ensemble_size", "batch_size", "selector", "seed", "round")
"""What tells rows apart."""


class Quantity(NamedTuple):
    """How people write a column."""

    name: str
    """In figures and tables."""
    unit: str = ""
    """Unit shown; empty for a plain number."""
    factor: float = 1.0
    """How many units shown make one of the column."""
    rises: bool = False
    """Whether more is better."""

    @property
    def label(self) -> str:
        """Name and unit."""
        return f"{self.name} ({self.unit})" if self.unit else self.name


_ERRORS: Final[dict[str, Quantity]] = {
    "energy_rmse": Quantity("energy RMSE", "meV/atom", 1e3),
    "energy_mae": Quantity("energy MAE", "meV/atom", 1e3),
    "energy_offset_free_rmse": Quantity("energy RMSE without offset", "meV/atom", 1e3),
    "forces_rmse": Quantity("force RMSE", "meV/Å", 1e3),
    "forces_mae": Quantity("force MAE", "meV/Å", 1e3),
    "stress_rmse": Quantity("stress RMSE", "meV/Å³", 1e3),
    "stress_mae": Quantity("stress MAE", "meV/Å³", 1e3),
}

CALIBRATION: Final[dict[str, Quantity]] = {
    "spearman": Quantity("Spearman correlation", rises=True),
    "miscalibration_area": Quantity("miscalibration area"),
    "ence": Quantity("ENCE"),
    "nll": Quantity("NLL", "nats"),
    "crps": Quantity("CRPS", "meV/Å", 1e3),
    "auroc": Quantity("AUROC", rises=True),
    "ause": Quantity("AUSE"),
}
"""Columns that say how well the force uncertainty predicts the error on a test set; see `uncertainty.calibration`."""


def error_columns() -> dict[str, Quantity]:
    """Columns that a comparison of selectors can be about: positive, smaller is better."""
    further = {
        f"{one.label}_{kind}": Quantity(f"{one.label} {kind.upper()}", spelt(one.shown), 1e3)
        for one in further_targets()
        for kind in ("rmse", "mae")
    }
    return _ERRORS | further


def columns() -> tuple[str, ...]:
    """Columns of the table, in their order; others are left alone."""
    return (*_POINT, *error_columns(), *CALIBRATION, *_SIGMA, _MONITOR, *SECONDS)


def _of_some() -> set[str]:
    """Columns that a table need not have: of stresses, dipoles and the like, which not all systems have."""
    return {_MONITOR, *(name for name, one in target_errors().items() if not one.basic or one.structures != "all")}


class Case(NamedTuple):
    """One comparison: the selectors in it share initial sets, pools and tests."""

    system: str
    test: str
    ensemble_size: int | None = None
    batch_size: int | None = None

    def title(self, among: Iterable[Case]) -> str:
        """The system, and whatever else differs among the cases."""
        every = list(among)
        parts = [self.system]
        if len({case.test for case in every}) > 1:
            parts.append(self.test)
        if len({case.ensemble_size for case in every}) > 1 and self.ensemble_size is not None:
            parts.append("1 member" if self.ensemble_size == 1 else f"{self.ensemble_size} members")
        if len({case.batch_size for case in every}) > 1 and self.batch_size is not None:
            parts.append(f"batches of {self.batch_size}")
        return ", ".join(part for part in parts if part)


def read_tables(paths: Sequence[Path | str]) -> pd.DataFrame:
    """Reads tables of a sweep and puts them one under the other.

    Args:
        paths: CSV files with all of `columns`; those of stresses and dipoles and ``monitor`` may be left out.  Rows
            without ``labels`` stand for rounds that a point did not reach, and are left out.

    Returns:
        names as text (``monitor`` empty where it is not said), ``seed``, ``round`` and ``labels`` as int64, sizes as
        Int64 (with missing ones), the rest as float64 with NaN where a value is missing; rows in the order of the
        files.

    Raises:
        InputError: a file is not a table, lacks a column, holds no number where one is due, or a row comes twice.
        OSError: a file cannot be read.
    """
    if not paths:
        raise InputError("there is no table to read; name the CSV files of a sweep.")
    table = pd.concat([_read(Path(path)) for path in paths], ignore_index=True)
    if table.empty:
        raise InputError(f"{paths[0]} has no rows; the sweep has not finished a round yet.")
    again = table.duplicated(subset=list(KEYS))
    if again.any():
        row = table[again].iloc[0]
        told = ", ".join(f"{name} {row[name]}" for name in KEYS if not pd.isna(row[name]))
        raise InputError(f"a row comes twice: {told}; name each table once and keep one row of each.")
    return table


def by_case(table: pd.DataFrame) -> Iterator[tuple[Case, pd.DataFrame]]:
    """The parts of a table that are compared among themselves, in the order in which they first come."""
    names = ["system", "test", "ensemble_size", "batch_size"]
    for key, part in table.groupby(names, sort=False, dropna=False):
        system, test, *sizes = key
        yield Case(str(system), str(test), *(None if pd.isna(size) else int(size) for size in sizes)), part


def by_selector(part: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """The rows of each selector, in the order in which they first come."""
    for name, rows in part.groupby("selector", sort=False):
        yield str(name), rows


def monitors(table: pd.DataFrame) -> dict[Case, str]:
    """The score that ``sigma_batch`` and ``sigma_pool`` are means of, of each case whose rows say it.

    Cases are those of systems, whatever their tests: their ``test`` is empty.

    Raises:
        InputError: rows of one case say different ones, which no axis holds.
    """
    found: dict[Case, str] = {}
    for case, part in by_case(table.assign(test="")):
        said = sorted(set(part[_MONITOR]) - {""})
        if len(said) > 1:
            raise InputError(
                f"{case.system}: uncertainties are of {said[0]} in some rows and of {said[1]} in others; draw their "
                "tables apart."
            )
        if said:
            found[case] = said[0]
    return found


def require(table: pd.DataFrame, columns: Sequence[str]) -> None:
    """Refuses a table in which a column is missing or has no value at all.

    Raises:
        InputError: names the column.
    """
    for column in columns:
        if column not in table:
            raise InputError(f"the table has no column '{column}'.")
        if not table[column].notna().any():
            raise InputError(f"column '{column}' of the table has no value.")


def _read(path: Path) -> pd.DataFrame:
    try:
        raw = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8")
    except (pd.errors.EmptyDataError, pd.errors.ParserError, UnicodeDecodeError):
        raise InputError(f"{path} is not a table: it must be CSV with a header.") from None
    missing = [name for name in columns() if name not in raw and name not in _of_some()]
    if missing:
        raise InputError(f"{path} lacks column {', '.join(repr(name) for name in missing)} of a sweep's table.")
    reached = raw.reindex(columns=[*columns()], fill_value="")[raw["labels"].str.strip() != ""]
    return pd.DataFrame({name: _typed(reached[name], path) for name in columns()})


def _typed(column: pd.Series, path: Path) -> pd.Series:
    """One column in its type."""
    name = str(column.name)
    text = column.str.strip()
    if name in (*_NAMES, _MONITOR):
        _refuse((text == "") & (name != _MONITOR), text, path, "is empty")
        return text.astype(object)
    text = text.mask(text.str.lower().isin(["", "nan"]), "")
    values = pd.to_numeric(text.mask(text == ""), errors="coerce").astype(float)
    _refuse(values.isna() & (text != ""), text, path, "is not a number")
    _refuse(np.isinf(values), text, path, "is infinite; leave the field of a missing value empty")
    if name in _COUNTS or name in _SIZES:
        _refuse(values.notna() & ((values % 1 != 0) | (values < 0)), text, path, "is not a count")
    if name in _COUNTS:
        _refuse(values.isna(), text, path, "is empty")
    if name in error_columns():
        _refuse(values <= 0, text, path, "is not an error, which must be positive")
    if name == "labels":
        _refuse(values < 1, text, path, "is not a number of labels")
    return values.astype("int64" if name in _COUNTS else "Int64" if name in _SIZES else "float64")


def _refuse(wrong: pd.Series, text: pd.Series, path: Path, reason: str) -> None:
    if wrong.any():
        place = wrong.idxmax()  # the first; line 1 of a file is its header, and its rows begin at 0
        raise InputError(f"{path}, line {place + 2}: {text.name} '{text[place]}' {reason}.")
