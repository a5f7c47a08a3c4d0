"""Fine-tuning: what a potential knew it still knows, since it is trained again on what it remembers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator
from small_training import MODEL, labelled, same_bits, settings_of, trainer_of, water

from almlip_jax.ensembles import EnsembleSettings, build_ensemble
from almlip_jax.errors import InputError
from almlip_jax.fitting import fit_potential, with_kept_references
from almlip_jax.learner import Learner
from almlip_jax.models.charge_energy import charge_energy_of
from almlip_jax.potential import Potential
from almlip_jax.potential.compositions import compositions_note, noted_compositions
from almlip_jax.structures.species import SpeciesTable
from almlip_jax.training import EpochReport, Trainer, training_part, validation_part

MEMBERS = EnsembleSettings(size=2)
SHORT = settings_of(max_steps=300, validate_every=8, batch_size=4, validation_fraction=0.1)


def methane(seed: int) -> Atoms:
    atoms = molecule("CH4")
    atoms.rattle(0.08, seed=seed)
    return labelled(atoms)


def errors(potential: Potential, structures: list[Atoms]) -> tuple[float, float]:
    """Root mean square errors, meV/atom and meV/Angstrom."""
    found = potential.evaluate(structures)
    energies = [(e - a.get_potential_energy()) / len(a) for e, a in zip(found.energy, structures, strict=True)]
    forces = [f - a.get_forces() for f, a in zip(found.forces, structures, strict=True)]
    return tuple(1e3 * float(np.sqrt(np.mean(np.square(x)))) for x in (energies, np.concatenate(forces)))


@pytest.fixture(scope="module")
def base() -> Potential:
    """Knows methane and four structures of water."""
    known = [*(methane(seed) for seed in range(16)), *(water(100 + seed) for seed in range(4))]
    potential, _ = fit_potential(known, MODEL, MEMBERS, settings_of(max_steps=2000, validate_every=50, batch_size=4), 0)
    return potential


@pytest.fixture(scope="module")
def tuned(base: Potential, waters: list[Atoms]) -> Potential:
    said: list[str] = []
    potential, _ = fit_potential(waters, MODEL, MEMBERS, SHORT, 1, start=base, say=said.append)
    assert said == [f"{len(base.remembered)} structures that the potential remembers are trained on again."]
    return potential


def cation(atoms: Atoms) -> Atoms:
    """The same geometry without an electron, 9 eV higher."""
    other = atoms.copy()
    other.info.update(charge=1, spin=2)
    results = {"energy": atoms.get_potential_energy() + 9.0, "forces": atoms.get_forces()}
    other.calc = SinglePointCalculator(other, **results)
    return other


def test_parameters_that_were_not_told_begin_as_they_are_with_those_that_tell(waters):
    """Shares of one electron in three atoms are scaled to one."""
    data, told = [*waters, *map(cation, waters)], MODEL.model_copy(update={"electronic_state": True})
    trainer = trainer_of(data, SHORT, model=told)
    old = jax.jit(trainer_of(waters, SHORT).ensemble.init)(jax.random.key(5))
    state = trainer.start(trainer.training_set(data, {1: 0.0, 8: 0.0}), old, jax.random.key(6))
    learned, constants = dict(state.params), dict(state.params["constants"])
    np.testing.assert_allclose(constants.pop("state_scale"), [[3, 1, 3]] * 2, rtol=1e-6)
    energies = [atoms.get_potential_energy() for atoms in map(cation, waters)]  # with references of 0 eV, all a cost
    np.testing.assert_allclose(constants.pop("charge_energy"), [[np.mean(energies), 0]] * 2, atol=0.3)
    assert {"state_weights", "state_vectors"} == {name for name in state.params if name not in old}
    assert same_bits({name: learned[name] for name in old} | {"constants": constants}, old)


@pytest.mark.slow
def test_a_potential_that_was_not_told_learns_of_charges(waters, tmp_path: Path):
    """One composition in two states; evaluations of a third warn."""
    start, _ = fit_potential(waters, MODEL, MEMBERS, SHORT, 0)
    told = MODEL.model_copy(update={"electronic_state": True})
    data = [*waters, *map(cation, waters)]
    with pytest.raises(InputError, match="set model.electronic_state"):
        fit_potential(data, MODEL, MEMBERS, SHORT, 1, start=start)
    fit_potential(data, told, MEMBERS, SHORT.model_copy(update={"max_steps": 1500}), 1, start=start)[0].save(tmp_path)
    potential = Potential.load(tmp_path)
    assert potential.states == {(0, 1), (1, 2)} and start.states == frozenset() and start.states_met == {(0, 1)}
    test = [water(70 + seed) for seed in range(6)]
    energies = potential.evaluate([*test, *map(cation, test)]).energy
    np.testing.assert_allclose(energies[6:] - energies[:6], 9.0, atol=0.3)
    test[0].info["charge"] = -2
    with pytest.warns(UserWarning, match="H2O has charge -2 and spin 1, but the potential has learned of charge 0"):
        potential.evaluate(test[:1])


@pytest.mark.slow
def test_what_was_known_stays_known(base, tuned, waters):
    test = [methane(50 + seed) for seed in range(8)]
    said: list[str] = []
    forgetting, _ = fit_potential(
        waters, MODEL, MEMBERS, SHORT.model_copy(update={"replay": 0}), 1, start=base, say=said.append
    )
    assert "training.replay is 0" in said[0] and forgetting.remembered == ()
    before, kept, lost = (errors(one, test)[0] for one in (base, tuned, forgetting))
    assert kept < 1.5 * before and lost > 5 * before  # 18 and 282 meV/atom where it was 18
    new = [water(70 + seed) for seed in range(8)]
    assert errors(tuned, new)[1] < 0.8 * errors(base, new)[1]


@pytest.mark.slow
def test_memories_train_and_never_validate(base, tuned, waters):
    """Those of the base are its training structures; the new ones join them, validation structures do not."""
    assert len(base.remembered) == 16 and tuned.metadata["replayed"] == 16 and tuned.metadata["dataset_size"] == 16
    validating = {atoms.positions.tobytes() for atoms in validation_part(waters, SHORT.validation_fraction)}
    assert {one.get_chemical_formula() for one in tuned.compositions} == {"CH4", "H2O"}
    held = [atoms.positions.tobytes() for atoms in tuned.remembered]
    assert len(set(held)) == len(held) == 16 + 16 - len(validating) and not validating.intersection(held)


class Captured(Exception):
    """Ends a fitting where its training would begin."""


@pytest.mark.parametrize("given", ["a share", "files", "one structure"])
def test_what_a_training_is_given(waters, monkeypatch, given):
    """Memories are behind the structures that train, and none validates, however that is said."""
    heard: dict[str, Any] = {}

    def train(self: Trainer, dataset: list[Atoms], *_: object, **more: Any) -> None:
        share = self.settings.validation_fraction
        heard.update(dataset=dataset, validation=more["validation"], share=share)
        raise Captured

    monkeypatch.setattr(Trainer, "train", train)
    known = tuple(methane(seed) for seed in range(3))
    references = {1: 0.0, 6: 0.0, 8: 0.0}
    species = SpeciesTable((1, 6, 8))
    params = jax.jit(build_ensemble(MODEL, MEMBERS, species).init)(jax.random.key(0))
    start = Potential(MODEL, species, params, references, members=MEMBERS, remembered=known)
    new = {"a share": waters, "files": waters[:8], "one structure": waters[:1]}[given]
    files = waters[8:] if given == "files" else []
    with pytest.raises(Captured):
        fit_potential(new, MODEL, MEMBERS, SHORT, 1, start=start, validation=files)
    judging = files or validation_part(new, SHORT.validation_fraction)
    learned = new if files else training_part(new, SHORT.validation_fraction)
    copies = {"a share": 2, "files": 1, "one structure": 1}[given]
    assert heard["dataset"] == [*learned, *known * copies] and heard["validation"] == judging
    assert heard["share"] == 0 and (given == "one structure") == (not judging)


@pytest.mark.slow
def test_an_interrupted_fine_tuning_goes_on(base, tuned, waters, tmp_path: Path):
    """Bit for bit; one that remembers something else is another training."""

    class Stop(Exception):
        pass

    def stop(report: EpochReport) -> None:
        if report.step > 200:
            raise Stop

    def fitted(start: Potential, on_epoch: Any) -> Potential:
        return fit_potential(waters, MODEL, MEMBERS, SHORT, 1, on_epoch, tmp_path / "kept", start=start)[0]

    with pytest.raises(Stop):
        fitted(base, stop)
    heard: list[EpochReport] = []
    assert same_bits(fitted(base, heard.append).params, tuned.params)
    assert heard[0].step > 50
    heard.clear()
    fitted(replace(base, remembered=base.remembered[1:]), heard.append)
    assert heard[0].step < 20


def with_energy(name: str, energy: float) -> Atoms:
    atoms = molecule(name)
    atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=np.zeros((len(atoms), 3)))
    return atoms


@pytest.fixture(scope="module")
def of_water() -> Potential:
    """Not trained; of water alone, whose energy the elements share evenly, as a fit of one composition has it."""
    species = SpeciesTable((1, 8))
    params = jax.jit(build_ensemble(MODEL, MEMBERS, species).init)(jax.random.key(0))
    known = (with_energy("H2O", -138.0),)
    return Potential(MODEL, species, params, {1: -46.0, 8: -46.0}, members=MEMBERS, remembered=known)


def kept(potential: Potential, data: list[Atoms]) -> dict[int, float]:
    """Reference energies, eV by atomic number, of a training on some data that goes on from a potential."""
    return dict(with_kept_references(potential, data, {1, 8}).reference_energies)


def test_proportions_that_were_never_met_say_how_elements_share_an_energy(of_water):
    """Energies of -46 eV for each serve water alone, and are far off for another molecule of the same elements."""
    data = [with_energy("H2O", -123.9), with_energy("H2O2", -226.4)]
    moved = kept(of_water, data)
    before, after = (
        replace(of_water, reference_energies=one).evaluate(data).energy for one in ({1: -46, 8: -46}, moved)
    )
    assert after[0] == pytest.approx(before[0], abs=1e-6)  # what was known stays
    assert after[1] == pytest.approx(-226.4, abs=1e-4) and abs(before[1] + 226.4) > 20
    assert 2 * moved[1] + moved[8] == pytest.approx(-138.0, abs=1e-9) and moved[8] < -60


def test_references_stay_where_nothing_is_left_open(of_water):
    """Water again; both molecules remembered; energies of isolated atoms; nothing remembered."""
    more = [with_energy("H2O2", -226.4)]
    given = dict(of_water.reference_energies)
    assert kept(of_water, [with_energy("H2O", -120.0)]) == given
    both = replace(of_water, remembered=(*of_water.remembered, *more))
    assert kept(both, more) == given
    assert kept(replace(of_water, remembered=()), more) == given
    alone = replace(of_water, isolated=frozenset({8}))  # then the energy of H is known, too
    assert kept(alone, more) == given


def test_compositions_are_known_where_no_structure_is_remembered(of_water):
    """What `training.replay: 0` and rounds of a sweep leave: as many compositions as tell of all others."""
    more = [with_energy("H2O2", -226.4)]
    noted = replace(of_water, remembered=(), metadata=compositions_note([with_energy("H2O", -138.0)] * 3))
    assert kept(noted, more) == kept(of_water, more)
    for known in (of_water, noted):  # a training of a learner, or of a fit, begins with a copy
        assert Learner(4, typical=more, start=known, training=SHORT).beginning(more, None)[1] == kept(of_water, more)
    given = [with_energy(name, -1.0) for name in ("H2O2", "H2O", "H2O")]
    given[2].info["charge"] = 1
    unlabelled = [molecule("CH4")]  # forces may be trained on; nothing is learned of its energy
    note = compositions_note([*given, *unlabelled], noted.compositions)
    found = noted_compositions(json.loads(json.dumps(note)))
    assert [(str(one.symbols), one.info["charge"]) for one in found] == [("H2O", 0), ("H2O", 1), ("H2O2", 0)]


def test_a_charge_that_was_never_met_says_what_it_costs(of_water):
    """Also where the potential knows nothing but ions: neutral molecules then tell."""
    told = MODEL.model_copy(update={"electronic_state": True})
    params = jax.jit(build_ensemble(told, MEMBERS, of_water.species).init)(jax.random.key(0))
    neutral = replace(of_water, settings=told, params=params)
    ion = with_energy("H2O2", -210.0)
    ion.info["charge"] = 1
    of_ions = replace(neutral, remembered=(ion,))
    for known, new in ((neutral, ion), (of_ions, with_energy("H2O", -161.0))):
        before, begun = known.evaluate([known.remembered[0]]), with_kept_references(known, [new], {1, 8})
        after = begun.evaluate([known.remembered[0], new]).energy
        assert after[0] == pytest.approx(before.energy[0], abs=1e-4)
        assert after[1] == pytest.approx(new.get_potential_energy(), abs=1e-3)
    assert np.abs(charge_energy_of(begun.params)[0]) > 1 and not charge_energy_of(neutral.params).any()


def test_a_training_begins_with_what_new_proportions_say(of_water):
    """A learner, whose campaign does the same, and a fit."""
    data = [with_energy("H2O", -138.0), *(with_energy("H2O2", -226.4) for _ in range(3))]
    learner = Learner(4, typical=data, start=of_water, training=SHORT)
    _, begun = learner.beginning(data, None)
    assert begun == kept(of_water, data) != dict(of_water.reference_energies)
    _, later = learner.beginning(data, learner.earlier(of_water, data[:1]))  # of a round that knew water alone
    assert later == begun
