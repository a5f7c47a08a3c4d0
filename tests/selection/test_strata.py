"""Strata that take turns: shares are held whatever the selector, which decides within a stratum."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ase import Atoms
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from small_pools import KEY, SELECTORS, K, candidates, chosen, distances, sample, scaled

from almlip_jax.campaign.batch import remarks_of, with_strata
from almlip_jax.campaign.settings import SelectionSettings
from almlip_jax.campaign.systems import deal
from almlip_jax.errors import InputError
from almlip_jax.selection import (
    Candidates,
    SelectorSettings,
    Strata,
    chain,
    cost_aware,
    dpp,
    kmeans_pp,
    random,
    select,
    stratified,
    threshold,
    top_k,
)

STEPPING = {name: one for name, one in SELECTORS.items() if name not in ("dpp", "maxvol", "chain")}
SHARES = np.array([1.0, 2.0, 0.0, 0.0], np.float32)


def stratum(pool: Candidates, numbers: Any, shares: np.ndarray = SHARES) -> Candidates:
    """Candidates with strata, and rubbish in the rows up to the capacity."""
    missing = len(pool.valid) - len(numbers)
    return replace(pool, strata=Strata(np.pad(np.asarray(numbers, np.int32), (0, missing)), shares))


def settings(**given: Any) -> SelectorSettings:
    return SelectorSettings.parse({"kind": "stratified", "by": "kelvin", "selector": {"kind": "random"}} | given)


def frames(*values: Any) -> list[Atoms]:
    return [Atoms(info={} if value is None else {"kelvin": value}) for value in values]


@pytest.mark.parametrize("name", STEPPING)
def test_each_stratum_has_its_share_whatever_the_selector(name):
    x, score = sample(3)
    known, _ = sample(4, n=5)
    numbers = np.arange(30) % 3 - 1  # ten of none, ten of each stratum
    pool = stratum(candidates(x, score + 5), numbers)
    context = stratum(candidates(known), [0, 0, 0, -1, 1])
    found = select(stratified(STEPPING[name]), KEY, pool, context)
    rows = chosen(found)
    assert len(set(rows)) == K
    # of the dataset: 4 of the first and 1 of the second before; (n + 1/2) / share is least for the second four times
    expected = deal({"0": 1, "1": 2}, 4 + K, {"0": 13, "1": 11})
    assert expected.count("0") - 3 + (expected.count("1") - 1) == K
    assert [int(np.sum(numbers[rows] == one)) for one in (-1, 0, 1)] == [
        0,
        expected.count("0") - 3,
        expected.count("1") - 1,
    ]


@pytest.mark.parametrize("name", STEPPING)
def test_one_stratum_changes_nothing(name):
    x, score = sample(5)
    known, _ = sample(6, n=5)
    pool, context = candidates(x, score + 5), candidates(known)
    plain = select(STEPPING[name], KEY, pool, context)
    found = select(stratified(STEPPING[name]), KEY, stratum(pool, np.zeros(30)), stratum(context, np.zeros(5)))
    assert chosen(found) == chosen(plain)
    np.testing.assert_allclose(found.gain, plain.gain, rtol=1e-12)


@pytest.mark.parametrize("name", ["max_det", "bait_backward", "top_k", "random", "kmeans_fps"])
def test_order_and_padding_of_the_pool_change_nothing(name):
    x, score = sample(7)
    known, _ = sample(8, n=5)
    numbers, order = np.arange(30) % 2, np.random.default_rng(0).permutation(30)
    context = stratum(candidates(known), [0, 0, 1, 1, -1])
    selector = stratified(STEPPING[name])
    one = select(selector, KEY, stratum(candidates(x, score + 5), numbers), context)
    moved = stratum(candidates(x[order], score[order] + 5, ids=order), numbers[order])
    assert order[chosen(select(selector, KEY, moved, context))].tolist() == chosen(one)


def test_a_greedy_selector_has_all_that_was_chosen_in_mind():
    x, score = sample(9)
    known, _ = sample(10, n=4)
    numbers = np.arange(30) % 2
    pool, context = stratum(candidates(x, score), numbers), stratum(candidates(known), [-1] * 4)
    found = select(stratified(STEPPING["max_det"]), KEY, pool, context)
    a, b = scaled(x, known)

    def logdet(rows: list[int]) -> float:
        stacked = np.concatenate([b, a[rows]])
        return np.linalg.slogdet(stacked.T @ stacked + 0.01 * np.eye(5))[1]

    picked: list[int] = []
    for turn in deal({"0": 1, "1": 2}, K):
        gains = {i: logdet([*picked, i]) for i in range(30) if i not in picked and str(numbers[i]) == turn}
        picked.append(max(gains, key=gains.__getitem__))
    assert chosen(found) == picked


def test_lcmd_takes_the_largest_cluster_of_the_stratum_whose_turn_it_is():
    """And not the smallest id, where the largest cluster of all is that of another stratum."""
    x, _ = sample(9)
    known, _ = sample(10, n=4)
    numbers = np.arange(30) % 2
    x[numbers == 0] *= 10
    pool, context = stratum(candidates(x), numbers), stratum(candidates(known), [-1] * 4)
    found = select(stratified(STEPPING["lcmd"]), KEY, pool, context)
    centres, picked, gains = list(known), [], []
    for turn in deal({"0": 1, "1": 2}, K):
        apart = distances(x, centres)
        owner, least = apart.argmin(axis=1), apart.min(axis=1)
        mine = (numbers == int(turn)) & ~np.isin(np.arange(30), picked)
        sizes = np.bincount(owner[mine], least[mine] ** 2, minlength=len(centres))
        picked.append(int(np.argmax(np.where(mine & (owner == sizes.argmax()), least, -1))))
        gains.append(least[picked[-1]])
        centres.append(x[picked[-1]])
    assert chosen(found) == picked
    np.testing.assert_allclose(found.gain, gains, rtol=1e-9)


def test_a_ranking_takes_the_best_of_each_stratum_by_the_money_too():
    _, score = sample(11)
    cost = np.exp(sample(12)[1])
    numbers = np.arange(30) % 2
    pool = stratum(candidates(np.zeros((30, 5)), score + 5, cost=cost), numbers)
    context = stratum(candidates(np.zeros((0, 5))), [])
    for selector, values in ((top_k(K, "score"), score), (cost_aware(top_k(K, "score")), (score + 5) / cost)):
        ranked = {str(n): iter(sorted(np.flatnonzero(numbers == n), key=lambda i: -values[i])) for n in (0, 1)}
        by_hand = [int(next(ranked[turn])) for turn in deal({"0": 1, "1": 2}, K)]
        assert chosen(select(stratified(selector), KEY, pool, context)) == by_hand


def test_what_a_stratum_cannot_use_goes_to_the_others_and_then_to_those_of_none():
    x, score = sample(13)
    numbers = np.full(30, -1)
    numbers[:1], numbers[1:3] = 1, 0
    for name in ("max_det", "bait", "top_k", "random"):
        pool = stratum(candidates(x, score), numbers)
        rows = chosen(select(stratified(STEPPING[name]), KEY, pool, stratum(candidates(x[:4]), [-1] * 4)))
        assert numbers[rows].tolist() == [1, 0, 0, -1, -1, -1], name
    nobody = stratum(candidates(x[:0], capacity=0), [])
    assert chosen(select(stratified(STEPPING["max_dist"]), KEY, nobody, stratum(candidates(x[:4]), [-1] * 4))) == []


def test_filters_come_first():
    _, score = sample(14)
    numbers = np.arange(30) % 2
    pool = stratum(candidates(np.zeros((30, 5)), score), numbers)
    selector = chain(threshold("score", minimum=0.0), selector=stratified(top_k(K, "score")))
    rows = chosen(select(selector, KEY, pool, stratum(candidates(np.zeros((0, 5))), [])))
    assert np.all(score[rows] > 0) and np.sum(numbers[rows] == 1) == 4


def test_draws_within_a_stratum_keep_their_probabilities():
    x = np.array([[1.0, 0], [2.0, 0], [0, 1.0], [0, 3.0]])
    x = np.pad(x, [(0, 0), (0, 3)])
    pool = stratum(candidates(x), [0, 0, 1, 1], np.array([2.0, 1, 0, 0], np.float32))
    context = stratum(candidates(np.zeros((1, 5))), [-1])
    with jax.enable_x64(True):
        pool, context = jax.tree.map(jnp.asarray, (pool, context))
        first = jax.jit(jax.vmap(lambda key: stratified(kmeans_pp(1, "x"))(key, pool, context).indices[0]))
        drawn = np.asarray(first(jax.random.split(KEY, 4000)))
    assert set(drawn) == {0, 1}  # the stratum of the larger share comes first
    assert np.mean(drawn == 1) == pytest.approx(4 / 5, abs=5 * np.sqrt(0.16 / 4000))  # by square distance


def test_other_strata_and_shares_compile_nothing(count_compilations):
    x, score = sample(15)
    selector, context = stratified(STEPPING["top_k"]), stratum(candidates(x[:3]), [0, 1, 0])
    select(selector, KEY, stratum(candidates(x, score), np.arange(30) % 2), context)
    with count_compilations() as compiled:
        shares = np.array([3, 1, 1, 0.5], np.float32)
        select(selector, KEY, stratum(candidates(x, score), np.arange(30) % 4, shares), context)
    assert not compiled


def test_selectors_that_choose_all_at_once_are_refused():
    for selector in (dpp(3, "x"), chain(threshold("score", minimum=0.0), selector=random(3))):
        with pytest.raises(InputError, match="do not choose one candidate after the other"):
            stratified(selector)
    with pytest.raises(ValidationError, match="'dpp' found using 'kind' does not match"):
        settings(selector={"kind": "dpp"})
    with pytest.raises(InputError, match="candidates have no strata"):
        select(stratified(random(3)), KEY, candidates(np.zeros((4, 5))), candidates(np.zeros((1, 5))))


class TestStratification:
    """Which structure belongs to which stratum, and what shares these have."""

    def test_numbers_are_the_same_however_they_are_written(self) -> None:
        of_pool, of_labelled = settings(shares={300: 1, "600": 3}).stratification.strata(
            [300, 300.0, "300", np.float32(600), "600 K", None], [600, np.int64(300), 17, None], (8, 6)
        )
        assert of_pool.number.tolist() == [0, 0, 0, 1, -1, -1, -1, -1]
        assert of_labelled.number.tolist() == [1, 0, -1, -1, -1, -1]
        assert of_pool.shares.tolist() == of_labelled.shares.tolist() == [1, 3, 0, 0]

    def test_equal_shares_are_of_what_candidates_have(self) -> None:
        of_pool, of_labelled = settings().stratification.strata(["hot", 1000, 90, True], ["cold", "hot"], (4, 2))
        assert of_pool.number.tolist() == [2, 1, 0, 3]  # numbers by size, then text
        assert of_labelled.number.tolist() == [-1, 2] and of_pool.shares.tolist() == [1, 1, 1, 1]

    def test_shares_may_be_those_of_the_pool_and_of_each_batch(self) -> None:
        asked = settings(shares="pool", of="batch").stratification
        of_pool, of_labelled = asked.strata([1, 1, 1, 2], [2, 2, 2], (4, 3))
        assert of_pool.shares.tolist() == [3, 1, 0, 0] and of_labelled.number.tolist() == [-1, -1, -1]

    def test_what_stands_in_a_batch_already_counts_for_its_shares(self) -> None:
        asked = settings(of="batch").stratification
        _, of_labelled = asked.strata([1, 1, 2], [2, 2, 2, 1], (3, 5), chosen=2)
        assert of_labelled.number.tolist() == [-1, -1, 1, 0, -1]
        _, of_dataset = settings().stratification.strata([1, 1, 2], [2, 2, 2, 1], (3, 5), chosen=2)
        assert of_dataset.number.tolist() == [1, 1, 1, 0, -1]

    def test_a_stratum_that_is_used_up_is_no_mistake(self) -> None:
        of_pool, _ = settings(shares={300: 1}).stratification.strata([600, 900], [300], (2, 1))
        assert of_pool.number.tolist() == [-1, -1]

    def test_edges_part_numbers(self) -> None:
        asked = settings(edges=[450, 750], shares={"750 and above": 1, "below 450": 2}).stratification
        of_pool, _ = asked.strata([449.9, 450, 749.0, "750", 1e4, float("nan")], [], (6, 1))
        assert of_pool.number.tolist() == [0, -1, -1, 1, 1, -1] and of_pool.shares.tolist() == [2, 1, 0, 0]

    def test_many_strata_have_room(self) -> None:
        of_pool, _ = settings().stratification.strata(range(9), [], (9, 0))
        assert of_pool.shares.tolist() == [1] * 9 + [0] * 7
        named, _ = settings(shares={7: 1, 90: 2}).stratification.strata(range(99), [], (99, 0))
        assert named.shares.tolist() == [1, 2, 0, 0]
        assert np.flatnonzero(np.asarray(named.number) >= 0).tolist() == [7, 90]

    @pytest.mark.parametrize(
        ("asked", "values", "message"),
        [
            ({}, [None, None], "no candidate has 'kelvin'"),
            ({}, np.linspace(0, 1, 65), "'kelvin' has 65 values among the candidates, of which at most 64"),
            ({"shares": {300: 1}}, np.arange(99.0), r"shares name 300, but candidates have 'kelvin' of 0, .*, \.\.\."),
            ({"shares": {300: 1}}, [600, 900], "shares name 300, but candidates have 'kelvin' of 600, 900"),
            ({}, [np.zeros(3)], "which is not text or a number"),
            ({"edges": [4.0]}, ["warm"], "'kelvin' of a structure holds 'warm', which is not a number"),
        ],
    )
    def test_what_cannot_be_told_apart_is_refused(self, asked: dict[str, Any], values: Any, message: str) -> None:
        with pytest.raises(InputError, match=message):
            settings(**asked).stratification.strata(list(values), [], (len(values), 0))

    @pytest.mark.parametrize(
        ("asked", "message"),
        [
            ({"edges": [3, 3]}, "edges must rise"),
            ({"shares": {}}, "shares name no stratum"),
            ({"edges": [3], "shares": {"above 3": 1}}, "shares name 'above 3'; the strata are: below 3, 3 and above"),
            ({"shares": {"hot": 0}}, "greater than 0"),
            ({"shares": "even"}, "'even' is not|Input should be"),
        ],
    )
    def test_nonsense_is_refused(self, asked: dict[str, Any], message: str) -> None:
        with pytest.raises(ValidationError, match=message):
            settings(**asked)

    def test_it_looks_at_what_the_selector_inside_looks_at(self) -> None:
        inside = {"kind": "cost_aware", "exponent": 2, "selector": {"kind": "hybrid", "features": "latent"}}
        asked = settings(selector=inside)
        assert asked.feature_names == ("latent",) and asked.score_names == ("force_std_mean",)
        assert asked.cost_exponent == 2 and asked.innermost.kind == "hybrid" and not asked.draws_at_random
        assert settings().draws_at_random
        chained = {"kind": "chain", "filters": [{"kind": "threshold", "minimum": 0}], "selector": asked.model_dump()}
        selection = SelectionSettings.model_validate({"selector": chained})
        assert selection.selector.stratification == asked and remarks_of(selection) == ("kelvin",)

    def test_candidates_get_strata_where_they_are_asked_for(self) -> None:
        pool, context = candidates(np.zeros((2, 5)), capacity=4), candidates(np.zeros((1, 5)), capacity=2)
        among, around = with_strata(settings(), (frames("a", "b"), pool), (frames("b"), context))
        assert among.strata.number.tolist() == [0, 1, -1, -1] and around.strata.number.tolist() == [1, -1]
        assert with_strata(SelectorSettings.parse({"kind": "random"}), ([], pool), ([], context)) == (pool, context)


@given(
    shares=st.lists(st.sampled_from([0.5, 1.0, 2.0, 3.0]), min_size=1, max_size=4),
    known=st.lists(st.integers(-1, 3), max_size=8),
    members=st.lists(st.integers(-1, 3), min_size=8, max_size=20),
)
def test_turns_are_dealt_as_systems_are(shares, known, members):
    known, members = ([min(n, len(shares) - 1) for n in some] for some in (known, members))
    weights = np.pad(np.array(shares, np.float32), (0, 4 - len(shares)))
    pool = stratum(candidates(np.zeros((len(members), 5)), -np.arange(len(members), dtype=float)), members, weights)
    context = stratum(candidates(np.zeros((len(known), 5))), known, weights)
    rows = chosen(select(stratified(top_k(K, "score")), KEY, pool, context))
    given_out = {n: known.count(n) for n in range(len(shares))}
    left = {n: [i for i, m in enumerate(members) if m == n] for n in (*given_out, -1)}
    by_hand = []
    for _ in range(K):
        open_ones = [n for n in given_out if left[n]]
        turn = min(open_ones, key=lambda n: (given_out[n] + 0.5) / shares[n]) if open_ones else -1
        by_hand.append(left[turn].pop(0))
        if turn >= 0:
            given_out[turn] += 1
    assert rows == by_hand
