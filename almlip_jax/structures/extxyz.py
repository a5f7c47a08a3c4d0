"""Extended XYZ files, written so that ASE can read them and nothing is lost: every number survives bit for bit.

The format is ASE's, but its own writer rounds to eight decimals, which would change the identity of a structure; this
one writes the shortest text that reads back as the same number, and keeps text that looks like a number or holds line
breaks what it is.
"""

from __future__ import annotations

import io
import json
import numbers
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from ase import Atoms
from ase.constraints import FixAtoms, FixCartesian
from ase.io.extxyz import key_val_str_to_dict, per_atom_properties, per_config_properties
from ase.spacegroup import Spacegroup
from ase.stress import voigt_6_to_full_3x3_stress

from almlip_jax.errors import InputError
from almlip_jax.files import replacing
from almlip_jax.structures.extxyz_header import canonical_key, parse_header
from almlip_jax.targets import target_named

_MATRICES = ("stress", "virial")  # read back as 3 x 3 matrices
_RESERVED_KEYS = ("Lattice", "Properties", "pbc")
_RESERVED_COLUMNS = ("species", "symbols", "numbers", "pos", "positions", "z", "charge", "move_mask")
_COLUMN_NAMES = {"positions": "pos", "charges": "charge"}
_BARE = re.compile(r"[\w.+-]+")
_COLUMN_TEXT: dict[str, tuple[str, Callable[[Any], str]]] = {
    "f": ("R", repr),
    "i": ("I", str),
    "u": ("I", str),
    "b": ("L", lambda flag: "T" if flag else "F"),
    "U": ("S", str),
}


def write_extxyz(path: Path, structures: Iterable[Atoms]) -> None:
    """Writes structures with cell, pbc, `info`, per-atom arrays, constraints and calculator results.

    Fixed atoms and coordinates (``FixAtoms``, ``FixCartesian``) are the column ``move_mask``, as in ASE.  The file
    appears complete or not at all.

    Raises:
        InputError: something has no place in the format, or the file cannot be written.
    """
    with replacing(path) as building, building.open("w", encoding="utf-8", newline="\n") as file:
        for number, atoms in enumerate(structures):
            write_frame(file, atoms, f"{path}, frame {number}")


def check_writable(structures: Iterable[Atoms], name: str) -> None:
    """Refuses structures that `write_extxyz` would refuse, before anything is paid for them.

    Args:
        structures: in order.
        name: of the file they come from.

    Raises:
        InputError: something of a structure has no place in the format.
    """
    for number, atoms in enumerate(structures):
        write_frame(io.StringIO(), atoms, f"{name}, frame {number}")


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
    if atoms.constraints and (fixed := fixed_coordinates(atoms, where)).any():
        mobile = ~fixed[:, :1] if np.array_equal(fixed.any(axis=1), fixed.all(axis=1)) else ~fixed
        described.append(f"move_mask:L:{mobile.shape[1]}")
        columns.extend(["FT"[int(flag)] for flag in column] for column in mobile.T)
    header = [f"Properties={':'.join(described)}", f'pbc="{" ".join("FT"[int(flag)] for flag in atoms.pbc)}"']
    if atoms.cell.array.any():
        header.insert(0, f'Lattice="{" ".join(map(repr, atoms.cell.array.ravel().tolist()))}"')
    header += [f"{_quoted(key)}={_quoted(text)}" for key, text in _info_texts(info, where)]
    file.write(f"{len(atoms)}\n{' '.join(header)}\n")
    file.writelines(" ".join(row) + "\n" for row in zip(*columns, strict=True))


def fixed_coordinates(atoms: Atoms, where: str) -> np.ndarray:
    """Which coordinates constraints hold, [N, 3] bool.

    Raises:
        InputError: a constraint holds something else than coordinates.
    """
    fixed = np.zeros((len(atoms), 3), bool)
    for constraint in atoms.constraints:
        if isinstance(constraint, FixAtoms):
            fixed[constraint.get_indices()] = True
        elif isinstance(constraint, FixCartesian):
            fixed[constraint.get_indices()] |= np.asarray(constraint.mask, bool)
        else:
            raise InputError(
                f"{where} has the constraint {type(constraint).__name__}, which an extxyz file cannot hold; remove it, "
                "or hold atoms by FixAtoms or FixCartesian."
            )
    return fixed


def _column(name: str, array: np.ndarray, num_atoms: int, where: str) -> tuple[np.ndarray, str, Callable[[Any], str]]:
    """Values [N, columns] of a per-atom array, the letter of their type, and what makes text of one."""
    if not _BARE.fullmatch(name) or (name != "positions" and name.lower() in _RESERVED_COLUMNS):
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
        target = target_named(name)
        if value is None:
            continue
        if name in per_atom_properties:
            columns[name] = np.asarray(value)
        elif name in per_config_properties:
            info[name] = value
        elif target is not None and target.per == "atom":  # ASE has no name for it
            columns[name] = np.asarray(value).reshape(len(atoms), -1)
        elif target is not None:
            info[name] = np.ravel(value) if target.shape else np.asarray(value)
    for key in info:
        if not isinstance(key, str) or not key or key in _RESERVED_KEYS:
            raise InputError(f"{where}: info key {key!r} has no place in an extxyz file; rename it.")
    return info, columns


def _info_texts(info: dict[str, Any], where: str) -> Iterator[tuple[str, str]]:
    for key, value in info.items():
        text = _info_text(key, value, where)
        if canonical_key(key, text) != key:
            raise InputError(f"{where}: info key {key!r} would be read as the format's own; rename it.")
        yield key, text


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
    """Whether a text is taken for itself, by ASE as well."""
    line = f"key={_quoted(text)}"
    try:
        found = [parse_header(line)["key"], key_val_str_to_dict(line).get("key")]
    except ValueError:
        return False
    return all(isinstance(one, str) and one == text for one in found)


def _quoted(text: str) -> str:
    return text if _BARE.fullmatch(text) else '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, Spacegroup):
        return value.symbol
    raise TypeError(f"{type(value).__name__} is neither number, text, list nor dictionary")
