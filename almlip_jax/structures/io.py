"""Structures in and out of files: extended XYZ, ASE databases, MLIP-2 cfg, and whatever else ASE reads.

Everything is checked at this border: what comes in has finite positions and labels, known elements and atoms in places
of their own, or a message names file, frame and atom.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ase.db
import ase.io
import numpy as np
from ase import Atoms

from almlip_jax.errors import InputError
from almlip_jax.structures.extxyz import count_extxyz, read_extxyz, write_extxyz
from almlip_jax.structures.mlip_cfg import count_cfg, iterate_cfg, read_cfg, write_cfg
from almlip_jax.structures.validation import LABELS, attach_labels, check_structure, checked_label, normalise_state

__all__ = [
    "check_structure",
    "count_structures",
    "iterate_structures",
    "read_cfg",
    "read_structures",
    "write_cfg",
    "write_structures",
]

_XYZ = (".xyz", ".extxyz")
_COMPRESSED = (".gz", ".bz2", ".xz")


def read_structures(
    path: str | Path,
    *,
    format: str | None = None,
    energy_key: str | None = None,
    forces_key: str | None = None,
    stress_key: str | None = None,
    require_labels: bool = False,
    type_numbers: Sequence[int] | None = None,
) -> list[Atoms]:
    """Reads all structures of a file and checks them.

    Labels (eV, eV/Angstrom, eV/Angstrom^3) are taken from the named keys of `info`, arrays or calculator results, and
    where no key is named from calculator results or ``REF_energy``, ``REF_forces``, ``REF_stress``; they end up in a
    `SinglePointCalculator`. Charge and spin, where given, become ints of `info`.

    Args:
        path: the file.
        format: ``extxyz``, ``db``, ``cfg`` (MLIP-2) or a format of ASE; by default the name of the file decides.
        energy_key: where the energies are.
        forces_key: where the forces are.
        stress_key: where the stresses are.
        require_labels: refuse structures without energy or forces.
        type_numbers: atomic number of each type of a ``cfg`` file, from type 0 on.

    Raises:
        InputError: the file cannot be read or has no structures, a named key is in no structure, two different values
            are given for one label, or a structure or label is not what it must be.
    """
    keys = {"energy": energy_key, "forces": forces_key, "stress": stress_key}
    return list(_checked(Path(path), format, keys, require_labels, type_numbers))


def iterate_structures(
    path: str | Path, *, format: str | None = None, type_numbers: Sequence[int] | None = None
) -> Iterator[Atoms]:
    """Reads the structures of a file one after the other, checked as by `read_structures`, and keeps none of them.

    Args:
        path: the file.
        format: as in `read_structures`.
        type_numbers: as in `read_structures`.

    Raises:
        InputError: as `read_structures`, when it comes to the frame.
    """
    return _checked(Path(path), format, dict.fromkeys(LABELS), False, type_numbers)


def count_structures(path: str | Path, *, format: str | None = None) -> int | None:
    """Number of structures of a file; None where only reading them would tell.

    Raises:
        InputError: the file cannot be read, or ends within a structure.
    """
    path = Path(path)
    kind = _kind(path, format)
    if kind == "extxyz":
        return count_extxyz(path)
    if kind == "cfg":
        return count_cfg(path)
    return None


def _checked(
    path: Path,
    format: str | None,
    keys: Mapping[str, str | None],
    require_labels: bool,
    type_numbers: Sequence[int] | None,
) -> Iterator[Atoms]:
    number, found = -1, set[str]()
    for number, atoms in enumerate(_frames(path, format, type_numbers)):
        where = f"{path}, frame {number}"
        check_structure(atoms, where)
        normalise_state(atoms, where)
        labels = _take_labels(atoms, keys, where)
        attach_labels(atoms, labels, where)
        missing = [name for name in ("energy", "forces") if name not in labels]
        if require_labels and missing:
            raise InputError(
                f"{where} has no {' and no '.join(missing)}; label it, leave it out, or name the key that holds "
                f"{'it' if len(missing) == 1 else 'them'}."
            )
        found.update(labels)
        yield atoms
    if number < 0:
        raise InputError(f"{path} holds no structures.")
    for name, key in keys.items():
        if key is not None and name not in found:
            raise InputError(f"no structure of {path} has '{key}', which is to hold the {name}; correct {name}_key.")


def write_structures(path: str | Path, structures: Iterable[Atoms]) -> None:
    """Writes structures as extended XYZ with every digit, each as it comes; the file appears complete or not at all.

    Cell, pbc, `info`, per-atom arrays and calculator results read back as they were (lists of numbers as arrays);
    constraints are left out.

    Raises:
        InputError: the name does not end in .xyz or .extxyz, something in `info` or the arrays has no place in the
            format, or the file cannot be written.
    """
    path = Path(path)
    if path.suffix not in _XYZ:
        raise InputError(f"{path} should end in .extxyz or .xyz, the format structures are written in.")
    write_extxyz(path, structures)


def _frames(path: Path, format: str | None, type_numbers: Sequence[int] | None) -> Iterator[Atoms]:
    kind = _kind(path, format)
    if kind == "extxyz":
        return read_extxyz(path)
    if kind == "db":
        return _read_database(path)
    if kind == "cfg":
        if type_numbers is None:
            raise InputError(f"{path} is an MLIP-2 file; say which element each of its types is.")
        return iterate_cfg(path, type_numbers)
    return _read_by_ase(path, format)


def _kind(path: Path, format: str | None) -> str | None:
    if not path.is_file():
        raise InputError(f"{path} cannot be read (no such file); correct the path.")
    return format or _format_of(path)


def _format_of(path: Path) -> str | None:
    suffixes = [suffix for suffix in path.suffixes if suffix not in _COMPRESSED]
    suffix = suffixes[-1] if suffixes else ""
    if suffix in _XYZ:
        return "extxyz"
    if suffix == ".db":
        return "db"
    with path.open("rb") as file:  # AtomEye's files have the same name
        return "cfg" if suffix == ".cfg" and file.read(4096).lstrip().startswith(b"BEGIN_CFG") else None


def _read_database(path: Path) -> Iterator[Atoms]:
    try:
        with ase.db.connect(path, type="db") as database:
            for row in database.select():
                atoms = row.toatoms()
                atoms.info = {**row.key_value_pairs, **row.data}
                yield atoms
    except Exception as error:  # whatever the library stumbles over is the file's fault
        raise InputError(f"{path} cannot be read as an ASE database ({error}); correct the path or file.") from error


def _read_by_ase(path: Path, format: str | None) -> Iterator[Atoms]:
    try:
        yield from ase.io.iread(path, index=":", format=format)
    except Exception as error:  # whatever the library stumbles over is the file's fault
        raise InputError(f"{path} cannot be read ({error}); correct the file or name its format.") from error


def _take_labels(atoms: Atoms, keys: Mapping[str, str | None], where: str) -> dict[str, Any]:
    """Labels of a structure; those that stood in `info` or arrays leave them."""
    results: Mapping[str, Any] = {} if atoms.calc is None else atoms.calc.results
    labels = {}
    for name in LABELS:
        key = keys[name]
        stored = f"REF_{name}" if key is None else key
        given = {}
        if key is None and results.get(name) is not None:
            given[name] = results[name]
        if stored in atoms.info:
            given[stored] = atoms.info.pop(stored)
        elif stored in atoms.arrays and stored not in ("positions", "numbers"):
            given[stored] = atoms.arrays.pop(stored)
        elif stored in results:
            given[stored] = results[stored]
        values = [checked_label(name, value, len(atoms), where) for value in given.values()]
        if len(values) == 2 and not np.allclose(values[0], values[1], rtol=1e-9, atol=1e-8):
            raise InputError(
                f"{where} has two different values, '{name}' and '{stored}'; say which one is meant with {name}_key."
            )
        if values:
            labels[name] = values[0]
    return labels
