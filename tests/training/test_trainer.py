"""Training: the loss against its formula, members against single trainings, determinism, growth without compilation."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from small_training import MODEL, SPECIES, labelled, settings_of, water

from almlip_jax.ensembles import Ensemble, Prediction
from almlip_jax.errors import CapacityError, InputError
from almlip_jax.models import build_model
from almlip_jax.structures.packing import pack, plan_batches, take_batch
from almlip_jax.structures.species import SpeciesTable
from almlip_jax.training import (
    EnsembleSettings,
    LossSettings,
    Trainer,
    plan_capacity,
    reference_energies,
)
from almlip_jax.training.dataset import bootstrap_weights, split
from almlip_jax.training.loss import means, residuals

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
    assert last.steps == 60 and 60 <= last.step < 60 + 7
    assert np.all(last.validation_forces_rmse < 0.7 * first.validation_forces_rmse)


def test_same_inputs_give_the_same_bits(trainer, dataset, references, result):
    again = trainer.train(dataset, None, jax.random.key(0), reference_energies=references)
    for a, b in zip(jax.tree.leaves(result.params), jax.tree.leaves(again.params), strict=True):
        np.testing.assert_array_equal(a, b)
    other = trainer.train(dataset, None, jax.random.key(1), reference_energies=references)
    assert any(
        np.any(a != b) for a, b in zip(jax.tree.leaves(result.params), jax.tree.leaves(other.params), strict=True)
    )


def test_members_differ(result):
    leaf = result.params["mix_0"]
    assert np.std(leaf[0] - leaf[1]) > 0.1 * np.std(leaf)


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
    capacity = plan_capacity(dataset, MODEL.cutoff, settings)
    model = build_model(MODEL, SPECIES)
    pair = Trainer(Ensemble(model, 2), SPECIES, capacity, settings, EnsembleSettings(size=2, bootstrap="none"))
    alone = Trainer(Ensemble(model, 1), SPECIES, capacity, settings, EnsembleSettings(size=1))
    start = Ensemble(model, 2).init(jax.random.key(5))
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
        tables = [np.asarray(bootstrap_weights(members, number, np.float32)) for number in (11, 2001)]
        np.testing.assert_array_equal(tables[1][:, :10], tables[0][:, :10])
        weights[kind] = tables[1]
    assert np.all(weights["none"] == 1)
    np.testing.assert_allclose(weights["gamma"].mean(axis=1), 1, atol=0.1)
    np.testing.assert_allclose(weights["gamma"].var(axis=1), 0.5, atol=0.15)
    np.testing.assert_allclose((weights["poisson"] == 0).mean(), np.exp(-1), atol=0.03)


def test_loss_is_its_formula():
    """Structures of different size, one without energy, one periodic with stress, and padding."""
    solid = labelled(bulk("Cu", cubic=True) * (1, 1, 1))
    wet = water(3)
    bare = water(4)
    del bare.calc.results["energy"]
    table = SpeciesTable((1, 8, 29))
    structures = [solid, wet, bare]
    capacity = plan_capacity(structures, MODEL.cutoff, SETTINGS.model_copy(update={"batch_size": 5}))
    shape = capacity.batch
    packed = pack(structures, table, MODEL.cutoff, neighbors=shape.neighbors)
    plan, _ = plan_batches(packed, np.arange(3), shape)
    graph, targets = take_batch(packed.data, plan, 0)
    rng = np.random.default_rng(0)
    prediction = Prediction(
        energy=jnp.asarray(rng.normal(size=shape.structures)),
        forces=jnp.asarray(rng.normal(size=(shape.atoms, 3))),
        virial=jnp.asarray(rng.normal(size=(shape.structures, 3, 3))),
        features=jnp.zeros((shape.atoms, 1)),
    )
    weights = jnp.asarray([0.5, 2.0, 3.0, 7.0, 7.0])
    energy, forces, virial = means(residuals(jax.tree.map(lambda x: x[None], prediction), graph, targets, weights))
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
    ensemble = Ensemble(build_model(MODEL, SPECIES), 1)
    capacity = plan_capacity(mixed, MODEL.cutoff, settings)
    trainer = Trainer(ensemble, SPECIES, capacity, settings)
    data = replace(trainer.training_set(mixed, references), training=np.arange(7))
    plan, steps, epochs = data.segment(np.random.default_rng(0), settings.validate_every)
    ids = np.asarray(plan.ids)[:steps]
    assert list(np.bincount(ids[ids < 7], minlength=7)) == [epochs] * 7
    result = trainer.train(mixed, None, jax.random.key(0), reference_energies=references)
    assert np.isnan(result.history[-1].validation_loss).all() and result.history[-1].step >= 9


def test_early_stopping_keeps_the_best(dataset, references):
    """With a learning rate far too high the best parameters are early ones, and patience ends the training."""
    settings = SETTINGS.model_copy(
        update={"max_steps": 2000, "patience": 2, "learning_rate": 0.3, "ema": 0.0, "loss": LossSettings(energy=1.0)}
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
    with pytest.raises(InputError, match="lack O"):
        reference_energies(mixed, SPECIES, {1: -13.6})


def test_bad_input(trainer, references):
    with pytest.raises(InputError, match="nothing to train on"):
        trainer.train([], None, jax.random.key(0), reference_energies=references)
    cation = water(1)
    cation.info["charge"] = 1
    with pytest.raises(InputError, match="structures 0 and 1 .*differ in charge"):
        trainer.train([water(0), cation], None, jax.random.key(0), reference_energies=references)
    with pytest.raises(CapacityError, match="41 structures"):
        trainer.train([water(0)] * 41, None, jax.random.key(0), reference_energies=references)
    with pytest.raises(InputError, match="atom 1 is C"):
        trainer.train([labelled(molecule("CO"))], None, jax.random.key(0), reference_energies={6: 0.0, 8: 0.0})


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
