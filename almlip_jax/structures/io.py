"""Structures in and out of files: extended XYZ, ASE databases, MLIP-2 cfg, and whatever else ASE reads.

Everything is checked at this border: what comes in has finite positions and labels, known elements and atoms in places
of their own, or a message names file, frame and atom.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import ase.db
import ase.io
import numpy as np
from ase import Atoms

from almlip_jax.errors import InputError
from almlip_jax.structures.carried import normalise_masses
from almlip_jax.structures.database import write_database
from almlip_jax.structures.electronic_state import normalise_state
from almlip_jax.structures.extxyz import check_writable, write_extxyz
from almlip_jax.structures.extxyz_reading import count_extxyz, read_extxyz
from almlip_jax.structures.label_census import LabelCensus
from almlip_jax.structures.labels import (
    LABEL_ERROR,
    LabelKeys,
    drop_labels,
    likely_keys,
    required_types,
    stated_failure,
    take_labels,
)
from almlip_jax.structures.mlip_cfg import count_cfg, is_cfg, iterate_cfg, read_cfg, require_typed, write_cfg
from almlip_jax.structures.validation import attach_labels, check_structure
from almlip_jax.structures.weights import normalise_weights
from almlip_jax.targets import label_names

__all__ = [
    "check_structure",
    "count_structures",
    "iterate_elements",
    "iterate_structures",
    "read_cfg",
    "read_structures",
    "require_format",
    "require_place",
    "write_cfg",
    "write_structures",
]

_XYZ = (".xyz", ".extxyz")
_CFG = ".cfg"
_DATABASE = ".db"
_DATABASES = ("db", "json")  # of ASE, also the names of their formats
_COMPRESSED = (".gz", ".bz2", ".xz")


def read_structures(
    path: str | Path | Sequence[str | Path],
    *,
    format: str | None = None,
    keys: LabelKeys | None = None,
    energy_key: str | None = None,
    forces_key: str | None = None,
    stress_key: str | None = None,
    virial_key: str | None = None,
    require_labels: bool = False,
    ignore_labels: bool = False,
    type_numbers: Sequence[int] | None = None,
) -> list[Atoms]:
    """Reads all structures of a file, or of several that make up one set, and checks them.

    Labels (eV, eV/Angstrom, eV/Angstrom^3) are taken from the named keys of `info`, arrays or calculator results, and
    where no key is named from calculator results, ``REF_energy``, ``REF_forces``, ``REF_stress``, or a virial; they end
    up in a `SinglePointCalculator`.  A ``free_energy`` is the energy where there is one (see `labels`).  Charge and
    spin, where given, become ints of `info`, and weights floats (see `weights`).

    Args:
        path: the file, or files.
        format: ``extxyz``, ``db`` or ``json`` (ASE databases), ``cfg`` (MLIP-2) or a format of ASE; by default name and
            beginning of the file decide.
        keys: where the labels are, and in which unit stresses are.
        energy_key: where the energies are; like the next three short for one of ``keys``.
        forces_key: where the forces are.
        stress_key: where the stresses are.
        virial_key: where the virials are.
        require_labels: refuse structures without energy or forces (isolated atoms need no forces).
        ignore_labels: leave the labels out unseen.
        type_numbers: atomic number of each type of a ``cfg`` file, from type 0 on.

    Raises:
        InputError: a file cannot be read or has no structures, a named key is in no structure, two different values
            are given for one label, energies of different kinds are mixed, stresses are in another unit, or a structure
            or label is not what it must be.
    """
    if keys is None:
        keys = LabelKeys.named(energy=energy_key, forces=forces_key, stress=stress_key, virial=virial_key)
    files = [Path(path)] if isinstance(path, str | Path) else [Path(one) for one in path]
    if ignore_labels:
        return [atoms for file in files for atoms in _bare(file, format, type_numbers)]
    census = LabelCensus(keys)
    frames = [atoms for file in files for atoms in _labelled(file, format, keys, require_labels, type_numbers, census)]
    census.finish(", ".join(map(str, files)))
    return frames


def iterate_structures(
    path: str | Path,
    *,
    format: str | None = None,
    ignore_labels: bool = False,
    keep_labels: bool = False,
    type_numbers: Sequence[int] | None = None,
) -> Iterator[Atoms]:
    """Reads the structures of a file one after the other, checked as by `read_structures`, and keeps none of them.

    Args:
        path: the file.
        format: as in `read_structures`.
        ignore_labels: as in `read_structures`.
        keep_labels: leave the labels as and where they are, unseen, for code that writes the structures again.
        type_numbers: as in `read_structures`.

    Raises:
        InputError: as `read_structures`, when it comes to the frame, or at the end.
    """
    if ignore_labels:
        yield from _bare(Path(path), format, type_numbers)
        return
    if keep_labels:
        yield from (atoms for atoms, _ in _checked(Path(path), format, type_numbers))
        return
    census = LabelCensus(LabelKeys())
    yield from _labelled(Path(path), format, LabelKeys(), False, type_numbers, census)
    census.finish(str(path))


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


def iterate_elements(
    path: str | Path, *, format: str | None = None, type_numbers: Sequence[int] | None = None
) -> Iterator[np.ndarray]:
    """Atomic numbers [N] of each structure of a file; nothing else of them is checked.

    Raises:
        InputError: the file cannot be read.
    """
    return (atoms.numbers for atoms in _frames(Path(path), format, type_numbers))


def _labelled(
    path: Path,
    format: str | None,
    keys: LabelKeys,
    require_labels: bool,
    type_numbers: Sequence[int] | None,
    census: LabelCensus,
) -> Iterator[Atoms]:
    found, all_failed = set[str](), True
    for atoms, where in _checked(path, format, type_numbers):
        unused = {name: likely_keys(atoms, name) for name in ("energy", "forces")} if require_labels else {}
        normalise_weights(atoms, where)
        taken = take_labels(atoms, keys, where)
        if require_labels and len(atoms) == 1 and "energy" in taken.values:
            taken.values.setdefault("forces", np.zeros((1, 3)))  # by symmetry, also in a crystal
        attach_labels(atoms, taken.values, where)
        missing = [name for name in unused if name not in taken.values]
        if missing and LABEL_ERROR in atoms.info:
            raise InputError(
                f"{where} has no {' and no '.join(missing)}, since its label failed "
                f"({atoms.info[LABEL_ERROR]}); leave it out, or label it again."
            )
        if missing:
            raise InputError(_without_labels(where, missing, [key for name in missing for key in unused[name]]))
        census.add(atoms, taken, where)
        found.update([*taken.values, *(["virial"] if taken.virial else [])])
        all_failed = all_failed and stated_failure(atoms) is not None
        yield atoms
    for name in (*label_names(), "virial"):
        key = keys.said(name)
        if key is not None and name not in found and not all_failed:
            raise InputError(f"no structure of {path} has '{key}', which should hold the {name}; correct {name}_key.")


def _without_labels(where: str, missing: Sequence[str], likely: Sequence[str]) -> str:
    perhaps = f" (perhaps {', '.join(likely)})" if likely else ""
    options = " and ".join(f"--{name}-key" for name in missing)
    return (
        f"{where} has no {' and no '.join(missing)}; label it, leave it out, or name the key that holds "
        f"{'it' if len(missing) == 1 else 'them'}{perhaps} with {options}, or keys in a config."
    )


def _bare(path: Path, format: str | None, type_numbers: Sequence[int] | None) -> Iterator[Atoms]:
    for atoms, _ in _checked(path, format, type_numbers):
        drop_labels(atoms)
        yield atoms


def _checked(path: Path, format: str | None, type_numbers: Sequence[int] | None) -> Iterator[tuple[Atoms, str]]:
    """Checked structures, and what to call them."""
    number = -1
    for number, atoms in enumerate(_frames(path, format, type_numbers)):
        where = f"{path}, frame {number}"
        check_structure(atoms, where)
        normalise_state(atoms, where)
        normalise_masses(atoms, where)
        yield atoms, where
    if number < 0:
        raise InputError(f"{path} holds no structures.")


def write_structures(
    path: str | Path, structures: Iterable[Atoms], *, type_numbers: Sequence[int] | None = None
) -> tuple[str, ...]:
    """Writes structures with every digit, each as it comes; the file appears complete or not at all.

    In extended XYZ, cell, pbc, `info`, per-atom arrays and calculator results read back as they were (lists of numbers
    as arrays); so do fixed atoms and coordinates.  MLIP-2's format keeps what `write_cfg` says, a database what
    `write_database` says.

    Args:
        path: ``.extxyz`` or ``.xyz``; ``.cfg`` (MLIP-2); or ``.db`` (ASE).
        structures: what to write.
        type_numbers: atomic number of each type of a ``.cfg`` file, from type 0 on; the elements that occur, by atomic
            number, where not given.

    Returns:
        names of what structures have and the format has no place for.

    Raises:
        InputError: the name has another ending, something in `info` or the arrays has no place in extended XYZ, an
            element has no type, or the file cannot be written.
    """
    path = Path(path)
    require_format(path, databases=True)
    if path.suffix == _DATABASE:
        return write_database(path, structures)
    if path.suffix != _CFG:
        write_extxyz(path, structures)
        return ()
    if type_numbers is None:
        structures = list(structures)
        type_numbers = sorted({int(number) for atoms in structures for number in atoms.numbers})
    return write_cfg(path, structures, type_numbers)


def require_place(
    path: Path, structures: Iterable[Atoms], source: str, *, type_numbers: Sequence[int] | None = None
) -> None:
    """Refuses structures that `write_structures` would refuse, before anything is paid for them.

    Args:
        path: the file to be written.
        structures: in order.
        source: what to call the file that they are from.
        type_numbers: as for `write_structures`.

    Raises:
        InputError: something of a structure has no place in extended XYZ, or an element has no type in a ``.cfg`` file.
    """
    if path.suffix != _CFG:
        check_writable(structures, source)
    elif type_numbers is not None:
        for number, atoms in enumerate(structures):
            require_typed(atoms.numbers, type_numbers, f"{source}, frame {number}")


def require_format(path: Path, *, databases: bool = False) -> None:
    """Refuses a name that `write_structures` would not write to; for callers that compute before they write.

    Args:
        path: the name.
        databases: whether a database may be written too.

    Raises:
        InputError: the name does not say one of its formats.
    """
    if path.suffix not in (*_XYZ, _CFG, *([_DATABASE] if databases else [])):
        further = ", in .cfg (MLIP-2) or .db (ASE)" if databases else ", or in .cfg (MLIP-2)"
        raise InputError(f"{path} should end in .extxyz or .xyz{further}, which says its format.")


def require_xyz(path: Path) -> None:
    """Refuses a name that does not say extended XYZ; for files that frames are added to one by one.

    Raises:
        InputError: it has another ending.
    """
    if path.suffix not in _XYZ:
        raise InputError(f"{path} should end in .extxyz or .xyz, since frames are added to it in extended XYZ.")


def _frames(path: Path, format: str | None, type_numbers: Sequence[int] | None) -> Iterator[Atoms]:
    kind = _kind(path, format)
    if kind == "extxyz":
        return read_extxyz(path)
    if kind in _DATABASES:
        return _read_database(path, kind)
    if kind == "cfg":
        return iterate_cfg(path, required_types(path, None) if type_numbers is None else type_numbers)
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
    if suffix[1:] in _DATABASES:
        return suffix[1:]
    return "cfg" if is_cfg(path) else None  # whatever its name: AtomEye's files end in .cfg too


def _read_database(path: Path, kind: str) -> Iterator[Atoms]:
    try:
        with ase.db.connect(path, type=kind) as database:
            for row in database.select():
                atoms = row.toatoms()
                # Not the values of `key_value_pairs`: attributes of a row, such as its charge, hide keys.
                atoms.info = {**{key: vars(row)[key] for key in row.key_value_pairs}, **row.data}
                yield atoms
    except Exception as error:  # whatever the library stumbles over is the file's fault
        raise InputError(f"{path} cannot be read as an ASE database ({error}); correct the path or file.") from error


def _read_by_ase(path: Path, format: str | None) -> Iterator[Atoms]:
    try:
        yield from ase.io.iread(path, index=":", format=format, do_not_split_by_at_sign=True)
    except Exception as error:  # whatever the library stumbles over is the file's fault
        raise InputError(f"{path} cannot be read ({error}); correct the file or name its format.") from error
