"""The unit of every number that is shown by name: in tables, progress, status, files and reports."""

from __future__ import annotations

import re
from typing import Final

from almlip_jax.scores import score_units
from almlip_jax.targets import target_errors

UNITS: Final[dict[str, str]] = {
    "energy_mae": "eV/atom",
    "energy_rmse": "eV/atom",
    "energy_offset_free_rmse": "eV/atom",
    "energy_mae_structure": "eV",
    "energy_rmse_structure": "eV",
    "forces_mae": "eV/A",
    "forces_rmse": "eV/A",
    "stress_mae": "eV/A^3",
    "stress_rmse": "eV/A^3",
    "force_error": "eV/A",
    "label_seconds": "s",
    "picoseconds": "ps",
    "seconds": "s",
    "teacher_seconds": "s",
    "temperature": "K",
    "time_fs": "fs",
}
"""Name -> unit of what is not a score, empty for a plain number; A is the Angstrom, which every terminal can show."""

_PREFIXES: Final = re.compile(r"^(final_|validation_)+")


def unit_of(name: str) -> str:
    """Unit of a number, empty where it has none: of `UNITS` or of a score, also with what it is of in front or behind.

    ``forces_rmse_300K`` is the error of a group, ``final_forces_rmse_300K`` that of the final potential,
    ``validation_forces_rmse_0`` that of a member, ``seconds_train`` the time of a stage.
    """
    bare = _PREFIXES.sub("", name)
    known = score_units() | {name: one.unit for name, one in target_errors().items() if not one.basic} | UNITS
    while bare:
        if bare in known:
            return known[bare]
        bare = bare.rpartition("_")[0]
    return ""


def spelt(unit: str) -> str:
    """A unit as figures and pages write it: eV/Å³."""
    return unit.replace("A", "Å").replace("^3", "³")


def with_unit(number: str, name: str) -> str:
    """A number as it is written, and the unit of its name behind it."""
    unit = unit_of(name)
    return f"{number} {unit}" if unit else number
