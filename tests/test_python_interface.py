"""The loop in thirty lines of the public interface: it learns, and compiles nothing after its first round."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator
from tiny_campaign import SECTIONS

import almlip_jax as al
from almlip_jax.errors import InputError, LabelError

# Of the sizes of the tiny campaign: programs of its trainings and explorations serve here, too.
WALKERS = {name: value for name, value in SECTIONS["exploration"].items() if name not in ("kind", "thresholds")}
LEARNER = {name: SECTIONS[name] for name in ("model", "ensemble")} | {
    "training": SECTIONS["training"] | {"max_steps": 60}
}
FIRST, BATCH, MOST = 8, 3, 14
"""Structures of the first dataset, of a batch, and of the dataset in the end."""
GATE = {"kind": "fixed", "record": 1e-3, "stop": 1e3}


@pytest.fixture(scope="module")
def rounds(count_compilations):
    """Three rounds on water with a harmonic label source of the test's own: potentials, batches and compilations."""
    start, data, compiled = molecule("H2O"), [], []
    data = [harmonic(frame) for frame in al.rattle(start, FIRST, np.random.default_rng(0), stdev=0.05)]
    learner = al.Learner(MOST, **LEARNER)
    found = []
    for step in range(3):
        with count_compilations() as events:
            potential = learner.fit(data)
            explorer = potential.explorer(WALKERS)
            explored = explorer.run([start], GATE, labelled=data, step=step)
            pool, options = explored.recorded, {"step": step, "room": explorer.room}
            batch = al.select({"kind": "bait"}, potential, pool, data, BATCH, **options)
        data = data + [harmonic(frame) for frame in batch]
        found.append((potential, explored, batch))
        compiled.append(len(events))
    return found, compiled, data


def harmonic(frame: Atoms) -> Atoms:
    """The frame with energy and forces of springs between all atoms."""
    at = frame.positions
    apart = at[:, None] - at[None]
    length = np.linalg.norm(apart, axis=-1) + np.eye(len(at))
    stretch = (length - 1.2) * (1 - np.eye(len(at)))
    labelled = frame.copy()
    forces = -10 * np.sum(stretch[..., None] * apart / length[..., None], axis=1)
    labelled.calc = SinglePointCalculator(labelled, energy=2.5 * np.sum(stretch**2), forces=forces)
    return labelled


def test_later_rounds_compile_nothing(rounds):
    _, compiled, _ = rounds
    assert compiled[0] > 0 and compiled[1:] == [0, 0]


def test_each_round_has_data_and_random_numbers_of_its_own(rounds):
    found, _, data = rounds
    batches = [len(batch) for _, _, batch in found]
    assert all(1 <= size <= BATCH for size in batches) and len(data) == FIRST + sum(batches)
    sizes = [potential.metadata["dataset_size"] for potential, _, _ in found]
    assert sizes == [FIRST, FIRST + batches[0], FIRST + sum(batches[:2])]
    first, second = (explored.recorded[0].positions for _, explored, _ in found[:2])
    assert not np.allclose(first, second)
    assert all("gain" in frame.info for _, _, batch in found for frame in batch)


def test_a_potential_of_the_loop_is_one_like_any_other(rounds, tmp_path):
    found, _, data = rounds
    potential = found[-1][0]
    potential.save(tmp_path / "water")
    loaded = al.load(tmp_path / "water")
    assert [one.get_chemical_formula() for one in loaded.compositions] == ["H2O"]
    again = loaded.evaluate(data[:3])
    np.testing.assert_array_equal(again.energy, potential.evaluate(data[:3]).energy)


def test_the_same_seed_gives_the_same_potential(rounds):
    found, _, data = rounds
    again = al.Learner(MOST, **LEARNER).fit(data[:FIRST]).evaluate(data)
    np.testing.assert_array_equal(again.energy, found[0][0].evaluate(data).energy)


def test_more_structures_than_the_budget_are_refused(rounds):
    with pytest.raises(InputError, match="8 structures are more than the budget of 7"):
        al.Learner(FIRST - 1).fit(rounds[2][:FIRST])


def test_thresholds_from_true_errors_take_frames_that_were_not_trained_on(rounds):
    """A training set says nothing of true errors, and nothing is not taken for something."""
    found, _, data = rounds
    explorer, rule = found[0][0].explorer(WALKERS), {"kind": "conformal", "tolerance": 0.5, "alpha": 0.2}
    with pytest.raises(InputError, match="conformal thresholds follow from labelled structures, and there are none"):
        explorer.run(data[:1], rule, labelled=data)
    held_out = data[FIRST : FIRST + 4]
    wanted = al.thresholds(rule, found[0][0], held_out)
    run = explorer.run(data[:1], rule, labelled=data[:FIRST], calibration=held_out)
    np.testing.assert_allclose(run.thresholds.record, wanted.record, rtol=1e-6)


@pytest.mark.usefixtures("labels_here")
def test_selectors_follow_errors_and_times_where_they_are_given(rounds, tmp_path):
    found, _, data = rounds
    potential, pool, known = found[0][0], data[FIRST:], data[:FIRST]
    assert potential.metadata["validation_forces_rmse"] > 0

    def gains(selector, **more):
        return [frame.info["gain"] for frame in al.select(selector, potential, pool, known, 2, **more)]

    adaptive = {"kind": "adaptive", "alpha": 0.3}
    assert gains(adaptive) != gains(adaptive, errors=[1.0, 1.0, 1.0])  # no progress: uncertainty weighs more
    al.label({"kind": "tblite"}, [molecule("H2O")], store=tmp_path / "labels.db")
    by_cost = {"kind": "cost_aware", "selector": {"kind": "top_k"}}
    assert gains(by_cost) != gains(by_cost, store=tmp_path / "labels.db")


def test_selectors_of_environments_compile_nothing_as_data_grow(rounds, count_compilations):
    potential, pool = rounds[0][0][0], al.rattle(molecule("H2O"), 12, np.random.default_rng(5), stdev=0.1)
    data = [harmonic(frame) for frame in al.rattle(molecule("H2O"), 26, np.random.default_rng(6), stdev=0.05)]
    chain = {"kind": "chain", "filters": [{"kind": "new_environments"}], "selector": {"kind": "cover"}}
    for selector in (chain, {"kind": "environment_entropy", "features": "latent"}):
        first = al.select(selector, potential, pool, data[:20], 3)
        with count_compilations() as compiled:
            second = al.select(selector, potential, pool[1:], data[:26], 3)
        assert not compiled and len(first) and len(second) and second[0].info["gain"] > 0


def test_a_spread_that_is_not_there_is_refused(rounds):
    first = rounds[0][0][0]
    params = jax.tree.map(lambda leaf: leaf[:1], first.params)
    alone = replace(first, params=params, members=al.EnsembleSettings(size=1), fitted={})
    with pytest.raises(InputError, match="one member"):
        al.select({"kind": "top_k"}, alone, rounds[2][FIRST:], rounds[2][:FIRST], 1)


def test_labels_are_paid_once(tmp_path):
    water = molecule("H2O")
    first = al.label({"kind": "tblite"}, [water], store=tmp_path / "labels.db")
    with al.LabelStore(tmp_path / "labels.db") as store:
        assert store.count_calls() == 1
    again = al.label({"kind": "tblite"}, [water, water], store=tmp_path / "labels.db")
    with al.LabelStore(tmp_path / "labels.db") as store:
        assert store.count_calls() == 1
    assert again[1].get_potential_energy() == first[0].get_potential_energy()


@pytest.mark.usefixtures("labels_here")
def test_a_label_that_fails_is_named_or_left_out():
    water, crashed = molecule("H2O"), molecule("H2O")
    crashed.positions[1] = crashed.positions[0] + 0.05
    with pytest.raises(LabelError, match="1 of 2 labels failed, first that of structure 1"):
        al.label({"kind": "tblite"}, [water, crashed])
    assert len(al.label({"kind": "tblite"}, [crashed, water], failed="leave_out")) == 1
