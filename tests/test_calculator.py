"""The ASE calculator: what `evaluate` says, derivatives, only the work that is asked for, scripts of ASE."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import jax
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, fcc100, molecule
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.fd import calculate_numerical_forces
from ase.filters import FrechetCellFilter
from ase.mep import NEB
from ase.optimize import BFGS, FIRE
from ase.vibrations import Vibrations

from almlip_jax.ensembles import Ensemble, EnsembleSettings
from almlip_jax.errors import InputError
from almlip_jax.models import SharedDensitySettings, build_model
from almlip_jax.models.constants import with_constants
from almlip_jax.potential import Calibration, Potential, PotentialCalculator, following
from almlip_jax.potential.answers import of_atoms
from almlip_jax.potential.following import Following
from almlip_jax.potential.states import completed_state, noted_states, states_note
from almlip_jax.structures.species import SpeciesTable

SETTINGS = SharedDensitySettings(cutoff=3.5, radial=4, l_max=1, channels=4, hidden=(8,))
SPECIES = SpeciesTable((1, 6, 8))
REFERENCES = {1: -13.6, 6: -1030.0, 8: -2040.0}


@pytest.fixture(scope="module")
def plain(committee) -> Potential:
    assert (committee.settings, committee.species) == (SETTINGS, SPECIES)
    return committee


@pytest.fixture(scope="module")
def potential(plain, structures) -> Potential:
    """It knows a training set, and has a calibration."""
    known = [atoms.copy() for atoms in structures.values() for _ in range(9)]
    for number, atoms in enumerate(known):
        atoms.rattle(0.1, seed=number)
    return plain.knowing(known).with_fitted(calibration=Calibration({"slope": 1.5}))


def crystal() -> Atoms:
    """Eight neighbours for each of its atoms, of which two are its own images."""
    hexagonal = [[3.0, 0, 0], [-1.5, 1.5 * 3**0.5, 0], [0, 0, 3.2]]
    return Atoms("C", cell=hexagonal, pbc=True) * (1, 4, 3)


def wires() -> Atoms:
    """Three of them, that do not see each other but themselves."""
    one = Atoms("CH2", [[0, 0, 0], [1.6, 0.3, 0.8], [-1.0, 1.2, 0.9]], cell=[9, 20, 2.4], pbc=(False, False, True))
    found = one.copy()
    for place in (7, 14):
        other = one.copy()
        other.translate([0, place, 0])
        found += other
    return found


@pytest.fixture(scope="module")
def structures() -> dict[str, Atoms]:
    """Of every kind; all but the small cell, which is full of neighbours, are of one size for programs."""
    found = {
        "molecule": molecule("CH3CH2OH"),
        "small cell": bulk("C", "diamond", a=3.6),
        "slab": fcc100("C", (1, 6, 2), a=4.3, vacuum=4.0),
        "wires": wires(),
        "crystal": crystal(),
    }
    for number, atoms in enumerate(found.values()):
        atoms.rattle(0.05, seed=number)
    return found


@contextmanager
def counting_parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The parts of results that are computed meanwhile."""
    parts: list[str] = []
    call = Following.__call__

    def noted(self: Following, atoms: Atoms, part: str) -> dict:
        parts.append(part)
        return call(self, atoms, part)

    with monkeypatch.context() as patch:
        patch.setattr(Following, "__call__", noted)
        yield parts


def test_it_says_what_evaluate_says(potential, structures):
    """Every result, of every kind of structure, one calculator after the other and the same one for all."""
    evaluated = potential.evaluate(list(structures.values()))
    calculator = potential.calculator()
    for n, atoms in enumerate(structures.values()):
        for calc in (calculator, potential.calculator()):
            atoms.calc = calc
            if atoms.pbc.any():  # all of it at once; of the molecule one after the other
                calc.get_property("force_std", atoms)
            assert atoms.get_potential_energy() == pytest.approx(evaluated.energy[n], abs=1e-5 * len(atoms), rel=1e-7)
            np.testing.assert_allclose(atoms.get_forces(), evaluated.forces[n], atol=1e-5)
            if atoms.pbc.all():
                np.testing.assert_allclose(atoms.get_stress(), evaluated.stress[n], atol=1e-5)
            for name, values in evaluated.scores.items():
                np.testing.assert_allclose(calc.results[name], values[n], atol=1e-5, rtol=1e-4)
            for name, values in evaluated.atom_scores.items():
                np.testing.assert_allclose(calc.results[of_atoms(name)], values[n], atol=1e-5, rtol=1e-4)
            error = 1.5 * evaluated.atom_scores["force_total"][n]
            np.testing.assert_allclose(calc.get_property("force_error", atoms), error, atol=1e-5)
        atoms.calc = None
    assert {"latent_distance", "atom_extrapolation_grade"} <= set(calculator.implemented_properties)


@pytest.mark.parametrize("mode", [None, "neighborhood", "configuration"])
def test_what_is_said_to_be_implemented_is(plain, structures, mode):
    """Of a potential without a training set, or with an active set: every result that is named, and no other score."""
    atoms = structures["small cell"].copy()
    known = plain if mode is None else plain.spanning([atoms, structures["slab"]], {"mode": mode})
    atoms.calc = known.calculator()
    for name in atoms.calc.implemented_properties:
        assert atoms.calc.get_property(name, atoms) is not None, name
    of_atoms_too = {"extrapolation_grade", "atom_extrapolation_grade"}
    fitted = {"latent_distance", "atom_latent_distance", "configuration_grade", "dipole_std", "force_error"}
    given = (fitted | of_atoms_too) & {*atoms.calc.implemented_properties}
    assert given == {"neighborhood": of_atoms_too, "configuration": {"configuration_grade"}}.get(mode, set())
    with pytest.raises(PropertyNotImplementedError):
        atoms.calc.get_property("latent_distance", atoms)


def test_cells_that_span_no_volume_have_no_stress(plain, structures):
    """Of a molecule, whose cell may be anything."""
    atoms = structures["molecule"].copy()
    atoms.calc = plain.calculator()
    atoms.cell = [[1.1, 0.2, 0.3], [0.7, 1.3, 0.1], [1.8, 1.5, 0.4]]  # the third is the sum of the others
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isfinite(atoms.get_forces()).all()
        with pytest.raises(PropertyNotImplementedError):
            atoms.get_stress()


def test_cores_may_share_out_the_members(plain, structures):
    """The numbers of one core, with novelty scores."""
    two = Potential(SETTINGS, SPECIES, jax.tree.map(lambda x: x[:2], plain.params), REFERENCES)
    two = two.knowing(list(structures.values()))
    alone, shared = Following(two, 0.5), Following(two, 0.5, share=True)
    assert len(jax.tree.leaves(shared._params)[0].devices()) == min(len(jax.devices()), 2)
    for atoms in structures.values():
        for part in ("scores", "energies"):
            one, other = alone(atoms, part), shared(atoms, part)
            assert one.keys() == other.keys()
            for name, values in one.items():
                np.testing.assert_allclose(other[name], values, atol=1e-5, rtol=1e-5, err_msg=name)


def test_members_are_shared_out_by_default_where_there_is_work(plain, structures, monkeypatch):
    two = Potential(SETTINGS, SPECIES, jax.tree.map(lambda x: x[:2], plain.params), REFERENCES)
    atoms = next(iter(structures.values()))

    def cores(asked: Following) -> int:
        asked(atoms, "forces")
        return len(jax.tree.leaves(asked._params)[0].devices())

    assert cores(Following(two, 0.5, share=None)) == 1, "a small structure"
    work = Following(two, 0.5)
    listed, place = work.follower.look(atoms, (0, 1))
    assert 0 < work._program("forces").operations(work._params, {}, listed, place) < following._WORTH_SHARING
    monkeypatch.setattr(following, "_WORTH_SHARING", 0.0)
    assert cores(Following(two, 0.5, share=None)) == min(len(jax.devices()), 2)
    assert cores(Following(two, 0.5)) == 1


@pytest.fixture(scope="module")
def double(plain) -> Potential:
    """The same numbers in float64."""
    return Potential(SETTINGS, SPECIES, jax.tree.map(lambda x: x.astype(np.float64), plain.params), REFERENCES)


@pytest.mark.slow
def test_double_precision_on_demand(plain, double, structures):
    """In a process that computes in float32 otherwise; equal to what one in float64 says."""
    with jax.enable_x64(True):
        evaluated = double.evaluate(list(structures.values()))
    for n, atoms in enumerate(structures.values()):
        calc = plain.calculator(precision="float64") if n % 2 else double.calculator()
        found = atoms.copy()
        found.calc = calc
        assert found.get_potential_energy() == pytest.approx(evaluated.energy[n], rel=1e-13, abs=1e-10)
        np.testing.assert_allclose(found.get_forces(), evaluated.forces[n], atol=1e-10)
        np.testing.assert_allclose(calc.results["force_std"], evaluated.atom_scores["force_std"][n], atol=1e-10)
    assert np.asarray(jax.numpy.zeros(1)).dtype == np.float32


def test_there_is_no_precision_by_another_name(plain):
    """NumPy takes these for double and half precision, and jax would compute in single."""
    for name in ("double", "float16", "f8"):
        with pytest.raises(InputError, match=f"'float32' or 'float64', not '{name}'"):
            plain.calculator(precision=name)


def test_forces_and_stresses_are_derivatives(double, structures):
    """Stresses of slabs and wires too, by the volume of their cell; energies of atoms add up."""
    for name, atoms in structures.items():
        atoms = atoms.copy()
        atoms.calc = double.calculator()
        energies = atoms.get_potential_energies()
        assert energies.shape == (len(atoms),)
        assert energies.sum() == pytest.approx(atoms.get_potential_energy(), abs=1e-9)
        np.testing.assert_allclose(atoms.get_forces(), calculate_numerical_forces(atoms, eps=1e-4), atol=2e-6)
        if name == "molecule":
            with pytest.raises(PropertyNotImplementedError):
                atoms.get_stress()
            continue
        stress, h = atoms.get_stress(voigt=False), 1e-4
        for i, j in ((0, 0), (2, 2), (1, 2)):
            energies = []
            for sign in (1, -1):
                strain = np.eye(3)
                strain[i, j] += sign * h / 2
                strain[j, i] += sign * h / 2
                moved = atoms.copy()
                moved.set_cell(atoms.cell.array @ strain, scale_atoms=True)
                moved.calc = atoms.calc
                energies.append(moved.get_potential_energy())
            numeric = (energies[0] - energies[1]) / (2 * h) / atoms.cell.volume
            assert stress[i, j] == pytest.approx(numeric, rel=1e-5, abs=1e-8), (name, i, j)


def test_stresses_of_atoms_are_of_their_surroundings(double, structures):
    """Two molecules that do not see each other have each its own; and nothing of them is told unasked."""
    one = structures["molecule"].copy()
    one.set_cell([30.0, 20.0, 20.0])
    two = one.copy()
    two.positions[:, 0] += 15.0
    two.rattle(0.1, seed=3)
    both = one + two
    found = {}
    for name, atoms in (("one", one), ("two", two), ("both", both)):
        atoms.calc = double.calculator()
        found[name] = atoms.get_stresses()
        np.testing.assert_allclose(found[name].sum(axis=0), atoms.get_stress(), atol=1e-12)
        assert "energies" not in dict(atoms.calc.results)
        np.testing.assert_allclose(atoms.get_potential_energies().sum(), atoms.get_potential_energy(), atol=1e-10)
    np.testing.assert_allclose(found["both"], np.concatenate([found["one"], found["two"]]), atol=1e-12)
    assert np.abs(found["both"].sum(axis=0) - found["one"].sum(axis=0)).max() > 1e-6


def test_members_say_what_they_say_alone(plain, structures):
    atoms = structures["crystal"].copy()
    atoms.calc = plain.calculator()
    atoms.get_forces()
    results = atoms.calc.results
    for member in range(3):
        params = jax.tree.map(lambda x, m=member: x[m : m + 1], plain.params)
        alone = Potential(SETTINGS, SPECIES, params, REFERENCES).evaluate([atoms])
        assert results["member_energy"][member] == pytest.approx(alone.energy[0], rel=1e-7)
        assert results["member_energies"][member].sum() == pytest.approx(alone.energy[0], rel=1e-7)
        np.testing.assert_allclose(results["member_forces"][member], alone.forces[0], atol=1e-5)
        np.testing.assert_allclose(results["member_stress"][member], alone.stress[0], atol=1e-5)
    np.testing.assert_allclose(results["energies_std"], np.std(results["member_energies"], axis=0), atol=1e-9)


def test_no_more_is_computed_than_is_asked_for(potential, structures, monkeypatch):
    atoms = structures["molecule"].copy()
    calc = atoms.calc = potential.calculator()
    with counting_parts(monkeypatch) as parts:

        def done(move: bool = True) -> list[str]:
            found = parts.copy()
            parts.clear()
            atoms.positions[0, 0] += 0.01 * move
            return found

        energy = atoms.get_potential_energy()
        assert set(calc.results) == {"energy", "free_energy", "member_energy"}
        assert done(move=False) == ["energies"]
        atoms.get_forces()
        assert atoms.get_potential_energy() == energy and done() == ["forces"]
        atoms.get_potential_energy(), atoms.get_forces()
        assert done() == ["forces"]  # both of the structure before, so both at once
        atoms.get_potential_energy()
        assert done() == ["forces"]
        atoms.get_potential_energy()
        assert done() == ["energies"]  # not asked for again
        for expected in (["forces", "scores"], ["scores"], ["scores"]):
            atoms.get_forces()
            assert calc.results["force_std"].shape == (len(atoms),)
            assert done() == expected
        assert atoms.get_potential_energies().sum() == pytest.approx(atoms.get_potential_energy(), abs=1e-4)
        assert done(move=False) == ["energies", "scores"]
        assert "energies" in calc.results and "member_energies" not in calc.results
        assert calc.results["member_energies"].shape == (3, len(atoms)) and not parts
        assert "nonsense" not in calc.results and calc.results.get("nonsense") is None
        with pytest.raises(KeyError):
            calc.results["nonsense"]


def test_ase_is_given_what_it_has_names_for(potential, structures):
    """Scores that were looked up stay with the calculator, and its energy brings those of the members."""
    atoms = structures["molecule"].copy()
    atoms.calc = potential.calculator()
    assert {*atoms.get_properties(["energy"])} == {"energy", "free_energy"}
    assert atoms.calc.results["force_std_max"] > 0
    found = atoms.get_properties(["forces", "energies"])
    assert found["energies"].sum() == pytest.approx(found["energy"], abs=1e-4)
    np.testing.assert_array_equal(found["forces"], atoms.get_forces())


def test_sizes_share_programs(plain, count_compilations):
    """Sixty to sixty-two atoms, more neighbours than before within their room, and another potential of the kind."""
    atoms = bulk("C", "diamond", a=3.7, cubic=True) * (2, 2, 2)
    calc = plain.calculator()

    def found(structure: Atoms, calculator: PotentialCalculator) -> np.ndarray:
        structure = structure.copy()
        structure.calc = calculator
        return structure.get_forces()

    found(atoms[:62], calc)
    with count_compilations() as compiled:
        for number in (60, 61, 62, 64):
            found(atoms[:number], calc)
        other = Potential(SETTINGS, SPECIES, jax.tree.map(lambda x: 1.1 * x, plain.params), REFERENCES)
        found(atoms[:60], other.calculator())
    assert not compiled
    squeezed = atoms[:60]
    squeezed.set_cell(squeezed.cell.array * 0.8, scale_atoms=True)
    np.testing.assert_allclose(found(squeezed, calc), plain.evaluate([squeezed]).forces[0], rtol=1e-4, atol=2e-5)


def test_charge_and_spin_are_looked_at(plain):
    atoms = molecule("CH3CH2OH")
    atoms.calc = plain.calculator()
    atoms.get_potential_energy()
    assert not atoms.calc.calculation_required(atoms, ["energy"])
    atoms.info["total_charge"] = 1
    assert atoms.calc.calculation_required(atoms, ["energy"])
    atoms.info["charge"] = 2
    with pytest.raises(InputError, match="contradict each other"):
        atoms.get_potential_energy()
    for wrong in (-0.1, np.nan):
        with pytest.raises(InputError, match="skin"):
            plain.calculator(skin=wrong)
    with pytest.raises(InputError, match="atom 0 is Au"):
        Atoms("Au", calculator=plain.calculator()).get_potential_energy()
    with pytest.raises(InputError, match="no atom"):
        Atoms(calculator=plain.calculator()).get_potential_energy()


def test_strange_states_are_told_once_for_a_structure():
    settings = SharedDensitySettings(cutoff=3.5, radial=4, l_max=1, channels=4, hidden=(8,), electronic_state=True)
    ensemble = Ensemble(build_model(settings, SPECIES), 3)
    params = jax.jit(ensemble.init)(jax.random.key(0))
    knows = Potential(settings, SPECIES, params, REFERENCES, metadata={"states": [[0, 1]]})
    atoms = molecule("H2O")
    atoms.calc = knows.calculator()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        neutral = atoms.get_potential_energy()
    atoms.info["charge"] = 1
    with pytest.warns(UserWarning, match="charge 1 and spin 1, but the potential has learned of charge 0"):
        assert abs(atoms.get_potential_energy() - neutral) > 1e-6
    atoms.positions += 0.01
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        atoms.get_potential_energy()


def test_states_that_a_potential_cannot_tell_apart_are_told_of_once(plain, structures):
    """Not that which it was trained on, nor a structure that says nothing; a potential of old cannot know."""
    cations = replace(plain, metadata={"states_met": [[1, 1]]})
    quiet, strange = [{}, {"charge": 1}, {"charge": 1, "spin": 1}], [{"charge": 2}, {"charge": 0}, {"spin": 3}]
    for info in quiet + strange:
        atoms = structures["small cell"].copy()
        atoms.info.update(info)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            atoms.calc = cations.calculator()
            energy = atoms.get_potential_energy()
            atoms.positions += 0.01
            atoms.get_forces()
            of_calculator = len(told)
            cations.evaluate([atoms, atoms])
        assert (of_calculator, len(told)) == ((1, 2) if info in strange else (0, 0)), (info, told)
        assert all("learned of charge 1, spin 1 only and tells none apart" in str(one.message) for one in told)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            atoms.positions -= 0.01
            atoms.calc = plain.calculator()
            assert atoms.get_potential_energy() == pytest.approx(energy)


def test_notes_of_states_are_as_long_as_what_is_known():
    atoms = [Atoms("H", info={"charge": 1}), Atoms("H", info={"spin": 2}), Atoms("H", info={"spin": 2})]
    assert states_note(atoms, sees_state=False) == {"states_met": [(0, 2), (1, 1)]}
    assert states_note(atoms[:1], [(0, 1)], sees_state=True) == {"states": [(0, 1), (1, 1)]}
    assert states_note(atoms, None, sees_state=False) == {} and noted_states({}) == frozenset()


def test_a_charge_has_the_spin_that_was_learned_with_it():
    """A spin says nothing of the charge, and of two states of a charge neither is meant."""
    learned = [(0, 1), (1, 2), (2, 1), (2, 3)]
    for charge, spin, completed in (
        (1, None, {"charge": 1, "spin": 2}),
        (1, 4, {"charge": 1, "spin": 4}),
        (2, None, {"charge": 2}),
        (-1, None, {"charge": -1}),
        (None, 2, {"spin": 2}),
        (None, None, {}),
    ):
        assert completed_state(learned, charge, spin) == completed
    assert completed_state([(1, 2)], None, 2) == completed_state([(1, 2)]) == {"charge": 1, "spin": 2}


def test_copies_work_on_their_own(plain, double, structures):
    """In double precision with every digit, also where members are shared out."""
    two = replace(double, params=jax.tree.map(lambda x: 1.1 * x[:2], double.params))  # digits that float32 has not
    for potential, share, digits in ((plain, False, 1e-7), (two, True, 1e-12)):
        atoms = structures["molecule"].copy()
        atoms.calc = potential.calculator()
        atoms.calc.following = Following(potential, 0.5, share=share)
        forces = atoms.get_forces()
        for other in (copy.deepcopy(atoms.calc), pickle.loads(pickle.dumps(atoms.calc))):
            assert other.results["force_std_max"] > 0
            other.reset()
            again = structures["molecule"].copy()
            again.calc = other
            np.testing.assert_allclose(again.get_forces(), forces, atol=digits)


# ----------------------------------------------------------------------------------------------------- scripts of ASE


@pytest.fixture(scope="module")
def binding() -> Potential:
    """A potential under which atoms neither fall into each other nor fly apart."""
    settings, species = SETTINGS.model_copy(update={"repulsion": True}), SpeciesTable((1, 6, 8, 13))
    ensemble = Ensemble(build_model(settings, species), 2)
    params = with_constants(jax.jit(ensemble.init)(jax.random.key(4)), density_scale=0.2)
    params = jax.tree.map(np.asarray, params | {"last": 100 * params["last"]})  # bonds of some eV
    return Potential(settings, species, params, REFERENCES | {13: -500.0}, members=EnsembleSettings(size=2))


@pytest.mark.slow
def test_relaxation_of_atoms_and_cell(binding):
    atoms = molecule("CH4")
    atoms.rattle(0.1, seed=2)
    atoms.calc = binding.calculator(precision="float64")
    assert BFGS(atoms, logfile=None, maxstep=0.05).run(fmax=1e-2, steps=100)
    crystal = bulk("C", "diamond", a=3.7)
    crystal.rattle(0.05, seed=2)
    weak = replace(
        binding, params=binding.params | {"last": binding.params["last"] / 100}
    )  # repulsion is the most of it
    crystal.calc = weak.calculator(precision="float64")
    before, stress = crystal.get_potential_energy(), np.abs(crystal.get_stress()).max()
    FIRE(FrechetCellFilter(crystal), logfile=None).run(steps=40)
    assert crystal.get_potential_energy() < before and np.abs(crystal.get_stress()).max() < stress / 2
    assert crystal.calc.following.follower.builds < 30


@pytest.mark.slow
def test_bands_have_one_calculator_or_several(binding):
    """Ends stay where they are, and images with calculators of their own do as those that share one."""
    first = molecule("H2O")
    last = first.copy()
    last.positions[1] += [0.4, 0.1, -0.3]
    shared = binding.calculator()
    bands = []
    for share in (True, False):
        images = [first.copy() for _ in range(4)] + [last.copy()]
        band = NEB(images, allow_shared_calculator=share, method="improvedtangent")
        band.interpolate()
        for image in images:
            image.calc = shared if share else binding.calculator()
        FIRE(band, logfile=None).run(steps=5)
        bands.append(np.concatenate([image.positions for image in images]))
    np.testing.assert_allclose(*bands, atol=1e-5)
    np.testing.assert_array_equal(bands[0][:3], first.positions)
    assert np.abs(bands[0][3:6] - first.positions - 0.25 * (last.positions - first.positions)).max() > 0.01


@pytest.mark.slow
def test_vibrations_of_a_relaxed_molecule(binding, tmp_path):
    """As from the derivatives of energies; six modes are none."""
    atoms = molecule("H2O")
    atoms.calc = binding.calculator(precision="float64")
    BFGS(atoms, logfile=None, maxstep=0.05).run(fmax=1e-5, steps=300)
    vibrations = Vibrations(atoms, name=str(tmp_path / "vib"), delta=0.002)
    vibrations.run()
    frequencies = np.sort(np.abs(vibrations.get_frequencies()))
    assert frequencies[:6].max() < 20 < frequencies[6] / 5


@pytest.mark.slow
def test_phonons_of_a_crystal(binding):
    phonopy = pytest.importorskip("phonopy", reason="phonopy is not installed")
    from phonopy.structure.atoms import PhonopyAtoms

    crystal = bulk("C", "diamond", a=3.6)
    crystal.calc = binding.calculator(precision="float64")
    FIRE(FrechetCellFilter(crystal, hydrostatic_strain=True), logfile=None).run(fmax=1e-3, steps=100)
    unit = PhonopyAtoms(crystal.symbols, positions=crystal.positions, cell=crystal.cell.array)
    phonons = phonopy.Phonopy(unit, np.diag([2, 2, 2]))
    phonons.generate_displacements(distance=0.01)
    forces = []
    for cell in phonons.supercells_with_displacements:
        moved = Atoms(cell.symbols, cell.positions, cell=cell.cell, pbc=True, calculator=crystal.calc)
        forces.append(moved.get_forces())
    phonons.forces = forces
    phonons.produce_force_constants()
    phonons.run_mesh([1, 1, 1], is_gamma_center=True)
    frequencies = phonons.get_mesh_dict()["frequencies"][0]
    assert np.abs(frequencies[:3]).max() < 0.1 and frequencies[3] > 1
