"""OpenMM with a potential: the numbers of `evaluate` in its units, barostats, ML/MM systems, a reporter that stops."""

from __future__ import annotations

import copy
import csv
import importlib
import sys
import tomllib
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms, units
from ase.data import atomic_masses

from almlip_jax.errors import InputError
from almlip_jax.interfaces.openmm import driven_in, potential_force
from almlip_jax.interfaces.openmm_plugin import AlmlipFactory
from almlip_jax.interfaces.openmm_reporter import CommitteeReporter, UncertaintyStop
from almlip_jax.interfaces.recording import whole
from almlip_jax.models import SharedDensitySettings
from almlip_jax.potential import Potential
from almlip_jax.structures.io import read_structures
from almlip_jax.structures.species import SpeciesTable

SPECIES = SpeciesTable((8, 14))
SETTINGS = SharedDensitySettings(cutoff=3.5, radial=4, l_max=1, channels=4, hidden=(8,), repulsion=True)
KJ = units.kJ / units.mol
needs_openmm = pytest.mark.skipif(find_spec("openmm") is None, reason="OpenMM is not installed")
needs_openmmml = pytest.mark.skipif(find_spec("openmmml") is None, reason="openmmml is not installed")


@pytest.fixture(scope="module")
def potential(oxide: Potential) -> Potential:
    return oxide


def crystal() -> Atoms:
    """A triclinic cell of two elements as OpenMM has it, atoms well apart and some of them outside."""
    cell = np.array([[5.4, 0, 0], [1.1, 5.6, 0], [-0.9, 1.3, 5.2]])
    grid = np.stack(np.meshgrid(*[[0.0, 0.5]] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    atoms = Atoms(numbers=[14, 8, 8, 14, 8, 14, 14, 8], scaled_positions=grid, cell=cell, pbc=True)
    atoms.rattle(0.15, seed=1)
    atoms.positions += [0.2, -0.4, 7.0]
    return atoms


def topology_of(atoms: Atoms) -> Any:
    from openmm import app

    topology = app.Topology()
    residue = topology.addResidue("X", topology.addChain())
    for number in atoms.numbers:
        topology.addAtom("X", app.Element.getByAtomicNumber(int(number)), residue)
    if atoms.pbc.all():
        topology.setPeriodicBoxVectors(atoms.cell.array / 10)
    return topology


def system_of(atoms: Atoms, *forces: Any) -> Any:
    import openmm

    system = openmm.System()
    for number in atoms.numbers:
        system.addParticle(atomic_masses[number])
    if atoms.pbc.all():
        system.setDefaultPeriodicBoxVectors(*(atoms.cell.array / 10))
    for force in forces:
        system.addForce(force)
    return system


def simulation_of(atoms: Atoms, system: Any, step: float = 0.5) -> Any:
    """At the positions of the atoms, steps in fs, in double precision."""
    import openmm
    from openmm import app

    integrator, platform = openmm.VerletIntegrator(step / 1000), openmm.Platform.getPlatformByName("Reference")
    simulation = app.Simulation(topology_of(atoms), system, integrator, platform)
    simulation.context.setPositions(atoms.positions / 10)
    return simulation


def energy_and_forces(simulation: Any) -> tuple[float, np.ndarray]:
    """In eV and eV/Angstrom."""
    state = simulation.context.getState(energy=True, forces=True)
    return KJ * state.getPotentialEnergy()._value, KJ / 10 * np.array(state.getForces(asNumpy=True)._value)


@needs_openmm
def test_energies_and_forces_are_those_of_evaluate(potential):
    atoms = crystal()
    found = potential.evaluate([atoms])
    energy, forces = energy_and_forces(
        simulation_of(atoms, system_of(atoms, potential_force(potential, topology_of(atoms))))
    )
    assert energy == pytest.approx(found.energy[0], abs=1e-5, rel=1e-9)
    np.testing.assert_allclose(forces, found.forces[0], atol=1e-5)
    some = [5, 0, 3, 6]
    for periodic in (None, False):
        force = potential_force(potential, topology_of(atoms), some, periodic=periodic, interaction=True)
        energy, forces = energy_and_forces(simulation_of(atoms, system_of(atoms, force)))
        part = atoms[some]
        part.pbc = periodic is None
        found = potential.evaluate([part])
        assert energy == pytest.approx(found.energy[0] - potential.reference_energy(part), abs=1e-5)
        np.testing.assert_allclose(forces[some], found.forces[0], atol=1e-5)
        assert not forces[[1, 2, 4, 7]].any()


@needs_openmm
def test_barostats_find_our_stress(potential):
    """A pressure is a difference of energies in boxes that OpenMM scaled, and a box that it moved has its energy."""
    import openmm

    atoms = crystal()
    atoms.set_cell([5.4, 5.6, 5.2], scale_atoms=True)  # OpenMM's pressure of a triclinic box is no stress
    force = potential_force(potential, topology_of(atoms), precision="float64")
    barostat = openmm.MonteCarloAnisotropicBarostat([1.0, 1.0, 1.0], 300.0)
    simulation = simulation_of(atoms, system_of(atoms, force, barostat))
    simulation.context.setVelocities(np.zeros((8, 3)))
    pressure = 1e5 * units.Pascal * np.array(barostat.computeCurrentPressure(simulation.context)._value)
    stress = potential.calculator(precision="float64").get_stress(atoms)[:3]
    np.testing.assert_allclose(pressure, -stress, atol=1e-3 * abs(stress).max())
    atoms = crystal()
    force = potential_force(potential, topology_of(atoms))
    simulation = simulation_of(atoms, system_of(atoms, force, openmm.MonteCarloFlexibleBarostat(1.0, 300.0, 1)))
    simulation.step(30)
    state = simulation.context.getState(positions=True, energy=True)
    moved = atoms.copy()
    moved.positions = 10 * state.getPositions(asNumpy=True)._value
    moved.set_cell(10 * np.array(state.getPeriodicBoxVectors(asNumpy=True)._value))
    assert moved.cell.volume != atoms.cell.volume
    assert KJ * state.getPotentialEnergy()._value == pytest.approx(potential.evaluate([moved]).energy[0], abs=1e-4)


@needs_openmm
def test_total_energy_is_conserved_and_copies_of_a_system_are_whole(potential):
    import openmm

    atoms = crystal()
    system = system_of(atoms, potential_force(potential, topology_of(atoms)))
    again = openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(copy.deepcopy(system)))
    simulation = simulation_of(atoms, again)
    assert energy_and_forces(simulation)[0] == pytest.approx(potential.evaluate([atoms]).energy[0], abs=1e-5, rel=1e-9)
    simulation.context.setVelocitiesToTemperature(600, 1)
    energies = []
    for _ in range(40):
        simulation.step(5)
        state = simulation.context.getState(energy=True)
        energies.append([state.getPotentialEnergy()._value, state.getKineticEnergy()._value])
    potentials, kinetics = np.array(energies).T
    assert np.ptp(potentials + kinetics) < 0.01 * np.ptp(kinetics)


# ----------------------------------------------------------------------------------------------------------- reporter


@needs_openmm
def test_a_report_is_of_the_reported_positions_and_stops_the_run(potential, tmp_path):
    """A molecule that lies across the faces of the box among atoms that are not its own."""
    atoms = Atoms("OSiO3", [[-1.7, 0, 0.1], [0, 0, 0], [1.6, 0.2, 0], [9, 9, 9], [10, 11, 9]], cell=[18] * 3, pbc=True)
    atoms.positions[0] += [18, 0, 0]  # in another image than its neighbours
    part = [2, 1, 0]
    force = potential_force(potential, topology_of(atoms), part, charge=1, spin=2)
    simulation = simulation_of(atoms, system_of(atoms, force))
    table, frames = tmp_path / "spread.csv", tmp_path / "uncertain.extxyz"
    simulation.context.setVelocitiesToTemperature(2000, 3)
    simulation.reporters.append(CommitteeReporter(table, 5))
    simulation.step(20)
    simulation.reporters[0].stop_above = 0.0
    simulation.reporters = [CommitteeReporter(table, 2, stop_above=1e-9, record=frames, append=True)]
    with pytest.raises(UncertaintyStop, match="step 22: force_std_max is .* eV/A, above 1e-09") as stopped:
        simulation.step(1000)
    assert simulation.currentStep == stopped.value.step == 22
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [5, 10, 15, 20, 22] and float(rows[-1]["time_ps"]) == pytest.approx(
        0.011
    )
    (frame,) = read_structures(frames)
    assert not frame.pbc.any() and list(frame.symbols) == ["O", "Si", "O"] and frame.calc is None
    assert frame.info["charge"] == 1 and frame.info["spin"] == 2
    assert frame.get_all_distances().max() < 4.5
    state = simulation.context.getState(positions=True)
    inside = atoms.copy()
    inside.positions = 10 * state.getPositions(asNumpy=True)._value
    found = potential.evaluate([inside[part], frame])
    assert found.energy[1] == pytest.approx(found.energy[0], abs=1e-5)
    np.testing.assert_allclose(frame.arrays["force_std"], found.atom_scores["force_std"][0], atol=1e-6)
    assert float(rows[-1]["force_std_max"]) == pytest.approx(found.scores["force_std_max"][0], rel=1e-3)
    members = [float(rows[-1][f"energy_{member}"]) for member in (1, 2, 3)]
    assert np.std(members) == pytest.approx(found.scores["energy_std"][0], rel=1e-3)


@needs_openmm
def test_what_a_reporter_cannot_do_is_refused(potential, tmp_path):
    atoms = crystal()
    with pytest.raises(InputError, match="'force_std' is no score of structures"):
        CommitteeReporter(tmp_path / "a", 1, score="force_std")
    with pytest.raises(InputError, match="say which too, by record_above or stop_above"):
        CommitteeReporter(tmp_path / "a", 1, record=tmp_path / "b")
    with pytest.raises(InputError, match="say where too, by record"):
        CommitteeReporter(tmp_path / "a", 1, record_above=1.0)
    unit = importlib.import_module("openmm.unit")
    force = 0.5 * unit.kilojoule_per_mole / unit.nanometer
    with pytest.raises(InputError, match="stop_above is a number, of force_std_max in eV/A, without OpenMM's units"):
        CommitteeReporter(tmp_path / "a", 1, stop_above=force)
    with pytest.raises(InputError, match="stop_above is not a number"):
        CommitteeReporter(tmp_path / "a", 1, stop_above=float("nan"))
    with pytest.raises(InputError, match="there are 0 steps"):
        CommitteeReporter(tmp_path / "a", 0)
    with pytest.raises(InputError, match="cannot write .*none/a"):
        CommitteeReporter(tmp_path / "none" / "a", 1)
    with pytest.raises(InputError, match="b.cfg should end in .extxyz or .xyz"):
        CommitteeReporter(tmp_path / "a", 1, record=tmp_path / "b.cfg", record_above=1.0)
    forces = [potential_force(potential, topology_of(atoms), [2 * n, 2 * n + 1]) for n in (0, 1)]
    simulation = simulation_of(atoms, system_of(atoms, *(copy.deepcopy(force) for force in forces)))
    simulation.reporters = [CommitteeReporter(tmp_path / "a", 1)]
    with pytest.raises(InputError, match="has 2 forces of a potential.*say which"):
        simulation.step(1)
    assert simulation.currentStep == 0
    simulation.reporters = [CommitteeReporter(tmp_path / "c", 1, force=forces[1], score="dipole_std")]
    with pytest.raises(InputError, match="this potential gives no 'dipole_std'"):
        simulation.step(1)


@needs_openmm
def test_what_reporters_wrote_is_not_lost(potential, tmp_path):
    atoms = crystal()
    table, frames = tmp_path / "spread.csv", tmp_path / "frames.extxyz"

    def reporter(**more: Any) -> CommitteeReporter:
        return CommitteeReporter(table, 1, record=frames, record_above=1e-9, **more)

    simulation = simulation_of(atoms, system_of(atoms, potential_force(potential, topology_of(atoms))))
    simulation.reporters = [reporter()]
    simulation.step(2)
    written = table.read_text()
    with pytest.raises(InputError, match=r"spread.csv is there already.*append=True"):
        reporter()
    table.rename(tmp_path / "moved.csv")
    with pytest.raises(InputError, match=r"frames.extxyz is there already"):
        reporter()
    assert not table.exists() and len(read_structures(frames)) == 2
    (tmp_path / "moved.csv").rename(table)
    simulation.reporters = [reporter(append=True)]
    simulation.step(1)
    assert [frame.info["step"] for frame in read_structures(frames)] == [1, 2, 3]
    assert table.read_text().startswith(written) and len(table.read_text().splitlines()) == 4


def test_atoms_across_faces_are_brought_together():
    atoms = crystal()
    atoms.set_cell([9, 10, 11])
    scattered = atoms.copy()
    scattered.positions += np.random.default_rng(0).integers(-2, 3, (8, 3)) * [9, 10, 11]
    together = whole(scattered)
    np.testing.assert_allclose(together.get_all_distances(), atoms.get_all_distances(), atol=1e-9)
    assert not together.pbc.any() and not together.cell.array.any()


# ------------------------------------------------------------------------------------------------------------ refusals


@needs_openmm
def test_what_cannot_be_driven_is_refused(potential):
    atoms = crystal()
    topology = topology_of(atoms)

    def refused(match: str, part: Any = None, of: Any = topology, **more: Any) -> None:
        with pytest.raises(InputError, match=match):
            potential_force(potential, of, part, **more)

    refused("there is no atom that the potential concerns", [])
    refused("named twice", [1, 1])
    refused("no atom 8 among the 8", [0, 8])
    refused("no atom -1 among the 8", [-1])
    refused("named by their indices.*'float' object", [0.5, 1])
    refused("named by their indices.*'Atom' object", list(topology.atoms())[:2])
    refused("spin is 0", spin=0)
    refused("precision is 'float32' or 'float64', not 'double'", precision="double")
    refused("skin of a list", skin=-1.0)
    carbon = atoms.copy()
    carbon.numbers[3] = 6
    refused("the topology.*C", of=topology_of(carbon))
    potential_force(potential, topology_of(carbon), [0, 1])
    virtual = topology_of(atoms)
    virtual.addAtom("EP", None, next(virtual.residues()))
    refused(r"atom 8 \(EP of X\) has no element", of=virtual)
    fewer = simulation_of(atoms[:7], system_of(atoms[:7], potential_force(potential, topology)))
    with pytest.raises(Exception, match="7 particles for a potential of 8 atoms"):
        fewer.step(1)


@needs_openmm
def test_the_only_state_that_was_learned_is_taken_and_others_are_refused(potential):
    topology = topology_of(crystal())
    learned = Potential(
        SETTINGS, SPECIES, potential.params, potential.reference_energies, metadata={"states_met": [[1, 2]]}
    )

    def state(of: Potential = learned, **given: int) -> Any:
        (found,) = driven_in(system_of(crystal(), potential_force(of, topology, **given)))
        return found.computation.template.info

    assert state() == state(charge=1) == {"charge": 1, "spin": 2}
    with pytest.raises(InputError, match="has charge 0 and spin 1, but .* charge 1, spin 2 only and tells none apart"):
        state(charge=0)
    assert state(potential, charge=0) == {"charge": 0} and state(potential) == {}  # nothing is known
    sees = replace(learned, settings=SETTINGS.model_copy(update={"electronic_state": True}))
    assert state(sees) == {"charge": 1, "spin": 2}
    with pytest.raises(InputError, match="charge 0 and spin 1, but the potential has learned of charge 1, spin 2 only"):
        state(sees, charge=0, spin=1)


def test_without_openmm_a_sentence_says_so(potential, monkeypatch):
    monkeypatch.setitem(sys.modules, "openmm", None)
    with pytest.raises(InputError, match=r'pip install "almlip-jax\[openmm\]"'):
        potential_force(potential, None)


# ------------------------------------------------------------------------------------------------------------ openmmml


def test_the_entry_point_is_there():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    module, name = project["entry-points"]["openmmml.potentials"]["almlip"].split(":")
    assert getattr(importlib.import_module(module), name) is AlmlipFactory


@pytest.fixture
def ml_potential(potential) -> Any:
    from openmmml import MLPotential

    MLPotential.registerImplFactory("almlip", AlmlipFactory())
    return MLPotential("almlip", potential=potential)


def molecular(atoms: Atoms, part: list[int]) -> Any:
    """A force field for all atoms: charges, Lennard-Jones, and bonds along the part."""
    import openmm

    pairs, bonds = openmm.NonbondedForce(), openmm.HarmonicBondForce()
    for number in atoms.numbers:
        pairs.addParticle(0.8 if number == 14 else -0.4, 0.25, 0.5)
    for first, second in zip(part, part[1:], strict=False):
        bonds.addBond(first, second, 0.17, 1e5)
        pairs.addException(first, second, 0, 1, 0)
    return system_of(atoms, pairs, bonds)


@needs_openmmml
@needs_openmm
def test_mechanical_embedding_takes_the_inside_of_a_molecule(potential, ml_potential):
    """The mixed system less the force field, with and without the molecule, is what the potential says of it."""
    rest = [[4, 0, 1], [0, 4, 1], [-4, 0.5, 0], [0.4, -4, 0.3], [3, 3, -3]]
    atoms = Atoms("OSiO6", [[-1.7, 0, 0.1], [0, 0, 0], [1.6, 0.2, 0], *rest])
    part, topology = [0, 1, 2], topology_of(atoms)
    field = molecular(atoms, part)
    mixed = ml_potential.createMixedSystem(topology, field, part, forceGroup=3, returnEnergyType="energy")
    energy, forces = energy_and_forces(simulation_of(atoms, mixed))
    plain, plain_forces = energy_and_forces(simulation_of(atoms, field))
    inside, inside_forces = energy_and_forces(simulation_of(atoms[part], molecular(atoms[part], part)))
    found = potential.evaluate([atoms[part]])
    assert energy - plain + inside == pytest.approx(found.energy[0], abs=1e-5)
    expected = plain_forces
    expected[part] += found.forces[0] - inside_forces
    np.testing.assert_allclose(forces, expected, atol=1e-5)
    group = simulation_of(atoms, mixed).context.getState(energy=True, groups={3}).getPotentialEnergy()._value
    assert KJ * group == pytest.approx(found.energy[0], abs=1e-5)
    between = ml_potential.createMixedSystem(topology, field, part, interpolate=True, returnEnergyType="energy")
    (driven,) = driven_in(between)
    assert driven.particles == (0, 1, 2)
    simulation = simulation_of(atoms, between)
    for mixing, wanted in ((0.0, plain), (1.0, energy), (0.25, 0.75 * plain + 0.25 * energy)):
        simulation.context.setParameter("lambda_interpolate", mixing)
        assert energy_and_forces(simulation)[0] == pytest.approx(wanted, abs=1e-5)


@needs_openmmml
@needs_openmm
def test_whole_systems_through_openmmml(potential, ml_potential, tmp_path):
    from openmmml import MLPotential

    potential.save(tmp_path / "saved")
    atoms = crystal()
    interaction = potential.evaluate([atoms]).energy[0] - potential.reference_energy(atoms)
    system = MLPotential("almlip", potential=tmp_path / "saved").createSystem(topology_of(atoms))
    assert energy_and_forces(simulation_of(atoms, system))[0] == pytest.approx(interaction, abs=1e-5)
    with pytest.raises(InputError, match="'half' is none of single, double"):
        ml_potential.createSystem(topology_of(atoms), precision="half")
    with pytest.warns(UserWarning, match="nothing of the argument 'modelIndex'"):
        ml_potential.createSystem(topology_of(atoms), modelIndex=1)
    with pytest.raises(InputError, match="no argument 'spin'; here it is 'multiplicity'"):
        ml_potential.createSystem(topology_of(atoms), spin=2)
    with pytest.raises(InputError, match="no argument 'chrage'; did you mean 'charge'"):
        ml_potential.createSystem(topology_of(atoms), chrage=1)
    (driven,) = driven_in(ml_potential.createSystem(topology_of(atoms), charge=2, multiplicity=3, precision="double"))
    assert driven.computation.template.info == {"charge": 2, "spin": 3}
    assert driven.computation.following.precision == "float64" and driven.particles is None
