"""Selectors against brute force, and what every one of them must keep: order of the pool, padding, no repeats."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from small_pools import BY_FEATURES, CAPACITY, KEY, SELECTORS, K, candidates, chosen, sample

from almlip_jax import selection
from almlip_jax.errors import InputError
from almlip_jax.feature_names import feature_names
from almlip_jax.selection import (
    BaitSettings,
    Candidates,
    ChainSettings,
    CostAwareSettings,
    DppSettings,
    MaxDetSettings,
    MaxvolSettings,
    RandomSettings,
    SelectorSettings,
    ThresholdSettings,
    TopFractionSettings,
    TopKSettings,
    UserSelector,
    WeighedSelector,
    chain,
    dpp,
    lcmd,
    max_det,
    max_dist,
    random,
    select,
    threshold,
    top_fraction,
    top_k,
)


@pytest.mark.parametrize("labelled", [0, 4])
def test_max_det_maximises_the_determinant_step_by_step(labelled):
    x, _ = sample(1)
    known, _ = sample(2, n=labelled)
    found = select(SELECTORS["max_det"], KEY, candidates(x), candidates(known))
    power = np.mean(np.sum((known if labelled else x) ** 2, axis=1))
    a, b = x / np.sqrt(power), known / np.sqrt(power)

    def logdet(rows: list[int]) -> float:
        stacked = np.concatenate([b, a[rows]])
        return np.linalg.slogdet(stacked.T @ stacked + 0.01 * np.eye(5))[1]

    picked: list[int] = []
    for n in range(K):
        gains = {i: logdet([*picked, i]) - logdet(picked) for i in range(len(x)) if i not in picked}
        picked.append(max(gains, key=gains.__getitem__))
        assert chosen(found)[n] == picked[n]
        assert found.gain[n] == pytest.approx(gains[picked[n]], rel=1e-8)


@pytest.mark.parametrize("labelled", [0, 4])
def test_max_dist_takes_the_farthest(labelled):
    x, _ = sample(3)
    known, _ = sample(4, n=labelled)
    found = select(SELECTORS["max_dist"], KEY, candidates(x), candidates(known))
    centres = list(known)
    for n, row in enumerate(chosen(found)):
        if centres:
            distance = np.min(np.linalg.norm(x[:, None] - np.array(centres)[None], axis=-1), axis=1)
        else:
            distance = np.linalg.norm(x, axis=1)
        assert row == int(np.argmax(distance))
        assert found.gain[n] == pytest.approx(distance[row], rel=1e-7)
        centres.append(x[row])


def test_top_k_is_a_sort_and_ties_go_to_the_smallest_id():
    score = np.array([1.0, 3.0, 2.0, 3.0, np.nan, 0.0])
    found = select(
        top_k(4, "score"),
        KEY,
        candidates(np.zeros((6, 1)), score, ids=[5, 9, 2, 3, 1, 0]),
        candidates(np.zeros((0, 1))),
    )
    assert chosen(found) == [3, 1, 2, 0]


def test_random_is_uniform():
    x, _ = sample(0, n=10)
    keys = jax.random.split(KEY, 4000)
    pool, nothing = candidates(x, capacity=10), candidates(np.zeros((0, 5)))
    pool = jax.tree.map(jnp.asarray, pool)
    rows = jax.vmap(lambda key: random(3)(key, pool, nothing).indices)(keys)
    counts = np.bincount(np.asarray(rows).ravel(), minlength=10)
    assert np.all(np.abs(counts - 1200) < 5 * np.sqrt(1200 * 0.7))


@pytest.mark.parametrize("name", SELECTORS)
@hypothesis_settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**20))
def test_order_padding_and_rubbish_in_the_pool_do_not_matter(name, seed):
    x, score = sample(seed)
    known, errors = sample(seed + 1, n=3)
    cost = np.exp(score)
    selector, rng = SELECTORS[name], np.random.default_rng(seed)
    plain = select(selector, KEY, candidates(x, score, cost=cost), candidates(known, errors))
    order = rng.permutation(30)
    place = np.sort(rng.permutation(CAPACITY)[:30])  # the rest is not valid, or not finite
    rows, scores, costs = np.full((CAPACITY, 5), np.nan), np.full(CAPACITY, np.nan), np.ones(CAPACITY)
    rows[place], scores[place], costs[place] = x[order], score[order], cost[order]
    ids, valid = np.arange(200, 200 + CAPACITY), np.full(CAPACITY, name != "random")
    ids[place], valid[place] = order, True
    labelled = candidates(
        np.concatenate([np.full((2, 5), np.nan), known]), np.concatenate([np.full(2, np.nan), errors])
    )
    other = select(selector, KEY, candidates(rows, scores, cost=costs, ids=ids, valid=valid), labelled)
    assert [int(ids[i]) for i in chosen(other)] == chosen(plain)
    assert set(chosen(plain)) <= set(range(30)) and len(set(chosen(plain))) == len(chosen(plain))
    assert len(chosen(plain)) == {"dpp": 3}.get(name, K) or name == "maxvol"


@pytest.mark.parametrize("name", SELECTORS)
def test_a_pool_smaller_than_the_batch(name):
    x, score = sample(5, n=4)
    found = select(SELECTORS[name], KEY, candidates(x, np.abs(score)), candidates(x[:1]))
    if name == "dpp":
        assert len(set(chosen(found))) == 3 and max(chosen(found)) < 4
    elif name == "maxvol":  # what is labelled already does not enter
        assert sorted(chosen(found)) == [1, 2, 3]
    else:
        assert sorted(chosen(found)) == [0, 1, 2, 3] and list(found.valid) == [True] * 4 + [False] * 2
    nobody = select(SELECTORS[name], KEY, candidates(x, score, valid=[False] * 4), candidates(x[:1]))
    assert chosen(nobody) == []


@pytest.mark.parametrize("name", BY_FEATURES)
def test_training_points_matter(name):
    """Labelling a near-duplicate of the choice changes the choice."""
    selector = BY_FEATURES[name]
    x, _ = sample(6)
    known, _ = sample(7, n=3)
    first = chosen(select(selector, KEY, candidates(x), candidates(known)))[0]
    context = candidates(np.concatenate([known, x[[first]] + 1e-6]))
    again = chosen(select(selector, KEY, candidates(x), context))
    # Frank-Wolfe looks at directions alone, which a duplicate still has once others are approximated
    assert first not in again[: 1 if name == "frank_wolfe" else 3]


def test_duplicates_in_the_pool_are_not_both_worth_it():
    x = np.array([[1.0, 0, 0], [1.0, 0, 0], [0, 0.5, 0], [0, 0, 0.25]])
    found = select(max_det(3, "x"), KEY, candidates(x), candidates(np.zeros((0, 3))))
    assert chosen(found) == [0, 2, 3]


def test_filters_narrow_in_order():
    x, _ = sample(8, n=10)
    pool = candidates(x, np.arange(10.0))
    stages = (threshold("score", minimum=2.0, maximum=8.0), top_fraction("score", 0.5))
    found = select(chain(*stages, selector=top_k(9, "score")), KEY, pool, candidates(x[:1]))
    assert chosen(found) == [7, 6, 5]


def test_a_grown_context_compiles_nothing(count_compilations):
    x, score = sample(9)
    selector = SELECTORS["max_det"]
    pool = candidates(x, score)
    grow = [candidates(x[:n]) for n in (2, 9)]
    select(selector, KEY, pool, grow[0])
    with count_compilations() as compiled:
        select(selector, KEY, pool, grow[1])
    assert not compiled


def smallest_first(k: int, offset: float):
    """A user's selector."""

    def choose(key, pool, labelled):
        return top_k(k, "score")(key, pool.replace(scores={"score": offset - pool.scores["score"]}), labelled)

    return choose


def test_settings_build_what_they_say(monkeypatch):
    x, score = sample(10)
    pool, known = candidates(x, score), candidates(x[:2])
    pool = pool.replace(scores=pool.scores | {"energy_std": pool.scores["score"]})
    made = ChainSettings(
        filters=(
            ThresholdSettings(score="energy_std", minimum=0.0),
            TopFractionSettings(score="energy_std", fraction=0.8),
        ),
        selector=RandomSettings(),
    ).build(3)
    by_hand = chain(threshold("score", minimum=0.0), top_fraction("score", 0.8), selector=random(3))
    assert chosen(select(made, KEY, pool, known)) == chosen(select(by_hand, KEY, pool, known))
    assert MaxDetSettings().features == "last_layer_gradient"
    backward = BaitSettings(overselect=1.5).build(4).rule.backward
    assert backward.spare == 2 and BaitSettings().build(4).rule.backward is None
    import sys

    monkeypatch.setitem(sys.modules, "my_selectors", sys.modules[__name__])
    user = UserSelector(function="my_selectors:smallest_first", parameters={"offset": 1.0}).build(3)
    assert chosen(select(user, KEY, pool, known)) == list(np.argsort(score)[:3])


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("nowhere", "module:function"),
        ("no_such_module:f", "cannot be imported"),
        ("math:no_such", "no function 'no_such'"),
        ("math:pi", "not a function"),
        ("math:sqrt", "does not take the parameters"),
        (".here:f", "module:function"),
        ("builtins:dict", "must return a function"),
    ],
)
def test_a_wrong_path_is_one_sentence(function, message):
    with pytest.raises(InputError, match=message):
        UserSelector(function=function).build(3)


def test_a_user_module_that_fails_is_one_sentence(with_module):
    with_module("broken_selectors", "raise RuntimeError('no licence')\n")
    with pytest.raises(InputError, match="broken_selectors:f' cannot be imported .RuntimeError: no licence"):
        UserSelector(function="broken_selectors:f").build(3)


@pytest.mark.parametrize("make", [lcmd, max_det])
def test_duplicates_do_not_make_the_order_of_the_pool_matter(make):
    """Gains of equal candidates differ by rounding, which depends on where in a matrix they stand."""
    selector = make(8, "x")
    for seed in range(6):
        rng = np.random.default_rng(seed)
        x, known = np.tile(rng.normal(size=(50, 64)), (3, 1)), rng.normal(size=(7, 64))
        place = rng.permutation(170)[:150]
        shuffled, ids, valid = np.zeros((170, 64)), np.full(170, 999), np.zeros(170, bool)
        shuffled[place], ids[place], valid[place] = x, np.arange(150), True
        plain = chosen(select(selector, KEY, candidates(x, capacity=170), candidates(known)))
        other = chosen(select(selector, KEY, candidates(shuffled, ids=ids, valid=valid), candidates(known)))
        assert [int(ids[i]) for i in other] == plain
        assert max(plain) < 50  # the smallest id of each three


def test_among_exact_equals_the_smallest_id_wins():
    x = np.array([[0.0, 2.0], [0.0, 1.0], [2.0, 0.0], [0.0, 2.0]])
    for selector in (max_dist(2, "x"), max_det(2, "x")):
        found = select(selector, KEY, candidates(x, ids=[7, 1, 5, 3]), candidates(np.zeros((0, 2))))
        assert chosen(found) == [3, 2]


@pytest.mark.parametrize("name", ["top_k", "kmeans_fps", "dpp", "maxvol"])
def test_an_empty_pool_gives_an_empty_batch(name):
    x, _ = sample(13, n=3)
    empty = candidates(np.zeros((0, 5)), capacity=0)
    assert chosen(select(SELECTORS[name], KEY, empty, candidates(x))) == []


def test_the_key_decides_a_random_batch():
    x, _ = sample(14)
    pool, nothing = candidates(x), candidates(np.zeros((0, 5)))
    first, again = (chosen(select(random(K), jax.random.key(3), pool, nothing)) for _ in range(2))
    assert first == again != chosen(select(random(K), jax.random.key(4), pool, nothing))


@pytest.mark.parametrize(("fraction", "kept"), [(0.07, 7), (0.55, 55), (0.071, 8), (1.0, 100), (1e-4, 1)])
def test_top_fraction_counts_right(fraction, kept):
    """0.07 * 100 is 7.000000000000001 in floating point; and what is not finite is not the highest."""
    pool = candidates(np.zeros((100, 1)), np.where(np.arange(100) == 3, np.inf, np.arange(100.0)))
    for precise in (False, True):
        with jax.enable_x64(precise):
            narrowed = top_fraction("score", fraction)(KEY, jax.tree.map(jnp.asarray, pool), pool)
        assert int(narrowed.valid.sum()) == kept and bool(narrowed.valid[3]) == (kept == 100)
    assert not bool(threshold("score", minimum=1.0)(KEY, pool, pool).valid[3])


@pytest.mark.parametrize("selector", [top_k(1, "scor"), max_dist(1, "y"), max_det(1, "y"), dpp(1, "y")])
def test_a_column_that_is_not_there_is_named(selector):
    x, score = sample(15, n=4)
    with pytest.raises(InputError, match="candidates have no .* they have: (score|x)"):
        select(selector, KEY, candidates(x, score), candidates(x))


@pytest.mark.parametrize("bounds", [{}, {"minimum": 2.0, "maximum": 1.0}, {"minimum": 1.0, "maximum": 1.0}])
def test_thresholds_that_keep_all_or_nothing_are_refused(bounds):
    with pytest.raises(ValueError, match="needs a minimum|no score lies between"):
        ThresholdSettings(score="force_std_max", **bounds)


def test_settings_know_the_names_of_scores_and_features():
    assert {"last_layer_gradient", "latent"} <= set(feature_names())
    with pytest.raises(ValueError, match="latent"):
        MaxDetSettings(features="latnt")
    with pytest.raises(ValueError, match="did you mean 'force_std_mean'"):
        TopKSettings(score="force_std_men")


@pytest.mark.parametrize("kind", list(WeighedSelector.kinds().values()))
def test_settings_of_every_kind_build_the_selector_of_that_name(kind):
    """Plain, and weighed by cost."""
    settings = kind()
    assert hasattr(selection, settings.kind) and settings.build(3).k == 3
    assert CostAwareSettings(selector=settings).build(3).per_cost


def test_settings_of_selectors_without_a_gain_build_them():
    x, _ = sample(16)
    pool = candidates(x).replace(features={"last_layer_gradient": candidates(x).features["x"]})
    least = ThresholdSettings(score="energy_std", maximum=6.5)
    for settings in (DppSettings(), MaxvolSettings(), ChainSettings(filters=(least,), selector=DppSettings())):
        chosen_from = pool.replace(scores={"energy_std": np.arange(CAPACITY)})
        found = chosen(select(settings.build(3), KEY, chosen_from, pool.replace(valid=~pool.valid)))
        assert found and (settings.kind != "chain" or max(found) < 7)


@pytest.mark.parametrize("kind", ["recalibrated"])
def test_what_could_not_mean_its_name_is_gone(kind):
    with pytest.raises(ValueError, match=kind):
        SelectorSettings.parse({"kind": kind})


def test_agreement_leaves_out_what_the_teacher_agrees_on():
    """In forces and, where asked, energies; where the teacher had no label nothing is known of it."""
    forces, energy = [0.01, 0.2, 0.01, np.nan], [0.1, 0.001, 0.001, np.nan]
    pool = Candidates.of(scores={"teacher_forces": forces, "teacher_energy": energy, "force_std_mean": [4, 3, 2, 1]})
    for settings, wanted in (({}, [1, 3]), ({"energy": 0.01}, [0, 1, 3]), ({"forces": 1.0, "energy": 1.0}, [3])):
        chain = {"kind": "chain", "filters": [{"kind": "agreement", **settings}], "selector": {"kind": "top_k"}}
        parsed = SelectorSettings.parse(chain)
        assert parsed.asks_teacher and chosen(select(parsed.build(4), KEY, pool, pool)) == wanted
    assert not SelectorSettings.parse({"kind": "top_k"}).asks_teacher


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"kind": "top_k"}, ()),
        ({"kind": "lcmd", "features": "full_gradient"}, ("full_gradient",)),
        ({"kind": "cost_aware", "selector": {"kind": "bait"}}, ("last_layer_gradient",)),
        (
            {
                "kind": "chain",
                "filters": [{"kind": "user", "function": "a:b", "features": ["power_spectrum", "latent"]}],
                "selector": {"kind": "cost_aware", "selector": {"kind": "max_dist", "features": "latent"}},
            },
            ("power_spectrum", "latent"),
        ),
    ],
)
def test_what_a_selector_looks_at(settings, wanted):
    assert SelectorSettings.parse(settings).feature_names == wanted


def test_selectors_made_anew_do_not_compile_anew(count_compilations):
    x, score = sample(21)
    pool, known = candidates(x, score), candidates(x[:2])

    def round_of_three() -> list[list[int]]:
        filtered = chain(threshold("score", minimum=0.0), selector=lcmd(3, "x"))
        return [chosen(select(one, KEY, pool, known)) for one in (max_det(3, "x"), filtered, top_k(3, "score"))]

    first = round_of_three()
    with count_compilations() as compiled:
        assert round_of_three() == first
    assert compiled == []
