"""Configuration files of MLIP-2 (``.cfg``), read and written.

A file is a sequence of ``BEGIN_CFG`` ... ``END_CFG`` blocks with the sections Size, Supercell (a zero row is a
direction that is not periodic), AtomData (named columns), Energy (eV), PlusStress (-volume * stress in eV: xx yy zz yz
xz xy) and Feature lines (a key, and the rest of the line).  Atom types count from 0; a table of atomic numbers says
what they are.

AtomData may have any further columns of numbers: per-atom arrays, by their names.  Feature lines with one key are the
lines of one text.  PlusStress without a volume is the virial that it is (``info["virial"]``).
"""

from __future__ import annotations

import itertools
import numbers as number_types
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from ase import Atoms
from ase.stress import full_3x3_to_voigt_6_stress

from almlip_jax.errors import InputError
from almlip_jax.files import replacing
from almlip_jax.structures.electronic_state import normalise_state
from almlip_jax.structures.validation import attach_labels, check_structure

_AXES = ("x", "y", "z")
_CARTESIAN = tuple(f"cartes_{axis}" for axis in _AXES)
_DIRECT = tuple(f"direct_{axis}" for axis in _AXES)
_FORCES = tuple(f"f{axis}" for axis in _AXES)
_VOIGT = ("xx", "yy", "zz", "yz", "xz", "xy")
_DEFAULT_STATE = {"charge": 0, "spin": 1}
_VIRIAL = "virial"  # key of `info`, as in all formats, where there is no volume to make a stress of it
_RESERVED = ("id", "type", *_CARTESIAN, *_DIRECT, *_FORCES)


@dataclass
class _Block:
    """The sections of one configuration, as far as they were there."""

    size: int = -1
    supercell: np.ndarray | None = None
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    energy: float | None = None
    plus_stress: np.ndarray | None = None
    features: dict[str, list[str]] = field(default_factory=dict)


def read_cfg(path: str | Path, numbers: Sequence[int]) -> list[Atoms]:
    """Reads the configurations of a file, with labels in a `SinglePointCalculator`.

    Features become entries of `info` (numbers where the text is just that of a number; lines of one key a text of so
    many lines), further AtomData columns per-atom arrays (of whole numbers where all are).  PlusStress is a stress with
    three periodic directions, and ``virial`` in `info` otherwise (eV, Voigt order), if it is finite.

    Args:
        path: the file.
        numbers: atomic number of each type, from type 0 on.

    Raises:
        InputError: the file cannot be read; names file, configuration and what is wrong with it.
    """
    return list(iterate_cfg(path, numbers))


def iterate_cfg(path: str | Path, numbers: Sequence[int]) -> Iterator[Atoms]:
    """The configurations of a file one after the other, as `read_cfg` gives them.

    Raises:
        InputError: as `read_cfg`, when it comes to the configuration.
    """
    path = Path(path)
    for number, block in enumerate(_blocks(_lines(path), path)):
        where = f"{path}, frame {number}"
        try:
            atoms = _atoms(_parsed(block), numbers, where)
        except (ValueError, IndexError, KeyError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{where} cannot be read ({error}); correct it.") from error
        yield atoms


def count_cfg(path: str | Path) -> int:
    """Number of configurations of a file.

    Raises:
        InputError: the file cannot be read, or its last configuration has no end.
    """
    return sum(1 for _ in _blocks(_lines(Path(path)), Path(path)))


def is_cfg(path: Path) -> bool:
    """Whether a file begins as MLIP-2's do."""
    with path.open("rb") as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"BEGIN_CFG")


def write_cfg(path: str | Path, structures: Iterable[Atoms], numbers: Sequence[int]) -> tuple[str, ...]:
    """Writes structures with their labels, each as it comes; the file appears complete or not at all.

    Numbers and texts of `info` become features (charge and spin where they are not 0 and 1), with a line for each line
    of a text; per-atom arrays of one number become columns; the stress, or a ``virial`` in `info` where there is none,
    becomes PlusStress.  Other entries of `info`, arrays and results, constraints, and cell vectors of directions that
    are not periodic have no place in the format.

    Args:
        path: the file.
        structures: what to write, in order.
        numbers: atomic number of each type, from type 0 on.

    Returns:
        names of what some structures have and the format has no place for.

    Raises:
        InputError: an element is not in the table, or the file cannot be written.
    """
    path, left_out = Path(path), set[str]()
    types = {number: kind for kind, number in enumerate(numbers)}
    with replacing(path) as building, building.open("w", encoding="utf-8", newline="\n") as file:
        for number, atoms in enumerate(structures):
            require_typed(atoms.numbers, numbers, f"{path}, frame {number}")
            _write_block(file, atoms, np.array([types[z] for z in atoms.numbers.tolist()], int))
            left_out.update(_without_place(atoms))
    return tuple(sorted(left_out))


def require_typed(elements: np.ndarray, numbers: Sequence[int], where: str) -> None:
    """Refuses a structure that has an atom without a type.

    Args:
        elements: atomic numbers [N] of its atoms.
        numbers: atomic number of each type, from type 0 on.
        where: what to call it in the message.

    Raises:
        InputError: an element is not in the table.
    """
    missing = sorted(set(elements.tolist()) - set(numbers))
    if missing:
        raise InputError(f"{where}: no type is given for atomic number {missing[0]}; add it.")


def _without_place(atoms: Atoms) -> list[str]:
    """Names of arrays, entries of `info` and results that have no place in the format."""
    results, labels = {} if atoms.calc is None else atoms.calc.results, _labels(atoms)
    written = {key for key, _ in _features(atoms.info)} | set(_DEFAULT_STATE)
    if "stress" not in labels and _plus_stress(atoms) is not None:
        written.add(_VIRIAL)
    columns = {"numbers", "positions", *_columns(atoms)}
    found = [name for name in atoms.arrays if name not in columns]
    found += [str(key) for key in atoms.info if key not in written]
    same = {"free_energy"} if results.get("free_energy") == labels.get("energy") else set()
    found += [name for name, value in results.items() if value is not None and name not in {*labels, *same}]
    return [*found, *(["constraints"] if atoms.constraints else [])]


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from file
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path} cannot be read ({reason}); correct the path or the file.") from error


def _blocks(lines: Iterable[str], path: Path) -> Iterator[list[str]]:
    block: list[str] | None = None
    count = 0
    for line in lines:
        word = line.strip()
        if word == "BEGIN_CFG":
            if block is not None:
                break
            block = []
        elif word == "END_CFG" and block is not None:
            yield block
            block, count = None, count + 1
        elif block is not None:
            block.append(line)
        elif word:
            raise InputError(f"{path}: {word!r} stands outside of BEGIN_CFG and END_CFG; correct it.")
    if block is not None:
        raise InputError(f"{path}, frame {count} has no END_CFG; the file is incomplete.")


def _parsed(lines: list[str]) -> _Block:
    block = _Block()
    rest = _Lines(line for line in lines if line.strip())
    for line in rest:
        section, *words = line.split()
        if section == "Size":
            block.size = int(next(rest, ""))
        elif section in ("Supercell", "SuperCell"):
            block.supercell = np.zeros((3, 3))
            for axis in range(rest.numeric(3)):
                block.supercell[axis] = _floats(next(rest), 3)
        elif section == "AtomData:":
            if block.size < 0:
                raise ValueError("AtomData without Size before it")
            lines_of_atoms = [next(rest, "") for _ in range(block.size)]
            rows = np.array([_floats(row, len(words)) for row in lines_of_atoms])
            block.columns = dict(zip(words, rows.reshape(block.size, len(words)).T, strict=True))
            for place, name in enumerate(words):
                if name not in _RESERVED and all(_is_whole(row.split()[place]) for row in lines_of_atoms):
                    block.columns[name] = np.array([int(row.split()[place]) for row in lines_of_atoms], int)
        elif section == "Energy":
            block.energy = float(_floats(next(rest, ""), 1)[0])
        elif section == "PlusStress:":
            if sorted(words) != sorted(_VOIGT):
                raise ValueError(f"PlusStress should name its components, {' '.join(_VOIGT)}")
            values = dict(zip(words, _floats(next(rest, ""), 6), strict=True))
            block.plus_stress = np.array([values[name] for name in _VOIGT])
        elif section == "Feature":
            _, key, *text = line.split(None, 2)
            block.features.setdefault(key, []).append("".join(text).strip())
        else:
            raise ValueError(f"unknown section {section!r}")
    return block


class _Lines(Iterator[str]):
    """Lines one after the other, of which the next ones can be looked at."""

    def __init__(self, lines: Iterable[str]) -> None:
        self._left = deque(lines)

    def __next__(self) -> str:
        if not self._left:
            raise StopIteration
        return self._left.popleft()

    def numeric(self, most: int) -> int:
        """How many of the next lines begin with a number, up to a maximum."""
        found = itertools.takewhile(_begins_with_number, itertools.islice(self._left, most))
        return sum(1 for _ in found)


def _begins_with_number(line: str) -> bool:
    try:
        float(line.split()[0])
    except ValueError:
        return False
    return True


def _is_whole(word: str) -> bool:
    return word.removeprefix("-").isdecimal() and len(word) < 19  # what an array of integers holds


def _floats(line: str, count: int) -> list[float]:
    values = [float(word) for word in line.split()]
    if len(values) != count:
        raise ValueError(f"expected {count} numbers but found {line.strip()!r}")
    return values


def _atoms(block: _Block, numbers: Sequence[int], where: str) -> Atoms:
    columns = dict(block.columns)
    if "type" not in columns:
        raise ValueError("AtomData has no column 'type'")
    types = _types(columns.pop("type"), numbers, where)
    cell = np.zeros((3, 3)) if block.supercell is None else block.supercell
    atoms = Atoms(np.asarray(numbers)[types], positions=_positions(columns, cell), cell=cell, pbc=cell.any(axis=1))
    labels: dict[str, Any] = {} if block.energy is None else {"energy": block.energy}
    if any(name in columns for name in _FORCES):
        absent = [name for name in _FORCES if name not in columns]
        if absent:
            raise ValueError(f"AtomData has only some of fx, fy, fz; {' and '.join(absent)} missing")
        labels["forces"] = np.column_stack([columns.pop(name) for name in _FORCES])
    if block.plus_stress is not None and atoms.pbc.all():
        labels["stress"] = -block.plus_stress / atoms.get_volume()
    columns.pop("id", None)
    for name, values in columns.items():
        if name in atoms.arrays:
            raise ValueError(f"AtomData has a column {name!r}, a name that an array of every structure has")
        atoms.new_array(name, values)
    atoms.info = {key: _typed("\n".join(lines)) for key, lines in block.features.items()}
    if block.plus_stress is not None and not atoms.pbc.all() and np.isfinite(block.plus_stress).all():
        atoms.info.setdefault(_VIRIAL, block.plus_stress)
    check_structure(atoms, where)
    normalise_state(atoms, where)
    attach_labels(atoms, labels, where)
    return atoms


def _types(given: np.ndarray, numbers: Sequence[int], where: str) -> np.ndarray:
    """Types [N] that are whole numbers and have an atomic number."""
    types = given.astype(int)
    unknown = (types < 0) | (types >= len(numbers))
    if (types != given).any():
        atom = int(np.argmax(types != given))
        raise InputError(f"{where}: atom {atom} has type {given[atom]:g}, which is not a whole number; correct it.")
    if unknown.any():
        atom = int(np.argmax(unknown))
        from_one = " (where types begin at 1, let the table begin with X)" if types[atom] == len(numbers) else ""
        raise InputError(
            f"{where}: atom {atom} has type {types[atom]}, but only {len(numbers)} atomic numbers are given, for types "
            f"from 0 on{from_one}."
        )
    return types


def _positions(columns: dict[str, np.ndarray], cell: np.ndarray) -> np.ndarray:
    if all(name in columns for name in _CARTESIAN):
        return np.column_stack([columns.pop(name) for name in _CARTESIAN])
    if not all(name in columns for name in _DIRECT):
        raise ValueError("AtomData has neither cartes_x, cartes_y, cartes_z nor direct_x, direct_y, direct_z")
    if not cell.any(axis=1).all():
        raise ValueError("direct coordinates need three cell vectors")
    return np.column_stack([columns.pop(name) for name in _DIRECT]) @ cell


def _typed(text: str) -> int | float | str:
    """A number where its text is exactly this one, so that a feature is written as it was read."""
    for kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            continue
        if repr(value) == text:
            return value
    return text


def _write_block(file: TextIO, atoms: Atoms, types: np.ndarray) -> None:
    labels, further, plus_stress = _labels(atoms), _columns(atoms), _plus_stress(atoms)
    lines = ["BEGIN_CFG", " Size", f"    {len(atoms)}"]
    if atoms.pbc.any():
        cell = np.where(atoms.pbc[:, None], atoms.cell.array, 0.0)
        lines += [" Supercell", *("    " + _row(vector) for vector in cell)]
    columns = [*_CARTESIAN, *(_FORCES if "forces" in labels else ()), *further]
    values = np.hstack([atoms.positions, *([labels["forces"]] if "forces" in labels else [])])
    texts = [_row(row) for row in values]
    for column in further.values():
        texts = [f"{text} {value!r}" for text, value in zip(texts, column.tolist(), strict=True)]
    lines.append(f" AtomData:  id type {' '.join(columns)}")
    lines += [f"    {atom + 1} {types[atom]} {text}" for atom, text in enumerate(texts)]
    if "energy" in labels:
        lines += [" Energy", f"    {float(labels['energy'])!r}"]
    if plus_stress is not None:
        lines += [f" PlusStress:  {' '.join(_VOIGT)}", "    " + _row(plus_stress)]
    lines += [f" Feature {key} {line}".rstrip() for key, text in _features(atoms.info) for line in text.split("\n")]
    file.write("\n".join([*lines, "END_CFG", "", ""]))


def _labels(atoms: Atoms) -> dict[str, Any]:
    """Results that have a place in the format; a free energy is the energy where there is no other."""
    results = {} if atoms.calc is None else atoms.calc.results
    names = ("energy", "forces", *(["stress"] if atoms.pbc.all() else []))
    labels = {name: results[name] for name in names if results.get(name) is not None}
    free = results.get("free_energy")
    return labels if free is None else {"energy": free} | labels


def _plus_stress(atoms: Atoms) -> np.ndarray | None:
    """Virial [6], eV, of the stress of a structure, or else the one that it has in `info`; None where there is none."""
    labels = _labels(atoms)
    if "stress" in labels:
        return -atoms.get_volume() * _voigt(labels["stress"])
    try:
        return _voigt(atoms.info[_VIRIAL])
    except (KeyError, TypeError, ValueError):  # not there, or something else of this name
        return None


def _voigt(tensor: Any) -> np.ndarray:
    values = np.asarray(tensor, np.float64)
    return values if values.shape == (6,) else full_3x3_to_voigt_6_stress(values.reshape(3, 3))


def _columns(atoms: Atoms) -> dict[str, np.ndarray]:
    """Per-atom arrays [N] that become columns: numbers, under names that say nothing else in AtomData."""
    return {
        name: array.reshape(len(atoms))
        for name, array in atoms.arrays.items()
        if name != "numbers"
        and name not in _RESERVED
        and len(name.split()) == 1
        and array.shape in ((len(atoms),), (len(atoms), 1))
        and array.dtype.kind in "fiu"
    }


def _row(values: np.ndarray) -> str:
    return " ".join(map(repr, np.asarray(values, np.float64).tolist()))


def _features(info: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in info.items():
        if len(str(key).split()) != 1 or (key in _DEFAULT_STATE and value == _DEFAULT_STATE[key]):
            continue
        if isinstance(value, number_types.Real) and not isinstance(value, bool):
            yield key, repr(int(value) if isinstance(value, number_types.Integral) else float(value))
        elif isinstance(value, str) and value.replace("\n", "").replace("\t", "").isprintable():
            yield key, "\n".join(line.strip() for line in value.split("\n"))
