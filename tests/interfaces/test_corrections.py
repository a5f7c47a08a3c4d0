"""Corrections of trained potentials in other programs: LAMMPS, OpenMM and i-PI have the whole sum."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk

from almlip_jax.delta_learning import corrected
from almlip_jax.ensembles import EnsembleSettings, build_ensemble
from almlip_jax.errors import InputError
from almlip_jax.interfaces.ipi_driver import PotentialDriver
from almlip_jax.interfaces.lammps import Coupling, attach
from almlip_jax.interfaces.lammps_script import started
from almlip_jax.interfaces.openmm import potential_force
from almlip_jax.models import SharedDensitySettings
from almlip_jax.models.constants import CORRECTION, with_constants
from almlip_jax.potential import Potential
from almlip_jax.structures.io import write_structures
from almlip_jax.structures.species import SpeciesTable
from almlip_jax.units import BOHR, HARTREE

SPECIES = SpeciesTable((8, 14))
BASE = SharedDensitySettings(cutoff=3.5, radial=4, l_max=1, channels=4, hidden=(8,), repulsion=True)
CORRECTING = SharedDensitySettings(cutoff=3.0, radial=3, l_max=1, channels=3, hidden=(5,))
MEMBERS = EnsembleSettings(size=2)
pytestmark = pytest.mark.slow  # corrections in a calculator, and other potentials in these programs, are quick ones


def crystal() -> Atoms:
    """In a box with right angles, which every engine has, all atoms inside."""
    atoms = bulk("Si", cubic=True)
    atoms.numbers[::2] = 8
    atoms.rattle(0.1, seed=1)
    atoms.set_cell([5.4, 5.6, 5.2], scale_atoms=True)
    atoms.wrap()
    return atoms


def random_params(settings: SharedDensitySettings, seed: int) -> Any:
    """Of members that say more than fresh ones do."""
    fresh = jax.jit(build_ensemble(settings, MEMBERS, SPECIES).init)(jax.random.key(seed))
    return jax.device_get(with_constants(fresh, energy_scale=20.0))


@pytest.fixture(scope="module")
def base() -> Potential:
    params = random_params(BASE, 3)
    return Potential(BASE, SPECIES, params, {8: -20.0, 14: -70.0}, members=MEMBERS)


@pytest.fixture(scope="module")
def potential(base: Potential) -> Potential:
    """A base with a correction that says something."""
    silent = corrected(base, [crystal()], CORRECTING)
    return replace(silent, params=silent.params | {CORRECTION: random_params(CORRECTING, 7)})


@pytest.fixture(scope="module")
def found(base: Potential, potential: Potential) -> Any:
    """Of the crystal, by the potential; the correction is no small part of it."""
    both, alone = (one.evaluate([crystal()]) for one in (potential, base))
    assert np.abs(both.forces[0] - alone.forces[0]).max() > 0.05
    return both


def test_lammps_has_energy_forces_pressure_and_spread(potential: Potential, found: Any) -> None:
    try:
        lmp = started(("-screen", "none", "-log", "none"))
    except InputError as error:
        pytest.skip(f"LAMMPS cannot be started here: {error}")
    atoms = crystal()
    a, b, c = atoms.cell.lengths()
    lines = ["units metal", "atom_modify map array", f"region box block 0 {a} 0 {b} 0 {c} units box"]
    lines += ["create_box 2 box", "mass 1 28.085", "mass 2 15.999", "pair_style none"]
    for number, (x, y, z) in zip(atoms.numbers, atoms.positions.tolist(), strict=True):
        lines.append(f"create_atoms {1 if number == 14 else 2} single {x!r} {y!r} {z!r} units box")
    lmp.commands_list(lines)
    attach(lmp, potential, Coupling()).command("run 0")
    assert lmp.get_thermo("pe") == pytest.approx(found.energy[0], abs=1e-5)
    order = np.argsort(lmp.numpy.extract_atom("id")[:8])
    np.testing.assert_allclose(lmp.numpy.extract_atom("f")[:8][order], found.forces[0], atol=1e-5)
    pressure = [lmp.get_thermo(name) for name in ("pxx", "pyy", "pzz", "pyz", "pxz", "pxy")]
    np.testing.assert_allclose(-1e5 * units.Pascal * np.array(pressure), found.stress[0], atol=1e-6)
    spread = lmp.extract_variable("almlip_force_std_max")
    assert spread == pytest.approx(found.scores["force_std_max"][0], rel=1e-4)
    lmp.close()


@pytest.mark.skipif(find_spec("openmm") is None, reason="OpenMM is not installed")
def test_openmm_has_energy_and_forces(potential: Potential, found: Any) -> None:
    import openmm
    from openmm import app

    atoms, topology, system = crystal(), app.Topology(), openmm.System()
    residue = topology.addResidue("X", topology.addChain())
    for number, mass in zip(atoms.numbers, atoms.get_masses(), strict=True):
        topology.addAtom("X", app.Element.getByAtomicNumber(int(number)), residue)
        system.addParticle(mass)
    topology.setPeriodicBoxVectors(atoms.cell.array / 10)
    system.setDefaultPeriodicBoxVectors(*(atoms.cell.array / 10))
    system.addForce(potential_force(potential, topology))
    platform = openmm.Platform.getPlatformByName("Reference")
    context = openmm.Context(system, openmm.VerletIntegrator(0.0005), platform)
    context.setPositions(atoms.positions / 10)
    state, unit = context.getState(energy=True, forces=True), units.kJ / units.mol
    assert unit * state.getPotentialEnergy()._value == pytest.approx(found.energy[0], abs=1e-5)
    forces = unit / 10 * np.array(state.getForces(asNumpy=True)._value)
    np.testing.assert_allclose(forces, found.forces[0], atol=1e-5)


def test_ipi_has_energy_forces_virial_and_members(potential: Potential, found: Any, tmp_path: Path) -> None:
    atoms = crystal()
    potential.save(tmp_path / "potential")
    write_structures(tmp_path / "start.extxyz", [atoms])
    driver = PotentialDriver(str(tmp_path / "potential"), str(tmp_path / "start.extxyz"), verbose=True)
    energy, forces, virial, text = driver(atoms.cell.array.T / BOHR, atoms.positions / BOHR)
    assert energy * HARTREE == pytest.approx(found.energy[0], abs=1e-5)
    np.testing.assert_allclose(forces * HARTREE / BOHR, found.forces[0], atol=1e-5)
    np.testing.assert_allclose(np.diag(virial) * HARTREE, -found.stress[0][:3] * atoms.cell.volume, atol=1e-4)
    members = np.array(json.loads(text)["committee_pot"])
    assert HARTREE * np.std(members) == pytest.approx(found.scores["energy_std"][0], rel=1e-3)
