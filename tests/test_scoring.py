"""Scoring pools: running statistics against those of whole arrays, and what an interruption leaves behind."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from ase.build import molecule

from almlip_jax.ensembles import SCORES, Ensemble
from almlip_jax.models import SharedDensitySettings, build_model
from almlip_jax.potential import Potential
from almlip_jax.scoring import PoolSummary, score_pool
from almlip_jax.structures.io import read_structures, write_structures
from almlip_jax.structures.species import SpeciesTable

SETTINGS = SharedDensitySettings(cutoff=3.5, radial=4, l_max=1, channels=4, hidden=(8,))
SPECIES = SpeciesTable((1, 8))


@pytest.fixture(scope="module")
def potential() -> Potential:
    params = Ensemble(build_model(SETTINGS, SPECIES), 2).init(jax.random.key(0))
    return Potential(SETTINGS, SPECIES, jax.tree.map(np.asarray, params), {1: -13.6, 8: -2040.0})


@pytest.fixture
def pool(tmp_path, monkeypatch):
    monkeypatch.setattr("almlip_jax.potential._CHUNK_FRAMES", 8)
    frames = [molecule("H2O") for _ in range(30)]
    for n, frame in enumerate(frames):
        frame.rattle(0.1, seed=n)
        frame.info["name"] = f"water {n}"
    write_structures(tmp_path / "pool.extxyz", frames)
    return tmp_path / "pool.extxyz"


@pytest.mark.parametrize("missing", [None, 5, 12])
def test_running_statistics_are_those_of_the_whole(missing):
    values = np.random.default_rng(0).normal(size=(20, len(SCORES))).astype(np.float32)
    if missing is not None:
        values[missing] = np.nan
    summary = PoolSummary()
    for rows in (slice(0, 7), slice(7, 8), slice(8, 20)):
        summary.add({name: values[rows, n] for n, name in enumerate(SCORES)})
    assert summary.number == 20
    assert summary.most_uncertain == np.argmax(values[:, SCORES.index("force_std_max")])
    np.testing.assert_allclose(list(summary.mean.values()), values.mean(axis=0), rtol=1e-5, atol=1e-6)


def test_a_scored_pool_holds_what_the_potential_says(potential, pool):
    steps = []
    summary = score_pool(potential, pool, pool.with_name("out.extxyz"), steps.append)
    frames = read_structures(pool)
    found = potential.evaluate(frames)
    for n, (frame, scored) in enumerate(zip(frames, read_structures(pool.with_name("out.extxyz")), strict=True)):
        np.testing.assert_array_equal(scored.positions, frame.positions)
        np.testing.assert_array_equal(scored.arrays["force_std"], found.force_std[n].astype(float))
        assert scored.info["name"] == f"water {n}"
        assert all(scored.info[name] == float(values[n]) for name, values in found.scores.items())
    assert sum(steps) == summary.number == 30 and len(steps) > 1
    assert summary.most_uncertain == found.scores["force_std_max"].argmax()


def test_an_interruption_leaves_what_was_there(potential, pool):
    out = pool.with_name("out.extxyz")
    out.write_text("of old")

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_pool(potential, pool, out, interrupt)
    assert out.read_text() == "of old"
    assert sorted(file.name for file in pool.parent.iterdir()) == ["out.extxyz", "pool.extxyz"]
