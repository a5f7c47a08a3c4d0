"""Selectors and filters over the atoms of structures, against brute force; and what they take of memory."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_environments import COVER, ENTROPY, ROOM, SELECTORS, K, Structure, candidates, structures
from small_pools import KEY, chosen

from almlip_jax.errors import InputError
from almlip_jax.selection import (
    Candidates,
    ChainSettings,
    CostAwareSettings,
    CoverSettings,
    EnvironmentEntropySettings,
    Environments,
    FilterSettings,
    NewEnvironmentsSettings,
    SelectorSettings,
    Sites,
    chain,
    cost_aware,
    cover,
    environment_entropy,
    new_environments,
    random,
    select,
    sites,
    surprising,
)

SCALE = jax.jit(lambda there: sites.scale_of(there, None, 0.75, K))


def apart(a: Structure, b: Structure) -> np.ndarray:
    """Distances between the atoms of two structures, infinite between unlike elements."""
    distance = np.linalg.norm(a[0][:, None] - b[0][None], axis=-1)
    return np.where(a[1][:, None] == b[1][None], distance, np.inf)


def joined(given: list[Structure]) -> Structure:
    return np.concatenate([x for x, _ in given]), np.concatenate([z for _, z in given])


def kinds(one: Structure, known: list[Structure], radius: float) -> float:
    """New kinds of surroundings in a structure: new atoms that are within the radius of each other share a count."""
    new = np.min(apart(one, joined(known)), axis=1) > radius if known else np.ones(len(one[1]), bool)
    return float(np.sum(new / np.sum(apart(one, one) <= radius, axis=1)))


def entropy(given: list[Structure], width: float) -> float:
    """Sum over the elements of the entropy of the atoms, nats."""
    total = 0.0
    x, z = joined(given)
    for element in set(z.tolist()):
        rows = x[z == element]
        square = np.sum((rows[:, None] - rows[None]) ** 2, axis=-1)
        total -= np.mean(np.log(np.mean(np.exp(-square / 2 / width**2), axis=1)))
    return float(total)


@pytest.mark.parametrize("labelled", [0, 3])
def test_cover_takes_the_most_new_kinds(labelled):
    pool, known = structures(1), structures(2, labelled)
    found = select(COVER, KEY, candidates(pool), candidates(known))
    sofar = list(known)
    for row, gain in zip(chosen(found), found.gain, strict=True):
        free = [n for n in range(len(pool)) if not any(pool[n] is one for one in sofar)]
        worth = {n: kinds(pool[n], sofar, 0.6) for n in free}
        assert worth[row] == pytest.approx(max(worth.values())) == pytest.approx(gain, abs=1.1e-3)
        sofar.append(pool[row])


def test_equal_atoms_count_once_and_a_rare_element_is_new_however_near_another_lies():
    copper = (np.zeros((6, 3)), np.full(6, 29))
    doped = (np.zeros((6, 3)), np.array([29] * 5 + [78]))
    shaken = (np.full((6, 3), 0.01), np.full(6, 29))
    pool, known = candidates([shaken, doped, copper]), candidates([copper])
    assert chosen(select(COVER, KEY, pool, known))[0] == 1 == chosen(select(ENTROPY, KEY, pool, known))[0]
    assert select(COVER, KEY, pool, known).gain[0] == pytest.approx(1, abs=1.1e-3)
    first = select(COVER, KEY, pool, candidates([]))
    assert chosen(first)[0] == 1 and first.gain[0] == pytest.approx(2, abs=1.1e-3)


def test_entropy_rises_as_the_gain_says():
    """One structure more, next to many: the gain is the rise of the entropy, where every atom raises it."""
    known, pool = structures(3, 60), [one for one in structures(4, 12) if len(one[1]) < 3]
    room = {"structures": 64, "atoms": 400, "largest": 6}
    selector = environment_entropy(1, "x", bandwidth=0.6)
    before = entropy(known, 0.6)
    shifted = [(x + 3.0, z) for x, z in pool]
    for one in [*shifted[:3], *pool[:2]]:
        gain = select(selector, KEY, candidates([one]), candidates(known, room=room)).gain[0]
        rise = entropy([*known, one], 0.6) - before
        if rise > 0:
            assert gain == pytest.approx(rise, rel=0.1)
        else:
            assert gain < 0.3 * entropy([*known, shifted[0]], 0.6) - before


def test_entropy_takes_what_is_rare_before_what_is_common():
    rng = np.random.default_rng(0)

    def cluster(centre: float, atoms: int) -> Structure:
        return rng.normal(loc=centre, scale=0.1, size=(atoms, 3)), np.full(atoms, 6)

    known = [cluster(0.0, 6) for _ in range(10)] + [cluster(3.0, 2)]
    pool = [cluster(0.0, 3), cluster(3.0, 3), cluster(6.0, 3), cluster(0.0, 3)]
    found = select(ENTROPY, KEY, candidates(pool), candidates(known))
    assert chosen(found)[:2] == [2, 1] and np.all(np.diff(found.gain) <= 0)


@pytest.mark.parametrize("name", SELECTORS)
def test_order_padding_and_what_is_not_finite_do_not_matter(name):
    pool, known = structures(5), structures(6, 4)
    plain = select(SELECTORS[name], KEY, candidates(pool), candidates(known))
    order = np.random.default_rng(0).permutation(len(pool))
    other = candidates(pool, order=order)
    broken = np.array(other.environments.rows["x"])
    bad = Environments.of({"x": [np.full((2, 3), np.nan)]}, [[1, 8]]).rows["x"]
    broken[-2:] = bad
    members = np.array(other.environments.members)
    members[len(pool), :2] = [78, 79]  # a valid structure of rows that are not finite
    valid = other.valid.copy()
    valid[len(pool)] = True
    other = other.replace(
        environments=other.environments.replace(rows={"x": broken}, members=members), valid=valid, id=other.id
    )
    found = select(SELECTORS[name], KEY, other, candidates(known))
    assert [int(order[row]) for row in chosen(found)] == chosen(plain)
    np.testing.assert_array_equal(found.gain, plain.gain)


@pytest.mark.parametrize("make", [cover, environment_entropy])
def test_blocks_of_distances_give_what_all_at_once_do(make, monkeypatch):
    pool, known = candidates(structures(7)), candidates(structures(8, 5))
    whole = select(make(K, "x"), KEY, pool, known)
    monkeypatch.setattr(sites, "ENTRIES", 200)  # two or three columns at a time
    parts = select(make.__wrapped__(K, "x"), KEY, pool, known)
    np.testing.assert_array_equal(parts.indices, whole.indices)
    np.testing.assert_allclose(parts.gain, whole.gain, rtol=1e-5)


def test_scales_follow_the_labelled_set_element_by_element():
    known, pool = structures(9, 5), structures(10)
    order, there = sites.arrange_sites(candidates(pool), candidates(known), "x")
    found = np.asarray(SCALE(there))
    for element in (1, 8):
        least = [
            np.min(apart(one, joined([other for other in known if other is not one])), axis=1)[one[1] == element]
            for one in known
        ]
        assert found[element] == pytest.approx(np.quantile(np.concatenate(least), 0.75), rel=1e-3)
    assert isinstance(there, Sites) and found[26] == 0
    _, alone = sites.arrange_sites(candidates(pool), candidates(known[:1]), "x")
    assert SCALE(alone)[1] > 0, "one labelled structure says nothing, its pool does"


def test_filters_drop_what_brings_nothing_new():
    carbon, near = np.full(2, 6), np.full((2, 3), 0.05)
    known = [(np.zeros((3, 3)), np.full(3, 6)), (np.full((2, 3), 0.1), carbon)]
    old, new, doped = (near, carbon), (np.full((2, 3), 4.0), carbon), (near, np.array([6, 1]))
    pool, labelled = candidates([old, new, doped]), candidates(known)
    by_radius, by_bandwidth = jax.jit(new_environments("x", radius=0.5)), jax.jit(surprising("x", bandwidth=0.5))
    for one in (by_radius, by_bandwidth, jax.jit(new_environments("x"))):
        assert one(KEY, pool, labelled).valid[:4].tolist() == [False, True, True, False]
    two = jax.jit(new_environments("x", radius=0.5, least=2))
    assert two(KEY, pool, labelled).valid[:3].tolist() == [False, True, False]
    for one in (by_radius, by_bandwidth):
        assert one(KEY, pool, candidates([])).valid[:4].tolist() == [True, True, True, False]
    both = select(chain(new_environments("x", radius=0.5), selector=random(3)), KEY, pool, labelled)
    assert sorted(chosen(both)) == [1, 2]


def test_costs_weigh():
    pool, known = structures(1), candidates(structures(2, 3))
    prices = np.full(ROOM["structures"], 1.0)
    dear = chosen(select(COVER, KEY, candidates(pool), known))[0]
    prices[dear] = 100.0
    assert chosen(select(cost_aware(COVER), KEY, candidates(pool, cost=prices), known))[0] != dear


def test_memory_is_in_proportion_to_the_atoms():
    """5,000 structures of 20 atoms and 100 columns, 500 labelled: less than 1 GB with all that is computed."""

    def shapes(number: int) -> Candidates:
        def array(*shape: int, dtype: Any = jnp.float32) -> Any:
            return jax.ShapeDtypeStruct(shape, dtype)

        atoms = Environments(
            {"x": array(20 * number, 100)}, array(20 * number, dtype=jnp.int32), array(number, 20, dtype=jnp.int32)
        )
        columns = array(number), array(number, dtype=bool), array(number, dtype=jnp.int32)
        return Candidates({}, {}, *columns, environments=atoms)

    with jax.enable_x64(True):
        for one in (cover(50, "x"), environment_entropy(50, "x")):
            used = jax.jit(one).lower(KEY, shapes(5000), shapes(500)).compile().memory_analysis()
            assert used.temp_size_in_bytes + used.argument_size_in_bytes < 0.8e9


def test_settings_say_what_they_look_at_and_build():
    by_atoms = CoverSettings(features="latent", radius=0.2)
    chained = ChainSettings(filters=(NewEnvironmentsSettings(),), selector=CostAwareSettings(selector=by_atoms))
    assert chained.atom_feature_names == ("power_spectrum", "latent") and chained.feature_names == ()
    assert by_atoms.build(3) is cover(3, "latent", radius=0.2, quantile=0.9)
    assert SelectorSettings.parse({"kind": "environment_entropy"}) == EnvironmentEntropySettings()
    assert FilterSettings.parse({"kind": "surprising"}).prefers
    with pytest.raises(ValueError, match="'composition' is not a feature map of atoms"):
        CoverSettings(features="composition")


def test_candidates_without_rows_of_atoms_are_refused():
    with pytest.raises(InputError, match="environments of no structure"):
        Environments.of({"x": []}, [])
    with pytest.raises(InputError, match="candidates have no rows of atoms 'x'"):
        select(COVER, KEY, Candidates.of({"x": np.ones((3, 2))}), Candidates.of({"x": np.ones((3, 2))}))
    with pytest.raises(InputError, match=r"candidates have no rows of atoms 'y'; they have: x"):
        select(cover(2, "y"), KEY, candidates(structures(0)), candidates([]))
