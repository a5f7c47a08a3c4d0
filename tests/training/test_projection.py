"""Trainings by variable projection, on labels that a moment tensor potential gave."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from pydantic import ValidationError
from small_training import same_bits

from almlip_jax.ensembles import Ensemble
from almlip_jax.errors import InputError
from almlip_jax.fitting import fit_potential
from almlip_jax.learner import Learner
from almlip_jax.models import ModelSettings
from almlip_jax.models.mtp import MtpSettings
from almlip_jax.potential import Potential
from almlip_jax.structures.packing import BatchShape, pack, plan_batches, take_batch
from almlip_jax.structures.species import SpeciesTable
from almlip_jax.training import (
    EnsembleSettings,
    EpochReport,
    Job,
    LossSettings,
    SideBySideTrainer,
    TrainingResult,
    TrainingSettings,
    check_training,
    plan_capacity,
)
from almlip_jax.training.loss import residuals, weighted
from almlip_jax.training.projection.algebra import Solved, solve
from almlip_jax.training.projection.data import observer
from almlip_jax.training.projection.search import Search, starts_left, the_best
from almlip_jax.training.projection.trainer import ProjectionTrainer

MODEL = MtpSettings(level=6, cutoff=4.0, min_dist=1.5, radial_basis_size=4)
SPECIES = SpeciesTable((3, 9))
NONE = {3: 0.0, 9: 0.0}


@cache
def drawn() -> Any:
    with jax.enable_x64(True):
        return jax.device_get(jax.jit(Ensemble(MODEL.build(SPECIES), 1).init)(jax.random.key(5)))


def truth() -> Any:
    """Parameters [1, ...] of the potential that labels."""
    params = drawn()
    generator = np.random.default_rng(0)
    return params | {
        "moment": 0.3 * generator.normal(size=params["moment"].shape) / (1 + np.arange(params["moment"].shape[1])),
        "species": np.array([[-1.0, 2.0]]),
        "constants": params["constants"] | {"scaling": np.full(1, 0.05)},
    }


def structure(seed: int) -> Atoms:
    """Four or five atoms in a crystal of no symmetry."""
    generator = np.random.default_rng(seed)
    numbers = [3, 9, 3, 9, 9][: 4 + seed % 2]
    sites = np.array([[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5], [0.5, 0.5, 0.5]])[: len(numbers)]
    return Atoms(
        numbers, cell=[4.2, 4.4, 4.6], scaled_positions=sites + 0.06 * generator.normal(size=sites.shape), pbc=True
    )


@pytest.fixture(scope="module")
def crystals() -> list[Atoms]:
    """Structures with labels of the potential, in float64."""
    with jax.enable_x64(True):
        structures = [structure(seed) for seed in range(14)]
        evaluated = Potential(MODEL, SPECIES, truth(), NONE, members=EnsembleSettings(size=1)).evaluate(structures)
    for n, atoms in enumerate(structures):
        results = {"energy": evaluated.energy[n], "forces": evaluated.forces[n], "stress": evaluated.stress[n]}
        atoms.calc = SinglePointCalculator(atoms, **results)
    return structures


def settings_of(**projection: Any) -> TrainingSettings:
    """A short training by projection."""
    given = {"starts": 2, "iterations": 12, "trial_iterations": 4, "member_iterations": 1, **projection}
    return TrainingSettings(loss={"kind": "mlip"}, projection=given, validation_fraction=0.2)


def trainer_of(
    dataset: list[Atoms], settings: TrainingSettings, members: int = 2, **of_members: Any
) -> ProjectionTrainer:
    """A trainer of the small model."""
    capacity = plan_capacity(dataset, MODEL.cutoff, settings)
    ensemble = Ensemble(MODEL.build(SPECIES), members)
    return ProjectionTrainer(
        ensemble, SPECIES, capacity, settings, EnsembleSettings(size=members, **of_members), np.float64
    )


def trained(trainer: ProjectionTrainer, dataset: list[Atoms], params: Any = None, **options: Any) -> TrainingResult:
    """A training with no reference energies."""
    return trainer.train(dataset, params, jax.random.key(0), reference_energies=NONE, **options)


@dataclass(frozen=True)
class Seen:
    """What a search is told of a dataset, all of which trains."""

    look: Callable[..., np.ndarray]

    def at(self, others: np.ndarray) -> Solved:
        """The point at some parameters, with derivatives for the best linear ones."""
        twice, active = np.stack([others] * 2), np.array([True, False])
        with jax.enable_x64(True):
            first = solve(self.look(twice, np.zeros((2, 7)), active)[0], 7, 1e-10)
            return solve(self.look(twice, np.stack([first.linear] * 2), active)[0], 7, 1e-10)


def seen(dataset: list[Atoms], loss: str = "mlip") -> Seen:
    """What searches are told of a dataset."""
    changes = {"loss": LossSettings.parse({"kind": loss}), "validation_fraction": 0.0}
    trainer = trainer_of(dataset, settings_of().model_copy(update=changes))
    with jax.enable_x64(True):
        data = trainer.training_set(dataset, NONE)
        first = jax.tree.map(lambda x: np.repeat(x, 2, 0), truth())
        found = observer(trainer._reduce, trainer.inner, first, data, trainer._all, summed=trainer.settings.loss.summed)
    return Seen(found.look(np.ones((2, trainer.capacity.structures)), np.arange(2)))


def others_near(size: float = 0.0) -> np.ndarray:
    """The true parameters that are not linear, or some near them."""
    radial = truth()["radial"].reshape(-1)
    return radial + size * np.random.default_rng(3).normal(size=radial.shape)


def test_linear_parameters_are_recovered(crystals):
    """Where radial functions are the true ones, one pass gives the potential itself."""
    found = seen(crystals).at(others_near())
    true = MODEL.build(SPECIES).separate(jax.tree.map(lambda x: x[0], truth()))[0]
    np.testing.assert_allclose(found.linear, true, rtol=1e-8, atol=1e-8)
    assert found.loss < 1e-18


@pytest.mark.parametrize("loss", ["mlip", pytest.param("mse", marks=pytest.mark.slow)])
def test_the_loss_is_the_one_that_gradients_see(crystals, loss):
    """At a point of a search it is that of all structures at once, with missing labels and weights of structures."""
    dataset = [atoms.copy() for atoms in crystals]
    for n, (atoms, full) in enumerate(zip(dataset, crystals, strict=True)):
        known = {name: value for name, value in full.calc.results.items() if (name, n) not in MISSING}
        atoms.calc = SinglePointCalculator(atoms, **known)
        atoms.info["weight"] = 1.0 + n
    point = seen(dataset, loss).at(others_near(0.3))
    with jax.enable_x64(True):
        model, batch = MODEL.build(SPECIES), BatchShape(70, 60, 14)
        packed = pack(dataset, SPECIES, MODEL.cutoff, neighbors=60, dtype=np.float64)
        graph, targets = take_batch(packed.data, plan_batches(packed, np.arange(14), batch)[0], 0)
        relative = {name: weights / 7.5 for name, weights in targets.weights.items()}  # to their mean
        first = jax.tree.map(lambda x: jnp.asarray(x[0]), truth())
        params = jax.jit(model.put_together)(first, jnp.asarray(point.linear), jnp.asarray(others_near(0.3)))
        prediction = jax.jit(Ensemble(model, 1).predict)(jax.tree.map(lambda x: x[None], params), graph)
        settings = LossSettings.parse({"kind": loss})
        summed = jax.jit(lambda *given: weighted(settings, residuals(*given, settings)))
        mean = float(summed(prediction, graph, targets.replace(weights=relative), jnp.ones(14)))
        assert point.loss == pytest.approx(mean, rel=1e-9)


MISSING = {("forces", 1), ("stress", 1), ("stress", 2), ("energy", 3)}


def test_the_gradient_is_that_of_the_projected_loss(crystals):
    told, others, step = seen(crystals), others_near(0.3), 1e-5
    gradient = told.at(others).gradient
    for direction in np.random.default_rng(4).normal(size=(2, len(others))):
        slope = (told.at(others + step * direction).loss - told.at(others - step * direction).loss) / (2 * step)
        assert -2 * gradient @ direction == pytest.approx(slope, rel=1e-5)


@pytest.fixture(scope="module")
def trainer(crystals) -> ProjectionTrainer:
    """For two members."""
    return trainer_of(crystals, settings_of(tolerance=1e-12))


@pytest.fixture(scope="module")
def whole(trainer, crystals) -> TrainingResult:
    """A training from random starts."""
    return trained(trainer, crystals)


def test_it_finds_what_gave_the_labels(trainer, crystals):
    """From radial functions near the true ones, the search ends with the potential itself."""
    begin = truth() | {"radial": others_near(0.05).reshape(truth()["radial"].shape)}
    last = trained(trainer, crystals, jax.tree.map(lambda x: np.repeat(x, 2, 0), begin), steps=20).history[-1]
    assert (last.train_loss < 1e-12).all()
    assert (last.validation_energy_rmse < 1e-5).all()
    assert (last.validation_forces_rmse < 1e-5).all()


def test_the_loss_falls_and_members_differ(whole):
    losses = np.array([report.train_loss for report in whole.history])
    shared = losses[:-2]
    assert (np.diff(shared[4:], axis=0) <= 0).all()
    assert (shared[:, 0] == shared[:, 1]).all()
    assert losses[-1][0] != losses[-1][1]
    assert not np.allclose(whole.params["moment"][0], whole.params["moment"][1], rtol=1e-3)
    assert whole.history[-1].step == whole.history[-1].steps or whole.history[-1].stopped.all()


@pytest.mark.parametrize("after", [2, 10])
def test_an_interrupted_training_goes_on_bit_for_bit(trainer, crystals, whole, tmp_path: Path, after):
    """In the trial of several starts, and among the members."""

    def stop(report: EpochReport) -> None:
        if report.step == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(trainer, crystals, on_epoch=stop, checkpoint=tmp_path, checkpoint_every=1)
    heard: list[int] = []
    again = trained(trainer, crystals, on_epoch=lambda report: heard.append(report.step), checkpoint=tmp_path)
    assert heard[0] == after + 1
    assert same_bits(again.params, whole.params)
    assert same_bits([r.models for r in again.history], [r.models for r in whole.history])


def test_structures_without_weight_and_energies_alone(trainer, crystals, whole):
    """What weighs nothing changes nothing; energies alone are learned from."""
    with_more = [atoms.copy() for atoms in crystals]
    for atoms, full in zip(with_more, crystals, strict=True):
        atoms.calc = SinglePointCalculator(atoms, energy=full.calc.results["energy"])
    result = trained(trainer, with_more, steps=4)
    assert np.isfinite(result.history[-1].train_loss).all()
    assert np.isnan(result.history[-1].validation_forces_rmse).all()


@pytest.mark.parametrize(
    ("model", "members", "training", "message"),
    [
        ({"kind": "mace"}, {}, {}, "kind 'mace' is not"),
        ({"kind": "mtp"}, {"heads": 2}, {"loss": {"kind": "mlip"}}, "heads"),
        ({"kind": "mtp"}, {"order": "own"}, {}, "no batches"),
        ({"kind": "mtp"}, {"bootstrap": "none"}, {}, "differ by ensemble.bootstrap alone"),
        ({"kind": "mtp"}, {}, {"learning_rate": 0.1}, "learning_rate counts with a training by gradients"),
        ({"kind": "mtp"}, {}, {"second_stage": {"energy": 1.0}}, "second_stage"),
        ({"kind": "mtp"}, {}, {"projection": {"members": "own", "starts": 8}}, "begin with one each"),
        ({"kind": "mtp"}, {}, {"projection": {"iterations": 3}}, "projection.iterations is 3, but 4 models .* least 4"),
        ({"kind": "mtp"}, {}, {"warm_start": True, "warm_steps": 3}, "warm_steps is 3, but 4 models"),
        ({"kind": "mtp"}, {}, {"projection": {"member_iterations": 3}, "final_steps": 4}, "final_steps is 4.*least 5"),
    ],
)
def test_what_it_cannot_do_is_refused(model, members, training, message):
    with pytest.raises(InputError, match=message):
        check_training(
            ModelSettings.parse(model),
            EnsembleSettings(**members),
            TrainingSettings.model_validate({"projection": {}, **training}),
        )


def test_passes_of_members_count_where_there_are_several(crystals):
    """A single model, or one of each kind, has no weights of its own to go on with."""
    short, model = TrainingSettings(projection={"iterations": 1, "starts": 1}), ModelSettings.parse({"kind": "mtp"})
    check_training(model, EnsembleSettings(size=1), short)
    check_training(model, EnsembleSettings(size=2, variants=[{}, {"model": {"level": 8}}]), short)
    own = TrainingSettings(projection={"iterations": 1, "members": "own"})
    check_training(model, EnsembleSettings(size=4, bootstrap="none"), own)
    trainer = trainer_of(crystals, settings_of(iterations=1, starts=1, member_iterations=9), members=1)
    result = trained(trainer, crystals)
    assert len(result.history) == 1 and np.isfinite(result.history[0].train_loss).all()


@pytest.mark.parametrize(
    ("starts", "left"),
    [(1, [1] * 6), (2, [2] * 5 + [1]), (3, [3, 3, 2, 2, 2, 1]), (8, [8, 4, 4, 2, 2, 1]), (9, [9, 5, 3, 3, 2, 1])],
)
def test_the_worse_half_of_the_starts_ends_until_one_is_left(starts, left):
    """In parts of equal length; what goes on is what stands best at the time, whatever is no number."""
    assert [starts_left(starts, passes / 6) for passes in range(1, 7)] == left
    assert starts_left(starts, 7.0) == 1
    known = Solved(0.0, 0.0, np.zeros(2), np.zeros(1), np.eye(1), np.zeros((2, 1)))
    objectives = [3.0, np.nan, 1.0, 2.0, 0.0]
    factors = [np.eye(4)] * 4 + [np.zeros((4, 4))]  # the last has looked at nothing
    searches = [
        Search(np.zeros(1), factor, replace(known, objective=objective), np.ones(1), active=place != 2)
        for place, (objective, factor) in enumerate(zip(objectives, factors, strict=True))
    ]
    going = [[one.active for one in the_best(searches, count)] for count in (3, 2)]
    assert going == [[True, False, False, True, False], [False, False, False, True, False]]


def test_losses_that_are_no_squares_are_refused():
    with pytest.raises(ValidationError, match="minimises squares"):
        TrainingSettings.model_validate({"projection": {}, "loss": {"kind": "huber"}})


@pytest.mark.slow
def test_isolated_atoms_are_exact_and_the_repulsion_stays(crystals):
    """What stands around the model is taken from the labels: the fit reaches them, atoms in open space too."""
    model = MODEL.model_copy(update={"repulsion": True})
    training = TrainingSettings.model_validate(
        {
            "loss": {"kind": "mlip"},
            "projection": {"starts": 2, "iterations": 40, "trial_iterations": 5, "tolerance": 1e-6},
            "reference_energies": {"Li": -0.7, "F": 1.5},
            "validation_fraction": 0.0,
        }
    )
    potential, result = fit_potential(crystals, model, EnsembleSettings(size=1), training, 0)
    alone = potential.evaluate([Atoms("Li"), Atoms("F")])
    np.testing.assert_allclose(alone.energy, [-0.7, 1.5], atol=1e-6)
    evaluated = potential.evaluate(crystals)
    wrong = evaluated.energy - [atoms.calc.results["energy"] for atoms in crystals]
    forces = np.concatenate(evaluated.forces) - np.concatenate([atoms.calc.results["forces"] for atoms in crystals])
    stress = evaluated.stress - [atoms.calc.results["stress"] for atoms in crystals]
    virial = stress * np.array([[atoms.cell.volume] for atoms in crystals])
    loss = np.mean(wrong**2) + (0.01 * np.sum(forces**2) + 0.001 * np.sum(virial**2)) / len(crystals)
    assert loss == pytest.approx(float(result.history[-1].train_loss[0]), rel=1e-3)
    assert result.history[-1].train_loss[0] < 0.2 * result.history[0].train_loss[0]


@pytest.mark.slow
def test_a_learner_goes_on_from_the_radial_functions_before(crystals):
    training = {
        "loss": {"kind": "mlip"},
        "projection": {"starts": 3, "iterations": 12, "trial_iterations": 4, "member_iterations": 1},
        "warm_start": True,
    }
    learner = Learner(20, model=MODEL, ensemble={"size": 2}, training=training, typical=crystals)
    learner.fit(crystals[:10])
    heard: list[EpochReport] = []
    learner.fit(crystals, on_epoch=heard.append)
    fresh: list[EpochReport] = []
    again = Learner(20, model=MODEL, ensemble={"size": 2}, training=training | {"warm_start": False}, typical=crystals)
    again.fit(crystals, on_epoch=fresh.append)
    assert heard[0].train_loss[0] < fresh[0].train_loss[0]


@pytest.mark.slow
def test_members_may_have_searches_of_their_own(crystals):
    trainer = trainer_of(crystals, settings_of(starts=4, members="own"), bootstrap="none")
    result = trained(trainer, crystals, steps=5)
    assert result.history[0].train_loss[0] != result.history[0].train_loss[1]
    assert not np.allclose(result.params["radial"][0], result.params["radial"][1], rtol=0.1)


def test_the_ridge_is_the_rounding_of_what_the_potential_is_used_in(crystals):
    def trainer_of(dtype: type, **given: float) -> ProjectionTrainer:
        settings = settings_of(**given)
        capacity, ensemble = plan_capacity(crystals, MODEL.cutoff, settings), Ensemble(MODEL.build(SPECIES), 1)
        return ProjectionTrainer(ensemble, SPECIES, capacity, settings, EnsembleSettings(size=1), dtype)

    usual, coarse, lower = (trainer_of(np.float32, **given) for given in ({}, {"ridge": 1e-5}, {"ridge": 1e-9}))
    assert usual.ridge == np.finfo(np.float32).eps and trainer_of(np.float64).ridge == 1e-10
    assert coarse.ridge == 1e-5 and lower.ridge == 1e-9
    assert usual.remark is None and coarse.remark is None and trainer_of(np.float64).remark is None
    said: list[str] = []
    with pytest.raises(InputError, match="nothing to train on"):
        lower.train([], None, jax.random.key(0), reference_energies={}, say=said.append)
    assert said == [lower.remark] and "ridge is 1e-09, below 1.2e-07, the rounding of float32" in said[0]


@pytest.mark.slow
def test_jobs_of_a_sweep_are_trained_in_turn(trainer, crystals, whole):
    """One that comes twice is trained once, and gives what it gives alone."""
    job = Job(crystals, jax.random.key(0), NONE)
    first, second = SideBySideTrainer(trainer).train([job, job])
    assert first is second
    assert same_bits(first.params, whole.params)
