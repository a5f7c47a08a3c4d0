"""Batch selectors against brute force: every choice, every gain, and the probabilities of those that draw."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_pools import KEY, SELECTORS, K, candidates, chosen, distances, sample, scaled

from almlip_jax.errors import InputError
from almlip_jax.selection import (
    WEIGHT,
    adapt,
    adaptive,
    bait,
    cost_aware,
    dpp,
    entropy,
    kmeans_pp,
    lcmd,
    max_det,
    random,
    select,
    top_k,
)
from almlip_jax.selection import distances as distances_module
from almlip_jax.selection.clusters import kmeans

LABELLED = pytest.mark.parametrize("labelled", [0, 4])
BACKWARD_BY_COST = cost_aware(SELECTORS["bait_backward"])
DPP, KMEANS_PP = dpp(3, "x", sigma=0.3), kmeans_pp(2, "x")


@LABELLED
def test_lcmd_takes_the_farthest_of_the_largest_cluster(labelled):
    x, _ = sample(1)
    known, _ = sample(2, n=labelled)
    found = select(SELECTORS["lcmd"], KEY, candidates(x), candidates(known))
    centres = list(known)
    for n, row in enumerate(chosen(found)):
        if centres:
            to = distances(x, centres)
            owner, nearest = np.argmin(to, axis=1), np.min(to, axis=1)
            sizes = np.bincount(owner, nearest**2, minlength=len(centres))
            gain = np.where(owner == np.argmax(sizes), nearest, -1)
        else:
            gain = np.linalg.norm(x, axis=1)
        assert row == np.argmax(gain) and found.gain[n] == pytest.approx(gain[row], rel=1e-9)
        centres.append(x[row])


@LABELLED
def test_kmeans_fps_takes_turns_among_clusters(labelled):
    x, _ = sample(3)
    known, _ = sample(4, n=labelled)
    with jax.enable_x64(True):
        points = distances_module.Points(
            jnp.asarray(x - x.mean(0)), jnp.sum((x - x.mean(0)) ** 2, 1), jnp.ones(30, bool)
        )
        cluster, centres = jax.jit(kmeans, static_argnums=(2, 3))(jax.random.split(KEY)[0], points, 3, 20)
    cluster, centres = np.asarray(cluster), np.asarray(centres) + x.mean(0)
    assert np.all(cluster == np.argmin(distances(x, centres), axis=1))
    for c in range(3):
        np.testing.assert_allclose(centres[c], x[cluster == c].mean(axis=0), rtol=1e-9)
    found = select(SELECTORS["kmeans_fps"], KEY, candidates(x), candidates(known))
    turns = sorted(range(3), key=lambda c: -np.sum(cluster == c)) * 2
    centres = list(known)
    for row, turn in zip(chosen(found), turns, strict=True):
        gain = distances(x, centres).min(axis=1) if centres else np.linalg.norm(x, axis=1)
        assert row == np.argmax(np.where(cluster == turn, gain, -1))
        centres.append(x[row])


@pytest.mark.parametrize("name", ["max_det", "bait", "bait_backward", "frank_wolfe", "dpp", "maxvol"])
def test_a_labelled_set_whose_features_are_zero_says_nothing(name):
    """The choice, and what it is worth, are those without a labelled set; where candidates have none either, no NaN."""
    x, _ = sample(5)
    zeros = np.zeros((4, x.shape[1]))
    plain = select(SELECTORS[name], KEY, candidates(x), candidates(zeros, valid=np.zeros(4, bool)))
    found = select(SELECTORS[name], KEY, candidates(x), candidates(zeros))
    assert chosen(found) == chosen(plain)
    np.testing.assert_array_equal(found.gain, plain.gain)
    assert np.all(found.gain[found.valid] > 0) and np.isfinite(found.gain[found.valid]).all()
    nothing = select(SELECTORS[name], KEY, candidates(np.zeros_like(x)), candidates(zeros))
    assert np.all(nothing.gain[nothing.valid] == 0)


def posterior_variance(x: np.ndarray, known: np.ndarray, sigma: float = 0.1) -> Callable[[list[int]], float]:
    """Sum of the posterior variance over labelled and pool, in units of sigma^2, given also rows of the pool."""
    a, b = scaled(x, known)
    fisher = a.T @ a + b.T @ b

    def variance(rows: list[int]) -> float:
        seen = np.concatenate([b, a[rows]])
        return np.trace(np.linalg.solve(seen.T @ seen + sigma**2 * np.eye(x.shape[1]), fisher))

    return variance


@LABELLED
def test_bait_lowers_the_posterior_variance_most(labelled):
    x, _ = sample(5)
    known, _ = sample(6, n=labelled)
    found = select(SELECTORS["bait"], KEY, candidates(x), candidates(known))
    variance = posterior_variance(x, known)
    picked: list[int] = []
    for n in range(K):
        gains = {i: variance(picked) - variance([*picked, i]) for i in range(len(x)) if i not in picked}
        picked.append(max(gains, key=gains.__getitem__))
        assert found.gain[n] == pytest.approx(gains[picked[n]], rel=1e-7)
    assert chosen(found) == picked


@LABELLED
@pytest.mark.parametrize(("usable", "dear"), [(30, False), (30, True), (8, False), (4, False)])
def test_bait_gives_back_what_matters_least(labelled, usable, dear):
    """Twice as many are chosen, where there are as many; then the smallest loss (over its price) goes, one by one."""
    x, score = sample(29)
    known, _ = sample(30, n=labelled)
    cost = np.exp(score) if dear else np.ones(30)
    pool = candidates(x[:usable], cost=cost[:usable])
    selector = BACKWARD_BY_COST if dear else SELECTORS["bait_backward"]
    found = select(selector, KEY, pool, candidates(known))
    variance = posterior_variance(x[:usable], known)
    picked: list[int] = []
    gains: dict[int, float] = {}
    while len(picked) < min(2 * K, usable):
        offered = {i: (variance(picked) - variance([*picked, i])) / cost[i] for i in range(usable) if i not in picked}
        picked.append(max(offered, key=offered.__getitem__))
        gains[picked[-1]] = offered[picked[-1]]
    forward = picked[:K]
    while len(picked) > K:
        without = {i: [j for j in picked if j != i] for i in picked}
        picked = without[min(picked, key=lambda i: (variance(without[i]) - variance(picked)) / cost[i])]
    assert chosen(found) == picked
    np.testing.assert_allclose(found.gain[: len(picked)], [gains[i] for i in picked], rtol=1e-7)
    if usable == 30:
        assert picked != forward and variance(picked) < variance(forward)


def test_bait_keeps_no_more_than_it_chooses():
    with pytest.raises(InputError, match="overselect is at least 1"):
        bait(K, "x", overselect=0.5)
    spare = [bait(10, "x", overselect=times).rule.backward for times in (1.0, 1.04, 1.1, 1.25, 2.0)]
    assert [one and one.spare for one in spare] == [None, 1, 1, 3, 10], "1.04 is not taken for 1"


@LABELLED
def test_frank_wolfe_approximates_the_sum_of_the_pool(labelled):
    x, _ = sample(7)
    known, _ = sample(8, n=labelled)
    found = select(SELECTORS["frank_wolfe"], KEY, candidates(x), candidates(known))
    a, b = scaled(x, known)
    psi = 0.1 * a @ np.linalg.inv(np.linalg.cholesky(b.T @ b + 0.01 * np.eye(5))).T
    norms, target, so_far, picked, left = np.linalg.norm(psi, axis=1), psi.sum(0), np.zeros(5), [], []
    for _ in range(K):
        gains = np.where(np.isin(np.arange(30), picked), -np.inf, psi @ (target - so_far) / norms)
        picked.append(int(np.argmax(gains)))
        vertex = norms.sum() / norms[picked[-1]] * psi[picked[-1]]
        shares = np.linspace(0, 1, 20001)
        path = so_far + shares[:, None] * (vertex - so_far)
        so_far = path[np.argmin(np.linalg.norm(path - target, axis=1))]
        left.append(np.linalg.norm(target - so_far))
        assert found.gain[len(picked) - 1] == pytest.approx(gains[picked[-1]], rel=2e-2, abs=1e-3)
    assert chosen(found) == picked and np.all(np.diff(left) <= 1e-9)


@LABELLED
def test_hybrid_weighs_uncertainty_and_diversity(labelled):
    x, score = sample(9)
    known, _ = sample(10, n=labelled)
    found = select(SELECTORS["hybrid"], KEY, candidates(x, score), candidates(known))
    uncertainty = (score - score.min()) / np.ptp(score)
    centres, picked = list(known), []
    for n in range(K):
        free = ~np.isin(np.arange(30), picked)
        distance = distances(x, centres).min(axis=1) if centres else np.linalg.norm(x, axis=1)
        gain = np.where(free, 0.2 * uncertainty + 0.8 * distance / distance[free].max(), -1)
        picked.append(int(np.argmax(gain)))
        assert found.gain[n] == pytest.approx(gain[picked[n]], rel=1e-9)
        centres.append(x[picked[n]])
    assert chosen(found) == picked


def test_adaptive_is_hybrid_with_a_weight_that_is_data(count_compilations):
    x, score = sample(11)
    known, _ = sample(12, n=4)
    pool, selector = candidates(x, score), adaptive(K, "score", "x", alpha=0.2)
    at = [candidates(known).replace(scalars={WEIGHT: np.asarray(alpha)}) for alpha in (0.2, 0.0, 1.0)]
    assert chosen(select(selector, KEY, pool, at[0])) == chosen(
        select(SELECTORS["hybrid"], KEY, pool, candidates(known))
    )
    with count_compilations() as compiled:
        assert chosen(select(selector, KEY, pool, at[2])) == list(np.argsort(-score)[:K])
        diverse = chosen(select(selector, KEY, pool, at[1]))
    assert not compiled and diverse == chosen(select(SELECTORS["max_dist"], KEY, pool, candidates(known)))
    assert chosen(select(selector, KEY, pool, candidates(known))) == chosen(select(selector, KEY, pool, at[0]))


def test_adapt_moves_with_progress():
    alpha = np.array([adapt(0.4, progress) for progress in (0.5, 0.1, 0.05, 0.0, -0.05, -0.1, -2.0)])
    assert alpha[0] == alpha[1] == pytest.approx(0.4)  # as expected: stays
    assert alpha[3] == pytest.approx(0.4 + 0.3 * 0.6) and alpha[4] == pytest.approx(0.4)
    assert np.all(np.diff(alpha[1:4]) > 0) and np.all(np.diff(alpha[3:6]) < 0)
    assert alpha[6] == alpha[5] == pytest.approx(0.4 * 0.7) and adapt(0.4, np.nan) == pytest.approx(0.4)
    weight = 0.2
    for _ in range(50):
        weight = adapt(weight, 0.0)
    assert 0.99 < weight <= 1


def probabilities_of_pairs(found: np.ndarray, n: int) -> dict[tuple[int, ...], float]:
    """Share of each ordered choice."""
    return {pair: np.mean(np.all(found == pair, axis=1)) for pair in np.ndindex(*(n,) * found.shape[1])}


def drawn(selector, x: np.ndarray, known: np.ndarray, number: int) -> np.ndarray:
    """Choices [number, k] for as many keys."""
    with jax.enable_x64(True):
        pool = jax.tree.map(jnp.asarray, candidates(x, capacity=0))
        context = jax.tree.map(jnp.asarray, candidates(known, capacity=4))
        return np.asarray(_many(selector)(jax.random.split(KEY, number), pool, context).indices)


@cache
def _many(selector):
    return jax.jit(jax.vmap(selector, (0, None, None)))


@LABELLED
def test_kmeans_pp_draws_by_square_distance(labelled):
    x, _ = sample(13, n=5)
    known, _ = sample(14, n=labelled)
    found = probabilities_of_pairs(drawn(KMEANS_PP, x, known, 4000), 5)
    first = distances(x, known).min(axis=1) ** 2 if labelled else np.sum(x**2, axis=1)
    for (i, j), share in found.items():
        second = distances(x, np.concatenate([known, x[[i]]])).min(axis=1) ** 2
        expected = first[i] / first.sum() * second[j] / second.sum()
        assert abs(share - expected) <= 5 * np.sqrt(expected * (1 - expected) / 4000)


@LABELLED
def test_dpp_draws_by_determinant(labelled):
    """Every set of 3 among 6, by enumeration."""
    x, _ = sample(15, n=6, d=4)
    known, _ = sample(16, n=labelled, d=4)
    found = np.sort(drawn(DPP, x, known, 6000), axis=1)
    a, b = scaled(x, known)
    kernel = a @ np.linalg.inv(b.T @ b + 0.09 * np.eye(4)) @ a.T
    sets = list(combinations(range(6), 3))
    weights = np.array([np.linalg.det(kernel[np.ix_(one, one)]) for one in sets])
    shares = np.array([np.mean(np.all(found == one, axis=1)) for one in sets])
    expected = weights / weights.sum()
    assert np.sum(shares) == pytest.approx(1)
    statistic = 6000 * np.sum((shares - expected) ** 2 / expected)
    assert statistic < 45  # chi square with 19 degrees of freedom: one in a thousand lies beyond 43.8
    marginals = np.array([np.mean(np.any(found == i, axis=1)) for i in range(6)])
    by_hand = np.array([sum(p for one, p in zip(sets, expected, strict=True) if i in one) for i in range(6)])
    np.testing.assert_allclose(marginals, by_hand, atol=5 * np.sqrt(0.25 / 6000))


def test_dpp_goes_on_where_the_kernel_has_no_rank_left():
    line = np.outer(np.arange(1.0, 7.0), [1.0, 1.0, 1.0, 1.0])
    found = drawn(DPP, line, np.zeros((0, 4)), 2000)
    assert all(len(set(row)) == 3 for row in found)
    first = found[:, 0]
    expected = np.arange(1.0, 7.0) ** 2 / 91
    shares = np.bincount(first, minlength=6) / 2000
    np.testing.assert_allclose(shares, expected, atol=5 * np.sqrt(0.25 / 2000))


def test_cost_aware_takes_the_most_for_the_money():
    x, score = sample(18)
    known, _ = sample(19, n=4)
    cost = np.exp(score)
    pool, context = candidates(x, score + 3, cost=cost), candidates(known)
    found = select(SELECTORS["cost_aware"], KEY, pool, context)
    a, b = scaled(x, known)

    def logdet(rows: list[int]) -> float:
        stacked = np.concatenate([b, a[rows]])
        return np.linalg.slogdet(stacked.T @ stacked + 0.01 * np.eye(5))[1]

    picked: list[int] = []
    for n in range(K):
        gains = {i: (logdet([*picked, i]) - logdet(picked)) / cost[i] for i in range(30) if i not in picked}
        picked.append(max(gains, key=gains.__getitem__))
        assert found.gain[n] == pytest.approx(gains[picked[n]], rel=1e-7)
    assert chosen(found) == picked
    by_score = cost_aware(top_k(K, "score"))
    ranked = select(by_score, KEY, pool, context)
    assert chosen(ranked) == list(np.argsort(-(score + 3) / cost)[:K])
    harmful = select(by_score, KEY, candidates(x, score - 9, cost=cost), context)
    assert chosen(harmful) == list(np.argsort(-(score - 9) * cost)[:K]), "the dearer the worse"
    free_of_charge = candidates(x, score + 3, cost=np.where(np.arange(30) < 28, 0.0, 1.0))
    assert sorted(chosen(select(by_score, KEY, free_of_charge, context))) == [28, 29]
    for selector in (random(2), dpp(2, "x"), entropy(2, "score")):
        with pytest.raises(InputError, match="no gain that a cost could weigh"):
            cost_aware(selector)


def test_entropy_ranks_as_sigma_and_is_that_of_a_gaussian():
    sigma = np.array([0.3, 2.0, 0.0, np.nan, 1.0, np.inf])
    pool, nothing = candidates(np.zeros((6, 1)), sigma), candidates(np.zeros((0, 1)))
    found = select(entropy(5, "score"), KEY, pool, nothing)
    assert chosen(found) == chosen(select(top_k(5, "score"), KEY, pool, nothing)) == [1, 4, 0, 2]  # what is finite
    z = np.linspace(-40, 40, 400001)
    density = np.exp(-(z**2) / 8) / np.sqrt(8 * np.pi)
    nats = -np.sum(density * np.log(np.maximum(density, 1e-300))) * (z[1] - z[0])
    assert found.gain[0] == pytest.approx(nats, rel=1e-6)


def test_large_training_sets_are_looked_at_in_blocks(monkeypatch):
    """The number of rows of a block does not divide the number of training rows."""
    x, _ = sample(21)
    known, _ = sample(22, n=11)
    plain = select(SELECTORS["lcmd"], KEY, candidates(x), candidates(known))
    monkeypatch.setattr(distances_module, "_ENTRIES", 7 * 40)
    blocks = select(lcmd(K, "x"), KEY, candidates(x), candidates(known))
    assert chosen(plain) == chosen(blocks)
    np.testing.assert_allclose(plain.gain, blocks.gain, rtol=1e-12)


def test_no_candidate_is_chosen_twice_where_rounding_hides_the_noise():
    """Many labelled rows in few directions, and the least noise that settings take: the factor was not a number."""
    x, _ = sample(25, n=8)
    known = x[:1] + 1e-3 * np.outer(np.random.default_rng(26).normal(size=100_000), x[1])
    found = select(max_det(3, "x", sigma=1e-6), KEY, candidates(x, capacity=8), candidates(known))
    assert len(set(chosen(found))) == 3 and np.isfinite(found.gain).all()


def test_features_in_their_own_precision():
    """Without a float64 copy of the features; where nothing is close to a tie, the choice is the same."""
    x, _ = sample(23)
    selector = SELECTORS["bait"]
    known, _ = sample(24, n=7)
    narrow = jax.tree.map(lambda one: one.astype(np.float32) if one.dtype == np.float64 else one, candidates(x))
    context = jax.tree.map(lambda one: one.astype(np.float32) if one.dtype == np.float64 else one, candidates(known))
    single = select(selector, KEY, narrow, context, double=False)
    double = select(selector, KEY, narrow, context)
    assert single.gain.dtype == np.float32 and double.gain.dtype == np.float64
    assert chosen(single) == chosen(double)
    np.testing.assert_allclose(single.gain, double.gain, rtol=1e-3)
