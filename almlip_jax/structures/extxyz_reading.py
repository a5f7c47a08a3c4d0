"""Extended XYZ files, read frame by frame; what a frame says is taken as it was meant, or refused with frame and atom.

The format is that of ASE, and a frame that ASE reads gives the same structure here.  Beyond it, rows must have the
columns that ``Properties`` names, neither more nor fewer, names of the format are known in any case, flags may be
numbers, D and T are the isotopes of hydrogen, and fixed coordinates become as few constraints as possible.
"""

from __future__ import annotations

import io
import math
import re
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from ase import Atoms
from ase.calculators.calculator import all_properties
from ase.constraints import FixAtoms, FixCartesian
from ase.data import atomic_masses, atomic_numbers
from ase.io.extxyz import per_config_properties
from ase.io.formats import open_with_compression
from ase.stress import full_3x3_to_voigt_6_stress

from almlip_jax.errors import InputError
from almlip_jax.structures.extxyz_header import parse_header, to_flag, to_float
from almlip_jax.structures.validation import holding
from almlip_jax.targets import further_targets

_PLAIN = "species:S:1:pos:R:3"  # what a frame without Properties holds
_COLUMNS = {"pos": "positions", "species": "symbols", "z": "numbers", "charge": "charges"}
_COLUMNS |= {name: name for name in ("positions", "symbols", "numbers", "move_mask")}
_ISOTOPES = {"D": 2.014, "T": 3.016}  # amu
_I_PI = re.compile(r"#\s*CELL\b")


class _Column(NamedTuple):
    """A property of ``Properties``: its name, what makes a value of text, and where it stands in a row."""

    name: str
    convert: Callable[[str], Any]
    begin: int
    end: int


def read_extxyz(path: Path) -> Iterator[Atoms]:
    """Frames of an (extended) XYZ file, also a compressed one (.gz, .bz2, .xz).

    Results of calculators, and declared `targets`, are in a `SinglePointCalculator`, ``move_mask`` is a constraint,
    everything else stays in `info` and arrays under its name.

    Raises:
        InputError: the file or a frame cannot be read.
    """
    for number, (comment, rows) in enumerate(_texts(path)):
        yield _parsed(comment, rows, f"{path}, frame {number}")


def count_extxyz(path: Path) -> int:
    """Number of frames of a file, far faster than reading them.

    Raises:
        InputError: the file cannot be read, or a frame has too few lines.
    """
    return sum(1 for _ in _texts(path))


def _texts(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Comment line and rows of each frame."""
    try:
        with (
            open_with_compression(str(path), "rb") as binary,
            io.TextIOWrapper(binary, encoding="utf-8-sig") as file,
        ):
            yield from _frames(file, path)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path} cannot be read ({reason}); correct the path or the file.") from error


def _frames(file: IO[str], path: Path) -> Iterator[tuple[str, list[str]]]:
    number = 0
    for line in file:
        if not line.strip():
            continue
        where = f"{path}, frame {number}"
        try:
            num_atoms = int(line)
        except ValueError as error:
            raise InputError(f"{where}: expected a number of atoms but found {line.strip()!r}; correct it.") from error
        if num_atoms < 0:
            raise InputError(f"{where} has {num_atoms} atoms; correct it.")
        comment = next(file, "")
        rows = list(islice(file, min(num_atoms, sys.maxsize)))  # never more than there are
        found = next((atom for atom, row in enumerate(rows) if row.isspace()), len(rows))
        if found < num_atoms:
            raise InputError(f"{where} ends after {found} of {num_atoms} atoms; the file is incomplete.")
        yield comment, rows
        number += 1


def _parsed(comment: str, rows: list[str], where: str) -> Atoms:
    try:
        return _atoms(comment, rows)
    except KeyError as error:
        raise InputError(f"{where} has an unknown element {error}; correct it.") from error
    except Exception as error:  # whatever the parser stumbles over is the file's fault
        raise InputError(f"{where} cannot be read ({error}); correct it.") from error


def _atoms(comment: str, rows: list[str]) -> Atoms:
    if _I_PI.match(comment):
        raise ValueError("i-PI keeps cell and units in the comment, where this format has none; convert the file")
    info = parse_header(comment)
    cell = info.pop("Lattice", None)
    pbc = info.pop("pbc", None)
    arrays = _arrays(info.pop("Properties", None), rows)
    numbers, masses = _species(arrays)
    atoms = Atoms(
        numbers=numbers,
        positions=arrays.pop("positions", np.zeros((len(rows), 3))),
        cell=cell,
        pbc=cell is not None if pbc is None else pbc,
        info=info,
    )
    if masses is not None and not {"mass", "masses"} & set(arrays):
        atoms.set_array("masses", masses)
    mobile = arrays.pop("move_mask", None)
    if mobile is not None:
        atoms.set_constraint(_constraints(mobile))
    _set_results_and_arrays(atoms, arrays)
    return atoms


def _arrays(properties: Any, rows: list[str]) -> dict[str, np.ndarray]:
    """The columns, by their names in ASE."""
    columns = _columns(_PLAIN if properties is None else str(properties))
    width = columns[-1].end
    words = [row.split() for row in rows]
    for atom, row in enumerate(words):
        # files without Properties often have more columns, which have no meaning then
        if len(row) < width or (len(row) > width and properties is not None):
            raise ValueError(f"atom {atom} has {len(row)} column{'s' * (len(row) != 1)}, not {width}")
    arrays = {}
    for column in columns:
        try:
            if column.end - column.begin == 1:
                values = [column.convert(row[column.begin]) for row in words]
            else:
                values = [[column.convert(text) for text in row[column.begin : column.end]] for row in words]
        except ValueError:
            raise ValueError(_first_bad(column, words)) from None
        arrays[column.name] = np.array(values, _TYPES[column.convert])
    return arrays


def _columns(properties: str) -> list[_Column]:
    fields = properties.strip().strip(":").split(":")
    if len(fields) % 3:
        raise ValueError(f"Properties={properties!r} is not a list of name:type:columns")
    columns: list[_Column] = []
    for name, letter, count in zip(fields[::3], fields[1::3], fields[2::3], strict=True):
        if letter not in _CONVERTERS or not count.isdecimal() or int(count) == 0:
            raise ValueError(f"Properties says {name}:{letter}:{count}, which is not a type (R, I, S, L) and a number")
        begin = columns[-1].end if columns else 0
        columns.append(_Column(_COLUMNS.get(name.lower(), name), _CONVERTERS[letter], begin, begin + int(count)))
    names = [column.name for column in columns]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"Properties names '{twice[0]}' twice")
    widths = {column.name: column.end - column.begin for column in columns}
    if not {"symbols", "numbers"} & set(names) or widths.get("positions") != 3:
        raise ValueError("Properties has no species:S:1 (or Z:I:1) and pos:R:3")
    return columns


def _first_bad(column: _Column, words: list[list[str]]) -> str:
    for atom, row in enumerate(words):
        for text in row[column.begin : column.end]:
            try:
                column.convert(text)
            except ValueError as error:
                return f"atom {atom}, {column.name}: {error}"
    raise AssertionError("only called where a text cannot be converted")


def _real(text: str) -> float:
    return to_float(text)


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a whole number") from None


_CONVERTERS: dict[str, Callable[[str], Any]] = {"R": _real, "I": _integer, "S": str, "L": to_flag}
_TYPES: dict[Callable[[str], Any], Any] = {_real: np.float64, _integer: np.int64, str: object, to_flag: bool}


def _species(arrays: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray | None]:
    """Atomic numbers, and the masses where isotopes are named."""
    numbers, symbols = arrays.pop("numbers", None), arrays.pop("symbols", None)
    if symbols is None:
        assert numbers is not None
        return numbers, None
    names = [symbol.capitalize() for symbol in symbols]
    if any(name.isdecimal() for name in names):
        raise ValueError("its species are numbers, which may be elements or types; write symbols, or a column Z:I:1")
    elements = ["H" if name in _ISOTOPES else name for name in names]
    found = np.array([atomic_numbers[element] for element in elements], np.int64)
    if numbers is not None and not np.array_equal(found, numbers):
        atom = int(np.argmax(found != numbers))
        raise ValueError(f"atom {atom} is {names[atom]} and element number {numbers[atom]} at once")
    if elements == names:
        return found, None
    return found, np.array([_ISOTOPES.get(name, atomic_masses[z]) for name, z in zip(names, found, strict=True)])


def _constraints(mobile: np.ndarray) -> list[FixAtoms | FixCartesian]:
    """Constraints of a mask [N] or [N, 3], true where an atom or coordinate may move."""
    if mobile.ndim == 2 and mobile.shape[1] != 3:
        raise ValueError(f"move_mask has {mobile.shape[1]} columns, not 1 or 3")
    fixed = ~(mobile[:, None] if mobile.ndim == 1 else mobile).astype(bool)
    found: list[FixAtoms | FixCartesian] = []
    if (whole := fixed.all(axis=1)).any():
        found.append(FixAtoms(mask=whole))
    for mask in np.unique(fixed[fixed.any(axis=1) & ~whole], axis=0):
        found.append(FixCartesian(np.flatnonzero((fixed == mask).all(axis=1)), mask=mask))
    return found


def _set_results_and_arrays(atoms: Atoms, arrays: dict[str, np.ndarray]) -> None:
    results: dict[str, Any] = {}
    declared = {one.label: one for one in further_targets()}
    for name, array in arrays.items():
        if name in all_properties or (name in declared and declared[name].per == "atom"):
            results[name] = array
        else:
            atoms.set_array(name, array)
    for key in list(atoms.info):
        if key in per_config_properties or (key in declared and declared[key].per == "structure"):
            results[key] = atoms.info.pop(key)
    for name in results.keys() & declared.keys():  # matrices stand in one line
        values, shape = np.asarray(results[name]), declared[name].shape_of(len(atoms))
        results[name] = values.reshape(shape) if values.size == math.prod(shape) else values
    if np.shape(results.get("stress", ())) == (3, 3):
        results["stress"] = full_3x3_to_voigt_6_stress(results["stress"])
    if results:
        atoms.calc = holding(atoms, results)
