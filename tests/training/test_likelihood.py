"""Likelihoods and scores against scipy, and members that learn how large their errors are."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ase.calculators.singlepoint import SinglePointCalculator
from scipy.integrate import quad
from scipy.stats import laplace, norm
from scipy.stats import t as student
from small_training import MODEL, SPECIES, settings_of, water

from almlip_jax.ensembles import Belief, EnsembleSettings, EvidentialBelief, gives_score
from almlip_jax.errors import InputError
from almlip_jax.fitting import fit_potential
from almlip_jax.kinds import check_user_code
from almlip_jax.targets import Target
from almlip_jax.training import LossSettings, TrainingSettings, build_trainer, plan_capacity
from almlip_jax.training.penalties import LikelihoodLoss, RankedLoss, SquaredLoss


def penalty(residual: np.ndarray, belief: Belief | None, loss: LossSettings) -> np.ndarray:
    with jax.enable_x64(True):
        found = loss.penalty(jnp.asarray(residual), jax.tree.map(jnp.asarray, belief), Target("energy", "eV"))
        return np.asarray(found)


def test_likelihood_of_heads_is_that_of_a_normal_distribution():
    residual = np.random.default_rng(0).normal(size=(5, 7))
    sigma = np.sqrt(residual.var(axis=0) + 0.01)
    expected = -norm.logpdf(residual.mean(axis=0), scale=sigma) - 0.5 * np.log(2 * np.pi)
    np.testing.assert_allclose(penalty(residual, None, LikelihoodLoss(energy_floor=0.1)), expected, rtol=1e-10)


def test_noise_adds_to_the_variance_of_heads():
    residual = np.random.default_rng(1).normal(size=(3, 7))
    belief = Belief(np.linspace(0.1, 3.0, 7))
    sigma = np.sqrt(residual.var(axis=0) + 0.01 + np.linspace(0.1, 3.0, 7))
    expected = -norm.logpdf(residual.mean(axis=0), scale=sigma) - 0.5 * np.log(2 * np.pi)
    np.testing.assert_allclose(penalty(residual, belief, LikelihoodLoss(energy_floor=0.1)), expected, rtol=1e-10)


def test_evidential_likelihood_is_students():
    rng = np.random.default_rng(2)
    residual, variance = rng.normal(size=(1, 9)), rng.uniform(0.2, 2.0, size=9)
    v, alpha = rng.uniform(0.3, 4.0, size=9), rng.uniform(1.2, 5.0, size=9)
    belief = EvidentialBelief(variance, v, alpha)
    beta = (variance + 0.01) * (alpha - 1)
    scale = np.sqrt(beta * (1 + v) / (v * alpha))
    expected = -student.logpdf(residual[0], 2 * alpha, scale=scale) - 0.5 * np.log(np.pi)
    loss = LikelihoodLoss(energy_floor=0.1, evidence_penalty=0.0)
    np.testing.assert_allclose(penalty(residual, belief, loss), expected, rtol=1e-9)
    more = penalty(residual, belief, LikelihoodLoss(energy_floor=0.1, evidence_penalty=0.3)) - expected
    np.testing.assert_allclose(more, 0.3 * np.abs(residual[0]) / np.sqrt(variance + 0.01) * (2 * v + alpha), rtol=1e-8)


def test_ranked_probability_score_is_its_integral():
    residual = np.array([[0.4, -1.3, 0.0]])
    sigma = np.sqrt(0.01 + np.array([0.2, 1.0, 2.5]))
    found = penalty(residual, Belief(np.array([0.2, 1.0, 2.5])), RankedLoss(energy_floor=0.1))
    for value, r, s in zip(found, residual[0], sigma, strict=True):
        below = quad(lambda x, s=s: norm.cdf(x, scale=s) ** 2, -40, r)[0]
        above = quad(lambda x, s=s: (1 - norm.cdf(x, scale=s)) ** 2, r, 40)[0]
        assert value == pytest.approx(below + above, rel=1e-6)


LAPLACE = """
import jax.numpy as jnp
from flax import struct
from almlip_jax.ensembles import Belief, EvidentialBelief, Noise
from almlip_jax.structures.graph import sum_over_atoms

@struct.dataclass
class Laplace(Belief):
    def nll(self, residual, floor):
        mean, variance = self.normal(residual, floor)
        width = jnp.sqrt(variance / 2)
        return jnp.log(width) + jnp.abs(mean) / width

@struct.dataclass
class Joint(Laplace):
    def nll(self, residual, floor):
        return super().nll(residual, floor).sum(axis=-1)

def laplace(first=0.1, kind=Laplace, **also):
    def noise(raw, graph, scale):
        variance = (first * scale) ** 2 * jnp.exp(2 * raw)
        energy, virial = (sum_over_atoms(variance[:, n], graph) for n in (0, 2))
        return Noise(*(kind(one, **{name: one for name in also}) for one in (energy, variance[:, 1], virial)))
    return noise

def joint(): return laplace(kind=Joint)
def sure(): return laplace(kind=EvidentialBelief, evidence=0, shape=0)
def of_atoms(): return lambda raw, graph, scale: Noise(*(Laplace(raw) for _ in range(3)))
def bare(): return lambda raw, graph, scale: raw
def wide(): return lambda raw, graph, scale: raw @ jnp.ones((5, 5))
"""


def by_hand(function: str, **keys: Any) -> dict[str, Any]:
    """A likelihood of the user's module."""
    return {"kind": "user", "function": f"errors_by_hand:{function}"} | keys


def test_a_likelihood_of_a_user_judges_by_its_own_distribution(with_module):
    with_module("errors_by_hand", LAPLACE)
    import errors_by_hand

    residual, variance = np.random.default_rng(4).normal(size=(3, 7)), np.linspace(0.1, 3.0, 7)
    width = np.sqrt((residual.var(axis=0) + 0.01 + variance) / 2)
    expected = -laplace.logpdf(residual.mean(axis=0), scale=width) - np.log(2)
    found = penalty(residual, errors_by_hand.Laplace(variance), LikelihoodLoss(energy_floor=0.1))
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    for likelihood, needed in ((by_hand("laplace"), "total"), (by_hand("sure", epistemic=True), "epistemic")):
        members = EnsembleSettings(size=1, likelihood=likelihood)
        check_user_code(members)
        assert EnsembleSettings.model_validate(members.model_dump(mode="json")) == members
        assert gives_score(f"force_{needed}_max", members)
    assert not gives_score("force_epistemic_max", EnsembleSettings(size=1, likelihood=by_hand("laplace")))


@pytest.mark.parametrize(
    ("likelihood", "sentence"),
    [
        (by_hand("joint"), r"nll of the Joint of 'errors_by_hand:joint' must give a number for each residual"),
        (by_hand("sure"), r"tells a variance of the prediction itself; set ensemble.likelihood.epistemic to true"),
        (by_hand("laplace", epistemic=True), r"tells no variance .*; set ensemble.likelihood.epistemic to false"),
        (by_hand("of_atoms"), r"has variance of shape \(1, 3\) for one atom"),
        (by_hand("bare"), r"must return a function that makes an almlip_jax.ensembles.Noise of three Beliefs"),
        (by_hand("wide", columns=4), r"fails on 4 outputs of an atom \(TypeError"),
    ],
    ids=lambda given: given["function"].rpartition(":")[2] if isinstance(given, dict) else "",
)
def test_likelihoods_of_users_that_nothing_could_learn_from_are_refused(with_module, likelihood, sentence):
    with_module("errors_by_hand", LAPLACE)
    with pytest.raises(InputError, match=sentence):
        check_user_code(EnsembleSettings(likelihood=likelihood))


@pytest.mark.slow
@pytest.mark.parametrize(
    "likelihood",
    [*("mean_variance", "evidential"), by_hand("laplace")],
    ids=["mean_variance", "evidential", "laplace"],
)
def test_noise_is_learned_where_it_is(likelihood, with_module):
    """Labels of the oxygen carry noise of 0.6 eV/Angstrom, those of hydrogen of 0.15."""
    with_module("errors_by_hand", LAPLACE)
    rng, noisy = np.random.default_rng(3), []
    for seed in range(60):
        atoms = water(seed)
        noise = rng.normal(size=(3, 3)) * np.where(atoms.numbers == 8, 0.6, 0.15)[:, None]
        results = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces() + noise}
        noisy.append(atoms.copy())
        noisy[-1].calc = SinglePointCalculator(noisy[-1], **results)
    training = settings_of(
        max_steps=1500,
        max_epochs=1000,
        batch_size=10,
        validation_fraction=0.0,
        second_stage={"start": 0.4, "kind": "nll"},
    )
    members = EnsembleSettings(size=1, likelihood=likelihood)
    potential, _ = fit_potential(noisy, MODEL, members, training, 0)
    found = potential.evaluate([water(seed) for seed in range(100, 110)])
    numbers = np.concatenate([water(0).numbers] * 10)
    total = np.concatenate(found.atom_scores["force_total"]) / np.sqrt(3)
    assert 0.45 < total[numbers == 8].mean() < 0.85 and 0.11 < total[numbers == 1].mean() < 0.32
    assert np.all(np.concatenate(found.atom_scores["force_std"]) == 0)


@pytest.mark.slow
def test_heads_learn_to_spread_as_they_err():
    """Squares leave the heads at the spread they began with, or let them agree, which their errors do not.

    On the average over seeds: one training may end anywhere.
    """
    waters = [water(seed) for seed in range(64)]
    tests = [water(seed) for seed in range(200, 230)]
    true = np.concatenate([atoms.get_forces() for atoms in tests])

    def learned(loss: str, seed: int) -> tuple[float, float]:
        """How far spread and error are apart, as a logarithm, and the negative log-likelihood."""
        training = settings_of(max_steps=1000, loss={"kind": loss})
        potential, _ = fit_potential(waters, MODEL, EnsembleSettings(size=1, heads=8), training, seed)
        found = potential.evaluate(tests)
        error = np.concatenate(found.forces) - true
        spread = np.sqrt(np.concatenate(found.atom_scores["force_std"])[:, None] ** 2 / 3 + 1e-6)
        apart = np.log(np.sqrt(np.mean(spread**2) / np.mean(error**2)))
        return abs(float(apart)), float(-norm.logpdf(error, scale=spread).mean())

    (apart, likelihood), of_likelihood, of_ranks = (
        np.mean([learned(loss, seed) for seed in range(4)], axis=0) for loss in ("mse", "nll", "crps")
    )
    assert of_likelihood[0] < apart / 2 and of_ranks[0] < apart / 2
    assert of_likelihood[1] < likelihood - 1 and of_ranks[1] < likelihood - 1


@pytest.mark.parametrize(
    ("members", "training", "message"),
    [
        ({}, {"loss": {"kind": "nll"}}, "needs members that say how sure"),
        ({}, {"second_stage": {"kind": "crps"}}, "'crps' needs members"),
        ({"likelihood": "mean_variance"}, {}, "learns from a loss of kind"),
    ],
)
def test_losses_and_members_that_do_not_go_together(waters, members, training, message):
    settings = TrainingSettings(**training)
    capacity = plan_capacity(waters, MODEL.cutoff, settings)
    with pytest.raises(InputError, match=message):
        build_trainer(MODEL, EnsembleSettings(size=2, **members), SPECIES, capacity, settings)


def test_weights_that_are_not_given_follow_the_kind():
    assert (SquaredLoss().energy, LikelihoodLoss().energy) == (10.0, 0.1)
    assert LikelihoodLoss(energy=3.0).energy == 3.0
    late = TrainingSettings(loss={"energy": 5.0}, second_stage={"kind": "nll", "forces": 2.0}).losses[1]
    assert (late.kind, late.energy, late.forces, late.virial) == ("nll", 0.1, 2.0, 0.1)
    assert TrainingSettings.model_validate(TrainingSettings().model_dump(mode="json")) == TrainingSettings()
