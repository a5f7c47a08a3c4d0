"""Active sets and extrapolation grades: against explicit inverses, and by what defines them."""

from __future__ import annotations

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import ValidationError
from small_pools import KEY, candidates, chosen, sample

from almlip_jax.selection import (
    ActiveSet,
    Candidates,
    Environments,
    MaxvolSettings,
    active_set,
    extrapolation_grade,
    maxvol,
    select,
)

M = 4
BUILD = jax.jit(active_set)
OFFER = jax.jit(lambda rows, start: active_set(rows, start, threshold=1.1))


def built(rows: np.ndarray, start: ActiveSet | None = None) -> ActiveSet:
    with jax.enable_x64(True):
        return jax.device_get(BUILD(jnp.asarray(rows)) if start is None else OFFER(jnp.asarray(rows), start))


def by_hand(rows: np.ndarray, matrix: np.ndarray, threshold: float) -> tuple[np.ndarray, list[int]]:
    """Swaps with a fresh inverse each."""
    matrix, places = matrix.copy(), [-1] * len(matrix)
    while True:
        entries = np.abs(rows @ np.linalg.inv(matrix))
        i, j = np.unravel_index(np.argmax(entries), entries.shape)
        if entries[i, j] <= threshold:
            return matrix, places
        matrix[j], places[j] = rows[i], int(i)


@hypothesis_settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**20))
def test_swaps_are_those_of_explicit_inverses(seed):
    rng = np.random.default_rng(seed)
    rows, offered = rng.normal(size=(20, M)), 1.5 * rng.normal(size=(20, M))
    trained = built(rows)
    matrix, places = by_hand(rows, 1e-5 * np.eye(M), 1 + 1e-7)
    np.testing.assert_allclose(trained.matrix, matrix)
    assert list(trained.rows) == places and trained.largest <= 1 + 1e-7
    np.testing.assert_allclose(trained.inverse @ matrix, np.eye(M), atol=1e-10)
    grades = extrapolation_grade(trained, rows)
    assert np.all(grades <= 1 + 1e-7) and np.max(grades) == pytest.approx(trained.largest)
    more = built(offered, trained)
    matrix, places = by_hand(offered, matrix, 1.1)
    np.testing.assert_allclose(more.matrix, matrix)
    assert list(more.rows) == places and more.largest <= 1.1
    assert abs(np.linalg.det(more.matrix)) >= abs(np.linalg.det(trained.matrix)) * (1 - 1e-9)


def test_no_set_of_rows_spans_much_more():
    """At a local maximum of the volume no single swap, and by Hadamard's bound few swaps at once, gain anything."""
    from itertools import combinations

    rows, _ = sample(1, n=20, d=M)
    volume = abs(np.linalg.det(built(rows).matrix))
    best = max(abs(np.linalg.det(rows[list(one)])) for one in combinations(range(20), M))
    assert volume <= best <= volume * M ** (M / 2)


def test_directions_that_nothing_spans_stay_at_epsilon():
    rows, _ = sample(2, n=20, d=2)
    flat = np.concatenate([rows, np.zeros((20, 2))], axis=1)
    found = built(flat)
    assert sorted(found.rows)[:2] == [-1, -1] and np.sum(found.rows >= 0) == 2
    outside = extrapolation_grade(found, np.array([0.0, 0.0, 0.3, 0.0]))
    assert outside == pytest.approx(0.3 / 1e-5)


def test_rows_that_are_no_numbers_never_enter():
    rows, _ = sample(3, n=18, d=M)
    broken = np.concatenate([np.full((1, M), np.nan), rows, np.zeros((1, M))])
    found, clean = built(broken), built(np.concatenate([rows, np.zeros((2, M))]))
    np.testing.assert_array_equal(found.rows - 1, clean.rows)


@pytest.mark.parametrize("start", ["epsilon", "identity"])
def test_maxvol_by_atoms_chooses_structures_of_which_an_atom_extrapolates(start):
    """The set is that of the atoms of what is labelled; of a candidate the atom with the largest grade counts."""
    rng = np.random.default_rng(6)
    known = [rng.normal(size=(n, M)) for n in (3, 4, 2, 3)]
    pool = [rng.normal(size=(n, M)) * size for n, size in ((2, 0.1), (1, 3.0), (2, 0.1), (1, 3.0), (2, 3.0))]
    pool[0][0] = np.nan  # cannot be judged, and is no candidate
    of_atoms = [Environments.of({"latent": rows}, [[8] * len(one) for one in rows]) for rows in (pool, known)]
    shown = [Candidates.of(environments=one) for one in of_atoms]
    settings = MaxvolSettings(mode="neighborhood", features="latent", start=start)
    assert settings.atom_feature_names == ("latent",) and settings.feature_names == ()
    found = select(settings.build(3), KEY, *shown)
    together = np.concatenate(known)
    factor = 1 / np.sqrt(np.mean(np.sum(together**2, axis=1)))
    first = (1.0 if start == "identity" else 1e-5) * np.eye(M)
    trained, _ = by_hand(factor * together, first, 1 + 1e-7)
    rows, owner = factor * np.concatenate(pool[1:]), np.repeat([1, 2, 3, 4], [1, 2, 1, 2])
    _, places = by_hand(rows, trained, 1.001)
    of_rows = np.abs(rows @ np.linalg.inv(trained)).max(axis=1)
    grades = {n: of_rows[owner == n].max() for n in {owner[i] for i in places if i >= 0}}
    assert chosen(found) == sorted(grades, key=lambda n: -grades[n])[:3] and len(grades) > 1
    np.testing.assert_allclose(found.gain[: len(grades)], sorted(grades.values(), reverse=True), rtol=1e-6)
    with pytest.raises(ValidationError, match="mode neighborhood needs features of atoms"):
        MaxvolSettings(mode="neighborhood", features="composition")


@pytest.mark.parametrize("mode", ["configuration", "neighborhood"])
def test_many_rows_are_looked_at_in_blocks(mode, monkeypatch):
    """Rows that stand out enter whatever they are looked at with: the choice is that of all rows at once."""
    rng = np.random.default_rng(8)

    def shown(count: int, size: float, far: dict[int, np.ndarray]) -> Candidates:
        atoms = [size * rng.uniform(-1, 1, size=(3, M)) for _ in range(count)]
        for n, row in far.items():
            atoms[n][1] = row
        if mode == "configuration":
            return Candidates.of({"latent": [one[1] for one in atoms]})
        return Candidates.of(environments=Environments.of({"latent": atoms}, [[8] * 3] * count))

    labelled = shown(20, 0.2, dict(zip((0, 7, 11, 19), np.eye(M), strict=True)))
    far = {3: 2.0 * np.eye(M)[1], 17: 3.0 * np.eye(M)[2], 18: 2.5 * np.eye(M)[2], 29: -4 * np.eye(M)[3]}
    pool = shown(30, 0.3, far)
    settings = MaxvolSettings(mode=mode, features="latent")
    whole = select(settings.build(6), KEY, pool, labelled)
    assert chosen(whole) == [29, 17, 3]
    seen: list[tuple[int, ...]] = []

    def watched(rows: jax.Array, *given, **options) -> ActiveSet:
        seen.append(rows.shape)
        return active_set(rows, *given, **options)

    module = importlib.import_module("almlip_jax.selection.maxvol")
    monkeypatch.setattr(module, "_ENTRIES", 7 * M)
    monkeypatch.setattr(module, "active_set", watched)
    found = select(settings.build(7), KEY, pool, labelled)  # another number: not the program of before
    assert seen and max(rows for rows, _ in seen) <= 7
    assert chosen(found) == chosen(whole)
    np.testing.assert_allclose(found.gain[:3], whole.gain[:3], rtol=1e-9)


def test_maxvol_chooses_what_extrapolates():
    x, _ = sample(4)
    known, _ = sample(5, n=12)
    factor = 1 / np.sqrt(np.mean(np.sum(known**2, axis=1)))
    found = select(maxvol(5, "x"), KEY, candidates(x), candidates(known))
    trained, _ = by_hand(factor * known, 1e-5 * np.eye(5), 1 + 1e-7)
    _, places = by_hand(factor * x, trained, 1.001)
    grades = np.max(np.abs(factor * x @ np.linalg.inv(trained)), axis=1)
    entered = sorted((i for i in places if i >= 0), key=lambda i: -grades[i])
    assert entered and chosen(found) == entered
    np.testing.assert_allclose(found.gain[: len(entered)], grades[entered], rtol=1e-9)
    inside = select(maxvol(5, "x"), KEY, candidates(0.1 * known), candidates(known))
    assert chosen(inside) == []
