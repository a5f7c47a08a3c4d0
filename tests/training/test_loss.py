"""Penalties of the loss against closed forms, and what a robust one is for."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import ValidationError
from scipy.special import huber
from small_training import MODEL, SPECIES, settings_of, trainer_of, water

from almlip_jax.ensembles import Prediction
from almlip_jax.errors import InputError
from almlip_jax.structures.graph import Graph, Targets
from almlip_jax.structures.packing import pack, plan_batches, take_batch
from almlip_jax.training import (
    EnsembleSettings,
    LossSettings,
    TrainingSettings,
    build_trainer,
    plan_capacity,
    reference_energies,
)
from almlip_jax.training.loss import means, residuals, weighted
from almlip_jax.training.penalties import HuberLoss, SquaredLoss, SummedLoss


@pytest.fixture(scope="module")
def batch() -> tuple[Graph, Targets]:
    """Two molecules in a batch that has room for three; the first weighs twice as much as the second."""
    structures = [water(0), water(1)]
    structures[0].info["weight"] = 2.0
    shape = plan_capacity(structures, MODEL.cutoff, settings_of(batch_size=3), largest_dataset=3).batch
    packed = pack(structures, SPECIES, MODEL.cutoff, neighbors=shape.neighbors)
    return take_batch(packed.data, plan_batches(packed, np.arange(2), shape)[0], 0)


def wrong_by(targets: Targets, graph: Graph, energy: np.ndarray, forces: np.ndarray, virial: np.ndarray) -> Prediction:
    """A prediction of one head with given residuals of the energy [2], forces [2, 3, 3] and virial [2, 3, 3]."""
    slots, atoms = graph.num_structures, len(graph.species)
    return Prediction(
        energy=(np.asarray(targets.values["energy"]) + np.pad(energy, (0, slots - 2)))[None],
        forces=(np.asarray(targets.values["forces"]) + np.pad(forces.reshape(6, 3), ((0, atoms - 6), (0, 0))))[None],
        virial=(np.asarray(targets.values["virial"]) + np.pad(virial, ((0, slots - 2), (0, 0), (0, 0))))[None],
        features=jnp.zeros((atoms, 1)),
    )


def test_huber_is_its_formula(batch):
    """Squares within delta, straight lines beyond it, each term with its own delta, in each structure's weight."""
    graph, targets = batch
    targets = targets.replace(weights={**targets.weights, "virial": targets.weights["energy"]})
    rng = np.random.default_rng(0)
    energy, forces = np.array([0.3, -6.0]), rng.normal(size=(2, 3, 3))
    virial = rng.normal(size=(2, 3, 3))
    loss = HuberLoss(energy_delta=0.5, forces_delta=0.8, virial_delta=0.2)
    prediction = wrong_by(targets, graph, energy, forces, virial)
    weights = jnp.asarray([0.5, 3.0, 7.0])
    found = jax.jit(lambda *given: means(residuals(*given, loss)))(prediction, graph, targets, weights)
    both = np.array([2.0 * 0.5, 1.0 * 3.0])
    np.testing.assert_allclose(found["energy"], np.sum(both * 2 * huber(0.5, energy / 3)) / 2, rtol=1e-4)
    np.testing.assert_allclose(
        found["forces"], np.sum(both[:, None] * np.mean(2 * huber(0.8, forces), axis=-1)) / 6, rtol=1e-4
    )
    np.testing.assert_allclose(
        found["virial"], np.sum(both * np.mean(2 * huber(0.2, virial / 3), axis=(-1, -2))) / 2, rtol=1e-4
    )


def test_the_loss_of_mlip_is_its_formula(batch):
    """Squares of whole energies, of all force components and of six of the virial, over the number of structures."""
    graph, targets = batch
    targets = targets.replace(weights={**targets.weights, "virial": targets.weights["energy"]})
    generator = np.random.default_rng(1)
    energy, forces, virial = np.array([0.3, -6.0]), generator.normal(size=(2, 3, 3)), generator.normal(size=(2, 3, 3))
    virial = virial + np.swapaxes(virial, 1, 2)
    loss = SummedLoss()
    sums = residuals(
        wrong_by(targets, graph, energy, forces, virial), graph, targets, jnp.asarray([0.5, 3.0, 7.0]), loss
    )
    both = np.array([2.0 * 0.5, 1.0 * 3.0])
    six = virial[:, *np.triu_indices(3)]
    each = energy**2 + 0.01 * np.sum(forces**2, axis=(1, 2)) + 0.001 * np.sum(six**2, axis=1)
    np.testing.assert_allclose(weighted(loss, sums), np.sum(both * each) / 2, rtol=1e-4)


def test_a_wrong_force_pulls_no_harder_than_delta(batch):
    """The gradient of Huber's penalty grows with the residual up to delta, and of squares without end."""
    graph, targets = batch

    def pull(size: float, loss: LossSettings) -> float:
        zero = np.zeros((2, 3, 3))
        forces = zero.copy()
        forces[0, 1, 2] = size
        right = wrong_by(targets, graph, np.zeros(2), zero, zero)
        wrong = wrong_by(targets, graph, np.zeros(2), forces, zero)

        def total(force: jax.Array) -> jax.Array:
            return means(residuals(right.replace(forces=force), graph, targets, jnp.ones(3), loss))["forces"]

        return float(jnp.linalg.norm(jax.grad(total)(wrong.forces)))

    robust, squares = HuberLoss(forces_delta=0.1), SquaredLoss()
    assert pull(0.05, robust) == pytest.approx(pull(0.05, squares), rel=1e-3)
    assert pull(50.0, robust) == pytest.approx(pull(0.1, squares), rel=1e-3)
    assert pull(50.0, squares) == pytest.approx(500 * pull(0.1, squares), rel=1e-3)


@pytest.mark.slow
def test_huber_with_a_wide_delta_trains_as_squares_do(waters):
    references = reference_energies(waters, SPECIES)
    wide = HuberLoss(energy_delta=1e3, forces_delta=1e3, virial_delta=1e3)
    ends = [
        trainer_of(waters, settings_of(loss=loss, max_steps=20)).train(
            waters, None, jax.random.key(0), reference_energies=references
        )
        for loss in (SquaredLoss(), wide)
    ]
    for a, b in zip(jax.tree.leaves(ends[0].params), jax.tree.leaves(ends[1].params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_huber_learns_past_labels_that_are_wrong(waters):
    """One force component in thirty-six is off by 60 eV/Angstrom; converged, squares follow it and Huber does not."""
    bad = [atoms.copy() for atoms in waters]
    for n, (atoms, good) in enumerate(zip(bad, waters, strict=True)):
        atoms.calc = type(good.calc)(atoms, **{k: np.copy(v) for k, v in good.calc.results.items()})
        if n % 5 == 0:
            atoms.calc.results["forces"][0, 0] += 60.0
    references = reference_energies(waters, SPECIES)
    judge = trainer_of(waters, settings_of())
    run = judge.prepare(replace(judge.training_set(waters, references), validation=np.arange(16)), 1, jax.random.key(0))
    errors = []
    for kind in ("mse", "huber"):
        settings = settings_of(loss=LossSettings.parse({"kind": kind}), max_steps=800, validation_fraction=0.0)
        result = trainer_of(waters, settings).train(bad, None, jax.random.key(0), reference_energies=references)
        errors.append(float(jnp.mean(jnp.sqrt(means(judge.program.validate(result.params, run)[0])["forces"]))))
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("wrong", [{"kind": "hubr"}, {"forces_delta": 0.0}, {"delta": 1.0}])
def test_settings_are_strict(wrong):
    with pytest.raises(ValidationError):
        LossSettings.parse(wrong)


LOG_COSH = """
import jax.numpy as jnp

def log_cosh(width):
    def penalty(residual, target):
        scale = width if target == "forces" else 1.0
        return scale**2 * jnp.logaddexp(residual / scale, -residual / scale)

    return penalty

def of_structures():
    return lambda residual, target: jnp.mean(residual, axis=-1)

def fails():
    return lambda residual, target: residual @ jnp.ones(7)

def fails_without_a_word():
    def penalty(residual, target):
        raise ValueError

    return penalty
"""


def test_a_loss_of_ones_own_is_its_formula(batch, with_module):
    """Penalties of every component, head by head and by target, averaged and weighed as those of the package."""
    with_module("own_losses", LOG_COSH)
    graph, targets = batch
    generator = np.random.default_rng(4)
    energy, forces, virial = np.array([0.3, -6.0]), generator.normal(size=(2, 3, 3)), np.zeros((2, 3, 3))
    loss = LossSettings.parse({"kind": "user", "function": "own_losses:log_cosh", "parameters": {"width": 0.2}})
    loss.check_code()
    prediction = wrong_by(targets, graph, energy, forces, virial)
    sums = jax.jit(lambda *given: residuals(*given, loss))(prediction, graph, targets, jnp.ones(3))
    found, weighed = means(sums), np.array([2.0, 1.0])
    expected = {
        "energy": np.sum(weighed * np.logaddexp(energy / 3, -energy / 3)) / 2,
        "forces": np.sum(weighed[:, None] * np.mean(0.04 * np.logaddexp(forces / 0.2, -forces / 0.2), axis=-1)) / 6,
    }
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4)
    total = 10 * expected["energy"] + expected["forces"] + found["virial"]
    np.testing.assert_allclose(weighted(loss, sums), total, rtol=1e-4)


@pytest.mark.parametrize(
    ("function", "told"),
    [
        ("of_structures", "one penalty for each residual, but of residuals of shape"),
        ("fails", "fails on residuals"),
        ("fails_without_a_word", r"fails on residuals \(ValueError\)"),
    ],
)
def test_what_is_no_penalty_is_refused_before_anything_is_built(waters, with_module, function, told):
    with_module("own_losses", LOG_COSH)
    settings = settings_of(loss={"kind": "user", "function": f"own_losses:{function}"})
    with pytest.raises(InputError, match=rf"training.loss: 'own_losses:{function}' .*{told}"):
        build_trainer(MODEL, EnsembleSettings(size=2), SPECIES, plan_capacity(waters, MODEL.cutoff, settings), settings)


PACKAGE = """
from typing import Literal

import jax.numpy as jnp
from pydantic import Field

from almlip_jax.training import LossSettings, ScheduleSettings

class Cauchy(LossSettings):
    kind: Literal["cauchy"] = "cauchy"
    width: float = Field(default=0.1, gt=0, le=10)

    def penalty(self, residual, belief, target):
        return jnp.mean(self.width**2 * jnp.log1p((residual / self.width) ** 2), axis=0)

class Halved(ScheduleSettings):
    kind: Literal["halved"] = "halved"

    def share(self, settings, progress, plateau_factor):
        return jnp.where(progress < 0.5, 1.0, settings.final_learning_rate)
"""


def test_kinds_of_other_packages_train_as_ours_do(waters, count_compilations, with_kinds):
    """A loss and a schedule of a package, and an optimiser of optax under the name of its factory."""
    with_kinds(PACKAGE)
    optimiser = {"kind": "user", "function": "optax:scale_by_lion", "parameters": {"b1": 0.8}}
    settings = settings_of(
        loss={"kind": "cauchy", "width": 0.3}, optimiser=optimiser, schedule="halved", final_learning_rate=0.1,
        learning_rate=1e-3, max_steps=60,
    )  # fmt: skip
    references = reference_energies(waters, SPECIES)
    trainer = trainer_of(waters, settings)
    first = trainer.train(waters, None, jax.random.key(0), reference_energies=references)
    losses = np.array([report.validation_loss for report in first.history])
    assert np.all(losses[-1] < 0.8 * losses[0])
    with count_compilations() as compiled:
        trainer_of(waters, TrainingSettings.model_validate(settings.model_dump(mode="json"))).train(
            waters, None, jax.random.key(1), reference_energies=references
        )
    assert not compiled
