"""Label sources: forces and stresses are derivatives of the energy, garbage is refused, nothing is remembered."""

from __future__ import annotations

import hashlib
import importlib.metadata
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.espresso import Espresso, EspressoProfile
from ase.calculators.vasp import Vasp

from almlip_jax.errors import InputError, LabelError
from almlip_jax.oracles import TBLiteSettings, rattle, structure_identity
from almlip_jax.oracles.base import Label, LabelSource, Results, bare, judged, obtain_label
from almlip_jax.oracles.scratch import Scratch
from almlip_jax.oracles.sources.calculator import CalculatorSettings, in_folder
from almlip_jax.oracles.sources.dft import PySCFSettings
from almlip_jax.oracles.sources.electrons import known_keys, state_parameters
from almlip_jax.oracles.sources.labelled_file import FileSettings, GeometryIndex, _coordinates
from almlip_jax.structures.electronic_state import multiplicity
from almlip_jax.structures.io import write_structures


def _force_by_differences(label: LabelSource, atoms: Atoms, atom: int, axis: int, step: float) -> float:
    energies = []
    for sign in (1, -1):
        moved = atoms.copy()
        moved.positions[atom, axis] += sign * step
        energies.append(label(moved).energy)
    return -(energies[0] - energies[1]) / (2 * step)


@pytest.mark.parametrize("method", ["GFN2-xTB", "GFN1-xTB", "IPEA1-xTB"])
def test_tblite_forces_are_minus_the_gradient(method: str, zundel: Atoms) -> None:
    label = TBLiteSettings(method=method, accuracy=1e-3).build()
    forces = label(zundel).forces
    for atom, axis in [(0, 0), (2, 1), (6, 2)]:
        assert forces[atom, axis] == pytest.approx(_force_by_differences(label, zundel, atom, axis, 1e-3), abs=2e-4)
    np.testing.assert_allclose(forces.sum(axis=0), 0, atol=1e-6)


def test_tblite_sees_charge_and_spin() -> None:
    label = TBLiteSettings().build()
    states = [(0, 1), (1, 2), (-1, 2), (0, 3)]
    energies = [label(Atoms(molecule("H2O"), info={"charge": q, "spin": s})).energy for q, s in states]
    assert len(set(energies)) == 4
    with pytest.raises(LabelError, match="9 electrons.*multiplicity"):
        label(Atoms(molecule("H2O"), info={"charge": 1, "spin": 1}))


def test_tblite_stress_is_the_strain_derivative() -> None:
    crystal = bulk("Si", a=5.3)
    crystal.positions[1] += [0.05, -0.02, 0.03]
    label = TBLiteSettings(method="GFN1-xTB", accuracy=1e-2).build()
    stress, step, volume = label(crystal).stress, 1e-4, crystal.cell.volume
    for voigt, (i, j) in {0: (0, 0), 3: (1, 2)}.items():
        energies = []
        for sign in (1, -1):
            strain = np.eye(3)
            strain[i, j] += sign * step / 2
            strain[j, i] += sign * step / 2
            strained = crystal.copy()
            strained.set_cell(crystal.cell.array @ strain, scale_atoms=True)
            energies.append(label(strained).energy)
        assert stress[voigt] == pytest.approx((energies[0] - energies[1]) / (2 * step * volume), abs=2e-5)


def test_tblite_refuses_what_it_would_get_wrong(zundel: Atoms) -> None:
    label = TBLiteSettings().build()
    zundel.set_cell([9, 9, 9])
    zundel.pbc = [True, False, False]
    with pytest.raises(LabelError, match="0 or 3 directions"):
        label(zundel)


def test_tblite_scf_that_does_not_converge_is_a_failed_label(zundel: Atoms) -> None:
    settings = TBLiteSettings(max_iterations=2)
    label = obtain_label(settings.build(), settings, zundel, "id")
    assert label.error is not None and "not converged in 2 cycles" in label.error


def test_tblite_labels_have_the_same_bits_whatever_came_before(zundel: Atoms, tmp_path: Path) -> None:
    code = (
        "import sys, hashlib, numpy as np; from ase import Atoms; from almlip_jax.oracles import TBLiteSettings;"
        "frames = [Atoms('O2H5', p, info=dict(charge=1)) for p in np.load(sys.argv[1])];"
        "order = [int(n) for n in sys.argv[2].split(',')];"
        "label = TBLiteSettings().build(); done = {n: label(frames[n]) for n in order};"
        "print(hashlib.sha256(b''.join(np.float64(done[n].energy).tobytes() + done[n].forces.tobytes()"
        " for n in sorted(done))).hexdigest())"
    )
    frames = rattle(zundel, 6, np.random.default_rng(0), stdev=0.05)

    def digest(order: str, folder: Path) -> str:
        np.save(folder / "frames.npy", [frame.positions for frame in frames])
        arguments = [sys.executable, "-c", code, str(folder / "frames.npy"), order]
        environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(sys.path)}
        return subprocess.run(arguments, env=environment, capture_output=True, text=True, check=True).stdout

    first = digest("0,1,2,3,4,5", tmp_path)
    assert len(first.strip()) == hashlib.sha256().digest_size * 2
    assert digest("5,3,1,0,2,4", tmp_path) == first


def test_pyscf_forces_are_minus_the_gradient() -> None:
    pytest.importorskip("pyscf").lib.num_threads(1)
    hydronium = Atoms("OH3", [[0, 0, 0.1], [0.95, 0, 0], [-0.4, 0.9, 0], [-0.5, -0.8, 0.1]], info={"charge": 1})
    hydroxyl = Atoms("OH", [[0, 0, 0], [0.3, 0, 0.9]], info={"spin": 2})
    for atoms in (hydronium, hydroxyl):
        label = PySCFSettings(basis="sto-3g", grid_level=1, conv_tol=1e-10).build()
        forces = label(atoms).forces
        assert forces[1, 0] == pytest.approx(_force_by_differences(label, atoms, 1, 0, 1e-3), abs=1e-4)
        np.testing.assert_allclose(forces.sum(axis=0), 0, atol=1e-6)


@pytest.mark.slow
def test_pyscf_takes_the_core_potentials_of_its_basis() -> None:
    pytest.importorskip("pyscf").lib.num_threads(1)
    results = PySCFSettings().build()(Atoms("NaI", [[0, 0, 0], [0, 0, 2.71]]))
    assert results.energy == pytest.approx(-12513.78, abs=0.01)  # PBE/def2-SVP with 28 electrons of iodine in its core
    assert results.forces[0, 2] == pytest.approx(-0.094, abs=0.001)


def test_pyscf_knows_which_elements_need_core_potentials() -> None:
    pytest.importorskip("pyscf")
    salt, water = Atoms("NaI", [[0, 0, 0], [0, 0, 2.71]]), molecule("H2O")
    assert PySCFSettings().core_potentials(salt) == {"I": "def2-svp"}
    assert PySCFSettings(basis="lanl2dz").core_potentials(salt) == {"Na": "lanl2dz", "I": "lanl2dz"}
    assert PySCFSettings(basis="ccecp-cc-pvdz").core_potentials(water) == {"O": "ccecp", "H": "ccecp"}
    assert PySCFSettings(ecp="none").core_potentials(salt) == {} == PySCFSettings().core_potentials(water)
    for settings in (PySCFSettings(basis="sto-3g"), PySCFSettings(basis="gth-szv")):
        with pytest.raises(LabelError, match=r"no effective core potential for I.*oracle\.ecp|made for pseudopot"):
            settings.check(salt)
    PySCFSettings(basis="sto-3g", ecp="none").check(salt)
    with pytest.raises(InputError, match="no effective core potentials 'lanl2d'"):
        PySCFSettings(ecp="lanl2d").build()
    # labels of light elements keep the identity that they had before there was a choice
    assert "ecp" not in PySCFSettings().identity() and not PySCFSettings().particulars(water)
    assert PySCFSettings().particulars(salt) and PySCFSettings(ecp="none").identity()["ecp"] == "none"


@pytest.mark.slow
def test_pyscf_defaults_on_the_zundel_cation(zundel: Atoms) -> None:
    pytest.importorskip("pyscf").lib.num_threads(1)
    label = PySCFSettings().build()
    assert label(zundel).forces[2, 0] == pytest.approx(_force_by_differences(label, zundel, 2, 0, 1e-3), abs=5e-4)


def test_pyscf_refuses_crystals_and_counts_cycles() -> None:
    pytest.importorskip("pyscf").lib.num_threads(1)
    with pytest.raises(LabelError, match="molecules"):
        PySCFSettings().build()(bulk("Si"))
    with pytest.raises(LabelError, match="did not converge in 1 cycles"):
        PySCFSettings(max_cycle=1, basis="sto-3g").build()(molecule("H2O"))


def test_missing_pyscf_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(InputError, match=r'pip install "almlip-jax\[pyscf\]"'):
        PySCFSettings().version()


@pytest.mark.parametrize(
    "energy, forces, stress, reason",
    [
        (np.nan, np.zeros((2, 3)), None, "energy nan"),
        (0.0, np.full((2, 3), np.inf), None, "not finite"),
        (0.0, np.zeros((3, 3)), None, r"shape \(3, 3\) for 2 atoms"),
        (0.0, np.full((2, 3), 101.0), None, "exceeds max_force"),
        (0.0, np.zeros((2, 3)), np.zeros(9), "stress of shape"),
        (0.0, np.zeros((2, 3)), np.full(6, np.nan), "not finite"),
        ("high", np.zeros((2, 3)), None, "not numbers"),
        (0.0, None, None, "shape|not numbers"),
    ],
)
def test_garbage_is_no_label(energy: float, forces: np.ndarray, stress: np.ndarray | None, reason: str) -> None:
    with pytest.raises(LabelError, match=reason):
        judged(Results(energy, forces, stress), num_atoms=2, max_force=100)


def test_what_is_no_results_is_said():
    """As of a package's source whose function returns a tuple, which functions of `kind: user` may."""
    with pytest.raises(LabelError, match=r"returned a tuple; what build\(\) gives has to return Results"):
        judged((1.0, np.zeros((2, 3))), num_atoms=2, max_force=100)


def test_positions_that_are_not_finite_are_a_failed_label(zundel: Atoms) -> None:
    zundel.positions[0, 0] = np.nan
    label = obtain_label(TBLiteSettings().build(), TBLiteSettings(), zundel, "id")
    assert label.error is not None and "not finite" in label.error


def test_ase_calculator_gets_charge_and_spin_as_parameters() -> None:
    own = TBLiteSettings().build()
    ase = CalculatorSettings(
        calculator="tblite.ase:TBLite",
        parameters={"method": "GFN2-xTB", "verbosity": 0},
        charge_key="charge",
        spin_key="multiplicity",
    )
    label = ase.build()
    for charge, spin in [(0, 1), (1, 2), (0, 3)]:
        atoms = Atoms(molecule("H2O"), info={"charge": charge, "spin": spin})
        assert label(atoms).energy == pytest.approx(own(atoms).energy, abs=1e-6)
        np.testing.assert_allclose(label(atoms).forces, own(atoms).forces, atol=1e-5)


def test_ase_calculator_gives_a_stress_where_it_can() -> None:
    crystal = bulk("Cu")
    emt = CalculatorSettings(calculator="ase.calculators.emt:EMT").build()
    assert emt(crystal).stress is not None and emt(Atoms("Cu2", [[0, 0, 0], [2.3, 0, 0]])).stress is None


def _told(name: str = "Told", **settings: Any) -> CalculatorSettings:
    return CalculatorSettings(calculator=f"label_calculators:{name}", **settings)


def test_ase_calculator_sees_initial_magnetic_moments() -> None:
    iron = Atoms("Fe2", scaled_positions=[[0, 0, 0], [0.5, 0.5, 0.5]], cell=[2.87, 2.87, 2.87], pbc=True)
    plain = structure_identity(iron, _told())
    iron.set_initial_magnetic_moments([2.3, 2.3])
    assert _told().build()(bare(iron)).energy == pytest.approx(-14.6)
    assert structure_identity(iron, _told()) != plain
    iron.set_initial_magnetic_moments([0.0, 0.0])
    assert structure_identity(iron, _told()) == plain


def test_magnetic_moments_are_the_total_spin_of_molecular_sources() -> None:
    oxygen = molecule("O2")  # with moments of 1 and 1
    assert multiplicity(oxygen) == 3
    triplet = Atoms(oxygen.numbers, oxygen.positions, info={"spin": 3})
    label = TBLiteSettings().build()
    assert label(bare(oxygen)).energy == label(triplet).energy
    assert abs(label(triplet).energy - label(Atoms("O2", oxygen.positions)).energy) > 0.05
    oxygen.info["spin"] = 1
    with pytest.raises(LabelError, match="add up to 2 unpaired electrons"):
        label(oxygen)


@pytest.mark.parametrize("converged", [False, np.False_, "inner"])
def test_calculator_that_has_not_converged_gives_a_failed_label(converged: Any) -> None:
    with pytest.raises(LabelError, match="not converged"):
        _told(parameters={"converged": converged}).build()(molecule("H2O"))
    assert _told(parameters={"converged": True}).build()(molecule("H2O")).energy == -10


def test_energies_are_those_whose_derivatives_the_forces_are() -> None:
    smeared = _told(parameters={"free": -0.2})
    extrapolated = smeared.model_copy(update={"force_consistent": False})
    water = molecule("H2O")
    assert smeared.build()(water).energy == pytest.approx(-10.2)
    assert extrapolated.build()(water).energy == -10
    assert _told().build()(water).energy == -10
    assert structure_identity(water, smeared) != structure_identity(water, extrapolated)
    assert "force_consistent" not in extrapolated.identity()  # labels of earlier versions keep their identity


def test_charge_that_would_not_reach_a_calculator_is_refused() -> None:
    carbonate = Atoms("CO3", [[0, 0, 0], [1.3, 0, 0], [0, 1.3, 0], [0, 0, 1.3]], info={"charge": -2})
    triplet = Atoms("O2", [[0, 0, 0], [0, 0, 1.2]], info={"spin": 3})
    with pytest.raises(LabelError, match=r"charge -2 .* would not reach label_calculators:Told.*oracle\.charge_key"):
        _told().build()(carbonate)
    with pytest.raises(LabelError, match=r"multiplicity 3 .* oracle\.spin_key"):
        _told().build()(triplet)
    assert _told(charge_key="charge").build()(carbonate).energy == 190
    assert _told(charge_key="info").build()(carbonate).energy == -10
    # calculators that are known by their name
    assert _told("ORCA").build()(carbonate).energy == 190
    assert _told("ORCA").build()(triplet).energy == 10
    assert _told("XTB").build()(carbonate).energy == 1990
    assert _told("XTB").build()(triplet).energy == -12
    with pytest.raises(LabelError, match="fixes charge = 1, but the structure has -2"):
        _told("ORCA", parameters={"charge": 1}).build()(carbonate)
    unknown, known = _told(), _told("ORCA")
    assert unknown.particulars(carbonate) != known.particulars(carbonate) and known.particulars(triplet)
    assert not known.particulars(molecule("H2O"))


def test_charge_within_other_parameters_leaves_those_as_they_are() -> None:
    parameters = {"input_data": {"system": {"ecutwfc": 40}}}
    keys = known_keys("ase.calculators.espresso:Espresso")
    told = state_parameters(Atoms("H", info={"charge": 1}), keys, parameters, always=False)
    assert told == {"input_data": {"system": {"ecutwfc": 40, "tot_charge": 1}}}
    assert parameters == {"input_data": {"system": {"ecutwfc": 40}}}


@pytest.mark.parametrize("name", ["no_such_module:Class", "ase.calculators.emt:Nothing", "ase.calculators.emt:__doc__"])
def test_calculator_that_cannot_be_loaded_is_named(name: str) -> None:
    with pytest.raises(InputError, match=name):
        CalculatorSettings(calculator=name).build()


def _labelled(frames: list[Atoms]) -> list[Atoms]:
    return [Label("", float(n), np.full((len(a), 3), n / 7)).attach(a) for n, a in enumerate(frames)]


@pytest.mark.parametrize("tolerance", [1e-8, 0.05])
def test_the_frames_that_are_near_are_found_without_looking_at_all(tolerance: float) -> None:
    rng = np.random.default_rng(1)
    noise = rng.normal(scale=0.1, size=(400, 8, 3))
    noise -= noise.mean(axis=1, keepdims=True)  # as in dynamics whose centre of mass rests
    noise[200:300] = noise[:100] + rng.uniform(-0.06, 0.06, size=(100, 8, 3))
    frames = [Atoms("Si8", positions=100 + one) for one in noise]
    index = GeometryIndex(frames)
    (group,), looked = index._groups.values(), 0
    for number in range(100):
        apart = np.abs(noise - noise[number]).max(axis=(1, 2))
        expected = [n for n in np.argsort(apart, kind="stable").tolist() if apart[n] <= tolerance]
        assert index.find_all(frames[number], tolerance) == expected and expected[0] == number
        looked += len(group.candidates(_coordinates(frames[number]), tolerance))
    assert tolerance > 1e-6 or looked < 0.01 * 400 * 100


def test_file_finds_labels_by_geometry(waters: Callable[[int], list[Atoms]], tmp_path: Path) -> None:
    frames = waters(5)
    write_structures(tmp_path / "pool.extxyz", _labelled(frames))
    label = FileSettings(path=tmp_path / "pool.extxyz").build()
    for n in (3, 0, 4):
        assert label(frames[n]).energy == n and label(frames[n]).forces[0, 0] == n / 7
    frames[2].positions[1, 2] += 1e-6
    with pytest.raises(LabelError, match=r"not in .*pool\.extxyz"):
        label(frames[2])
    near = FileSettings(path=tmp_path / "pool.extxyz", tolerance=1e-4).build()
    frames[2].positions[1, 2] += 3e-4 - 1e-6  # nearest is still frame 2, but too far
    with pytest.raises(LabelError):
        near(frames[2])


def test_file_minds_the_charge_where_it_states_one(waters: Callable[..., list[Atoms]], tmp_path: Path) -> None:
    write_structures(tmp_path / "pool.extxyz", _labelled(waters(1, 1) + waters(1, 0)))
    label = FileSettings(path=tmp_path / "pool.extxyz").build()
    assert label(waters(1, 1)[0]).energy == 0 and label(waters(1, 0)[0]).energy == 1
    with pytest.raises(LabelError):
        label(waters(1, 2)[0])


def test_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.extxyz"):
        FileSettings(path=tmp_path / "none.extxyz").version()


def test_programs_behind_files_write_into_the_folder_of_the_worker(tmp_path):
    """Of ASE's calculators some take their folder as a text, others (Quantum ESPRESSO among them) as a path."""
    profile = EspressoProfile(command="true", pseudo_dir=tmp_path)
    cell = Atoms("Li", cell=[3, 3, 3], pbc=True)
    by_path, by_text = Espresso(profile=profile, pseudopotentials={"Li": "Li.UPF"}), Vasp()
    scratch = Scratch(tmp_path)
    in_folder(by_path, scratch)
    by_path.write_inputfiles(cell, ["energy"])
    assert "Li.UPF" in (scratch.folder / "espresso.pwi").read_text()
    in_folder(by_text, scratch)
    assert by_text.directory == str(scratch.folder)
    folder = scratch.folder
    del scratch
    assert not folder.exists()
