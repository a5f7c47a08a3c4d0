"""Sets of crystals with one label each: parts of the reference data, and exports of Materials Project or OQMD."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
from ase import Atoms

from almlip_jax.errors import InputError

LARGEST_SET, MOST_ATOMS = 600, 50
LABELS = ("energy_per_atom", "formation_energy_per_atom", "delta_e")
"""Columns of an export that are looked for where none is named."""


@dataclass(frozen=True)
class Source:
    """Where a set comes from.

    Attributes:
        file: below the folder of the reference data.
        label: key in ``info``, or ``energy`` (of the cell, taken per atom).
        unit: of the label.
        elements: that a crystal must have.
        keep: whether a crystal with this label belongs to it.
        transform: of the label.
    """

    file: str
    label: str
    unit: str = "eV/atom"
    elements: tuple[str, ...] = ()
    keep: Callable[[float], bool] = np.isfinite
    transform: Callable[[float], float] = float


SOURCES = {
    "carbon": Source("carbon24/carbon24.extxyz", "energy"),
    "silicon": Source("crystals/perov5.extxyz", "heat_all", elements=("Si",)),
    "iron": Source("crystals/perov5.extxyz", "heat_all", elements=("Fe",)),
    "titanium_oxide": Source("crystals/perov5.extxyz", "heat_all", elements=("Ti", "O")),
    "perovskites": Source("crystals/perov5.extxyz", "heat_all"),
    "wbm": Source("crystals/wbm.extxyz", "formation_energy_per_atom"),
    "bulk_modulus": Source("crystals/mp_binaries.extxyz", "bulk_modulus", "log10 GPa", transform=np.log10),
    "shear_modulus": Source("crystals/mp_binaries.extxyz", "shear_modulus", "log10 GPa", transform=np.log10),
    "gap": Source("crystals/perov5.extxyz", "dir_gap", "eV", keep=lambda gap: gap > 0),
}
PAPER = ("carbon", "silicon", "iron", "titanium_oxide")


@dataclass(frozen=True)
class Labelled:
    """Crystals and their labels [n]."""

    name: str
    frames: list[Atoms]
    labels: np.ndarray
    unit: str


def read_source(name: str, data: Path, seed: int = 0) -> Labelled:
    """At most `LARGEST_SET` crystals of a set, drawn once for all seeds, of 2 to `MOST_ATOMS` atoms.

    Raises:
        InputError: the folder of the reference data has no such file.
    """
    source = SOURCES[name]
    if not (data / source.file).is_file():
        raise InputError(f"{data} has no {source.file}, of which {name} is a part; give the folder of the data.")
    blocks = [block for block in _blocks(data / source.file) if _belongs(block, source)]
    drawn = np.sort(np.random.default_rng(seed).permutation(len(blocks))[:LARGEST_SET])
    frames = ase.io.read(io.StringIO("".join(blocks[n] for n in drawn)), index=":", format="extxyz")
    return Labelled(name, frames, np.array([source.transform(_label(a, source.label)) for a in frames]), source.unit)


def _blocks(path: Path) -> Iterator[str]:
    """The text of each frame: a file of thousands is much faster cut than parsed."""
    with path.open(encoding="utf-8") as file:
        while head := file.readline():
            yield head + "".join(file.readline() for _ in range(1 + int(head)))


def _belongs(block: str, source: Source) -> bool:
    head, comment, *atoms = block.splitlines()
    if not 2 <= int(head) <= MOST_ATOMS or not set(source.elements) <= {line.split(maxsplit=1)[0] for line in atoms}:
        return False
    found = [part for part in comment.split() if part.startswith(f"{source.label}=")]
    return bool(found) and bool(source.keep(float(found[0].split("=")[1])))


def _label(atoms: Atoms, key: str) -> float:
    if key == "energy":
        return float(atoms.get_potential_energy()) / len(atoms)
    return float(atoms.info[key])


# ------------------------------------------------------------------------------------------------------------- exports


def read_export(name: str, path: Path, label: str | None = None, seed: int = 0) -> Labelled:
    """Crystals of an export: ``.json`` and ``.csv`` (see the README), or anything that ase reads.

    Args:
        name: of the set.
        path: the file.
        label: column, or key in ``info``; by default the first of `LABELS` that is there, or the energy of the cell.
        seed: of the drawing, where there are more than `LARGEST_SET`.

    Raises:
        InputError: a record has no structure or no number as label, or there are too few.
    """
    known = {".json": _json_records, ".csv": _csv_records}
    if path.suffix in known:
        pairs = [_of_record(record, label, f"{path}, record {n}") for n, record in enumerate(known[path.suffix](path))]
    else:
        pairs = [_of_frame(atoms, label, f"{path}, frame {n}") for n, atoms in enumerate(ase.io.read(path, index=":"))]
    pairs = [pair for pair in pairs if 2 <= len(pair[0]) <= MOST_ATOMS]
    drawn = np.sort(np.random.default_rng(seed).permutation(len(pairs))[:LARGEST_SET])
    return Labelled(name, [pairs[n][0] for n in drawn], np.array([pairs[n][1] for n in drawn]), label or "eV/atom")


def content_of(path: Path, label: str | None) -> str:
    """What an export holds, in twelve digits: a hash of the file and of the column that is learned."""
    return hashlib.sha256(path.read_bytes() + f"\n{label or ''}".encode()).hexdigest()[:12]


def _json_records(path: Path) -> list[dict[str, Any]]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}).") from error
    records = found.get("data") if isinstance(found, dict) else found
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise InputError(f"{path} holds no list of records, nor one below 'data': see the README.")
    return records


def _csv_records(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _of_frame(atoms: Atoms, label: str | None, place: str) -> tuple[Atoms, float]:
    results = {} if atoms.calc is None else atoms.calc.results
    return atoms, _number(results | atoms.info, label, len(atoms), place)


def _of_record(record: Mapping[str, Any], label: str | None, place: str) -> tuple[Atoms, float]:
    atoms = _structure(record, place)
    return atoms, _number(record, label, len(atoms), place)


def _number(record: Mapping[str, Any], label: str | None, atoms: int, place: str) -> float:
    names = (label,) if label else LABELS
    found = next((name for name in names if record.get(name) not in (None, "")), None)
    try:
        if found is None and not label:
            return float(record["energy"]) / atoms
        return float(record[found])  # type: ignore[index]
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{place} has no number in {', '.join(names)}; name the column of the label.") from None


def _structure(record: Mapping[str, Any], place: str) -> Atoms:
    """Of the Materials Project (``structure``), of OQMD (``unit_cell``, ``sites``), or of a ``cif``."""
    try:
        if record.get("structure"):
            held = record["structure"]
            return _of_pymatgen(json.loads(held) if isinstance(held, str) else held)
        if record.get("cif"):
            return ase.io.read(io.StringIO(record["cif"]), format="cif")
        cell, sites = (json.loads(v) if isinstance(v, str) else v for v in (record["unit_cell"], record["sites"]))
        symbols, places = zip(*(site.split(" @ ") for site in sites), strict=True)
        return Atoms(symbols, scaled_positions=[[float(x) for x in one.split()] for one in places], cell=cell, pbc=True)
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(f"{place} has no structure that can be read ({error}): see the README for columns.") from None


def _of_pymatgen(held: Mapping[str, Any]) -> Atoms:
    """A structure as pymatgen writes it: ``lattice`` with its ``matrix``, ``sites`` with ``species`` and ``abc``."""
    symbols = []
    for site in held["sites"]:
        species = site["species"]
        if len(species) != 1 or float(species[0]["occu"]) != 1:
            raise ValueError("a site is shared by several elements, or empty in part")
        symbols.append(species[0]["element"])
    places = [site["abc"] for site in held["sites"]]
    return Atoms(symbols, scaled_positions=places, cell=held["lattice"]["matrix"], pbc=True)
