"""ASE databases, written; `io` reads them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ase.db
import numpy as np
from ase import Atoms
from ase.calculators.calculator import all_properties
from ase.db.core import check

from almlip_jax.errors import InputError
from almlip_jax.files import replacing
from almlip_jax.targets import further_targets

_ARRAYS = ("numbers", "positions", "tags", "momenta", "masses", "initial_magmoms", "initial_charges")


def write_database(path: Path, frames: Iterable[Atoms]) -> tuple[str, ...]:
    """Writes structures with labels and `info`, each as it comes; the file appears complete or not at all.

    Declared targets that ASE has no column for lie among the data, where they are read from again.

    Returns:
        names of arrays and results that a database has no place for.

    Raises:
        InputError: a structure cannot be written; it is named.
    """
    left_out, declared = set[str](), {one.label for one in further_targets()}
    with replacing(path) as building, ase.db.connect(building, type="db", append=False) as database:
        for number, atoms in enumerate(frames):
            pairs = {key: _plain(value) for key, value in atoms.info.items() if _is_searchable(key, _plain(value))}
            data = {key: value for key, value in atoms.info.items() if key not in pairs}
            results = {} if atoms.calc is None else atoms.calc.results
            others = {name for name, value in results.items() if value is not None and name not in all_properties}
            data |= {name: results[name] for name in others & declared}  # a database has no column for them
            try:
                database.write(atoms, key_value_pairs=pairs, data=data)
            except (ValueError, TypeError) as error:
                raise InputError(
                    f"{path}, frame {number} cannot be written ({error}); remove what it names."
                ) from error
            left_out.update(name for name in atoms.arrays if name not in _ARRAYS)
            left_out.update(others - declared)
    return tuple(sorted(left_out))


def _is_searchable(key: Any, value: Any) -> bool:
    """Whether a database takes an entry of `info` among those that it searches by."""
    try:
        check({key: value})
    except (ValueError, TypeError, AssertionError, AttributeError):
        return False
    return isinstance(value, str | int | float)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
