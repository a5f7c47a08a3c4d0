"""From one format of structure files to another, with labels, weights and whatever else has a place in both."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ase.data import atomic_numbers, chemical_symbols

from almlip_jax.errors import InputError
from almlip_jax.structures.io import read_structures, write_structures
from almlip_jax.structures.labels import FileReading


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
    if target.suffix == ".cfg":
        occurring = sorted({int(number) for atoms in frames for number in atoms.numbers})
        types = how.types or tuple(chemical_symbols[number] for number in occurring)
    left_out = write_structures(target, frames, type_numbers=[atomic_numbers[symbol] for symbol in types] or None)
    return Converted(len(frames), types, left_out)
