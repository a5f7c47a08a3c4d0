"""Bundles for lammps-jax: what LAMMPS would hand over gives energies, forces and virials of the whole structure."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from importlib.util import find_spec
from itertools import product
from typing import NamedTuple

import jax
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk

from almlip_jax.delta_learning import corrected
from almlip_jax.ensembles import Ensemble, EnsembleSettings, build_ensemble
from almlip_jax.errors import InputError
from almlip_jax.interfaces.lammps_jax import LammpsRoom, energies_of, export_lammps_jax, room_for
from almlip_jax.models import SharedDensitySettings, build_model
from almlip_jax.models.constants import CORRECTION, with_constants
from almlip_jax.potential import Potential
from almlip_jax.structures.species import SpeciesTable
from almlip_jax.units import KCAL_PER_MOL

SPECIES = SpeciesTable((8, 14))
SETTINGS = SharedDensitySettings(cutoff=3.5, radial=4, l_max=1, channels=4, hidden=(8,), repulsion=True)
SKIN = 0.7
needs_lammps_jax = pytest.mark.skipif(find_spec("lammps_jax") is None, reason="lammps-jax is not installed")


@pytest.fixture(scope="module")
def potential(oxide: Potential) -> Potential:
    params = jax.tree.map(np.asarray, with_constants(oxide.params, energy_scale=0.5))
    return replace(oxide, params=params, reference_energies={8: -20.0, 14: -70.0})


def crystal() -> Atoms:
    """In a triclinic cell as LAMMPS has it, all atoms inside."""
    atoms = bulk("Si", cubic=True)
    atoms.numbers[::2] = 8
    atoms.rattle(0.1, seed=1)
    atoms.set_cell([[5.6, 0, 0], [0.4, 5.5, 0], [-0.3, 0.2, 5.4]], scale_atoms=True)
    atoms.wrap()
    return atoms


class Matrix(NamedTuple):
    """The list as lammps-jax hands it over."""

    neighbors: np.ndarray
    num_neighbors: np.ndarray


class Handed(NamedTuple):
    """What a process of LAMMPS holds: own atoms, then ghosts; and the own atom that each of them is."""

    positions: np.ndarray
    types: np.ndarray
    own: np.ndarray
    matrix: Matrix


def handed_over(atoms: Atoms, room: LammpsRoom, reach: float, types: dict[int, int]) -> Handed:
    """Full lists of the own atoms, ghosts and skin included, found by looking at all pairs."""
    shifts = sorted(product((-2, -1, 0, 1, 2), repeat=3), key=lambda one: one != (0, 0, 0))
    places = np.concatenate([atoms.positions + np.array(one) @ atoms.cell.array for one in shifts])
    own = np.tile(np.arange(len(atoms)), len(shifts))
    distances = np.linalg.norm(places[None] - places[: len(atoms), None], axis=-1)
    kept = (distances < reach).any(axis=0)
    places, own, distances = places[kept], own[kept], distances[:, kept]
    assert len(places) <= room.atoms
    positions, kinds = np.full((room.atoms, 3), 9.9), np.zeros(room.atoms, np.int32)
    positions[: len(places)], kinds[: len(places)] = places, [types[z] for z in atoms.numbers[own]]
    neighbors, counts = np.full((room.listed, room.owned), room.atoms, np.int32), np.zeros(room.owned, np.int32)
    for atom, row in enumerate(distances):
        near = [other for other in np.flatnonzero(row < reach) if other != atom]
        neighbors[: len(near), atom], counts[atom] = near, len(near)
    return Handed(positions, kinds, own, Matrix(neighbors, counts))


def compare(atoms: Atoms, handed: Handed, energy: float, forces: np.ndarray, potential: Potential, unit: float) -> None:
    """With the calculator: ghosts hand their forces back, and the virial is the sum of positions times forces."""
    atoms = atoms.copy()
    atoms.calc = potential.calculator(precision="float64")
    held = len(handed.own)
    back = np.zeros((len(atoms), 3))
    np.add.at(back, handed.own, forces[:held])
    assert energy * unit == pytest.approx(atoms.get_potential_energy(), abs=1e-9)
    np.testing.assert_allclose(back * unit, atoms.get_forces(), atol=1e-9)
    virial = handed.positions[:held].T @ forces[:held] * unit
    stress = -0.5 * (virial + virial.T) / atoms.cell.volume
    xx, yy, zz, yz, xz, xy = atoms.get_stress()
    np.testing.assert_allclose(stress, [[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]], atol=1e-10)
    assert (forces[held:] == 0).all()


@pytest.mark.parametrize("correcting", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["whole", "correction"])
def test_own_atoms_and_ghosts_make_the_whole(potential, correcting):
    atoms = crystal()
    if correcting:  # of a shorter cutoff
        shorter = SETTINGS.model_copy(update={"cutoff": 3.0, "channels": 3, "repulsion": False})
        own = jax.jit(build_ensemble(shorter, EnsembleSettings(size=3), SPECIES).init)(jax.random.key(7))
        silent = corrected(potential, [atoms], shorter)
        potential = replace(silent, params=silent.params | {CORRECTION: jax.device_get(own)})
    room = room_for([atoms], potential.cutoff, SKIN)
    assert room.neighbors < room.listed and room.owned < room.atoms
    handed = handed_over(atoms, room, potential.cutoff + SKIN, {14: 0, 8: 1})
    with jax.enable_x64(True):
        function = energies_of(potential, room, ["Si", "O"], "float64", 1.0, references=True)

        def total(positions: np.ndarray, matrix: Matrix) -> jax.Array:
            return function(positions, handed.types, matrix)[: len(atoms)].sum()

        program = jax.jit(jax.value_and_grad(total))
        energy, gradient = jax.device_get(program(handed.positions, handed.matrix))
        compare(atoms, handed, energy, -gradient, potential, 1.0)
        crowded = handed.positions.copy()
        crowded[1 : room.neighbors + 3] = crowded[0] + np.linspace(0.5, 1.0, room.neighbors + 2)[:, None]
        everyone = np.where(
            np.arange(room.listed)[:, None] < room.neighbors + 2, 1 + np.arange(room.listed)[:, None], 0
        )
        full = Matrix(np.broadcast_to(everyone, handed.matrix.neighbors.shape), np.full(room.owned, room.neighbors + 2))
        energy, gradient = jax.device_get(program(crowded, full))
        assert np.isnan(energy) and np.isnan(gradient[0]).all(), "neighbours without a place are no silent loss"


def test_what_cannot_be_served_is_refused(potential):
    room = LammpsRoom(8, 64, 16, 8)
    with pytest.raises(InputError, match="does not name an element"):
        energies_of(potential, room, ["Si", "Qq"], "float32", 1.0, references=True)
    with pytest.raises(InputError, match="type 2 is H, and the potential knows O, Si"):
        energies_of(potential, room, ["Si", "H"], "float32", 1.0, references=True)
    with pytest.raises(InputError, match="give at least one"):
        room_for([], 3.5, 2.0)


@needs_lammps_jax
def test_models_whose_atoms_hear_of_each_other_are_refused(potential, tmp_path):
    settings = SharedDensitySettings(cutoff=3.5, radial=3, l_max=1, channels=2, hidden=(4,), layers=1)
    shapes = jax.eval_shape(Ensemble(build_model(settings, SPECIES), 3).init, jax.random.key(0))
    params = jax.tree.map(lambda one: np.zeros(one.shape, one.dtype), shapes)
    talking = Potential(settings, SPECIES, params, potential.reference_energies)
    with pytest.raises(InputError, match="hear of each other"):
        export_lammps_jax(talking, tmp_path / "no.json", [crystal()], ["Si", "O"])
    with pytest.raises(InputError, match="hold O, which is the element of no type"):
        export_lammps_jax(potential, str(tmp_path / "no.json"), crystal(), ["Si"])


@needs_lammps_jax
@pytest.mark.slow
@pytest.mark.parametrize(("units", "unit"), [("metal", 1.0), ("real", KCAL_PER_MOL)])
def test_a_bundle_runs_as_lammps_runs_it(potential, tmp_path, units, unit):
    """Its programs are compiled and called through PJRT on a CPU, as the pair style does."""
    from jax.extend import backend
    from jaxlib import xla_client

    atoms, path = crystal(), tmp_path / "model.json"
    options = {"skin": SKIN, "units": units, "precision": "float64", "platform": "cpu"}
    room = export_lammps_jax(potential, path, [atoms], ["Si", "O"], **options)
    bundle = json.loads(path.read_text())
    contract = bundle["contract"]
    assert contract["input_layout"] == "neighbor-matrix" and contract["unit_style"] == units
    assert (contract["max_atoms"], contract["max_owned"], contract["max_neighbors"]) == (
        room.atoms,
        room.owned,
        room.listed,
    )
    assert contract["newton"] == "on" and contract["n_species"] == 2 and contract["cutoff"] == potential.cutoff
    handed = handed_over(atoms, room, potential.cutoff + SKIN, {14: 0, 8: 1})
    client = backend.get_backend("cpu")
    devices = xla_client.DeviceList(tuple(client.local_devices()[:1]))
    code = base64.b64decode(bundle["programs"]["energy_and_forces_mlir_b64"])
    executable = client.compile_and_load(code, devices, xla_client.CompileOptions())
    ghosts = np.int32(len(handed.own) - len(atoms))
    with jax.enable_x64(True):
        given = (handed.positions, handed.types, np.int32(len(atoms)), ghosts, *handed.matrix)
        energy, forces = executable.execute([jax.device_put(one) for one in given])
    compare(atoms, handed, float(energy), np.asarray(forces), potential, unit)


@needs_lammps_jax
@pytest.mark.slow
def test_bundles_for_gpus_are_written_without_one(potential, tmp_path):
    export_lammps_jax(potential, tmp_path / "model.json", [crystal()], ["O", "Si"], references=False)
    bundle = json.loads((tmp_path / "model.json").read_text())
    assert bundle["export_info"]["platform"] == "cuda" and bundle["contract"]["precision"] == "float32"
    assert all(bundle["programs"].values())
