"""What files say of a structure beside its geometry is taken as it was meant, or refused; what is read is kept."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms, FixBondLength, FixCartesian
from ase.db import connect

from almlip_jax.errors import InputError
from almlip_jax.structures.carried import carried
from almlip_jax.structures.io import read_structures, write_structures
from almlip_jax.structures.neighbors import neighborhood

OPEN = "Properties=species:S:1:pos:R:3"
CRYSTAL = f'{OPEN} Lattice="3 0 0 0 3 0 0 0 3"'
PAIR = "Cu 0 0 0\nCu 1.5 1.5 1.5\n"


def read(tmp_path: Path, comment: str, rows: str = "O 0 0 0\nO 0 0 1.21\n") -> Atoms:
    """The one frame of a file with this comment line and these rows."""
    path = tmp_path / "frame.xyz"
    path.write_text(f"{rows.count(chr(10))}\n{comment}\n{rows}")
    (atoms,) = read_structures(path)
    return atoms


# ------------------------------------------------------------------------------------------------------ charge and spin


@pytest.mark.parametrize(
    ("said", "state"),
    [
        ("charge=-2", {"charge": -2}),
        ("Charge=-2.0", {"charge": -2}),
        ("total_charge=-2", {"charge": -2}),
        ("NET_CHARGE=-2", {"charge": -2}),
        ("charge=-2 net_charge=-2", {"charge": -2}),
        ("spin=3", {"spin": 3}),
        ("Multiplicity=3", {"spin": 3}),
        ("spin_multiplicity=3 uhf=2", {"spin": 3}),
        ("uhf=2", {"spin": 3}),
        ("unpaired_electrons=0 charge=0", {"charge": 0, "spin": 1}),
        ("spin=3 total_spin=1", {"spin": 3}),
        ("spin=3 total_spin=2", {"spin": 3}),
        ("config_type=dimer", {}),
    ],
)
def test_charge_and_spin_are_understood_in_every_spelling(tmp_path: Path, said: str, state: dict[str, int]) -> None:
    info = read(tmp_path, f"{OPEN} {said}").info
    assert {key: info[key] for key in info if key != "config_type"} == state
    assert all(type(info[key]) is int for key in state)


@pytest.mark.parametrize(
    ("column", "values", "state"),
    [
        ("initial_charges", (-1.2, -0.8), {"charge": -2}),
        ("initial_charges", (-1.204, -0.8), {"charge": -2}),
        ("initial_charges", (0, 0), {}),
        ("charge", (-0.6, -0.4), {"charge": -1}),
        ("charge", (-0.6, -0.3), {}),
        ("initial_magmoms", (1, 1), {"spin": 3}),
        ("initial_magmoms", (1, -1), {}),
        ("initial_magmoms", (0.3, 0.3), {}),
    ],
)
def test_columns_of_charges_and_moments_state_the_whole(
    tmp_path: Path, column: str, values: tuple[float, float], state: dict[str, int]
) -> None:
    rows = f"O 0 0 0 {values[0]}\nO 0 0 1.21 {values[1]}\n"
    assert read(tmp_path, f"{OPEN}:{column}:R:1", rows).info == state
    if column == "initial_magmoms":  # where the bands of a crystal begin, and no multiplicity
        atoms = read(tmp_path, f'{OPEN}:{column}:R:1 Lattice="9 0 0 0 9 0 0 0 9"', rows)
        np.testing.assert_array_equal(atoms.get_initial_magnetic_moments(), values)
        assert atoms.info == {}


@pytest.mark.parametrize(
    ("comment", "columns", "message"),
    [
        ("charge=1 Net_charge=2", "", "charge and Net_charge contradict each other .charge 1 or 2.; keep charge"),
        ("spin=1 uhf=2", "", "spin and uhf contradict each other .spin 1 or 3.; keep spin"),
        ("charge=1", " -1.2 -0.8", "charge and initial_charges contradict each other"),
        ("", " -1.2 -0.5", "initial charges add up to -1.7, not a whole number; give charge"),
        ("uhf=-1", "", "uhf is -1, but the number of unpaired electrons"),
        ("uhf=0.5", "", "uhf is 0.5, but the number of unpaired electrons"),
        ("total_spin=1", "", "total_spin is 1, and it may be S, 2S or 2S.1; give the multiplicity"),
        ("spin=3 total_spin=5", "", "total_spin is 5, and the multiplicity is 3"),
        ("spin=0", "", "spin is 0, but the multiplicity"),
        ("charge=high", "", "charge is 'high'"),
    ],
)
def test_states_that_contradict_or_mean_nothing_are_refused(
    tmp_path: Path, comment: str, columns: str, message: str
) -> None:
    first, second = columns.split() or ("", "")
    rows = f"O 0 0 0 {first}\nO 0 0 1.21 {second}\n"
    properties = f"{OPEN}:initial_charges:R:1" if columns else OPEN
    with pytest.raises(InputError, match=f"frame.xyz, frame 0: .*{message}"):
        read(tmp_path, f"{properties} {comment}", rows)


@pytest.mark.parametrize("name", ["frames.db", "frames.json"])
def test_keys_of_a_database_are_not_hidden_by_what_ase_computes(tmp_path: Path, name: str) -> None:
    atoms = molecule("H2O")
    atoms.set_constraint(FixAtoms([0]))
    atoms.set_masses([15.999, 2.014, 2.014])
    with connect(tmp_path / name) as database:
        database.write(atoms, charge=-2, origin="md")
        database.write(atoms, data={"multiplicity": 3})
    first, second = read_structures(tmp_path / name)
    assert first.info == {"charge": -2, "origin": "md"} and second.info == {"spin": 3}
    assert first.constraints[0].todict() == FixAtoms([0]).todict()
    np.testing.assert_array_equal(first.get_masses(), atoms.get_masses())


# ------------------------------------------------------------------------------------------- masses and fixed atoms


@pytest.mark.parametrize("column", ["mass", "masses"])
def test_masses_of_isotopes_are_masses(tmp_path: Path, column: str) -> None:
    atoms = read(tmp_path, f"{OPEN}:{column}:R:1", "O 0 0 0 15.999\nH 0 0 0.96 2.014\n")
    np.testing.assert_array_equal(atoms.get_masses(), [15.999, 2.014])
    assert "mass" not in atoms.arrays
    named = read(tmp_path, OPEN, "O 0 0 0\nD 0 0 0.96\n")
    assert named.get_chemical_symbols() == ["O", "H"]
    np.testing.assert_array_equal(named.get_masses(), [15.999, 2.014])
    with pytest.raises(InputError, match="the mass of atom 1 is -2"):
        read(tmp_path, f"{OPEN}:{column}:R:1", "O 0 0 0 15.999\nH 0 0 0.96 -2\n")
    with pytest.raises(InputError, match="mass and masses contradict each other"):
        read(tmp_path, f"{OPEN}:mass:R:1:masses:R:1", "O 0 0 0 16 16\nH 0 0 0.96 2 1\n")


@pytest.mark.parametrize(
    "constraints",
    [
        [FixAtoms([0, 2])],
        [FixCartesian([1, 2], mask=[True, False, True])],
        [FixAtoms([0]), FixCartesian([2], mask=[False, False, True])],
        [FixAtoms([0]), FixAtoms([1])],
        [FixAtoms([])],
    ],
)
def test_fixed_atoms_and_coordinates_survive_a_file(tmp_path: Path, constraints: list[Any]) -> None:
    """Here and in ASE: after a move of all atoms, the same coordinates stand where they stood."""
    atoms = molecule("H2O")
    atoms.set_constraint(constraints)
    write_structures(tmp_path / "frame.xyz", [atoms])
    for found in (read_structures(tmp_path / "frame.xyz")[0], ase.io.read(tmp_path / "frame.xyz")):
        for one in (atoms, found):
            one.set_positions(molecule("H2O").positions + 1.0)
        np.testing.assert_array_equal(found.positions, atoms.positions)
        assert found.get_number_of_degrees_of_freedom() == atoms.get_number_of_degrees_of_freedom()


def test_a_constraint_that_a_file_cannot_hold_is_refused(tmp_path: Path) -> None:
    atoms = molecule("H2O")
    atoms.set_constraint(FixBondLength(0, 1))
    with pytest.raises(
        InputError, match="frame 0 has the constraint FixBondLength.*, which an extxyz file cannot hold"
    ):
        write_structures(tmp_path / "frame.xyz", [atoms])


def test_labels_of_fixed_atoms_are_forces_and_not_zeros(tmp_path: Path) -> None:
    atoms = molecule("H2O")
    forces = np.arange(9.0).reshape(3, 3) + 1
    atoms.calc = SinglePointCalculator(atoms, energy=-1.0, forces=forces)
    atoms.set_constraint(FixAtoms([0]))
    write_structures(tmp_path / "frame.xyz", [atoms])
    np.testing.assert_array_equal(read_structures(tmp_path / "frame.xyz")[0].calc.results["forces"], forces)


def test_what_is_carried_is_all_that_dynamics_and_labels_depend_on() -> None:
    atoms = molecule("H2O")
    atoms.set_constraint(FixAtoms([0]))
    atoms.set_masses([16, 2, 2])
    atoms.set_initial_magnetic_moments([0, 1, -1])
    atoms.set_tags([1, 2, 3])
    atoms.info = {"charge": 1, "spin": 2, "remark": "x"}
    found = carried(atoms)
    assert found.info == {"charge": 1, "spin": 2}
    assert set(found.arrays) == {"numbers", "positions", "masses", "initial_magmoms"}
    assert found.constraints[0].todict() == FixAtoms([0]).todict() and found.constraints[0] is not atoms.constraints[0]


# ------------------------------------------------------------------------------------------------------ as it was meant


@pytest.mark.parametrize("key", ["Lattice", "lattice", "LATTICE"])
def test_names_of_the_format_are_known_in_any_case(tmp_path: Path, key: str) -> None:
    atoms = read(tmp_path, f'properties=Species:S:1:Pos:R:3 {key}="3 0 0 0 4 0 0 0 5" PBC="T T F"', PAIR)
    np.testing.assert_array_equal(atoms.cell.array, np.diag([3, 4, 5]))
    assert atoms.pbc.tolist() == [True, True, False] and atoms.info == {}


def test_a_remark_is_no_lattice_and_cannot_be_written_as_one(tmp_path: Path) -> None:
    atoms = read(tmp_path, f"{CRYSTAL} lattice=fcc", PAIR)
    assert atoms.info == {"lattice": "fcc"} and atoms.cell[2, 2] == 3
    write_structures(tmp_path / "again.xyz", [atoms])
    assert read_structures(tmp_path / "again.xyz")[0].info == {"lattice": "fcc"}
    atoms.info = {"lattice": np.arange(9.0)}
    with pytest.raises(InputError, match="info key 'lattice' would be read as the format's own"):
        write_structures(tmp_path / "again.xyz", [atoms])


def test_six_numbers_are_a_stress_in_voigt_order(tmp_path: Path) -> None:
    stress = np.array([1.0, 2, 3, 4, 5, 6]) / 100
    for text in (" ".join(map(str, stress)), "0.01 0.06 0.05 0.06 0.02 0.04 0.05 0.04 0.03"):
        atoms = read(tmp_path, f'{CRYSTAL} energy=-1 stress="{text}"', PAIR)
        np.testing.assert_allclose(atoms.calc.results["stress"], stress)


@pytest.mark.parametrize("start", [b"\xef\xbb\xbf", b""])
def test_marks_at_the_beginning_and_other_line_ends_change_nothing(tmp_path: Path, start: bytes) -> None:
    text = f"2\n{OPEN}:forces:R:3 energy=-1.0D+00\nO 0 0 0 0 0 1.0d-1\nH 0 0 0.96 0 0 -1\n\n\n".encode()
    for ends in (b"\n", b"\r\n", b"\r"):
        (tmp_path / "frames.xyz").write_bytes(start + text.replace(b"\n", ends) * 2)
        for atoms in read_structures(tmp_path / "frames.xyz", require_labels=True):
            assert atoms.get_potential_energy() == -1
            np.testing.assert_array_equal(atoms.get_forces()[:, 2], [0.1, -1])
        start_once = (tmp_path / "frames.xyz").read_bytes()
        assert start_once.count(b"\xef\xbb\xbf") == len(start) // 3


@pytest.mark.parametrize(
    ("comment", "rows", "message"),
    [
        (f"{OPEN}:forces:R:3", "O 0 0 0 0 0 1\nH 0 0 0.96 9 0 0 -1\n", "atom 1 has 8 columns, not 7"),
        (f"{OPEN}:forces:R:3", "O 0 0 0 0 0 1\nH 0 0 0.96 0 0\n", "atom 1 has 6 columns, not 7"),
        (f"{OPEN}:forces:R:3", "O 0 0 0 0 0 1\nH 0 0 0.96 0 no 0\n", "atom 1, forces: 'no' is not a number"),
        (f"{OPEN}:move_mask:L:1", "O 0 0 0 maybe\nH 0 0 0.96 T\n", "atom 0, move_mask: 'maybe' is neither T nor F"),
        ("O 0 0 0", "H 0 0 0.96\n2\n", "atom 1 has 1 column, not 4"),
        (f"{OPEN} energy=-1 energy=-2", PAIR, "energy is given twice, as -1 and -2"),
        (f'{OPEN} Lattice="3 0 0 0 3 0"', PAIR, "should be nine numbers"),
        (f'{CRYSTAL} lattice="4 0 0 0 4 0 0 0 4"', PAIR, "Lattice is given twice"),
        (f'{CRYSTAL} pbc="T T"', PAIR, "should be three flags"),
        (f'{CRYSTAL} stress="1 2 3 4"', PAIR, "stress should be 9 numbers"),
        (OPEN, "8 0 0 0\n1 0 0 0.96\n", "its species are numbers, which may be elements or types"),
        ("Properties=species:S:1:pos:R:3:Z:I:1", "O 0 0 0 8\nH 0 0 0.96 2\n", "atom 1 is H and element number 2"),
        ("Properties=species:S:1", "O\nH\n", "Properties has no species:S:1 .* and pos:R:3"),
        ("Properties=species:S:1:pos:R:3:forces:F:3", PAIR, "Properties says forces:F:3"),
        ("# CELL(abcABC): 19 19 19 90 90 90 positions{atomic_unit}", PAIR, "i-PI keeps cell and units in the comment"),
    ],
)
def test_frames_that_say_something_else_are_refused(tmp_path: Path, comment: str, rows: str, message: str) -> None:
    with pytest.raises(InputError, match=f"frame.xyz, frame 0 cannot be read .*{message}"):
        read(tmp_path, comment, rows)


def test_a_header_of_too_many_atoms_is_a_sentence_and_no_memory(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for count in (99_999_999_999, 10**30):
        (tmp_path / "frames.xyz").write_text(f"{count}\n{OPEN}\nH 0 0 0\n")
        with pytest.raises(InputError, match=f"frame 0 ends after 1 of {count} atoms; the file is incomplete"):
            read_structures(tmp_path / "frames.xyz")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


def test_paths_may_hold_signs_that_ase_takes_for_indices(tmp_path: Path) -> None:
    frames = [molecule("H2O"), molecule("CH4"), molecule("NH3")]
    for name in ("a@1.xyz", "a@b.traj", "a@0.traj"):
        ase.io.write(tmp_path / "plain", frames, format="extxyz" if name.endswith("xyz") else "traj")
        (tmp_path / "plain").rename(tmp_path / name)
        assert [str(atoms.symbols) for atoms in read_structures(tmp_path / name)] == ["OH2", "CH4", "NH3"]


# --------------------------------------------------------------------------------------------------------- far away


@pytest.mark.parametrize("far", [(700, 0.5, 800), (1e6, 0, 0), (0, 1e8, 1e7), (700, 800, 900)])
def test_an_atom_far_from_all_others_is_an_atom_without_neighbours(tmp_path: Path, far: tuple[float, ...]) -> None:
    rows = f"O 0 0 0\nH 0.96 0 0\nH -0.24 0.93 0\nH {' '.join(map(str, far))}\n"
    hood = neighborhood(read(tmp_path, OPEN, rows), 5.0)
    assert hood.mask.sum(axis=1).tolist() == [2, 2, 2, 0]


def test_positions_that_are_no_places_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"frame 0: atom 1 lies too far .* at \[0.0, 1e\+20, 0.0\] Angstrom; move it"):
        read(tmp_path, OPEN, "O 0 0 0\nH 0 1e20 0\n")


@pytest.mark.parametrize("pbc", [(False, False, False), (True, False, False), (False, True, True), (True, True, True)])
def test_scattered_and_flat_structures_have_the_edges_that_all_distances_give(pbc: tuple[bool, ...]) -> None:
    rng = np.random.default_rng(0)
    for spread in (1.0, 1e3, 1e6):
        positions = rng.normal(size=(24, 3)) * 2
        positions[:12] += rng.uniform(-1, 1, size=3) * spread
        positions[12:16] += rng.uniform(-1, 1, size=(4, 3)) * spread
        cell = np.diag([40.0, 2000.0, 900.0]) @ (np.eye(3) + 0.1 * rng.normal(size=(3, 3)))
        atoms = Atoms("H24", positions=positions, cell=cell, pbc=pbc)
        inside = atoms.copy()
        inside.wrap(eps=0)
        images = np.stack(np.meshgrid(*([-1, 0, 1] if one else [0] for one in pbc), indexing="ij"), -1).reshape(-1, 3)
        vectors = inside.positions[None, :, None] - inside.positions[:, None, None] + images @ cell
        lengths = np.linalg.norm(vectors, axis=-1)
        expected = np.sum(lengths < 4.0) - len(atoms)
        assert neighborhood(atoms, 4.0).mask.sum() == expected
