"""From one format of structure files to another, with labels, weights and whatever else has a place in both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ase.db
import numpy as np
from ase import Atoms
from ase.data import atomic_numbers, chemical_symbols
from ase.db.core import check

from almlip_jax.errors import InputError
from almlip_jax.files import replacing
from almlip_jax.structures.io import read_structures, write_cfg, write_structures
from almlip_jax.structures.labels import FileReading

_ARRAYS_OF_DATABASES = ("numbers", "positions", "tags", "momenta", "masses", "initial_magmoms", "initial_charges")


@dataclass(frozen=True)
class Converted:
    """What came of a conversion.

    Attributes:
        number: structures written.
        types: element of each type, where the file has types.
        left_out: names of what some structures have and the format has no place for.
    """

    number: int
    types: tuple[str, ...]
    left_out: tuple[str, ...]


def convert(source: Path, target: Path, reading: FileReading | None = None) -> Converted:
    """Reads structures and writes them in the format that the name of the target says; it appears whole or not at all.

    Args:
        source: whatever `read_structures` reads.
        target: ``.extxyz`` or ``.xyz``, ``.cfg`` (MLIP-2) or ``.db`` (ASE).
        reading: keys of the labels, and the element of each type where one of the files is MLIP-2's; for writing the
            elements that occur, by atomic number, where not given.

    Raises:
        InputError: the source cannot be read, or the target not be written.
    """
    how = reading or FileReading()
    if target.suffix not in (".extxyz", ".xyz", ".cfg", ".db"):
        raise InputError(f"{target} should end in .extxyz, .xyz, .cfg (MLIP-2) or .db (ASE), which says its format.")
    frames = read_structures(source, **how.arguments)
    types: tuple[str, ...] = ()
    left_out: set[str] = set()
    if target.suffix == ".cfg":
        occurring = sorted({int(number) for atoms in frames for number in atoms.numbers})
        types = how.types or tuple(chemical_symbols[number] for number in occurring)
        left_out.update(write_cfg(target, frames, [atomic_numbers[symbol] for symbol in types]))
    elif target.suffix == ".db":
        _write_database(target, frames)
        left_out.update(name for atoms in frames for name in atoms.arrays if name not in _ARRAYS_OF_DATABASES)
    else:
        write_structures(target, frames)
    return Converted(len(frames), types, tuple(sorted(left_out)))


def _write_database(path: Path, frames: Sequence[Atoms]) -> None:
    with replacing(path) as building, ase.db.connect(building, type="db", append=False) as database:
        for number, atoms in enumerate(frames):
            pairs = {key: _plain(value) for key, value in atoms.info.items() if _is_searchable(key, _plain(value))}
            data = {key: value for key, value in atoms.info.items() if key not in pairs}
            try:
                database.write(atoms, key_value_pairs=pairs, data=data)
            except (ValueError, TypeError) as error:
                raise InputError(
                    f"{path}, frame {number} cannot be written ({error}); remove what it names."
                ) from error


def _is_searchable(key: Any, value: Any) -> bool:
    """Whether a database takes an entry of `info` among those that it searches by."""
    try:
        check({key: value})
    except (ValueError, TypeError, AssertionError, AttributeError):
        return False
    return isinstance(value, str | int | float)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
