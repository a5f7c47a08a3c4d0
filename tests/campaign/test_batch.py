"""What selectors are told of labelled structures: true errors, and the weight that follows progress."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from almlip_jax.campaign.batch import ERRORS, candidates, uncertainty_weight


def test_labelled_structures_carry_their_true_errors():
    rng = np.random.default_rng(0)
    frames = [Atoms("H3", positions=rng.normal(size=(3, 3))) for _ in range(3)]
    forces, energy = rng.normal(size=(3, 3, 3)), rng.normal(size=3)
    frames[0].calc = SinglePointCalculator(frames[0], energy=1.0, forces=np.ones((3, 3)))
    frames[1].calc = SinglePointCalculator(frames[1], energy=2.0)
    found = SimpleNamespace(
        features={"latent": np.zeros((3, 2))}, scores={"s": np.ones(3)}, energy=energy, forces=forces
    )
    made = candidates(frames, found, 5, labelled=True, scalars={"weight": 0.4})
    assert set(made.scores) == {"s", *ERRORS} and made.scalars["weight"] == pytest.approx(0.4)
    lengths = np.linalg.norm(forces[0] - 1, axis=1)
    np.testing.assert_allclose(made.scores["energy_error"][:3], [abs(energy[0] - 1), abs(energy[1] - 2), np.nan], 1e-6)
    np.testing.assert_allclose(made.scores["force_error_mean"][:3], [lengths.mean(), np.nan, np.nan], 1e-6)
    np.testing.assert_allclose(made.scores["force_error_max"][:3], [lengths.max(), np.nan, np.nan], 1e-6)
    assert list(made.valid) == [True] * 3 + [False] * 2


def test_weight_of_uncertainty_rises_as_progress_fades():
    steady = uncertainty_weight(0.3, [1.0, 0.8, 0.6])
    assert steady == pytest.approx(0.3) == uncertainty_weight(0.3, []) == uncertainty_weight(0.3, [1.0])
    assert uncertainty_weight(0.3, [1.0, 0.8, 0.8]) == pytest.approx(0.3 + 0.3 * 0.7)
    assert uncertainty_weight(0.3, [1.0, 0.8, 1.0]) == pytest.approx(0.3 * 0.7)
