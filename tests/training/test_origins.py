"""What trainings begin with: energies of two sources meet at once, whatever their compositions and references."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from small_training import PLAIN as MODEL
from small_training import same_bits, settings_of

from almlip_jax.ensembles import Ensemble, EnsembleSettings, build_ensemble
from almlip_jax.errors import InputError
from almlip_jax.fitting import standardised
from almlip_jax.learner import Learner
from almlip_jax.models import ModelSettings, build_model
from almlip_jax.models.anchored import with_binding
from almlip_jax.models.charge_energy import charge_energy_of, with_charge_energy
from almlip_jax.models.constants import CONSTANTS, with_constants, with_constants_of
from almlip_jax.models.mtp import MtpSettings
from almlip_jax.origins import Known, Split, Taught, TaughtOn
from almlip_jax.potential import Potential
from almlip_jax.structures.replay import most_replayed, replay
from almlip_jax.structures.species import SpeciesTable
from almlip_jax.training import EpochReport, Trainer, plan_capacity

SPECIES, MEMBERS = SpeciesTable((1, 8)), EnsembleSettings(size=2)
TEACHER, APART, ALONE = {1: -10.0, 8: -100.0}, {1: -3.5, 8: -1900.0}, {1: -13.0, 8: -2001.0}


def frames(count: int = 9) -> list[Atoms]:
    found = [molecule(name) for name in ("H2O", "H2O2", "OH")[:count] * 3]
    for seed, atoms in enumerate(found):
        atoms.rattle(0.05, seed=seed)
    return found


def labelled(structures: list[Atoms], energies: np.ndarray, forces: list[np.ndarray]) -> list[Atoms]:
    made = []
    for atoms, energy, force in zip(structures, energies, forces, strict=True):
        other = atoms.copy()
        other.calc = SinglePointCalculator(other, energy=float(energy), forces=np.asarray(force, np.float64))
        made.append(other)
    return made


def by_element(structures: list[Atoms], energies: dict[int, float]) -> np.ndarray:
    return np.array([sum(energies[z] for z in atoms.numbers.tolist()) for atoms in structures])


@cache
def pretrained(isolated: bool) -> Potential:
    """A potential with random parameters in the place of one that learned from a teacher."""
    alone = frozenset(SPECIES.numbers) if isolated else frozenset()
    params = jax.jit(build_ensemble(MODEL, MEMBERS, SPECIES, alone).init)(jax.random.key(3))
    if isolated:
        params = with_binding(params, np.array([-0.3, 0.2]))
    return Potential(MODEL, SPECIES, jax.device_get(params), TEACHER, members=MEMBERS, isolated=alone)


@pytest.mark.parametrize("isolated", [False, True], ids=["fitted", "isolated"])
def test_the_network_is_kept_and_energies_of_the_other_source_are_met(isolated: bool) -> None:
    """Labels of the oracle are those of the network, with other energies of each atom: nothing is left to learn."""
    teacher = pretrained(isolated)
    told = teacher.evaluate(frames())
    data = labelled(frames(), told.energy + by_element(frames(), APART), told.forces)
    start = Taught(teacher, tuple(labelled(frames(), told.energy, told.forces)), 0.5)
    alone = ALONE if isolated else {}
    learner = Learner(20, typical=data, start=start, isolated=alone, training={"validation_fraction": 0.0})
    params, references = learner.beginning(data, None)
    begun = Potential(MODEL, SPECIES, params, references, members=MEMBERS, isolated=frozenset(alone))
    found = begun.evaluate(data)
    np.testing.assert_allclose(found.energy, [a.get_potential_energy() for a in data], atol=0.02)
    for forces, atoms in zip(found.forces, data, strict=True):
        np.testing.assert_allclose(forces, atoms.get_forces(), atol=0.02)
    if isolated:
        np.testing.assert_allclose(begun.evaluate([Atoms("H"), Atoms("O")]).energy, list(ALONE.values()), atol=1e-4)
    again = start.again(Split(data, [], False), params, references)
    assert len(again.structures) == len(data) and again.structures[0].info["weight"] == 0.5 and start.second == 0.5
    moved = [a.get_potential_energy() for a in again.structures]
    np.testing.assert_allclose(moved, [a.get_potential_energy() for a in data], atol=0.02)
    assert start.kept(Split(data, [], False)) == ()


@pytest.mark.parametrize(
    ("model", "scale", "weights"),
    [(MODEL, "density_scale", "mix_1"), (MtpSettings(cutoff=4.0, level=4), "scaling", "radial")],
    ids=["shared_density", "mtp"],
)
def test_what_was_never_met_enters_in_the_size_that_it_has_in_a_fresh_model(
    model: ModelSettings, scale: str, weights: str
) -> None:
    """Whatever the densities that the constants of the potential were made for; and what it knew it still says."""
    before, both, members = SpeciesTable((29,)), SpeciesTable((7, 29)), EnsembleSettings(size=16)
    dimers, copper = [Atoms("N2", [[0, 0, 0], [0, 0, d]]) for d in (1.0, 1.1, 1.2)], [bulk("Cu")]

    def potential(species: SpeciesTable, seed: int) -> Potential:
        params = jax.device_get(jax.jit(build_ensemble(model, members, species).init)(jax.random.key(seed)))
        return Potential(model, species, params, dict.fromkeys(species.numbers, 0.0), members=members)

    new, old = potential(both, 2), potential(before, 0)
    fresh = replace(new, params=standardised(new, dimers))
    usual = with_constants_of(old.params, fresh.params)
    forces = []
    for factor in (4.0, 0.25):
        start = replace(old, params=with_constants(usual, **{scale: usual[CONSTANTS][scale] * factor}))
        grown = Taught(start).grown(both, {}, jax.random.key(2), [*copper, *dimers])
        forces.append(np.array(grown.evaluate(dimers).forces))
        np.testing.assert_allclose(grown.evaluate(copper).energy, start.evaluate(copper).energy, rtol=1e-5)
    np.testing.assert_allclose(forces[0], forces[1], atol=1e-4)
    ratio = np.linalg.norm(forces[0]) / np.linalg.norm(fresh.evaluate(dimers).forces)
    assert 1 / 3 < ratio < 3  # 22 and 0.03 without
    unmet = Taught(start).grown(both, {}, jax.random.key(2), copper)  # nothing tells how large it is to be
    assert np.mean(unmet.params[weights] == new.params[weights]) == 0.75


@pytest.mark.parametrize("isolated", [False, True], ids=["fitted", "isolated"])
def test_a_charge_costs_what_it_does_in_the_source_of_the_data(isolated: bool) -> None:
    """The teacher's charges cost 5 eV, those of the data 12 and -1: nothing is left to learn of that either."""
    model, alone = MODEL.model_copy(update={"electronic_state": True}), ALONE if isolated else {}
    params = jax.jit(build_ensemble(model, MEMBERS, SPECIES, frozenset(alone)).init)(jax.random.key(3))
    params = with_charge_energy(jax.device_get(params), np.array([5.0, 5.0]))
    teacher = Potential(model, SPECIES, params, TEACHER, members=MEMBERS, isolated=frozenset(alone))
    structures = frames()
    charges = np.array([0, 1, -1, 1, 0, 0, -1, 1, 0])
    for atoms, charge in zip(structures, charges.tolist(), strict=True):
        atoms.info["charge"] = charge
    told = teacher.evaluate(structures)
    further = by_element(structures, APART) + 7.0 * (charges > 0) - 6.0 * (charges < 0)
    data = labelled(structures, told.energy + further, told.forces)
    start = Taught(teacher, tuple(labelled(structures, told.energy, told.forces)), 0.5)
    learner = Learner(20, model=model, typical=data, start=start, isolated=alone, training={"validation_fraction": 0.0})
    params, references = learner.beginning(data, None)
    np.testing.assert_allclose(charge_energy_of(params), [12, -1], atol=0.05)
    begun = Potential(model, SPECIES, params, references, members=MEMBERS, isolated=frozenset(alone))
    energies = [atoms.get_potential_energy() for atoms in data]
    np.testing.assert_allclose(begun.evaluate(data).energy, energies, atol=0.05)
    moved = start.again(Split(data, [], True), params, references).structures
    np.testing.assert_allclose([atoms.get_potential_energy() for atoms in moved], energies, atol=0.05)


def test_one_composition_and_a_wrong_label_do_no_harm() -> None:
    teacher = pretrained(False)
    water = frames(1)
    told = teacher.evaluate(water)
    energies = told.energy + by_element(water, APART)
    energies[1] += 40.0  # a label that is wrong
    learner = Learner(20, typical=water, start=Taught(teacher))
    _, references = learner.beginning(labelled(water, energies, told.forces), None)
    begun = Potential(MODEL, SPECIES, teacher.params, references, members=MEMBERS)
    left = np.delete(begun.evaluate(water).energy - energies, 1)
    assert np.abs(left).max() < 0.05


def test_references_of_the_same_source_stay() -> None:
    teacher = pretrained(False)
    told = teacher.evaluate(frames())
    data = labelled(frames(), told.energy + by_element(frames(), APART), told.forces)
    learner = Learner(20, typical=data, start=teacher)
    assert isinstance(learner.start, Known)
    params, references = learner.beginning(data, None)
    assert references == TEACHER
    np.testing.assert_array_equal(jax.tree.leaves(params)[0], jax.tree.leaves(teacher.params)[0])
    assert learner.earlier(teacher, [molecule("H2")]).elements == {1, 8}
    assert Learner(20, typical=data, start=Taught(teacher)).earlier(teacher, [molecule("H2")]).elements == {1}


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_what_a_potential_of_the_oracle_remembers_goes_with_what_it_was_taught(weight: float) -> None:
    """Levels of energy follow from both, both are trained on, and the new potential remembers labels of the oracle."""
    network = pretrained(False)
    told = network.evaluate(frames())
    oracle = labelled(frames(), told.energy + by_element(frames(), APART), told.forces)
    data, remembered = oracle[:2], tuple(oracle[2:])
    before = replace(network, reference_energies=ALONE, remembered=remembered)
    start = TaughtOn(network, tuple(labelled(frames(), told.energy, told.forces)), weight, 0.5, Known(before))
    training = {"max_steps": 2, "validate_every": 1, "batch_size": 4, "learning_rate": 1e-6, "validation_fraction": 0.0}
    learner = Learner(4, typical=data, start=start, training=training)
    params, references = learner.beginning(data, None)
    begun = Potential(MODEL, SPECIES, params, references, members=MEMBERS)
    np.testing.assert_allclose(begun.evaluate(oracle).energy, [a.get_potential_energy() for a in oracle], atol=0.02)
    parts = learner._parts(data, params, references)
    assert len(parts.dataset) == len(oracle) and (parts.again is None) is (weight == 0)
    assert learner.earlier(network, [molecule("H2")]).elements == {1, 8}
    tuned = learner.fit(data)
    assert len(tuned.remembered) == len(oracle)
    np.testing.assert_allclose(jax.tree.leaves(tuned.params)[-1], jax.tree.leaves(network.params)[-1], atol=1e-3)
    if weight:  # another dataset is another program
        forgetful = replace(start, before=Known(before, replays=False))
        assert Learner(4, typical=data, start=forgetful, training=training).fit(data).remembered[0] in tuned.remembered
    with pytest.raises(InputError, match="give it as before"):
        TaughtOn(network).typical  # noqa: B018


@pytest.mark.parametrize("remembered, new", [(1, 1), (2, 50), (13, 14), (64, 200), (5, 33)])
def test_there_is_room_for_all_that_is_seen_again(remembered: int, new: int) -> None:
    def some(count: int, first: int) -> list[Atoms]:
        found = []
        for seed in range(first, first + count):
            atoms = molecule("H2O")
            atoms.rattle(0.05, seed=seed)
            atoms.calc = SinglePointCalculator(atoms, energy=-10.0, forces=np.zeros((3, 3)))
            found.append(atoms)
        return found

    for number in (1, new // 2 + 1, new):
        found = replay(some(remembered, 1000), some(number, 0))
        assert len(found.structures) * found.copies <= most_replayed(remembered, new)
    assert most_replayed(0, new) == 0


def scaled_last(potential: Potential, factor: float) -> Potential:
    return replace(potential, params=potential.params | {"last": factor * potential.params["last"]})


def test_a_teacher_holds_the_features_and_leaves_the_last_layer_to_the_labels(tmp_path: Path) -> None:
    """Labels are three times what the teacher taught: its frames, of ten times the weight, pull at nothing else.

    One last layer for both would stay near the teacher's.  A training that was killed ends with the same bits.
    """
    teacher = pretrained(False)
    told = scaled_last(teacher, 3.0).evaluate(frames())
    data = labelled(frames(), told.energy + by_element(frames(), APART), told.forces)
    known = teacher.evaluate(frames())
    taught = Taught(teacher, tuple(labelled(frames(), known.energy, known.forces)), 10.0, 0.7)
    training = {"max_steps": 120, "learning_rate": 0.02, "batch_size": 4, "validate_every": 40, "ema": 0.9}

    def error(potential: Potential) -> float:
        found = potential.evaluate(data).forces
        return float(np.sqrt(np.mean(np.square(np.concatenate(found) - np.concatenate(told.forces)))))

    def learner() -> Learner:
        return Learner(9, typical=data, start=taught, isolated={}, training=training)

    tuned = learner().fit(data)
    assert error(tuned) < 0.3 * error(teacher)
    assert set(tuned.params) == set(teacher.params)

    def kill(report: EpochReport) -> None:
        if report.step > 40:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learner().fit(data, on_epoch=kill, checkpoint=tmp_path)
    assert same_bits(learner().fit(data, checkpoint=tmp_path).params, tuned.params)


def test_each_pass_draws_a_share_of_the_teachers_frames() -> None:
    told = pretrained(False).evaluate(frames())
    data = labelled(frames(), told.energy, told.forces)
    settings = settings_of(batch_size=4, validation_fraction=0.0)
    capacity = plan_capacity(data * 2, MODEL.cutoff, settings)
    trainer = Trainer(Ensemble(build_model(MODEL, SPECIES), 2), SPECIES, capacity, settings, share=0.6)
    packed = trainer.training_set(data[:4], TEACHER, data[4:5], data)
    np.testing.assert_array_equal(np.asarray(packed.packed.data.second)[:15], [0] * 4 + [1] * 9 + [0, 0])
    assert packed.epoch == 10 and packed.validation.tolist() == [13]
    batches, epochs = packed.epochs(np.random.default_rng(0), 9)
    passes = np.array([n for batch in batches for n in batch]).reshape(epochs, -1)
    assert passes.shape[1] == packed.epoch and len({tuple(sorted(one)) for one in passes.tolist()}) > 1
    for one in passes.tolist():
        assert len(set(one)) == 10 and set(range(4)) < set(one) < set(range(13))
    whole = trainer.training_set(data, TEACHER, (), data[:3])
    assert whole.epoch == 12  # there are no more


def test_room_is_for_data_larger_than_what_comes_again() -> None:
    """A campaign whose batches hold large systems beside many small frames of a teacher compiles one training."""
    small, large = molecule("H2O"), molecule("H2O2")
    large = Atoms(np.tile(large.numbers, 4), np.concatenate([large.positions + [6 * n, 0, 0] for n in range(4)]))
    known = pretrained(False).evaluate([small, large])
    taught, other = labelled([small, large], known.energy, known.forces)
    learner = Learner(12, typical=[taught, other], start=Taught(pretrained(False), (taught,) * 30, 1.0), isolated={})
    capacity = learner.trainer.capacity
    assert (len(large), capacity.structures, capacity.atoms) == (16, 43, int(1.1 * 12 * 9.5 + 30 * 3) + 16 + 1)
    made = learner.trainer.training_set([taught] * 6 + [other] * 6, TEACHER, (), [taught] * 30)
    assert made.packed.data.second.sum() == 30


def test_a_last_layer_for_each_source_needs_plain_members() -> None:
    taught = Taught(pretrained(False), tuple(frames()), 1.0)
    learner = Learner(9, typical=frames(), start=replace(taught, potential=several_heads()), isolated={})
    with pytest.raises(InputError, match="leave these out, or teacher.replay at 0"):
        learner.trainer  # noqa: B018
    with pytest.raises(InputError, match="give one between 0 and 1"):
        Taught(pretrained(False), (), 1.0, 1.0)


def several_heads() -> Potential:
    members = EnsembleSettings(size=2, heads=2)
    params = jax.jit(build_ensemble(MODEL, members, SPECIES).init)(jax.random.key(3))
    return Potential(MODEL, SPECIES, jax.device_get(params), TEACHER, members=members)
