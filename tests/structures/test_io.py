"""Structures through files: nothing is lost on a round trip, and every bad input gets its sentence."""

from __future__ import annotations

import errno
import gzip
import json
import os
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from ase.db import connect
from ase.spacegroup import Spacegroup
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from almlip_jax.errors import InputError
from almlip_jax.structures.io import (
    check_structure,
    count_structures,
    iterate_structures,
    read_cfg,
    read_structures,
    write_cfg,
    write_structures,
)


def labelled(seed: int = 0, periodic: bool = True) -> Atoms:
    """A rattled structure with irrational numbers everywhere and all labels."""
    rng = np.random.default_rng(seed)
    atoms = bulk("NaCl", "rocksalt", a=5.6) * (2, 1, 1) if periodic else molecule("H2O")
    atoms.rattle(0.1, rng=rng)
    results = {"energy": rng.normal() * 1e4, "forces": rng.normal(size=(len(atoms), 3))}
    if periodic:
        atoms.set_cell(atoms.cell.array @ (np.eye(3) + 0.05 * rng.normal(size=(3, 3))))
        results["stress"] = rng.normal(size=6)
    atoms.calc = SinglePointCalculator(atoms, **results)
    return atoms


def assert_same(found: Atoms, expected: Atoms) -> None:
    """Equality of everything, bit for bit."""
    np.testing.assert_array_equal(found.cell.array, expected.cell.array)
    np.testing.assert_array_equal(found.pbc, expected.pbc)
    assert set(found.arrays) == set(expected.arrays)
    for name, array in expected.arrays.items():
        np.testing.assert_array_equal(found.arrays[name], array, err_msg=name)
    assert set(found.info) == set(expected.info)
    for key, value in expected.info.items():
        np.testing.assert_equal(found.info[key], value, err_msg=key)
    assert (found.calc is None) == (expected.calc is None)
    if expected.calc is not None:
        assert set(found.calc.results) == set(expected.calc.results)
        for name, value in expected.calc.results.items():
            np.testing.assert_array_equal(found.calc.results[name], value, err_msg=name)


def frame(comment: str = "", rows: str = "H 0 0 0\nH 0 0 0.8\n", properties: str = "") -> str:
    """One extxyz frame of two atoms; the third to fifth further columns are forces or what `properties` says."""
    count = len(rows.strip().splitlines())
    return f'{count}\nProperties=species:S:1:pos:R:3{properties} pbc="F F F" {comment}\n{rows}'


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


# -------------------------------------------------------------------------------------------------------------- extxyz


def test_extxyz_keeps_every_bit(tmp_path: Path) -> None:
    path = tmp_path / "frames.extxyz"
    frames = [labelled(0), labelled(1, periodic=False), labelled(2)]
    frames[0].pbc = True, False, True
    frames[1].calc.results["dipole"] = np.array([0.1, 1 / 3, -2e-17])
    frames[2].calc.results["magmoms"] = np.arange(4) / 7
    write_structures(path, frames)
    for found, expected in zip(read_structures(path, require_labels=True), frames, strict=True):
        assert_same(found, expected)


def test_extxyz_keeps_info_and_arrays(tmp_path: Path) -> None:
    atoms = labelled()
    atoms.info = {
        "charge": -1,
        "spin": 2,
        "force_std_max": 1 / 3,
        "single": np.float32(0.1),
        "whole_float": 3.0,
        "broken": np.nan,
        "flag": True,
        "group": "300K",
        "looks_like_a_number": "300",
        "looks_like_a_flag": "T",
        "looks_like_json": "_JSON [",
        "empty": "",
        "reason": 'failed:\n\t"SCF" in C:\\tmp = {1}, ü',
        "vector": np.array([1.0, 2.0, np.pi]),
        "counts": np.array([1, 2]),
        "one": np.array([1.5]),
        "matrix": np.array([[0.1, 0.2], [0.3, 0.4]]),
        "flags": np.array([True, False]),
        "nothing": None,
        "nested": {"walker": 3, "scores": [0.1, 0.2], "name": "a b"},
        "key with blanks": 1,
    }
    atoms.set_array("force_std", np.random.default_rng(0).random(4))
    atoms.set_array("step", np.arange(4))
    atoms.set_array("moved", np.array([True, False, True, True]))
    atoms.set_array("site", np.array(["a", "b1", "c", "d"]))
    atoms.set_tags([0, 1, 2, 3])
    atoms.set_momenta(np.random.default_rng(1).normal(size=(4, 3)))
    atoms.set_initial_charges([0.1, 0.2, -0.7, -0.6])
    path = tmp_path / "frames.extxyz"
    write_structures(path, [atoms])
    found = read_structures(path)[0]
    assert_same(found, atoms)
    for key, value in atoms.info.items():
        assert isinstance(found.info[key], str) == isinstance(value, str), key
    assert type(found.info["charge"]) is int and type(found.info["spin"]) is int
    write_structures(path, [found])
    assert_same(read_structures(path)[0], atoms)  # what was read can be written again


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=12), numbers=arrays(np.float64, 6, elements=st.floats(allow_nan=False)))
def test_any_text_and_any_number_survive(
    tmp_path_factory: pytest.TempPathFactory, text: str, numbers: np.ndarray
) -> None:
    path = tmp_path_factory.mktemp("io") / "frames.extxyz"
    atoms = Atoms("H2", positions=[[0, 0, 0], [0, 0, 0.8]], info={"text": text, "number": numbers[0]})
    atoms.set_array("column", numbers.reshape(2, 3))
    write_structures(path, [atoms])
    found = read_structures(path)[0]
    assert found.info["text"] == text and isinstance(found.info["text"], str)
    assert found.info["number"] == numbers[0]
    np.testing.assert_array_equal(found.arrays["column"], atoms.arrays["column"])


def test_ase_reads_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "frames.extxyz"
    atoms = labelled()
    atoms.set_constraint(FixAtoms([0]))
    atoms.info["spacegroup"] = Spacegroup(225)
    write_structures(path, [atoms])
    found = ase.io.read(path)
    np.testing.assert_array_equal(found.positions, atoms.positions)
    np.testing.assert_array_equal(found.calc.results["forces"], atoms.calc.results["forces"])
    np.testing.assert_array_equal(found.calc.results["stress"], atoms.calc.results["stress"])
    assert found.info["spacegroup"] == "F m -3 m"
    assert [constraint.todict() for constraint in found.constraints] == [FixAtoms([0]).todict()]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "frames.extxyz"
    write_structures(path, [labelled(0)])
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="frames.extxyz: the disk is full"):
        write_structures(path, [labelled(1)])
    bad = labelled(1)
    bad.info["object"] = object()
    with pytest.raises(InputError, match=r"frame 1: info\['object'\] cannot be written"):
        write_structures(path, [labelled(1), bad])
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["frames.extxyz"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda atoms: atoms.info.update(pbc="x"), "info key 'pbc' has no place"),
        (lambda atoms: atoms.info.update({3: 1}), "info key 3 has no place"),
        (lambda atoms: atoms.info.update(virial=[1.0, 2.0]), r"'virial' has shape \(2,\)"),
        (lambda atoms: atoms.set_array("a b", np.zeros(4)), "array 'a b' has a name"),
        (lambda atoms: atoms.set_array("deep", np.zeros((4, 3, 3))), "array 'deep' .* cannot be written"),
        (lambda atoms: atoms.set_array("text", np.array(["a", "b c", "d", "e"])), "array 'text' holds text"),
        (lambda atoms: atoms.__delitem__(slice(None)), "has no atoms"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    atoms = labelled()
    change(atoms)
    with pytest.raises(InputError, match=message):
        write_structures(tmp_path / "frames.extxyz", [atoms])
    assert os.listdir(tmp_path) == []


def test_places_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="should end in .extxyz or .xyz"):
        write_structures(tmp_path / "frames.cif", [labelled()])
    (tmp_path / "notes").write_text("no folder")
    with pytest.raises(InputError, match="cannot write .*notes"):
        write_structures(tmp_path / "notes" / "frames.xyz", [labelled()])


def test_folders_of_a_file_are_made(tmp_path: Path) -> None:
    write_structures(tmp_path / "new" / "folder" / "frames.xyz", [labelled()])
    assert len(read_structures(tmp_path / "new" / "folder" / "frames.xyz")) == 1


# -------------------------------------------------------------------------------------------------------------- labels

FORCES = "H 0 0 0 1 2 3\nH 0 0 0.8 -1 -2 -3\n"


@pytest.mark.parametrize(
    ("comment", "column", "keys"),
    [
        ("energy=-1.5", "forces", {}),
        ("REF_energy=-1.5", "REF_forces", {}),
        ("dft_energy=-1.5", "dft_forces", {"energy_key": "dft_energy", "forces_key": "dft_forces"}),
        ("energy=9 dft_energy=-1.5", "forces", {"energy_key": "dft_energy"}),
        ("energy=9 REF_energy=-1.5", "forces", {"energy_key": "REF_energy"}),
        ("energy=-1.5 REF_energy=-1.5", "REF_forces", {}),
        ("free_energy=-1.5", "forces", {"energy_key": "free_energy"}),
    ],
)
def test_labels_are_found(tmp_path: Path, comment: str, column: str, keys: dict[str, str]) -> None:
    path = write(tmp_path / "frames.xyz", frame(comment, FORCES, f":{column}:R:3"))
    atoms = read_structures(path, require_labels=True, **keys)[0]
    assert atoms.get_potential_energy() == -1.5
    np.testing.assert_array_equal(atoms.get_forces(), [[1, 2, 3], [-1, -2, -3]])
    assert column not in atoms.arrays and "REF_energy" not in atoms.info and "dft_energy" not in atoms.info


def test_stress_is_found_in_every_shape(tmp_path: Path) -> None:
    voigt = np.array([1.0, 2.0, 3.0, 0.4, 0.5, 0.6])
    full = "1.0 0.6 0.5 0.6 2.0 0.4 0.5 0.4 3.0"
    comments = [f'stress="{full}"', f'REF_stress="{full}"', 'REF_stress="1 2 3 0.4 0.5 0.6"']
    path = write(tmp_path / "frames.xyz", "".join(map(frame, comments)))
    for atoms in read_structures(path):
        np.testing.assert_array_equal(atoms.calc.results["stress"], voigt)
    named = write(tmp_path / "named.xyz", frame(f'S="{full}"'))
    np.testing.assert_array_equal(read_structures(named, stress_key="S")[0].calc.results["stress"], voigt)


def test_structures_without_labels_have_no_calculator(tmp_path: Path) -> None:
    atoms = read_structures(write(tmp_path / "frames.xyz", frame("charge=1.0 multiplicity=2")))[0]
    assert atoms.calc is None
    assert atoms.info == {"charge": 1, "spin": 2}
    assert type(atoms.info["charge"]) is int and type(atoms.info["spin"]) is int


BAD_FRAMES = {
    "no such element": (frame(rows="H 0 0 0\nQq 0 0 1\n"), {}, "frame 1 has an unknown element 'Qq'"),
    "dummy atom": (frame(rows="H 0 0 0\nX 0 0 1\n"), {}, "frame 1: atom 1 is of no known element"),
    "NaN position": (frame(rows="H 0 0 0\nH 0 nan 1\n"), {}, "frame 1: the position of atom 1 is not finite"),
    "on top": (frame(rows="H 0 0 0\nO 0 0 3\nH 0 0 3.1\n"), {}, "frame 1: atoms 1 and 2 are 0.1 Angstrom apart"),
    "same place": (frame(rows="H 0 0 0\nO 0 0 0\n"), {}, "frame 1: atoms 0 and 1 are 0 Angstrom apart"),
    "truncated": ("3\n\nH 0 0 0\nH 0 0 1\n", {}, "frame 1 ends after 2 of 3 atoms; the file is incomplete"),
    "no count": ("H 0 0 0\n", {}, "frame 1: expected a number of atoms but found 'H 0 0 0'"),
    "negative count": ("-2\n\n", {}, "frame 1 has -2 atoms"),
    "no atoms": ("0\n\n", {}, "frame 1 has no atoms"),
    "missing column": ("1\n\nH 0 0\n", {}, "frame 1 cannot be read"),
    "text for a number": ("1\n\nH 0 0 zero\n", {}, "frame 1 cannot be read .*'zero'"),
    "no cell": ('1\nLattice="1 0 0 0 0 0 0 0 1"\nH 0 0 0\n', {}, "frame 1: direction 1 is periodic but"),
    "flat cell": ('1\nLattice="2 0 0 2 0 0 0 0 2"\nH 0 0 0\n', {}, "frame 1: .* linearly dependent"),
    "own image": (
        '1\nLattice="0.1 0 0 0 2 0 0 0 2"\nH 0 0 0\n',
        {},
        "frame 1: atom 0 and its periodic image are 0.1 Angstrom apart",
    ),
    "NaN energy": (frame("energy=nan"), {}, "frame 1: the energy is not finite"),
    "two energies": (frame('REF_energy="1 2"'), {}, r"frame 1: the energy has shape \(2,\)"),
    "text energy": (frame("REF_energy=none"), {}, "frame 1: energy is not numeric"),
    "inf force": (
        frame(rows="H 0 0 0 0 0 0\nH 0 0 1 0 inf 0\n", properties=":forces:R:3"),
        {},
        "frame 1: the force of atom 1 is not finite",
    ),
    "flat forces": (
        frame(rows="H 0 0 0 0\nH 0 0 1 0\n", properties=":REF_forces:R:1"),
        {},
        r"frame 1: forces have shape \(2,\), not \(2, 3\)",
    ),
    "stress shape": (frame('REF_stress="1 2 3"'), {}, r"frame 1: the stress has shape \(3,\)"),
    "no energy": (frame(rows=FORCES, properties=":forces:R:3"), {"require_labels": True}, "frame 1 has no energy; "),
    "no labels": (frame(), {"require_labels": True}, "frame 1 has no energy and no forces; label it"),
    "contradiction": (frame("energy=1 REF_energy=2"), {}, "frame 1 has two different values, 'energy' and 'REF_en"),
    "half a charge": (
        frame("charge=0.5"),
        {},
        "frame 1: charge is .*0.5.*, but the total charge must be a whole number",
    ),
    "no spin": (frame("spin=0"), {}, "frame 1: spin is .*0.*, but the multiplicity 2S.1 must be a positive whole"),
    "two charges": (frame("charge=1 total_charge=2"), {}, "frame 1: charge and total_charge contradict each other"),
}


@pytest.mark.parametrize("case", BAD_FRAMES)
def test_bad_frames_are_named(tmp_path: Path, case: str) -> None:
    text, options, message = BAD_FRAMES[case]
    good = frame("energy=1", FORCES, ":forces:R:3")
    path = write(tmp_path / "frames.xyz", good + text)
    with pytest.raises(InputError, match=f"frames.xyz, {message}"):
        read_structures(path, **options)


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="missing.xyz cannot be read .no such file"):
        read_structures(tmp_path / "missing.xyz")
    with pytest.raises(InputError, match="empty.xyz holds no structures"):
        read_structures(write(tmp_path / "empty.xyz", "\n"))
    (tmp_path / "binary.xyz").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="binary.xyz cannot be read"):
        read_structures(tmp_path / "binary.xyz")
    with pytest.raises(InputError, match="text.db cannot be read as an ASE database"):
        read_structures(write(tmp_path / "text.db", "not a database at all, but long enough to look at"))
    with pytest.raises(InputError, match="what.is_this cannot be read"):
        read_structures(write(tmp_path / "what.is_this", "nothing"))
    with pytest.raises(InputError, match="no structure of .*a.xyz has 'dft', which should hold the energy"):
        read_structures(write(tmp_path / "a.xyz", frame("energy=1")), energy_key="dft")


def test_check_structure_names_its_place() -> None:
    check_structure(molecule("H2O"), "water")
    with pytest.raises(InputError, match="^the start: atom 0 is of no known element"):
        check_structure(Atoms([0]), "the start")
    with pytest.raises(InputError, match="^the start: the cell has a component that is not finite"):
        check_structure(Atoms("H", cell=[np.nan, 1, 1], pbc=True), "the start")


# ------------------------------------------------------------------------------------------------------- other formats


def test_compressed_files_and_formats_of_ase(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "frames.xyz.gz", "wt") as file:
        file.write(frame("energy=2") * 2)
    assert [atoms.get_potential_energy() for atoms in read_structures(tmp_path / "frames.xyz.gz")] == [2, 2]
    atoms = labelled()
    atoms.write(tmp_path / "frames.traj")
    assert_same(read_structures(tmp_path / "frames.traj")[0], atoms)
    (tmp_path / "frames.traj").rename(tmp_path / "frames.dat")
    assert_same(read_structures(tmp_path / "frames.dat", format="traj")[0], atoms)


def test_ase_databases_keep_labels_and_extra_data(tmp_path: Path) -> None:
    path = tmp_path / "frames.db"
    frames = [labelled(0), labelled(1, periodic=False)]
    with connect(path) as database:
        for number, atoms in enumerate(frames):
            database.write(atoms, origin="md", step=number, data={"charge": 1, "spin": 2})
    for number, atoms in enumerate(read_structures(path, require_labels=True)):
        frames[number].info = {"origin": "md", "step": number, "charge": 1, "spin": 2}
        assert_same(atoms, frames[number])


CFG = """BEGIN_CFG
 Size
    2
 Supercell
    4.0 0.0 0.0
    0.0 5.0 0.0
    0.0 0.0 6.0
 AtomData:  id type       direct_x      direct_y      direct_z   fx fy fz  site_en
    1    1     0.25 0.5 0.5    1.0 2.0 -3.0e+00  0.5
    2    0     0.0  0.0 1e-1   -1.0 -2.0 3.0  0.25
 Energy
    -1.25e+01
 PlusStress:  xx yy zz yz xz xy
    120.0 -240.0 60.0 12.0 -24.0 6.0
 Feature   EFS_by\tsome code, version 2
 Feature MV_grade 1.5
 Feature charge 1
END_CFG

BEGIN_CFG
Size
1
AtomData: type cartes_x cartes_y cartes_z
0 0.1 0.2 0.3
END_CFG
"""


def test_cfg_files_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "frames.cfg", CFG)
    crystal, atom = read_structures(path, type_numbers=[8, 1])
    assert crystal.get_chemical_symbols() == ["H", "O"] and crystal.pbc.all()
    np.testing.assert_allclose(crystal.positions, [[1.0, 2.5, 3.0], [0, 0, 0.6]])
    assert crystal.get_potential_energy() == -12.5
    np.testing.assert_array_equal(crystal.get_forces(), [[1, 2, -3], [-1, -2, 3]])
    np.testing.assert_allclose(crystal.get_stress(), np.array([-120, 240, -60, -12, 24, -6]) / 120)
    np.testing.assert_array_equal(crystal.arrays["site_en"], [0.5, 0.25])
    assert crystal.info == {"EFS_by": "some code, version 2", "MV_grade": 1.5, "charge": 1}
    assert atom.calc is None and not atom.pbc.any() and atom.get_chemical_symbols() == ["O"]


def test_cfg_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "frames.cfg"
    frames = [labelled(0), labelled(1), Atoms("NaCl", positions=[[0, 0, 0], [0, 0, 2.1 + 1e-13]])]
    frames[0].info = {"charge": -1, "spin": 2, "MV_grade": 1 / 3, "step": 7, "made by": "skipped", "origin": "a b"}
    frames[1].pbc = True, False, True  # no stress, no second cell vector
    frames[2].info = {"charge": 0, "spin": 1}
    write_cfg(path, frames, [17, 11])
    found = read_cfg(path, [17, 11])
    for read, written in zip(found, frames, strict=True):
        np.testing.assert_array_equal(read.positions, written.positions)
        np.testing.assert_array_equal(read.numbers, written.numbers)
        np.testing.assert_array_equal(read.pbc, written.pbc)
    np.testing.assert_array_equal(found[0].cell, frames[0].cell)
    np.testing.assert_array_equal(found[0].get_forces(), frames[0].get_forces())
    np.testing.assert_allclose(found[0].get_stress(), frames[0].get_stress(), rtol=1e-14)
    assert found[0].get_potential_energy() == frames[0].get_potential_energy()
    assert found[0].info == {"charge": -1, "spin": 2, "MV_grade": 1 / 3, "step": 7, "origin": "a b"}
    assert set(found[1].calc.results) == {"energy", "forces"}
    assert found[2].calc is None and found[2].info == {}


def test_structures_are_written_as_the_name_says(tmp_path: Path) -> None:
    """MLIP-2's format with types that are given, or those that occur; what it has no place for is named."""
    frames = [Atoms("OH", [[0, 0, 0], [0, 0, 1]], info={"grade": 1.5, "tensor": np.eye(2)}), Atoms("O", [[0, 0, 0]])]
    frames[0].set_array("site", np.eye(2))
    assert write_structures(tmp_path / "a.extxyz", frames) == ()
    assert write_structures(tmp_path / "a.cfg", iter(frames)) == ("site", "tensor")
    assert write_structures(tmp_path / "b.cfg", iter(frames), type_numbers=[8, 6, 1]) == ("site", "tensor")
    for name, types in (("a.cfg", [1, 8]), ("b.cfg", [8, 6, 1])):
        found = read_structures(tmp_path / name, type_numbers=types)
        assert [str(atoms.symbols) for atoms in found] == ["OH", "O"] and found[0].info == {"grade": 1.5}
    with pytest.raises(InputError, match="no type is given for atomic number 1"):
        write_structures(tmp_path / "b.cfg", frames, type_numbers=[8])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("END_CFG\n\n", "", "frame 0 has no END_CFG"),
        ("END_CFG\n\nBEGIN", "END_CFG\nstray\nBEGIN", "'stray' stands outside"),
        ("1.0 2.0 -3.0e+00  0.5", "1.0 2.0", "frame 0 cannot be read .expected 9 numbers but found '1 "),
        ("0.0 5.0 0.0", "0.0 5.0 x", "frame 0 cannot be read .*'x'"),
        ("0.0 5.0 0.0", "0.0 0.0 0.0", "frame 0 cannot be read .direct coordinates need three cell vectors"),
        (" Energy\n", " Enthalpy\n", "frame 0 cannot be read .unknown section 'Enthalpy'"),
        ("id type", "id kind", "frame 0 cannot be read .AtomData has no column 'type'"),
        ("direct_z", "z", "frame 0 cannot be read .AtomData has neither"),
        ("    1    1     0.25", "    1    2     0.25", "frame 0: atom 0 has type 2, but only 2 atomic numbers"),
        (" Size\n    2\n", "", "frame 0 cannot be read .AtomData without Size"),
        ("-1.25e+01", "nan", "frame 0: the energy is not finite"),
        ("0 0.1 0.2 0.3", "0 0.1 0.2 inf", "frame 1: the position of atom 0 is not finite"),
    ],
)
def test_bad_cfg_files_are_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in CFG
    path = write(tmp_path / "frames.cfg", CFG.replace(old, new, 1))
    with pytest.raises(InputError, match=f"frames.cfg(, |: ){message}"):
        read_cfg(path, [8, 1])


def test_cfg_needs_to_know_its_elements(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="say which element each of its types is"):
        read_structures(write(tmp_path / "frames.cfg", CFG))
    with pytest.raises(InputError, match="frame 0: no type is given for atomic number 17"):
        write_cfg(tmp_path / "out.cfg", [labelled()], [11])
    with pytest.raises(InputError, match="missing.cfg cannot be read"):
        read_cfg(tmp_path / "missing.cfg", [1])


@pytest.mark.parametrize("name", ["pool.extxyz", "pool.xyz.gz", "pool.cfg"])
def test_files_are_read_frame_by_frame_and_counted(tmp_path: Path, name: str) -> None:
    """A frame is there before a later one turns out to be broken."""
    frames = [labelled(seed) for seed in range(5)]
    path, numbers = tmp_path / name, [17, 11]
    if name.endswith("cfg"):
        write_cfg(path, frames, numbers)
    else:
        write_structures(tmp_path / "plain.xyz", frames)
        text = (tmp_path / "plain.xyz").read_bytes()
        path.write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    assert count_structures(path) == 5
    for found, expected in zip(
        iterate_structures(path, type_numbers=numbers), read_structures(path, type_numbers=numbers), strict=True
    ):
        assert_same(found, expected)
    text = gzip.decompress(path.read_bytes()) if name.endswith("gz") else path.read_bytes()
    text = text[: text.rstrip().rindex(b"\n") + 1]
    path.write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    stream = iterate_structures(path, type_numbers=numbers)
    assert len([next(stream) for _ in range(4)]) == 4
    for broken in (lambda: next(stream), lambda: count_structures(path)):
        with pytest.raises(InputError, match=f"{name}, frame 4 .*incomplete"):
            broken()


def test_counting_says_what_it_cannot_know(tmp_path: Path) -> None:
    ase.io.write(tmp_path / "frames.traj", [molecule("H2O")] * 2)
    assert count_structures(tmp_path / "frames.traj") is None
    assert len(list(iterate_structures(tmp_path / "frames.traj"))) == 2
    with pytest.raises(InputError, match="no such file"):
        count_structures(tmp_path / "missing.xyz")
    with pytest.raises(InputError, match="holds no structures"):
        list(iterate_structures(write(tmp_path / "empty.xyz", "")))


def test_json_in_info_stays_json(tmp_path: Path) -> None:
    text = json.dumps({"a": [1, 2], "b": "c = d"})
    path = tmp_path / "frames.xyz"
    write_structures(path, [Atoms("H", info={"provenance": text})])
    assert read_structures(path)[0].info["provenance"] == text
