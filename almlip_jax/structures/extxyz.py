"""Extended XYZ files that ASE can read and that lose nothing: every number survives bit for bit.

The format is ASE's.  Reading splits the file into frames, so that a message can name one, and leaves each to ASE.
ASE's own writer rounds to eight decimals, which would change the identity of a structure; this one writes the shortest
text that reads back as the same number, and keeps text that looks like a number or holds line breaks what it is.
"""

from __future__ import annotations

import io
import json
import numbers
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, TextIO

import numpy as np
from ase import Atoms
from ase.io.extxyz import key_val_str_to_dict, per_atom_properties, per_config_properties, read_xyz
from ase.io.formats import open_with_compression
from ase.spacegroup import Spacegroup
from ase.stress import voigt_6_to_full_3x3_stress

from almlip_jax.errors import InputError
from almlip_jax.files import replacing

_MATRICES = ("stress", "virial")  # read back as 3 x 3 matrices
_RESERVED_KEYS = ("Lattice", "Properties", "pbc")
_RESERVED_COLUMNS = ("species", "symbols", "pos", "Z", "charge", "move_mask")
_COLUMN_NAMES = {"positions": "pos", "charges": "charge"}
_MATRIX_KEY = re.compile(rf"(^|\s)({'|'.join(_MATRICES)})(\s*=)")
_PAIR = re.compile(
    r"""(?:^|\s)(?P<key>"[^"]*"|'[^']*'|[^\s="'{}\[\]]+)\s*=\s*"""
    r"""(?P<value>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|\{[^}]*\}|\[[^\]]*\]|[^\s"'{\[]\S*)"""
)
_BARE = re.compile(r"[\w.+-]+")
_COLUMN_TEXT: dict[str, tuple[str, Callable[[Any], str]]] = {
    "f": ("R", repr),
    "i": ("I", str),
    "u": ("I", str),
    "b": ("L", lambda flag: "T" if flag else "F"),
    "U": ("S", str),
}


def read_extxyz(path: Path) -> Iterator[Atoms]:
    """Frames of an (extended) XYZ file, also a compressed one (.gz, .bz2, .xz), as ASE reads them.

    Raises:
        InputError: the file or a frame cannot be read.
    """
    for number, text in enumerate(_texts(path)):
        yield _parsed(text, f"{path}, frame {number}")


def count_extxyz(path: Path) -> int:
    """Number of frames of a file, far faster than reading them.

    Raises:
        InputError: the file cannot be read, or a frame has too few lines.
    """
    return sum(1 for _ in _texts(path))


def write_extxyz(path: Path, structures: Iterable[Atoms]) -> None:
    """Writes structures with cell, pbc, `info`, per-atom arrays and calculator results; constraints are left out.

    The file appears complete or not at all.

    Raises:
        InputError: something has no place in the format, or the file cannot be written.
    """
    with replacing(path) as building, building.open("w", encoding="utf-8", newline="\n") as file:
        for number, atoms in enumerate(structures):
            write_frame(file, atoms, f"{path}, frame {number}")


def _texts(path: Path) -> Iterator[str]:
    """The text of each frame."""
    try:
        with open_with_compression(str(path), "rt") as file:
            yield from _frames(file, path)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path} cannot be read ({reason}); correct the path or the file.") from error


def _frames(file: IO[str], path: Path) -> Iterator[str]:
    number = 0
    while line := file.readline():
        if not line.strip():
            continue
        where = f"{path}, frame {number}"
        try:
            num_atoms = int(line)
        except ValueError as error:
            raise InputError(f"{where}: expected a number of atoms but found {line.strip()!r}; correct it.") from error
        if num_atoms < 0:
            raise InputError(f"{where} has {num_atoms} atoms; correct it.")
        rows = [file.readline() for _ in range(num_atoms + 1)]
        for atom, row in enumerate(rows[1:]):
            if not row.strip():
                raise InputError(f"{where} ends after {atom} of {num_atoms} atoms; the file is incomplete.")
        yield "".join([line, *rows])
        number += 1


def _parsed(text: str, where: str) -> Atoms:
    try:
        return next(read_xyz(io.StringIO(text), index=0, properties_parser=_header))
    except KeyError as error:
        raise InputError(f"{where} has an unknown element {error}; correct it.") from error
    except Exception as error:  # whatever the parser stumbles over is the file's fault
        raise InputError(f"{where} cannot be read ({error}); correct it.") from error


def _header(line: str) -> dict[str, Any]:
    """Keys and values of a comment line as ASE reads them; also a stress or virial of six numbers, in Voigt order.

    Raises:
        ValueError: a key is given twice, with different values.
    """
    seen: dict[str, str] = {}
    for pair in _PAIR.finditer(line):
        key, value = pair["key"].strip("\"'"), pair["value"]
        if seen.setdefault(key, value) != value:
            raise ValueError(f"{key} is given twice, as {seen[key]} and {value}")
    try:
        return dict(key_val_str_to_dict(line))
    except ValueError:  # ASE takes matrices only
        found: dict[str, Any] = key_val_str_to_dict(_MATRIX_KEY.sub(r"\1six_\2\3", line))
    for key in _MATRICES:
        value = np.asarray(found.pop(f"six_{key}", np.zeros((0,))))
        if value.dtype.kind not in "fiu" or value.shape not in ((0,), (6,), (9,)):
            raise ValueError(f"{key} should be 9 numbers, or 6 in Voigt order")
        if value.size:
            found[key] = voigt_6_to_full_3x3_stress(value) if value.size == 6 else value.reshape(3, 3, order="F")
    return found


def write_frame(file: TextIO, atoms: Atoms, where: str) -> None:
    """Writes one structure into an open file, as `write_extxyz` does.

    Args:
        file: text, with line breaks as they are.
        atoms: the structure.
        where: what to call it in messages.

    Raises:
        InputError: something has no place in the format.
    """
    if len(atoms) == 0:
        raise InputError(f"{where} has no atoms; leave it out.")
    info, arrays = _contents(atoms, where)
    described, columns = ["species:S:1"], [list(atoms.symbols)]
    for name, array in arrays.items():
        values, kind, text = _column(name, array, len(atoms), where)
        described.append(f"{_COLUMN_NAMES.get(name, name)}:{kind}:{values.shape[1]}")
        columns.extend([text(value) for value in column] for column in values.T.tolist())
    header = [f"Properties={':'.join(described)}", f'pbc="{" ".join("FT"[int(flag)] for flag in atoms.pbc)}"']
    if atoms.cell.array.any():
        header.insert(0, f'Lattice="{" ".join(map(repr, atoms.cell.array.ravel().tolist()))}"')
    header += [f"{_quoted(key)}={_quoted(_info_text(key, value, where))}" for key, value in info.items()]
    file.write(f"{len(atoms)}\n{' '.join(header)}\n")
    file.writelines(" ".join(row) + "\n" for row in zip(*columns, strict=True))


def _column(name: str, array: np.ndarray, num_atoms: int, where: str) -> tuple[np.ndarray, str, Callable[[Any], str]]:
    """Values [N, columns] of a per-atom array, the letter of their type, and what makes text of one."""
    if not _BARE.fullmatch(name) or name in _RESERVED_COLUMNS:
        raise InputError(f"{where}: array '{name}' has a name that the format cannot hold; rename it.")
    if array.dtype == object and all(isinstance(value, str) for value in array.flat):
        array = array.astype(str)
    kind = array.dtype.kind
    if array.ndim not in (1, 2) or array.size == 0 or len(array) != num_atoms or kind not in _COLUMN_TEXT:
        raise InputError(f"{where}: array '{name}' {array.dtype}{list(array.shape)} cannot be written; remove it.")
    if kind == "U" and any(len(text.split()) != 1 for text in array.flat):
        raise InputError(f"{where}: array '{name}' holds text that is empty or has blanks; change it.")
    return array.reshape(num_atoms, -1), *_COLUMN_TEXT[kind]


def _contents(atoms: Atoms, where: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What goes into the header and into the columns: `info` and arrays, then the calculator's results."""
    info = dict(atoms.info)
    columns = {"positions": atoms.positions}
    columns |= {name: array for name, array in atoms.arrays.items() if name not in ("numbers", "positions")}
    results = {} if atoms.calc is None else atoms.calc.results
    for name, value in results.items():
        if value is None:
            continue
        if name in per_atom_properties:
            columns[name] = np.asarray(value)
        elif name in per_config_properties:
            info[name] = value
    for key in info:
        if not isinstance(key, str) or not key or key in _RESERVED_KEYS:
            raise InputError(f"{where}: info key {key!r} has no place in an extxyz file; rename it.")
    return info, columns


def _info_text(key: str, value: Any, where: str) -> str:
    """The text of an `info` value that reads back as that value; JSON where the plain text would not."""
    if key in _MATRICES:
        matrix = np.asarray(value, np.float64)
        matrix = voigt_6_to_full_3x3_stress(matrix) if matrix.shape == (6,) else matrix
        if matrix.size != 9:
            raise InputError(f"{where}: '{key}' has shape {matrix.shape}, not (6,) or (3, 3); correct it.")
        return " ".join(map(repr, matrix.reshape(3, 3).ravel(order="F").tolist()))
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool | np.bool_ | numbers.Real):
        return _number_text(value)
    if isinstance(value, np.ndarray) and value.ndim == 1 and len(value) > 1 and value.dtype.kind in "fiu":
        return " ".join(map(_number_text, value.tolist()))
    if isinstance(value, str) and value.isprintable() and _reads_back(value):
        return value
    try:
        return "_JSON " + json.dumps(value, default=_plain)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: info['{key}'] cannot be written ({error}); remove it.") from error


def _number_text(value: Any) -> str:
    if isinstance(value, bool | np.bool_):
        return "T" if value else "F"
    return str(int(value)) if isinstance(value, numbers.Integral) else repr(float(value))


def _reads_back(text: str) -> bool:
    try:
        found = key_val_str_to_dict(f"key={_quoted(text)}").get("key")
    except ValueError:
        return False
    return isinstance(found, str) and found == text


def _quoted(text: str) -> str:
    return text if _BARE.fullmatch(text) else '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, Spacegroup):
        return value.symbol
    raise TypeError(f"{type(value).__name__} is neither number, text, list nor dictionary")
