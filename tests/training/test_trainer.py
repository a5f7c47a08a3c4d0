"""Training: the loss against its formula, members against single trainings, determinism, growth without compilation."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from small_training import MODEL, PLAIN, SPECIES, labelled, settings_of, trainer_of, water

from almlip_jax.ensembles import Ensemble, Prediction
from almlip_jax.errors import CapacityError, InputError
from almlip_jax.learner import Learner
from almlip_jax.models import build_model
from almlip_jax.models.charge_energy import charge_energy_of
from almlip_jax.potential import Potential
from almlip_jax.structures.packing import Packed, pack, plan_batches, take_batch
from almlip_jax.structures.species import SpeciesTable
from almlip_jax.training import (
    EnsembleSettings,
    EpochReport,
    Trainer,
    TrainingResult,
    build_trainer,
    find_references,
    plan_capacity,
    reference_energies,
)
from almlip_jax.training.dataset import Order, TrainingSet, bootstrap_weights, split
from almlip_jax.training.loss import means, residuals
from almlip_jax.training.penalties import SquaredLoss
from almlip_jax.training.settings import OF_THE_HOST

SETTINGS = settings_of()


@pytest.fixture(scope="module")
def dataset(waters) -> list[Atoms]:
    return waters


@pytest.fixture(scope="module")
def references(dataset) -> dict[int, float]:
    return reference_energies(dataset, SPECIES)


@pytest.fixture(scope="module")
def trainer(dataset) -> Trainer:
    ensemble = Ensemble(build_model(MODEL, SPECIES), 2)
    capacity = plan_capacity(dataset[:4], MODEL.cutoff, SETTINGS, largest_dataset=40)
    return Trainer(ensemble, SPECIES, capacity, SETTINGS, EnsembleSettings(size=2))


@pytest.fixture(scope="module")
def result(trainer, dataset, references):
    return trainer.train(dataset, None, jax.random.key(0), reference_energies=references)


def test_it_learns(result):
    first, last = result.history[0], result.history[-1]
    assert last.steps == last.step == 60  # not a whole number of epochs
    assert np.all(last.validation_forces_rmse < 0.7 * first.validation_forces_rmse)


def test_same_inputs_give_the_same_bits(trainer, dataset, references, result):
    again = trainer.train(dataset, None, jax.random.key(0), reference_energies=references)
    for a, b in zip(jax.tree.leaves(result.params), jax.tree.leaves(again.params), strict=True):
        np.testing.assert_array_equal(a, b)
    other = trainer.train(dataset, None, jax.random.key(1), reference_energies=references)
    assert any(
        np.any(a != b) for a, b in zip(jax.tree.leaves(result.params), jax.tree.leaves(other.params), strict=True)
    )


def test_a_weight_of_all_changes_nothing(trainer, dataset, references, result):
    """Weights are relative to each other; errors that are reported are those of labels, not of weights."""
    heavy = [atoms.copy() for atoms in dataset]
    for atoms, light in zip(heavy, dataset, strict=True):
        atoms.calc, atoms.info["weight"] = light.calc, 100.0
    again = trainer.train(heavy, None, jax.random.key(0), reference_energies=references)
    for ours, others in zip(again.history, result.history, strict=True):
        np.testing.assert_array_equal(ours.validation_forces_rmse, others.validation_forces_rmse)
    for n, atoms in enumerate(heavy):
        atoms.info["weight"] = 5.0 if n % 2 else 1.0
    data = trainer.training_set(heavy, references)
    assert np.asarray(data.packed.data.weights["forces"])[data.training].mean() == pytest.approx(1, rel=1e-6)


def test_models_that_diverge_are_trained_once_more(trainer, dataset, references, result, monkeypatch, tmp_path):
    """From another stream, with a word; the others stay as they are, and an interruption in between changes nothing."""
    start, began = trainer.start, jax.random.key_data(jax.random.split(jax.random.key(0))[0])

    def poisoned(data, params, key, taught):
        state = start(data, params, key, taught)
        if not np.array_equal(jax.random.key_data(key), began):
            return state
        return replace(state, params=jax.tree.map(lambda x: x.at[1].set(jnp.nan), state.params))

    monkeypatch.setattr(trainer, "start", poisoned)
    said, heard = [], []

    def interrupt(report):
        heard.append(report)
        if report.step > 80:
            raise KeyboardInterrupt

    options = {"reference_energies": references, "checkpoint": tmp_path / "state", "checkpoint_every": 1}
    with pytest.raises(KeyboardInterrupt):
        trainer.train(dataset, None, jax.random.key(0), on_epoch=interrupt, say=said.append, **options)
    mended = trainer.train(dataset, None, jax.random.key(0), **options)
    assert said == ["model 1 diverged, and is trained once more."] and heard[-1].steps == 120
    for ours, others in zip(jax.tree.leaves(mended.params), jax.tree.leaves(result.params), strict=True):
        np.testing.assert_array_equal(ours[0], others[0])
        assert np.isfinite(ours).all() and (ours.shape == others.shape)
    assert np.isfinite(mended.history[-1].train_loss).all() and mended.history[-1].step == 120
    assert mended.left_out == () and len(mended.history) == 2 * len(result.history)


def test_models_that_diverge_twice_are_left_out():
    trainer = trainer_of([water(0)], SETTINGS, members=3)
    params = {"w": np.arange(6.0).reshape(3, 2)}

    def after(loss: list[float]) -> TrainingResult:
        wide = np.array(loss)
        report = EpochReport(1, 60, 60, wide, wide, wide, wide, np.zeros(3, bool), np.ones(3, bool), 1.0)
        return TrainingResult(params, (report,))

    said: list[str] = []
    found = trainer.settled(after([1.0, np.nan, np.nan]), after([3.0, np.nan, 5.0]), said.append)
    np.testing.assert_array_equal(found.params["w"], params["w"][[0, 2]])
    assert found.left_out == (1,) and said == ["model 1 diverged again; the ensemble goes on without."]
    assert found.members(EnsembleSettings(size=3)).size == 2
    assert list(found.history[-1].train_loss[[0, 2]]) == [1.0, 5.0]
    with pytest.raises(InputError, match="models 1, 2 diverged in two trainings"):
        trainer.settled(after([1.0, np.nan, np.nan]), after([1.0, np.nan, np.nan]), None)
    with pytest.raises(InputError, match="the training loss is not finite"):
        trainer.settled(after(3 * [np.nan]), after(3 * [np.nan]), None)


def test_members_differ(result):
    leaf = result.params["mix_0"]
    assert np.std(leaf[0] - leaf[1]) > 0.1 * np.std(leaf)


def test_constants_are_what_the_data_made_them(trainer, dataset, references, result):
    """To the last bit, in what is averaged too."""
    first = trainer.start(trainer.training_set(dataset, references), None, jax.random.key(0)).params["constants"]
    assert jax.tree.all(jax.tree.map(np.array_equal, result.params["constants"], first))


@pytest.mark.parametrize("changes", [{}, {"warm_steps": 7, "final_steps": 9, "replay": 0, "max_epochs": 999}])
def test_an_equal_trainer_compiles_nothing(trainer, dataset, references, result, changes, count_compilations):
    """Equal in what the program depends on."""
    other = Trainer(
        Ensemble(build_model(MODEL, SPECIES), 2),
        SPECIES,
        trainer.capacity,
        settings_of(**changes),
        EnsembleSettings(size=2),
    )
    with count_compilations() as compiled:
        again = other.train(dataset, None, jax.random.key(0), reference_energies=references)
    assert compiled == []
    assert jax.tree.all(jax.tree.map(np.array_equal, again.params, result.params))


def test_no_program_looks_at_settings_of_the_host(waters):
    """Without them it is traced all the same, whatever branches other settings open."""
    settings = settings_of(optimiser="adamw", schedule="plateau", second_stage={"forces": 0.5})
    trainer = trainer_of(waters, settings, model=PLAIN)
    bare = settings.model_copy()
    for name in OF_THE_HOST:
        del bare.__dict__[name]
    with pytest.raises(AttributeError):
        _ = bare.max_steps
    program = replace(trainer.program, settings=bare)
    data = trainer.training_set(waters, reference_energies(waters, SPECIES))
    plan, steps = data.training_plan()
    params = jax.eval_shape(program.fresh, jax.random.key(0), data.packed.data, plan, steps, 1.0)
    run = trainer.prepare(data, 60, jax.random.key(0))
    jax.eval_shape(program.segment, jax.eval_shape(program.initial, params), run, plan, steps)


def test_growth_and_warm_start_compile_nothing(trainer, dataset, references, result, count_compilations):
    with count_compilations() as compiled:
        grown = [*dataset, *(water(seed) for seed in range(100, 117))]
        fresh = trainer.train(grown, None, jax.random.key(2), reference_energies=references)
        warm = trainer.train(grown, fresh.params, jax.random.key(3), reference_energies=references)
    assert not compiled
    assert warm.history[0].train_loss.mean() < 0.5 * fresh.history[0].train_loss.mean()


@pytest.mark.slow
def test_a_member_trains_as_it_would_alone(dataset, references):
    """Members share batches and geometry and nothing else."""
    settings = SETTINGS.model_copy(update={"max_steps": 20})
    capacity = plan_capacity(dataset, PLAIN.cutoff, settings)
    model = build_model(PLAIN, SPECIES)
    pair = Trainer(Ensemble(model, 2), SPECIES, capacity, settings, EnsembleSettings(size=2, bootstrap="none"))
    alone = Trainer(Ensemble(model, 1), SPECIES, capacity, settings, EnsembleSettings(size=1))
    start = jax.jit(Ensemble(model, 2).init)(jax.random.key(5))
    both = pair.train(dataset, start, jax.random.key(6), reference_energies=references)
    second = alone.train(
        dataset, jax.tree.map(lambda x: x[1:], start), jax.random.key(6), reference_energies=references
    )
    for a, b in zip(jax.tree.leaves(both.params), jax.tree.leaves(second.params), strict=True):
        np.testing.assert_allclose(a[1:], b, rtol=2e-3, atol=2e-5)


def test_validation_structures_stay_on_their_side():
    _, few = split(20, 0.2)
    training, many = split(200, 0.2)
    assert set(few) == {i for i in many if i < 20}
    assert len(many) == pytest.approx(40, abs=2) and not set(training) & set(many)


def test_bootstrap_weights():
    weights = {}
    for kind in ("none", "gamma", "poisson"):
        members = EnsembleSettings(size=3, bootstrap=kind, bootstrap_variance=0.5)
        tables = [
            np.asarray(bootstrap_weights(members, number, np.float32, jax.random.key(0))) for number in (11, 2001)
        ]
        np.testing.assert_array_equal(tables[1][:, :10], tables[0][:, :10])
        other = np.asarray(bootstrap_weights(members, 11, np.float32, jax.random.key(1)))
        assert kind == "none" or np.any(other != tables[0])
        weights[kind] = tables[1]
    assert np.all(weights["none"] == 1)
    np.testing.assert_allclose(weights["gamma"].mean(axis=1), 1, atol=0.1)
    np.testing.assert_allclose(weights["gamma"].var(axis=1), 0.5, atol=0.15)
    np.testing.assert_allclose((weights["poisson"] == 0).mean(), np.exp(-1), atol=0.03)


JACKKNIFE = """
from typing import Literal
import numpy as np
from almlip_jax.ensembles import BootstrapSettings

class Jackknife(BootstrapSettings):
    kind: Literal["jackknife"] = "jackknife"

    def weights(self, settings, structures, seed):
        left_out = np.arange(structures) % settings.size == np.arange(settings.size)[:, None]
        return np.where(left_out, 0, settings.size / (settings.size - 1))
"""
BY_HAND = """
import numpy as np

def exponential(models, power=1):
    def weights(seed, structures):
        draws = (np.random.default_rng([*seed, n]) for n in range(structures))
        return np.stack([draw.exponential(size=models) ** power for draw in draws], 1)
    return weights

def shuffled(models): return lambda seed, structures: np.random.default_rng(seed).exponential(size=(models, structures))
def of_structures(models): return lambda seed, structures: np.ones(structures)
def negative(models): return lambda seed, structures: -np.ones((models, structures))
"""


def test_bootstraps_of_packages_and_users(with_kinds, with_module):
    """Models of a package's jackknife learn from all structures but their own share; a user's weights are as drawn."""
    with_kinds(JACKKNIFE)
    with_module("weights_by_hand", BY_HAND)
    members = EnsembleSettings.model_validate({"size": 3, "bootstrap": "jackknife"})
    assert members.model_dump(mode="json")["bootstrap"] == "jackknife"
    weights = np.asarray(bootstrap_weights(members, 6, np.float32, jax.random.key(0)))
    np.testing.assert_array_equal(weights, 1.5 * np.tile(1 - np.eye(3), 2))

    def by_hand(function: str, **parameters: Any) -> EnsembleSettings:
        code = {"kind": "user", "function": f"weights_by_hand:{function}", "parameters": parameters}
        return EnsembleSettings.model_validate({"size": 3, "bootstrap": code})

    drawn = (bootstrap_weights(by_hand("exponential", power=n), 9, np.float32, jax.random.key(1)) for n in (1, 2))
    one, two = (np.asarray(weights) for weights in drawn)
    np.testing.assert_allclose(one**2, two, rtol=1e-5)
    capacity = plan_capacity([water(0)], MODEL.cutoff, SETTINGS)
    for settings, sentence in (
        (by_hand("shuffled"), "the weights that 'weights_by_hand:shuffled' gives for the first structures change"),
        (
            by_hand("of_structures"),
            r"'weights_by_hand:of_structures' .* of shape \(3, 5\) \(models, structures\), not \(5,\)",
        ),
        (by_hand("negative"), "'weights_by_hand:negative' .* some of them are negative"),
    ):
        with pytest.raises(InputError, match=f"^ensemble.bootstrap: {sentence}"):
            build_trainer(MODEL, settings, SPECIES, capacity, SETTINGS)
    with pytest.raises(InputError, match="some of them are negative"):
        bootstrap_weights(by_hand("negative"), 6, np.float32, jax.random.key(0))


def test_scales_do_not_depend_on_the_order_of_the_file():
    """Perfect crystals first, whose densities of degree 1 vanish, or last; alone they are not blown up."""
    copper = SpeciesTable((29,))
    perfect = [labelled(bulk("Cu", cubic=True, a=a)) for a in np.linspace(3.5, 3.7, 6)]
    hot = [bulk("Cu", cubic=True) for _ in range(6)]
    for seed, atoms in enumerate(hot):
        atoms.rattle(0.15, seed=seed)
        labelled(atoms)
    settings = settings_of(validation_fraction=0.0)
    ensemble = Ensemble(build_model(PLAIN, copper), 1)
    trainer = Trainer(ensemble, copper, plan_capacity(hot, PLAIN.cutoff, settings, 12), settings)

    def scales(structures: list[Atoms]) -> tuple[np.ndarray, float]:
        data = trainer.training_set(structures, reference_energies(structures, copper))
        params = trainer.start(data, None, jax.random.key(0)).params
        return np.asarray(params["constants"]["density_scale"])[0], float(params["constants"]["energy_scale"][0])

    (first, of_first), (last, of_last) = scales([*perfect, *hot]), scales([*hot, *perfect])
    np.testing.assert_allclose(first, last, rtol=1e-5)
    assert of_first == pytest.approx(of_last, rel=1e-5)
    alone, of_alone = scales(perfect)
    assert alone[1] < 4 * last[1] and 0.05 <= of_alone < of_last


def test_what_binds_atoms_is_fitted_and_does_not_count_in_the_scale():
    """Energies of -3 and -7 eV an atom below those of isolated ones; the mixed element counts where it is asked for."""
    table = SpeciesTable((1, 8))
    frames = [labelled(Atoms("H" * n + "O", positions=[[1.1 * k, 0, 0] for k in range(n + 1)])) for n in (1, 2, 3)]
    for frame in frames:
        frame.calc.results["energy"] = -3.0 * (len(frame) - 1) - 7.0
        frame.calc.results["forces"] = np.zeros((len(frame), 3))
    settings = settings_of(validation_fraction=0.0)
    ensemble = Ensemble(build_model(PLAIN, table, isolated=(1, 8)), 2)
    trainer = Trainer(ensemble, table, plan_capacity(frames, PLAIN.cutoff, settings, 6), settings)
    data = trainer.training_set(frames, {1: 0.0, 8: 0.0})
    np.testing.assert_allclose(data.levels(2, [0, 1], charges=True).binding, [-3, -7], rtol=1e-4)
    assert data.levels(2, [1], charges=False).binding[0] == 0
    params = trainer.start(data, None, jax.random.key(0)).params
    np.testing.assert_allclose(params["constants"]["binding"], [[-3, -7]] * 2, rtol=1e-4)
    assert float(params["constants"]["energy_scale"][0]) < 0.3 * data.energy_scale()


@pytest.mark.parametrize("isolated", [(), (1, 8)], ids=["fitted", "isolated"])
def test_a_training_begins_with_what_charges_cost(isolated):
    """Energies that elements and charges give are met before the first step, of ions beside neutral molecules."""
    table, true = SpeciesTable((1, 8)), {1: -3.0, 8: -7.0}
    frames = []
    for hydrogens, oxygens, charge in [(2, 1, 0), (3, 1, 1), (1, 1, -1), (2, 2, 0), (5, 2, 1), (4, 2, 2)]:
        count = hydrogens + oxygens
        atoms = Atoms("H" * hydrogens + "O" * oxygens, [[1.1 * k, 0, 0] for k in range(count)], info={"charge": charge})
        energy = true[1] * hydrogens + true[8] * oxygens + {1: 11.0, 0: 0.0, -1: -2.0, 2: 22.0}[charge]
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=np.zeros((count, 3)))
        frames.append(atoms)
    settings = settings_of(validation_fraction=0.0)
    model = PLAIN.model_copy(update={"electronic_state": True})
    ensemble = Ensemble(build_model(model, table, isolated=isolated), 2)
    trainer = Trainer(ensemble, table, plan_capacity(frames, PLAIN.cutoff, settings), settings)
    found = find_references(frames, table, isolated=dict.fromkeys(isolated, 0.0), charges=True)
    data = trainer.training_set(frames, found.energies)
    params = jax.device_get(trainer.start(data, None, jax.random.key(0)).params)
    np.testing.assert_allclose(charge_energy_of(params), [11, -2], atol=1e-3)
    silent = params | {name: np.zeros_like(params[name]) for name in ("last", "species_bias")}
    members = EnsembleSettings(size=2)
    begun = Potential(model, table, silent, found.energies, members=members, isolated=frozenset(isolated))
    wanted = [atoms.get_potential_energy() for atoms in frames]
    np.testing.assert_allclose(begun.evaluate(frames).energy, wanted, atol=0.05)  # atoms of OH- are not quite bound
    assert data.energy_scale() > 5 * float(params["constants"]["energy_scale"][0])


def test_loss_is_its_formula():
    """Structures of different size, one without energy, one periodic with stress, and padding."""
    solid = labelled(bulk("Cu", cubic=True) * (1, 1, 1))
    wet = water(3)
    bare = water(4)
    del bare.calc.results["energy"]
    table = SpeciesTable((1, 8, 29))
    structures = [solid, wet, bare]
    capacity = plan_capacity(structures, MODEL.cutoff, SETTINGS.model_copy(update={"batch_size": 5}), 5)
    shape = capacity.batch
    packed = pack(structures, table, MODEL.cutoff, neighbors=shape.neighbors)
    plan, _ = plan_batches(packed, np.arange(3), shape)
    graph, targets = take_batch(packed.data, plan, 0)
    rng = np.random.default_rng(0)
    prediction = Prediction(
        energy=rng.normal(size=shape.structures),
        forces=rng.normal(size=(shape.atoms, 3)),
        virial=rng.normal(size=(shape.structures, 3, 3)),
        features=np.zeros((shape.atoms, 1)),
    )
    weights = np.array([0.5, 2.0, 3.0, 7.0, 7.0])
    one_head = jax.tree.map(lambda x: x[None], prediction)
    found = jax.jit(lambda *given: means(residuals(*given)))(one_head, graph, targets, weights)
    energy, forces, virial = (found[name] for name in ("energy", "forces", "virial"))
    de = [(prediction.energy[n] - a.get_potential_energy()) / len(a) for n, a in ((0, solid), (1, wet))]
    np.testing.assert_allclose(energy, (0.5 * de[0] ** 2 + 2 * de[1] ** 2) / 2, rtol=1e-5)
    expected, start = 0.0, 0
    for weight, atoms in zip((0.5, 2.0, 3.0), structures, strict=True):
        difference = prediction.forces[start : start + len(atoms)] - atoms.calc.results["forces"]
        expected += weight * float(np.sum(np.mean(difference**2, axis=-1)))
        start += len(atoms)
    np.testing.assert_allclose(forces, expected / 10, rtol=1e-5)
    target = -solid.get_stress(voigt=False) * solid.cell.volume
    np.testing.assert_allclose(virial, 0.5 * np.mean(((prediction.virial[0] - target) / 4) ** 2), rtol=1e-4)


def test_structures_of_different_size_fill_their_batches(references):
    """An epoch needs more batches than structures / batch size; each structure appears once in each epoch."""
    mixed = [labelled(molecule(name)) for name in ("H2O", "H2", "O2", "H2O2", "H2", "H2O", "H2O2")]
    settings = SETTINGS.model_copy(update={"validation_fraction": 0.0, "validate_every": 9, "max_steps": 9})
    ensemble = Ensemble(build_model(PLAIN, SPECIES), 1)
    capacity = plan_capacity(mixed, PLAIN.cutoff, settings)
    trainer = Trainer(ensemble, SPECIES, capacity, settings)
    data = replace(trainer.training_set(mixed, references), training=np.arange(7))
    plan, steps, epochs = Order(jax.random.key(0)).segment(data, settings.validate_every)
    ids = np.asarray(plan.ids)[:steps]
    assert list(np.bincount(ids[ids < 7], minlength=7)) == [epochs] * 7
    result = trainer.train(mixed, None, jax.random.key(0), reference_energies=references)
    assert np.isnan(result.history[-1].validation_loss).all() and result.history[-1].step >= 9


def test_capacities_of_strongly_unlike_sizes():
    """Single atoms and large cells in any proportion: every epoch has its place in a plan, whatever its order."""
    small, large = Atoms("Cu", cell=[9, 9, 9], pbc=True), Atoms("Cu200", positions=30 * np.eye(200)[:, :3])
    large.positions[:, 0] = 3.0 * np.arange(200)
    for share in (2, 3, 50):
        settings = settings_of(batch_size=5)
        counts = np.where(np.arange(3000) % share == 0, 200, 1)
        capacity = plan_capacity([large if n == 200 else small for n in counts[:100]], 4.0, settings, 3000)
        sizes = SimpleNamespace(species=np.zeros(capacity.atoms), volume=np.zeros(capacity.structures))
        packed = Packed(sizes, counts, np.concatenate([[0], np.cumsum(counts)[:-1]]))
        data = TrainingSet(packed, np.arange(3000), np.arange(0), capacity)
        order = Order(jax.random.key(0))
        for _ in range(3):
            plan, steps, epochs = order.segment(data, settings.validate_every)
            assert len(plan.ids) == capacity.steps and steps <= capacity.steps
            assert np.bincount(plan.ids[:steps][plan.ids[:steps] < 3000], minlength=3000).tolist() == [epochs] * 3000


def test_each_member_passes_over_the_data_in_an_order_of_its_own(waters):
    """Epoch after epoch, every structure once in each, also where a plan ends within an epoch of some."""
    sizes = [labelled(molecule(name)) for name in ("H2O", "H2", "O2", "H2O2", "H2", "H2O", "H2O2")]
    settings = settings_of(validation_fraction=0.0)
    trainer = Trainer(
        Ensemble(build_model(MODEL, SPECIES), 3),
        SPECIES,
        plan_capacity(sizes, MODEL.cutoff, settings),
        settings,
        EnsembleSettings(size=3, order="own"),
    )
    data = trainer.training_set(sizes, reference_energies(sizes, SPECIES))
    order, again = trainer.order(jax.random.key(0)), trainer.order(jax.random.key(5))
    seen: list[list[int]] = [[], [], []]
    for n in range(4):
        plan, steps, _ = order.segment(data, 9)
        if n == 1:
            again.restore(json.loads(json.dumps(order.state)))
        if n == 2:
            np.testing.assert_array_equal(again.segment(data, 9)[0].ids, plan.ids)
        for member, ids in zip(seen, plan.ids[:, :steps], strict=True):
            member += ids[ids < 7].tolist()
    for member in seen:
        whole = len(member) // 7 * 7
        epochs = np.sort(np.reshape(member[:whole], (-1, 7)), axis=1)
        assert whole >= 49 and np.all(epochs == np.arange(7))
    assert seen[0][:49] != seen[1][:49] != seen[2][:49]
    shared, own = (one.segment(data, 9)[0].ids for one in (Order(jax.random.key(0)), trainer.order(jax.random.key(0))))
    np.testing.assert_array_equal(shared, own[0])


@pytest.mark.slow
def test_an_order_of_its_own_is_a_training_of_its_own(dataset, references):
    """The first member has the order that all would share, and trains as it would then; the second does not."""
    settings = SETTINGS.model_copy(update={"max_steps": 20})
    capacity = plan_capacity(dataset, MODEL.cutoff, settings)
    ends = {}
    for order in ("shared", "own"):
        members = EnsembleSettings(size=2, order=order)
        trainer = Trainer(Ensemble(build_model(MODEL, SPECIES), 2), SPECIES, capacity, settings, members)
        ends[order] = trainer.train(dataset, None, jax.random.key(0), reference_energies=references)
        assert ends[order].history[-1].step == 20
    for a, b in zip(jax.tree.leaves(ends["shared"].params), jax.tree.leaves(ends["own"].params), strict=True):
        np.testing.assert_allclose(a[0], b[0], rtol=2e-3, atol=2e-5)
    assert abs(ends["shared"].params["last"][1] - ends["own"].params["last"][1]).max() > 1e-3


def test_batches_are_no_larger_than_the_data(waters):
    capacity = plan_capacity(waters, MODEL.cutoff, settings_of(batch_size=1000000))
    assert capacity.batch.structures == 16 and capacity.batch.atoms == 48 and capacity.steps < 30


def test_a_pool_takes_no_more_room_than_what_is_chosen_from_it():
    """Ten structures of a thousand, whichever: the largest ones, and epochs in any order."""
    settings = settings_of(batch_size=4, validation_fraction=0.0)
    pool = [Atoms(f"H{n}", positions=np.arange(3.0 * n).reshape(n, 3) / 4) for n in (1, 2, 2, 3, 9)] * 200
    capacity = plan_capacity(pool, 4.0, settings, 10)
    assert capacity.structures == 11 and 90 < capacity.atoms <= 100
    for chosen in (pool[4::5][:10], pool[:10], [*pool[:8], *pool[4::5][:2]]):
        counts = np.array([len(atoms) for atoms in chosen])
        sizes = SimpleNamespace(species=np.zeros(capacity.atoms), volume=np.zeros(capacity.structures))
        data = TrainingSet(Packed(sizes, counts, np.cumsum(counts) - counts), np.arange(10), np.arange(0), capacity)
        assert counts.sum() < capacity.atoms
        plan, steps, epochs = Order(jax.random.key(0)).segment(data, settings.validate_every)
        assert np.bincount(plan.ids[:steps][plan.ids[:steps] < 10], minlength=10).tolist() == [epochs] * 10
    whole = plan_capacity(pool[:10], 4.0, settings)
    assert plan_capacity(pool[:10], 4.0, settings, 10) == whole and whole.structures == 11


def test_early_stopping_keeps_the_best(dataset, references):
    """With a learning rate far too high the best parameters are early ones, and patience ends the training."""
    settings = SETTINGS.model_copy(
        update={"max_steps": 2000, "patience": 2, "learning_rate": 0.3, "ema": 0.0, "loss": SquaredLoss(energy=1.0)}
    )
    ensemble = Ensemble(build_model(MODEL, SPECIES), 2)
    capacity = plan_capacity(dataset, MODEL.cutoff, settings)
    trainer = Trainer(ensemble, SPECIES, capacity, settings, EnsembleSettings(size=2))
    result = trainer.train(dataset, None, jax.random.key(0), reference_energies=references)
    assert result.history[-1].stopped.all() and result.history[-1].step < 2000


def test_reference_energies():
    mixed = [water(0), labelled(molecule("H2")), labelled(molecule("O2"))]
    found = reference_energies(mixed, SPECIES)
    for atoms in mixed:
        assert sum(found[z] for z in atoms.numbers) == pytest.approx(atoms.get_potential_energy(), abs=2.0)
    same = reference_energies([water(0), water(1)], SPECIES)
    assert np.isfinite(list(same.values())).all()
    assert reference_energies(mixed, SPECIES, {1: -13.6})[1] == -13.6


def test_bad_input(trainer, references):
    with pytest.raises(InputError, match="nothing to train on"):
        trainer.train([], None, jax.random.key(0), reference_energies=references)
    cation = water(1)
    cation.info["charge"] = 1
    with pytest.raises(InputError, match="structures 0 and 1 .*differ in charge"):
        trainer.train([water(0), cation], None, jax.random.key(0), reference_energies=references)
    told = trainer_of([water(0), cation], settings_of(), model=MODEL.model_copy(update={"electronic_state": True}))
    assert told.training_set([water(0), cation], references).packed.data.charge.tolist() == [0, 1, 0]
    with pytest.raises(CapacityError, match="41 structures"):
        trainer.train([water(0)] * 41, None, jax.random.key(0), reference_energies=references)
    with pytest.raises(InputError, match="atom 1 is C"):
        trainer.train([labelled(molecule("CO"))], None, jax.random.key(0), reference_energies={6: 0.0, 8: 0.0})


def test_a_users_model_that_sees_charge_goes_on_without_compiling(count_compilations):
    """Its parameters need none of those with which models of ours see it."""
    data = [water(seed) for seed in range(13)]
    for n, atoms in enumerate(data):
        atoms.info["charge"] = n % 2
    model = {"kind": "user", "function": "pair_model:Charged", "cutoff": 3.0}
    training = {"max_steps": 4, "warm_start": True, "batch_size": 2, "validation_fraction": 0.2}
    learner = Learner(20, model=model, ensemble={"size": 2}, training=training)
    learner.fit(data[:11])
    with count_compilations() as compiled:
        potential = learner.fit(data)
    assert not compiled, compiled
    assert potential.ensemble.sees_state


@pytest.mark.slow
def test_one_after_the_other_is_as_side_by_side(dataset, references):
    """However members are mapped, the same training comes out."""
    settings = SETTINGS.model_copy(update={"max_steps": 20})
    capacity = plan_capacity(dataset, MODEL.cutoff, settings)
    ends = []
    for mapping in ("vmap", "map"):
        ensemble = Ensemble(build_model(MODEL, SPECIES), 2, mapping=mapping)
        trainer = Trainer(ensemble, SPECIES, capacity, settings)
        ends.append(trainer.train(dataset, None, jax.random.key(0), reference_energies=references))
    np.testing.assert_allclose(ends[0].history[-1].train_loss, ends[1].history[-1].train_loss, rtol=1e-3)
    for a, b in zip(jax.tree.leaves(ends[0].params), jax.tree.leaves(ends[1].params), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5)
