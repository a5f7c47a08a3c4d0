"""The small matrices of variable projection, against scipy and finite differences."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import lsq_linear

from almlip_jax.training.projection.algebra import damped_step, solve
from almlip_jax.training.projection.search import advanced, begun, best


class Problem:
    """Labels that are a sum of exponentials: linear in amplitudes, not in the rates."""

    def __init__(self, seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        self.t = np.linspace(0, 4, 60)
        self.labels = self.columns(np.array([0.5, 1.7, 3.0])) @ [1.0, -2.0, 0.7] + 0.01 * generator.normal(size=60)

    def columns(self, rates: np.ndarray) -> np.ndarray:
        """[n, 3]."""
        return np.exp(-self.t[:, None] * rates)

    def factor(self, rates: np.ndarray, amplitudes: np.ndarray) -> np.ndarray:
        """The triangular factor of [Phi J y]."""
        phi = self.columns(rates)
        return np.linalg.qr(np.column_stack([phi, -self.t[:, None] * phi * amplitudes, self.labels]), mode="r")

    def solved(self, rates: np.ndarray, ridge: float = 1e-10):
        """Its point at some rates."""
        first = solve(self.factor(rates, np.zeros(3)), 3, ridge)
        return solve(self.factor(rates, first.linear), 3, ridge)


RATES = np.array([0.4, 1.5, 3.3])


def test_linear_parameters_are_those_of_least_squares():
    problem = Problem()
    found = problem.solved(RATES)
    wanted = lsq_linear(problem.columns(RATES), problem.labels, tol=1e-14)
    np.testing.assert_allclose(found.linear, wanted.x, rtol=1e-8)
    assert found.loss == pytest.approx(2 * wanted.cost, rel=1e-10)


def test_the_gradient_is_that_of_the_projected_loss():
    problem, step = Problem(), 1e-5
    found = problem.solved(RATES)
    slopes = [
        (problem.solved(RATES + step * one).loss - problem.solved(RATES - step * one).loss) / (2 * step)
        for one in np.eye(3)
    ]
    np.testing.assert_allclose(-2 * found.gradient, slopes, rtol=1e-6)
    moved = problem.solved(RATES + step * np.ones(3)).linear - problem.solved(RATES - step * np.ones(3)).linear
    first_order = found.response @ np.ones(3)  # without what the residual adds
    np.testing.assert_allclose(moved / (2 * step), first_order, rtol=0.2)


def test_steps_reach_the_minimum():
    """The loss falls as promised, and to where the true rates are."""
    problem, rates = Problem(), RATES
    for _ in range(30):
        point = problem.solved(rates)
        step = damped_step(point, np.diag(point.curvature), 1e-8)
        rates = rates + step.others
    assert np.linalg.norm(problem.solved(rates).gradient) < 1e-9
    np.testing.assert_allclose(rates, [0.5, 1.7, 3.0], rtol=0.3)


def test_what_data_leave_open_is_shared_or_nothing():
    """Two equal columns share a coefficient, an empty one has none, and the others are as without them."""
    generator = np.random.default_rng(1)
    phi, labels = generator.normal(size=(30, 3)), generator.normal(size=30)
    wide = np.column_stack([phi, phi[:, 1], np.zeros(30)])
    plain = solve(np.linalg.qr(np.column_stack([phi, labels]), mode="r"), 3, 1e-10)
    found = solve(np.linalg.qr(np.column_stack([wide, labels]), mode="r"), 5, 1e-10)
    assert found.linear[4] == 0
    assert found.linear[1] == pytest.approx(found.linear[3], abs=1e-6)
    np.testing.assert_allclose(found.linear[:3] + [0, found.linear[3], 0], plain.linear, rtol=1e-8)
    assert found.loss == pytest.approx(plain.loss, rel=1e-10)


def test_a_ridge_of_rounding_leaves_nothing_to_cancel():
    """Of columns that nearly depend on each other, large coefficients fit best until the columns are rounded."""
    generator, eps = np.random.default_rng(2), float(np.finfo(np.float32).eps)
    few, near = generator.normal(size=(200, 6)), 1e-9 * generator.normal(size=(200, 6))
    phi = np.column_stack([few, few + near])
    labels = few.sum(axis=1) + 1e-4 * generator.normal(size=200)
    rounded = phi * (1 + eps * generator.uniform(-0.5, 0.5, size=phi.shape))
    factor = np.linalg.qr(np.column_stack([phi, labels]), mode="r")

    def loss(ridge: float, columns: np.ndarray) -> float:
        return float(np.sum((columns @ solve(factor, 12, ridge).linear - labels) ** 2))

    assert loss(1e-10, rounded) > 5 * loss(1e-10, phi)
    assert loss(eps, rounded) < 1.05 * loss(1e-10, phi)


def test_numbers_that_are_none_are_seen():
    assert not solve(np.full((5, 5), np.nan), 2, 1e-10).finite


def test_a_search_that_has_looked_at_no_data_is_never_the_best():
    """As of a training that goes on from fewer models than there is room for."""
    rng = np.random.default_rng(4)
    factor = np.linalg.qr(rng.normal(size=(40, 6)), mode="r")

    def look(others: np.ndarray, linear: np.ndarray, active: np.ndarray) -> np.ndarray:
        return np.where(active[:, None, None], factor, 0.0)

    tried = np.array([False, True, False])
    searches = begun(look, rng.normal(size=(3, 2)), 3, tried, 1e-10)
    assert best(searches) == 1 and np.any(searches[1].point.linear)
    assert best(advanced(look, searches, 1e-10, 1e-4)) == 1
