"""Files of MLIP-2 in all forms that are written: read as they are meant, or refused with a sentence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms

from almlip_jax.errors import InputError
from almlip_jax.structures.io import count_structures, read_cfg, read_structures, write_structures

CFG = """BEGIN_CFG
 Size
    2
 Supercell
    4 0 0
    0 5 0
    0 0 6
 AtomData:  id type cartes_x cartes_y cartes_z fx fy fz
    1 0 0 0 0 0.1 0 0
    2 1 2 2 2 -0.1 0 0
 Energy
    -1.5
 PlusStress:  xx yy zz yz xz xy
    1 2 3 4 5 6
 Feature weight 0.5
END_CFG
"""


def read(path: Path, text: str, types: tuple[int, ...] = (8, 1)) -> Atoms:
    path.write_bytes(text.encode())
    assert count_structures(path) == 1
    return read_structures(path, type_numbers=types)[0]


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("", "", "a.cfg"),
        ("", "", "a.cfg_train"),
        ("", "", "train"),
        ("\n", "\r\n", "a.cfg"),
        ("BEGIN_CFG", "\ufeffBEGIN_CFG", "a.dat"),
        ("Supercell", "SuperCell", "a.cfg"),
        ("xx yy zz yz xz xy\n    1 2 3 4 5 6", "xx xy xz yy yz zz\n    1 6 5 2 4 3", "a.cfg"),
        ("1 0 0 0 0 0.1", "1 0.0 0 0 0 0.1", "a.cfg"),
        ("weight 0.5", "weight 0.500", "a.cfg"),
    ],
)
def test_one_structure_in_many_forms(tmp_path: Path, old: str, new: str, name: str) -> None:
    atoms = read(tmp_path / name, CFG.replace(old, new) if old else CFG)
    assert str(atoms.symbols) == "OH" and atoms.pbc.all() and atoms.info == {"weight": 0.5}
    assert atoms.get_potential_energy() == -1.5
    np.testing.assert_array_equal(atoms.get_forces(), [[0.1, 0, 0], [-0.1, 0, 0]])
    np.testing.assert_allclose(atoms.get_stress(), -np.arange(1, 7) / 120, rtol=1e-14)


def test_cells_of_one_and_two_vectors(tmp_path: Path) -> None:
    for rows, pbc in (("    4 0 0\n    0 5 0\n", [True, True, False]), ("    4 0 0\n", [True, False, False])):
        atoms = read(tmp_path / "a.cfg", CFG.replace("    4 0 0\n    0 5 0\n    0 0 6\n", rows))
        np.testing.assert_array_equal(atoms.pbc, pbc)
        assert "stress" not in atoms.calc.results and atoms.get_potential_energy() == -1.5
        np.testing.assert_array_equal(atoms.info["virial"], [1, 2, 3, 4, 5, 6])


def test_types_may_begin_at_one(tmp_path: Path) -> None:
    text = CFG.replace("2 1 2 2 2", "2 2 2 2 2").replace("1 0 0 0 0 0.1", "1 1 0 0 0 0.1")
    with pytest.raises(InputError, match="frame 0: atom 1 has type 2, but only 2 .*let the table begin with X"):
        read(tmp_path / "a.cfg", text)
    assert str(read(tmp_path / "a.cfg", text, (0, 8, 1)).symbols) == "OH"
    with pytest.raises(InputError, match="frame 0: atom 0 is of no known element"):
        read(tmp_path / "a.cfg", CFG, (0, 8, 1))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("1 0 0 0 0 0.1", "1 0.7 0 0 0 0.1", "atom 0 has type 0.7, which is not a whole number"),
        (
            "cartes_z fx fy fz",
            "cartes_z fx fy site_en",
            r"cannot be read .AtomData has only some of fx, fy, fz; fz miss",
        ),
        ("xx yy zz yz xz xy", "xx yy zz", "cannot be read .PlusStress should name its components, xx yy zz yz xz xy"),
        ("0.1 0 0", "nan 0 0", "the force of atom 0 is not finite"),
        ("1 2 3 4 5 6", "1 2 3 4 5 nan", "the stress is not finite; remove the stress"),
        ("weight 0.5", "weight half", "weight is 'half', but a weight is a number of at least 0"),
        ("weight 0.5", "weight -1", "weight is -1, but a weight is a number of at least 0"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in CFG
    with pytest.raises(InputError, match=f"a.cfg, frame 0:? {message}"):
        read(tmp_path / "a.cfg", CFG.replace(old, new))


@pytest.mark.parametrize("between", [None, "extxyz"])
def test_a_file_is_written_as_it_was_read(tmp_path: Path, between: str | None) -> None:
    """Lines of one key, flags, further columns and virials of slabs, also by way of another format."""
    columns = "fx fy fz site_en nbh_grades tags"
    text = CFG.replace("    0 0 6\n", "").replace("fx fy fz", columns).replace("0.1 0 0\n", "0.1 0 0 -1.5 1.25 3\n", 1)
    text = text.replace("-0.1 0 0\n", "-0.1 0 0 -2.5 3.5 -4\n")
    features = ["note first line", "flag", "note", "ID 0012", "note third  line", "mindist 1.230000"]
    text = text.replace("END_CFG", "".join(f" Feature {one}\n" for one in features) + "END_CFG")
    atoms = read(tmp_path / "a.cfg", text)
    assert atoms.info["note"] == "first line\n\nthird  line" and atoms.info["flag"] == ""
    np.testing.assert_array_equal(atoms.arrays["nbh_grades"], [1.25, 3.5])
    assert atoms.arrays["tags"].tolist() == [3, -4] and atoms.arrays["tags"].dtype.kind == "i"
    if between is not None:
        assert write_structures(tmp_path / f"a.{between}", [atoms]) == ()
        atoms = read_structures(tmp_path / f"a.{between}")[0]
    assert write_structures(tmp_path / "b.cfg", [atoms], type_numbers=(8, 1)) == ()
    again = read_cfg(tmp_path / "b.cfg", (8, 1))[0]
    virial = again.info.pop("virial")
    np.testing.assert_array_equal(virial, [1, 2, 3, 4, 5, 6])
    assert set(atoms.info) == {*again.info, "virial"} and all(atoms.info[key] == again.info[key] for key in again.info)
    for name in ("positions", "site_en", "nbh_grades", "tags"):
        np.testing.assert_array_equal(again.arrays[name], atoms.arrays[name])
    written = (tmp_path / "b.cfg").read_text().splitlines()
    assert [line.strip() for line in written if "note" in line] == [
        *("Feature note first line", "Feature note", "Feature note third  line"),
    ]


def test_what_has_no_place_is_named(tmp_path: Path) -> None:
    atoms = Atoms("OH", [[0, 0, 0], [0, 0, 1]], info={"virial": "none", "bell": "\a", "yes": True})
    atoms.calc = SinglePointCalculator(atoms, energy=1.0, free_energy=1.0, stress=np.ones(6), dipole=np.ones(3))
    atoms.set_constraint(FixAtoms([0]))
    atoms.arrays |= {"fx": np.ones(2), "site en": np.ones(2), "flags": np.ones(2, bool), "vector": np.ones((2, 2))}
    left = ("bell", "constraints", "dipole", "flags", "fx", "site en", "stress", "vector", "yes")
    assert write_structures(tmp_path / "a.cfg", [atoms]) == left
    assert read_cfg(tmp_path / "a.cfg", (1, 8))[0].info == {"virial": "none"}
    atoms.calc = SinglePointCalculator(atoms, energy=1.0, free_energy=2.0)
    assert "free_energy" in write_structures(tmp_path / "a.cfg", [atoms])


def test_virials_of_crystals_are_written_where_there_is_no_stress(tmp_path: Path) -> None:
    atoms = Atoms("OH", [[0, 0, 0], [0, 0, 1]], cell=[4, 5, 6], pbc=True, info={"virial": np.diag([1.0, 2.0, 3.0])})
    assert write_structures(tmp_path / "a.cfg", [atoms]) == ()
    found = read_cfg(tmp_path / "a.cfg", (1, 8))[0]
    np.testing.assert_allclose(found.get_stress(), -np.array([1, 2, 3, 0, 0, 0]) / 120, rtol=1e-14)
    atoms.calc = SinglePointCalculator(atoms, stress=np.ones(6))
    assert write_structures(tmp_path / "a.cfg", [atoms]) == ("virial",)
