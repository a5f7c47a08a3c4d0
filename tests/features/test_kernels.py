"""Kernel transformations against kernels."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from almlip_jax.features import ensemble_sum, posterior, unit_diagonal
from almlip_jax.kernels import gram


def test_ensemble_sum_is_the_mean_of_the_kernels():
    rows = np.random.default_rng(0).normal(size=(3, 5, 4))
    found = ensemble_sum(jnp.asarray(rows))
    np.testing.assert_allclose(found @ found.T, np.mean([one @ one.T for one in rows], axis=0), rtol=1e-5, atol=1e-5)


def test_unit_diagonal_scales_the_training_kernel():
    rng = np.random.default_rng(1)
    rows, known = rng.normal(size=(6, 4)), 7 * rng.normal(size=(5, 4))
    counts = np.array([1, 1, 0, 1, 0], bool)
    factor = unit_diagonal(rows, np.where(counts[:, None], known, 0), counts)
    assert np.mean(np.sum((factor * known[counts]) ** 2, axis=1)) == pytest.approx(1, rel=1e-5)
    alone = unit_diagonal(rows, np.zeros((0, 4)), np.zeros(0, bool))
    assert np.mean(np.sum((alone * rows) ** 2, axis=1)) == pytest.approx(1, rel=1e-5)
    assert unit_diagonal(rows, np.zeros((5, 4)), counts) == alone, "rows that are zero set no scale"
    assert unit_diagonal(np.zeros((6, 4)), np.zeros((5, 4)), counts) == 1


def test_posterior_is_that_of_a_gaussian_process():
    rng = np.random.default_rng(2)
    rows, known = rng.normal(size=(6, 4)), rng.normal(size=(3, 4))
    with jax.enable_x64(True):
        found = np.asarray(posterior(jnp.asarray(rows), jnp.asarray(known), 0.2))
    cross = rows @ known.T
    by_hand = rows @ rows.T - cross @ np.linalg.inv(known @ known.T + 0.04 * np.eye(3)) @ cross.T
    np.testing.assert_allclose(found @ found.T, by_hand, atol=1e-10)


def test_noise_that_rounding_would_hide_is_raised_to_what_it_does_not():
    """Rows in few directions, in float32: without, the factor is not a number."""
    rng = np.random.default_rng(4)
    known = rng.normal(size=8) + 1e-3 * rng.normal(size=(60, 2)) @ rng.normal(size=(2, 8))
    unseen = np.linalg.svd(known)[2][-1]
    seen, free = (
        np.sum(np.asarray(posterior(jnp.asarray(row[None]), jnp.asarray(known), 1e-3)) ** 2)
        for row in (known.mean(axis=0), unseen)
    )
    assert 0 < seen < 1e-4 and free == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("n", [3, 4096, 9000])
def test_gram_in_blocks(n):
    rows = np.random.default_rng(3).normal(size=(n, 3)).astype(np.float32)
    with jax.enable_x64(True):
        found = jax.jit(gram)(jnp.asarray(rows))
    assert found.dtype == jnp.float64
    np.testing.assert_allclose(found, rows.T.astype(float) @ rows.astype(float), rtol=1e-10, atol=1e-9)
