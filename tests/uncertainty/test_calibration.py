"""Calibration metrics on samples whose calibration is known, and against slow definitions."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import norm

from almlip_jax.uncertainty import (
    auroc,
    ause,
    calibration_metrics,
    crps,
    ence,
    force_calibration,
    miscalibration_area,
    nll,
    nll_scale,
    slope,
)


@pytest.fixture(scope="module")
def sample() -> tuple[np.ndarray, np.ndarray]:
    """Errors drawn with exactly the standard deviations that are told."""
    rng = np.random.default_rng(0)
    sigma = rng.uniform(0.05, 0.5, size=40_000)
    return rng.normal(size=sigma.size) * sigma, sigma


def test_a_calibrated_sample(sample):
    errors, sigma = sample
    found = calibration_metrics(errors, sigma, bound=0.3)
    assert found["zms"] == pytest.approx(1, abs=0.03) and found["scale"] == pytest.approx(1, abs=0.02)
    assert found["miscalibration_area"] < 0.01 and found["ence"] < 0.05
    assert found["slope"] == pytest.approx(np.sqrt(2 / np.pi), abs=0.01)
    assert found["auroc"] > 0.75 and found["spearman"] > 0.4


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_wrong_scale_is_found_and_put_right(sample, factor):
    errors, sigma = sample
    wrong = factor * sigma
    assert nll_scale(errors, wrong) == pytest.approx(1 / factor, rel=0.02)
    assert slope(errors, wrong) == pytest.approx(np.sqrt(2 / np.pi) / factor, rel=0.02)
    assert ence(errors, wrong) == pytest.approx(abs(1 - 1 / factor), abs=0.04)
    # p_obs(p) = 2 Phi(factor * z_p) - 1 for a Gaussian
    area, _ = quad(lambda p: abs(2 * norm.cdf(factor * norm.ppf(0.5 + p / 2)) - 1 - p), 0, 1)
    assert miscalibration_area(errors, wrong) == pytest.approx(area, abs=0.01)
    assert nll(errors, wrong) > nll(errors, sigma) and crps(errors, wrong) > crps(errors, sigma)


def test_crps_is_its_integral():
    for error, sigma in [(0.3, 0.2), (-1.0, 0.5), (0.0, 1.0)]:
        value, _ = quad(lambda x, e=error, s=sigma: (norm.cdf(x / s) - (x >= e)) ** 2, -8, 8, points=[error], limit=200)
        assert crps(np.array([error]), np.array([sigma])) == pytest.approx(value, rel=1e-5)


def test_auroc_counts_pairs():
    rng = np.random.default_rng(1)
    sigma, errors = np.round(rng.uniform(size=60), 1), rng.normal(size=60)
    large, small = sigma[abs(errors) > 0.7], sigma[abs(errors) <= 0.7]
    wins = np.sum(large[:, None] > small[None]) + 0.5 * np.sum(large[:, None] == small[None])
    assert auroc(errors, sigma, 0.7) == pytest.approx(wins / (len(large) * len(small)))
    assert np.isnan(auroc(errors, sigma, 100.0))


def test_ause_is_zero_for_a_perfect_order_and_positive_for_noise(sample):
    errors, _ = sample
    assert ause(errors, np.abs(errors)) == pytest.approx(0, abs=1e-12)
    assert ause(errors, np.random.default_rng(2).uniform(size=errors.size)) > 0.3


def test_forces_are_judged_by_component():
    """s_i is the length of a vector; its components have s_i / sqrt(3)."""
    rng = np.random.default_rng(3)
    force_std = rng.uniform(0.05, 0.5, size=20_000)
    errors = rng.normal(size=(20_000, 3)) * force_std[:, None] / np.sqrt(3)
    found = force_calibration(errors, force_std)
    assert found["zms"] == pytest.approx(1, abs=0.03) and found["miscalibration_area"] < 0.01


def test_too_few_values_are_no_number():
    assert np.isnan(list(calibration_metrics(np.array([1.0]), np.array([1.0]), 0.1).values())).all()


def test_a_committee_of_one_has_no_calibration():
    """No spread at all is no estimate: its metrics are no numbers, not astronomical ones."""
    errors = np.random.default_rng(4).normal(size=(10, 3))
    assert np.isnan(list(force_calibration(errors, np.zeros(10)).values())).all()
    assert np.isfinite(force_calibration(errors, np.append(np.ones(9), 0.0))["spearman"])


def test_the_scale_minimises_the_likelihood_and_serves_vectors_and_components_alike():
    rng = np.random.default_rng(5)
    force_std = rng.uniform(0.05, 0.5, size=500)
    errors = 3 * rng.normal(size=(500, 3)) * force_std[:, None]
    flat, sigma = errors.reshape(-1), np.repeat(force_std, 3) / np.sqrt(3)
    alpha = nll_scale(flat, sigma)
    assert nll(flat, alpha * sigma) < min(nll(flat, factor * alpha * sigma) for factor in (0.99, 1.01))
    assert force_calibration(errors, force_std)["scale"] == pytest.approx(alpha)
    assert nll_scale(np.linalg.norm(errors, axis=1), force_std) == pytest.approx(alpha)
