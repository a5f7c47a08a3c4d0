"""Optimisers, learning rates and the second stage of a training, against closed forms."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ase.calculators.singlepoint import SinglePointCalculator
from pydantic import ValidationError
from small_training import PLAIN, SPECIES, settings_of, trainer_of, water

from almlip_jax.errors import InputError
from almlip_jax.training import VALIDATION_ERROR, TrainingSettings, reference_energies, validation_note
from almlip_jax.training.loss import means
from almlip_jax.training.optimisers import build_optimiser
from almlip_jax.training.penalties import HuberLoss
from almlip_jax.training.schedules import in_second_stage, learning_rate

STAGED = {
    "max_steps": 400,
    "validate_every": 20,
    "patience": 1,
    "ema": 0.0,
    "loss": {"energy": 1.0, "forces": 2.0},
    "second_stage": {"start": 0.75, "energy": 300.0, "forces": 0.5, "learning_rate_factor": 0.25},
}


def rates(settings: TrainingSettings, steps: list[int], total: int = 1000, factor: float = 1.0) -> np.ndarray:
    """Learning rates of the steps after so many done ones."""
    return np.array(
        [float(learning_rate(settings, jnp.asarray(n), jnp.asarray(total), jnp.asarray(factor))) for n in steps]
    )


class TestSchedules:
    STEPS = [0, 24, 499, 749, 999]
    PROGRESS = np.array([0.001, 0.025, 0.5, 0.75, 1.0])
    RISE = np.array([0.02, 0.5, 1, 1, 1])

    @pytest.mark.parametrize(
        ("schedule", "shape"),
        [
            ("cosine", 0.01 + 0.99 * 0.5 * (1 + np.cos(np.pi * PROGRESS))),
            ("exponential", 0.01**PROGRESS),
            ("constant", np.ones(5)),
            ("plateau", np.full(5, 0.125)),
        ],
    )
    def test_each_is_its_formula(self, schedule, shape):
        settings = TrainingSettings(schedule=schedule, final_learning_rate=0.01, learning_rate=3e-3)
        np.testing.assert_allclose(rates(settings, self.STEPS, factor=0.125), 3e-3 * self.RISE * shape, rtol=1e-4)

    def test_a_plateau_falls_no_lower_than_the_last_rate(self):
        settings = TrainingSettings(schedule="plateau", final_learning_rate=0.01, learning_rate=1.0)
        assert rates(settings, [500], factor=1e-5)[0] == pytest.approx(0.01)

    def test_the_rate_falls_after_enough_validations_without_a_better_mean(self, waters):
        """The mean over the members decides, those that diverged aside; a fall restarts the count."""
        settings = settings_of(schedule="plateau", plateau_factor=0.5, plateau_patience=2)
        trainer = trainer_of(waters, settings, model=PLAIN)
        seen = trainer.program.initial(jax.jit(trainer.ensemble.init)(jax.random.key(0))).plateau
        factors = []
        for loss in ([4, 2], [3, 1], [1, 3.5], [2, 2], [2, 2], [2, 1.9], [2, 2], [np.nan, 1], [1, 1], [1, 1], [1, 1]):
            seen = trainer.program.follow_plateau(seen, jnp.asarray(loss, jnp.float32))
            factors.append(float(seen.factor))
        assert factors == [1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.25, 0.25]

    def test_a_training_on_a_plateau_comes_to_rest(self, waters):
        """Far too large steps never improve; once the rate has fallen by a million, nothing moves any more."""
        settings = settings_of(
            schedule="plateau", learning_rate=0.5, warm_up=0.0, plateau_factor=1e-7, plateau_patience=1, ema=0.0,
            max_steps=200,
        )  # fmt: skip
        references = reference_energies(waters, SPECIES)
        trainer = trainer_of(waters, settings, model=PLAIN)
        result = trainer.train(waters, None, jax.random.key(0), reference_energies=references)
        losses = np.array([report.validation_loss for report in result.history])
        mean = losses.mean(axis=1)
        fell = int(np.argmax(mean >= np.minimum.accumulate(np.r_[np.inf, mean[:-1]])))
        assert 0 < fell < len(mean) - 1
        assert np.abs(losses[1] / losses[0] - 1).max() > 1e-2
        np.testing.assert_allclose(
            losses[fell + 1 :], np.broadcast_to(losses[fell], losses[fell + 1 :].shape), rtol=1e-2
        )

    def test_one_of_ones_own_is_its_formula(self, with_module):
        with_module("own_rates", "def steps(at):\n    return lambda progress: 1.0 - 0.75 * (progress > at)\n")
        schedule = {"kind": "user", "function": "own_rates:steps", "parameters": {"at": 0.6}}
        settings = TrainingSettings(schedule=schedule, learning_rate=3e-3)
        shape = np.array([1, 1, 1, 0.25, 0.25])
        np.testing.assert_allclose(rates(settings, self.STEPS), 3e-3 * self.RISE * shape, rtol=1e-5)

    def test_an_exponential_needs_an_end(self):
        with pytest.raises(ValidationError, match="never reaches 0"):
            TrainingSettings(schedule="exponential")


class TestOptimisers:
    GRADIENTS = np.array([[0.3, -0.2, 0.0], [-0.1, 0.4, 0.0], [0.2, 0.2, 0.0]])
    START = np.array([1.0, -2.0, 5.0])

    def updates(self, **settings) -> np.ndarray:
        optimiser = build_optimiser(TrainingSettings(clip_norm=100.0, **settings))
        state = optimiser.init(jnp.asarray(self.START))
        found = []
        for gradient in self.GRADIENTS:
            update, state = optimiser.update(jnp.asarray(gradient), state, jnp.asarray(self.START))
            found.append(update)
        return np.array(found)

    def formula(self, largest: bool) -> np.ndarray:
        """Adam with the usual constants; ``largest``: AMSGrad's running maximum of the second moment."""
        first = second = top = np.zeros(3)
        found = []
        for n, gradient in enumerate(self.GRADIENTS, start=1):
            first = 0.9 * first + 0.1 * gradient
            second = 0.999 * second + 0.001 * gradient**2
            corrected = second / (1 - 0.999**n)
            top = np.maximum(top, corrected)
            found.append(first / (1 - 0.9**n) / (np.sqrt(top if largest else corrected) + 1e-8))
        return np.array(found)

    @pytest.mark.parametrize("optimiser", ["amsgrad", "adam"])
    def test_each_is_its_formula(self, optimiser):
        expected = self.formula(optimiser == "amsgrad")
        np.testing.assert_allclose(self.updates(optimiser=optimiser), expected, rtol=1e-4)
        assert np.abs(self.formula(True) - self.formula(False)).max() > 1e-2

    def test_weight_decay_pulls_what_is_learned_and_spares_constants(self):
        """The third parameter sees no gradient, as the scales that a model takes from data."""
        expected = self.formula(False) + 0.1 * self.START * np.array([1, 1, 0])
        np.testing.assert_allclose(self.updates(optimiser="adamw", weight_decay=0.1), expected, rtol=1e-4)

    def test_one_of_ones_own_leaves_constants_alone(self, with_module):
        """Signs of momenta, as optax has them, less a share of the parameters that would shrink constants too."""
        with_module("own_optimisers", OWN)
        optimiser = {"kind": "user", "function": "own_optimisers:lion", "parameters": {"decay": 0.1}}
        built = build_optimiser(TrainingSettings(optimiser=optimiser))
        params = {"params": jnp.asarray([2.0, -3.0]), "constants": jnp.asarray([4.0])}
        gradient = {"params": jnp.asarray([0.3, -0.2]), "constants": jnp.asarray([0.0])}
        update, _ = built.update(gradient, built.init(params), params)
        np.testing.assert_allclose(update["params"], [1 + 0.2, -1 - 0.3], rtol=1e-6)
        assert float(update["constants"][0]) == 0.0

    def test_what_is_no_optimiser_is_refused(self):
        optimiser = {"kind": "user", "function": "math:hypot"}
        with pytest.raises(InputError, match="'math:hypot' must return a gradient transformation of optax"):
            build_optimiser(TrainingSettings(optimiser=optimiser))


OWN = """
import optax

def lion(decay):
    return optax.chain(optax.scale_by_lion(), optax.add_decayed_weights(decay))
"""


class TestSecondStage:
    @pytest.fixture(scope="class")
    def staged(self, waters):
        settings = settings_of(**STAGED)
        trainer = trainer_of([*waters, *waters], settings, model=PLAIN)
        references = reference_energies(waters, SPECIES)
        return trainer, trainer.train(waters, None, jax.random.key(0), reference_energies=references), references

    def test_weights_and_rate_change_at_its_start(self):
        settings = TrainingSettings(
            second_stage={"start": 0.6, "energy": 7.0, "learning_rate_factor": 0.1}, schedule="constant", warm_up=0.0
        )
        total = jnp.asarray(50)
        assert [bool(in_second_stage(settings, jnp.asarray(n), total)) for n in (0, 29, 30, 49)] == [0, 0, 1, 1]
        assert [(loss.energy, loss.forces, loss.virial) for loss in settings.losses] == [(10, 1, 1), (7, 1, 1)]
        np.testing.assert_allclose(rates(settings, [29, 30], total=50), [5e-3, 5e-4], rtol=1e-5)
        whole = {"loss": {"kind": "huber", "forces_delta": 0.3}}
        assert TrainingSettings(second_stage=whole).losses[1] == HuberLoss(forces_delta=0.3)
        with pytest.raises(ValidationError, match="loss says it all; leave out energy"):
            TrainingSettings(second_stage=whole | {"energy": 2.0})

    def test_validation_weighs_as_the_stage_does(self, staged):
        _, result, _ = staged
        for report in result.history:
            energy, forces = (300.0, 0.5) if report.step >= 300 else (1.0, 2.0)
            expected = energy * report.validation_energy_rmse**2 + forces * report.validation_forces_rmse**2
            np.testing.assert_allclose(report.validation_loss, expected, rtol=1e-4)

    def test_what_is_kept_is_the_best_of_the_second_stage(self, staged, waters):
        trainer, result, references = staged
        run = trainer.prepare(trainer.training_set(waters, references), 400, jax.random.key(0))
        found = means(trainer.program.validate(result.params, run)[0])
        late = np.array([report.validation_loss for report in result.history if report.step >= 300])
        np.testing.assert_allclose(300 * found["energy"] + 0.5 * found["forces"], late.min(axis=0), rtol=1e-3)

    def test_errors_are_those_of_what_is_kept(self, staged, waters):
        """Forces were better in the first stage, whose parameters are gone."""
        trainer, result, references = staged
        run = trainer.prepare(trainer.training_set(waters, references), 400, jax.random.key(0))
        forces = np.sqrt(means(trainer.program.validate(result.params, run)[0])["forces"])
        assert result.errors["forces_rmse"] == pytest.approx(forces.mean(), rel=1e-4)
        assert validation_note(result) == {VALIDATION_ERROR: result.errors["forces_rmse"]}
        lowest = np.min([report.validation_forces_rmse for report in result.history], axis=0).mean()
        assert lowest < 0.99 * result.errors["forces_rmse"]

    def test_patience_waits_for_it(self, staged):
        """With a patience of one validation the first stage would have ended at the first loss that rose."""
        _, result, _ = staged
        early = [report for report in result.history if report.step < 300]
        assert np.any(np.diff([report.validation_loss for report in early], axis=0) > 0)
        assert not any(report.stopped.any() for report in early)

    @pytest.mark.slow
    def test_it_is_better_at_what_it_weighs(self):
        """Forces that are half as large again as the energies say: only weights decide which of both is learned."""
        torn = []
        for atoms in (water(seed) for seed in range(64)):  # of a few, those that validate decide by chance
            energy, forces = atoms.get_potential_energy(), 1.5 * atoms.get_forces()
            torn.append(atoms.copy())
            torn[-1].calc = SinglePointCalculator(torn[-1], energy=energy, forces=forces)
        references = reference_energies(torn, SPECIES)
        errors = []
        for second in (None, {"start": 0.5, "energy": 100.0, "forces": 0.0}):
            settings = settings_of(max_steps=400, loss={"energy": 0.1, "forces": 1.0}, second_stage=second)
            trainer = trainer_of(torn, settings, members=6, model=PLAIN)
            result = trainer.train(torn, None, jax.random.key(0), reference_energies=references)
            last = result.history[-1]
            errors.append((last.validation_energy_rmse.mean(), last.validation_forces_rmse.mean()))
        assert errors[1][0] < 0.5 * errors[0][0] and errors[1][1] > 1.5 * errors[0][1]

    def test_it_compiles_nothing_on_its_way(self, staged, waters, count_compilations):
        trainer, _, references = staged
        with count_compilations() as compiled:
            trainer.train([*waters, water(70)], None, jax.random.key(1), reference_energies=references)
        assert not compiled
