"""Admission to the candidate buffer against offline selection."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from analytic import PARAMS, SPECIES, dimer, morse, settings
from analytic import context as run_context
from pydantic import ValidationError
from scipy import stats

from almlip_jax.dynamics import ExplorationSettings, Explorer, Knowledge, SanitySettings, WalkerGroup
from almlip_jax.dynamics.admission import (
    Context,
    FarthestAdmission,
    LogDetAdmission,
    Offer,
    ReservoirAdmission,
    TopAdmission,
)
from almlip_jax.dynamics.recorder import Frames
from almlip_jax.errors import InputError

WALKERS, ROOM, WIDTH = 3, 8, 5


@cache
def placing(rule):
    """`Admission.apply`, compiled once for a rule."""
    return jax.jit(rule.apply)


def stream(
    rule, context: Context, features: np.ndarray, scores: np.ndarray, seed: int = 0, regions: np.ndarray | None = None
) -> list[int]:
    """Rows that a buffer holds at the end, of frames [n, D] offered three at a time."""
    ones, width = np.ones(WALKERS), context.map.shape[1]
    begun = run_context(ones, ones, dtype=context.map.dtype, room=ROOM, width=width, regions=regions)
    state, place = rule.init(begun), placing(rule)
    nothing = jnp.zeros(WALKERS)
    frames = Frames(nothing, nothing, nothing, {}, nothing, nothing)
    held = np.full(ROOM, -1)
    for n in range(0, len(features), WALKERS):
        offer = Offer(
            wanted=jnp.ones(WALKERS, bool),
            score=jnp.asarray(scores[n : n + WALKERS]),
            features=jnp.asarray(features[n : n + WALKERS] @ np.asarray(context.map)),
            known=context.known,
            frames=frames,
            key=jax.random.fold_in(jax.random.key(seed), n),
            offered=jnp.zeros(WALKERS, int),
        )
        slots, state = place(state, offer)
        slots = np.asarray(slots)
        used = slots[slots < ROOM]
        assert len(set(used)) == len(used)
        held[used] = (n + np.arange(WALKERS))[slots < ROOM]
    return [int(row) for row in held if row >= 0]


@pytest.fixture(scope="module")
def clouds() -> tuple[np.ndarray, np.ndarray]:
    """A training set in the middle of a stream that drifts away from it."""
    rng = np.random.default_rng(0)
    trained = rng.normal(size=(40, WIDTH))
    walk = np.cumsum(0.4 * rng.normal(size=(300, WIDTH)), axis=0)
    return trained, walk


def log_det(trained: np.ndarray, chosen: np.ndarray, sigma: float) -> float:
    scale = np.mean(np.sum(trained**2, axis=1))
    information = (trained.T @ trained + chosen.T @ chosen) / scale + sigma**2 * np.eye(WIDTH)
    return float(np.linalg.slogdet(information)[1])


def test_exchanges_reach_the_determinant_of_greedy_selection(clouds):
    trained, walk = clouds
    options = LogDetAdmission(sigma=0.1, least_gain=0.0)
    with jax.enable_x64(True):
        held = stream(options.build(), options.context(trained, 0), walk, np.ones(len(walk)))
    chosen: list[int] = []
    for _ in range(ROOM):  # offline: all frames at hand
        gains = [log_det(trained, walk[[*chosen, n]], 0.1) for n in range(len(walk))]
        chosen.append(int(np.argmax(gains)))
    base = log_det(trained, walk[:0], 0.1)
    online, offline = (log_det(trained, walk[rows], 0.1) - base for rows in (held, chosen))
    assert len(held) == ROOM and online >= 0.95 * offline


def cloud(kind: str, width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Training frames and a stream, in float32 as in a campaign: away, around a place, or with a decaying spectrum."""
    rng = np.random.default_rng(seed)
    trained, noise = rng.normal(size=(40, width)), rng.normal(size=(300, width))
    if kind == "away":
        return trained.astype(np.float32), np.cumsum(0.4 * noise, axis=0).astype(np.float32)
    place, stream = np.zeros(width), []
    for push in noise:
        place = 0.95 * place + 0.5 * push
        stream.append(1.5 * place)
    spectrum = 0.5 ** np.arange(width) if kind == "decaying" else np.ones(width)
    return (trained * spectrum).astype(np.float32), (np.array(stream) * spectrum).astype(np.float32)


def test_the_defaults_keep_what_greedy_selection_would_add():
    """At least 0.95 of the gain of offline greedy selection, with the shipped settings, in single precision."""
    options = LogDetAdmission()
    shares = []
    for kind, width, seed in itertools.product(("away", "around", "decaying"), (5, 16), range(3)):
        trained, frames = cloud(kind, width, seed)
        context = options.context(trained, 0)
        held = stream(options.build(), context, frames, np.ones(len(frames), np.float32))
        rows = frames.astype(np.float64) @ np.asarray(context.map, np.float64)
        posterior, chosen = np.eye(width), []
        for _ in range(ROOM):
            chosen.append(int(np.argmax(np.einsum("ni,ij,nj->n", rows, posterior, rows))))
            way = posterior @ rows[chosen[-1]]
            posterior -= np.outer(way, way) / (1 + rows[chosen[-1]] @ way)
        online, offline = (np.linalg.slogdet(np.eye(ROOM) + rows[k] @ rows[k].T)[1] for k in (held, chosen))
        assert len(held) == ROOM
        shares.append(online / offline)
    assert min(shares) >= 0.95 and np.median(shares) >= 0.97, np.round(shares, 3)


def test_copies_find_no_free_slot_and_new_frames_do():
    rng = np.random.default_rng(0)
    trained = rng.normal(size=(40, WIDTH)).astype(np.float32)
    places = 3 * rng.normal(size=(4, WIDTH))
    frames = np.concatenate([place + 0.02 * rng.normal(size=(15, WIDTH)) for place in places]).astype(np.float32)
    options = LogDetAdmission()
    held = stream(options.build(), options.context(trained, 0), frames, np.ones(len(frames), np.float32))
    assert sorted(row // 15 for row in held) == [0, 1, 2, 3]


def test_gains_and_exchanges_are_those_of_the_determinant(clouds):
    """Every decision of the rule, against determinants computed from scratch."""
    trained, walk = clouds
    options = LogDetAdmission(sigma=0.1, least_gain=0.7)
    with jax.enable_x64(True):
        context, rule = options.context(trained, 0), options.build()
        held = stream(rule, context, walk[:90], np.ones(90))
        mapped = walk[:90] @ np.asarray(context.map)
    kept: list[int] = []
    for n in range(90):

        def value(rows: list[int]) -> float:
            return float(np.linalg.slogdet(np.eye(len(rows)) + mapped[rows] @ mapped[rows].T)[1])

        if len(kept) < ROOM:
            if value([*kept, n]) - value(kept) > 0.7:
                kept.append(n)
            continue
        swaps = [value([*kept[:j], n, *kept[j + 1 :]]) - value(kept) for j in range(ROOM)]
        if max(swaps) > np.log(1.001):
            kept[int(np.argmax(swaps))] = n
    assert sorted(held) == sorted(kept)


STRATA = [{"bath_temperature": kelvin, "walker": w} for w, kelvin in enumerate((300.0, 600.0, 600.0))]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"by": "bath_temperature"}, [(0, 4), (4, 8), (4, 8)]),
        ({"by": "bath_temperature", "shares": {600: 3, 300: 1}}, [(0, 2), (2, 8), (2, 8)]),
        ({"by": "bath_temperature", "shares": {300: 1, 600: 1e6}}, [(0, 1), (1, 8), (1, 8)]),
        ({"by": "walker"}, [(0, 3), (3, 5), (5, 8)]),
        ({"by": "walker", "shares": {0: 1, 1: 1e-3, 2: 1}}, [(0, 4), (4, 5), (5, 8)]),
    ],
)
def test_strata_have_regions_of_the_buffer(options, expected):
    for settings_of in (LogDetAdmission, FarthestAdmission, TopAdmission, ReservoirAdmission):
        regions = settings_of.model_validate(options).regions(STRATA, ROOM)
        assert [tuple(row) for row in regions] == expected
    assert TopAdmission().regions(STRATA, ROOM) is None


@pytest.mark.parametrize("seed", range(3))
def test_exchanges_within_regions_are_those_of_the_determinant(seed):
    """A frame takes a slot of its own stratum, and what it adds is counted with all that is kept."""
    rng = np.random.default_rng(seed)
    trained = rng.normal(size=(60, 16))
    walk = rng.normal(size=(90, 16)) * np.tile([1.0, 2.0, 2.0], 30)[:, None]  # the first walker goes less far
    options = LogDetAdmission(sigma=0.1, least_gain=0.1, by="bath_temperature")
    regions = options.regions(STRATA, ROOM)
    with jax.enable_x64(True):
        context = options.context(trained, 0)
        held = stream(options.build(), context, walk, np.ones(90), regions=regions)
        unshared = stream(options.build(), context, walk, np.ones(90))
        mapped = walk @ np.asarray(context.map)
    slots: list[int | None] = [None] * ROOM

    def value(rows: list[int | None]) -> float:
        kept = mapped[[row for row in rows if row is not None]]
        return float(np.linalg.slogdet(np.eye(len(kept)) + kept @ kept.T)[1])

    def with_frame(j: int, n: int) -> list[int | None]:
        return [*slots[:j], n, *slots[j + 1 :]]

    for n in range(90):
        own = range(*regions[n % WALKERS])
        free = [j for j in own if slots[j] is None]
        gains = {j: value(with_frame(j, n)) - value(slots) for j in free[:1] or own}
        best = max(gains, key=gains.__getitem__)
        if gains[best] > (0.1 if free else np.log(1.001)):
            slots[best] = n
    assert held == slots and all((row % WALKERS == 0) == (j < 4) for j, row in enumerate(held))
    assert sum(row % WALKERS == 0 for row in unshared) <= 1  # what shares are for


def test_the_best_of_each_stratum_are_kept():
    """The highest scores, frames far from all, and uniform samples, of each walker among its own."""
    rng = np.random.default_rng(2)
    scores = (rng.permutation(60) + 100 * (np.arange(60) % WALKERS)).astype(np.float32)
    top = TopAdmission(by="walker")
    regions = top.regions(STRATA, ROOM)
    held = stream(top.build(), top.context(None, 0), np.zeros((60, 0), np.float32), scores, regions=regions)
    for w, (first, last) in enumerate(regions):
        own = np.arange(w, 60, WALKERS)
        assert sorted(held[first:last]) == sorted(own[np.argsort(-scores[own])[: last - first]])
    trained = rng.normal(size=(20, WIDTH))
    features = rng.normal(size=(60, WIDTH)) * np.tile([0.2, 1.0, 3.0], 20)[:, None]
    for options in (FarthestAdmission(by="walker"), ReservoirAdmission(by="walker")):
        context = options.context(trained, 0)
        width = context.map.shape[1]
        held = stream(options.build(), context, features[:, : len(context.map)], scores, regions=regions)
        assert [row % WALKERS for row in held] == [0] * 3 + [1] * 2 + [2] * 3, (options.kind, width)


def test_a_lonely_frame_keeps_to_its_region():
    """With nothing known and one frame kept, whose nearest neighbour is infinitely far, no other slot is taken."""
    options = FarthestAdmission(by="walker", least_distance=0.0)
    context = Context(jnp.eye(WIDTH), jnp.zeros((0, WIDTH)))
    regions = np.array([[7, 8], [0, 4], [4, 7]], np.int32)
    begun = run_context(np.ones(WALKERS), np.ones(WALKERS), room=ROOM, width=WIDTH, regions=regions)
    rule = options.build()
    state = rule.init(begun)
    nothing = jnp.zeros(WALKERS)
    frames = Frames(nothing, nothing, nothing, {}, nothing, nothing)
    for n in range(3):
        offer = Offer(
            wanted=jnp.array([True, False, False]),
            score=nothing,
            features=jnp.full((WALKERS, WIDTH), float(n)),
            known=context.known,
            frames=frames,
            key=jax.random.key(n),
            offered=jnp.zeros(WALKERS, int),
        )
        slots, state = placing(rule)(state, offer)
        assert int(slots[0]) in (7, ROOM)
    assert list(np.flatnonzero(state.kept)) == [7]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"shares": {300: 1}}, "say by what"),
        ({"by": "bath_temperature", "shares": {300: 1, 450: 1}}, "'450'; walkers have bath_temperature of 300, 600"),
        ({"by": "bath_temperature", "shares": {300: 1}}, "leave bath_temperature '600' out"),
        ({"by": "walker", "shares": {0: 1, 1: 1, 2: 1, 3: 1}}, "'3'; walkers have walker of 0, 1, 2"),
    ],
)
def test_shares_of_walkers_that_there_are_not(changes, said):
    walkers = [{"temperature": 300, "count": 1}, {"temperature": 600, "count": 2}]
    given = {"walkers": walkers, "admission": {"kind": "top_k", **changes}}
    with pytest.raises(ValidationError, match=re.escape(said)):
        ExplorationSettings.model_validate(given)


@pytest.mark.parametrize(
    "changes", [{"walkers": [{"temperature": [300, 600]}]}, {"integrator": {"kind": "fire"}}], ids=str
)
def test_strata_by_a_temperature_that_does_not_last(changes):
    given = {"admission": {"kind": "top_k", "by": "bath_temperature"}, **changes}
    with pytest.raises(ValidationError, match="not every walker has one that lasts"):
        ExplorationSettings.model_validate(given)


def test_farthest_frames_are_far_from_all(clouds):
    trained, walk = clouds
    options = FarthestAdmission(least_distance=0.3)
    with jax.enable_x64(True):
        context = options.context(trained, 0)
        held = stream(options.build(), context, walk, np.ones(len(walk)))
    scale = np.sqrt(np.mean(np.sum(trained**2, axis=1)))

    def nearest(rows: list[int]) -> float:
        others = [np.concatenate([trained, walk[[r for r in rows if r != row]]]) for row in rows]
        pairs = zip(rows, others, strict=True)
        return min(np.linalg.norm(walk[row] - other, axis=1).min() for row, other in pairs) / scale

    assert len(held) == ROOM and nearest(held) > 0.3
    rng = np.random.default_rng(1)
    assert nearest(held) > 2 * np.median([nearest(list(rng.choice(300, ROOM, replace=False))) for _ in range(50)])


@pytest.mark.parametrize("options", [FarthestAdmission(), LogDetAdmission(sigma=0.1)])
def test_a_training_set_whose_features_are_zero_sets_no_scale(options):
    context = options.context(np.zeros((5, 4), np.float32), 0)
    rows = np.eye(4, dtype=np.float32) @ np.asarray(context.map)
    np.testing.assert_allclose(rows @ rows.T, np.eye(4) / (0.01 if options.kind == "log_det" else 1), rtol=1e-5)


def test_the_highest_scores_are_kept_and_a_reservoir_is_uniform(clouds):
    nothing = TopAdmission().context(None, 0)
    features = np.zeros((60, 0), np.float32)
    scores = np.random.default_rng(2).permutation(60).astype(np.float32)
    held = stream(TopAdmission().build(), nothing, features, scores)
    assert sorted(held) == sorted(np.argsort(-scores)[:ROOM])
    counts = np.zeros(60)
    rule = ReservoirAdmission().build()
    for seed in range(60):
        counts[stream(rule, nothing, features, scores, seed)] += 1
    thirds = counts.reshape(3, 20).sum(axis=1)
    assert counts.sum() == 60 * ROOM
    assert stats.chisquare(thirds).pvalue > 1e-3


def test_walkers_of_each_temperature_keep_frames_of_their_own(count_compilations):
    """In the loop: the hottest take all slots where they compete for them; other shares compile nothing anew."""
    groups = tuple(WalkerGroup(temperature=kelvin, count=2) for kelvin in (50.0, 3000.0))

    def kept(**more) -> Counter:
        admission = TopAdmission.model_validate(more)
        runner = Explorer(morse, SPECIES, 6.0, settings(walkers=groups, record_every=1, buffer=4, admission=admission))
        found = runner.run(PARAMS, [dimer(1.3)] * 4, (0.0, 1e4), jax.random.key(0))
        return Counter(frame.info["bath_temperature"] for frame in found.recorded)

    assert kept() == {3000.0: 16}
    with count_compilations() as compiled:
        assert kept(by="bath_temperature") == {50.0: 8, 3000.0: 8}
        assert kept(by="bath_temperature", shares={50: 3, 3000: 1}) == {50.0: 12, 3000.0: 4}
        assert set(kept(by="walker").values()) == {8}
    assert not compiled
    with pytest.raises(InputError, match="walker 0 has no 'system'"):
        kept(by="system")


@pytest.mark.parametrize("options", [LogDetAdmission(), FarthestAdmission()], ids=lambda o: o.kind)
def test_ten_identical_walkers_record_one_frame(options):
    """All start at the same place with no motion to speak of."""
    group = WalkerGroup(temperature=1e-6, count=10)
    runner = Explorer(
        morse,
        SPECIES,
        6.0,
        settings(
            walkers=(group,),
            steps=100,
            record_every=10,
            admission=options,
            sanity=SanitySettings(max_temperature=1e12, dissociation=False),
        ),
    )
    trained = np.random.default_rng(0).normal(size=(20, 18)).astype(np.float32)  # 3 members, 2 species, 3 components
    known = Knowledge(context=options.context(0.01 * trained, 0))
    found = runner.run(PARAMS, [dimer(1.3)] * 10, (1e-3, 1e4), jax.random.key(0), knowledge=known)
    assert found.offered == 100
    steps = [f.info["step"] for f in found.recorded]
    assert 1 in steps and len(set(steps)) == len(steps)
