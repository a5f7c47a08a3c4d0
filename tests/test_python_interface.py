"""The loop in thirty lines of the public interface: it learns, and compiles nothing after its first round."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator

import almlip_jax as al
from almlip_jax.errors import InputError, LabelError

WALKERS = {
    "walkers": [{"temperature": 300, "count": 2}],
    "steps": 60,
    "buffer": 8,
    "record_every": 5,
    "trace_every": 10,
    "trajectory_every": 20,
    "chunk": 60,
}
GATE = {"kind": "fixed", "record": 1e-3, "stop": 1e3}


@pytest.fixture(scope="module")
def rounds(count_compilations):
    """Three rounds on water with a harmonic label source of the test's own: potentials, batches and compilations."""
    start, data, compiled = molecule("H2O"), [], []
    data = [harmonic(frame) for frame in al.rattle(start, 20, np.random.default_rng(0), stdev=0.05)]
    learner = al.Learner(40, model={"size": "tiny"}, ensemble={"size": 2}, training={"max_steps": 60})
    found = []
    for step in range(3):
        with count_compilations() as events:
            potential = learner.fit(data)
            explorer = potential.explorer(WALKERS)
            explored = explorer.run([start], GATE, labelled=data, step=step)
            batch = al.select({"kind": "bait"}, potential, explored.recorded, data, 4, step=step, room=explorer.room)
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
    assert all(1 <= size <= 4 for size in batches) and len(data) == 20 + sum(batches)
    sizes = [potential.metadata["dataset_size"] for potential, _, _ in found]
    assert sizes == [20, 20 + batches[0], 20 + sum(batches[:2])]
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
    learner = al.Learner(40, model={"size": "tiny"}, ensemble={"size": 2}, training={"max_steps": 60})
    again = learner.fit(data[:20]).evaluate(data)
    np.testing.assert_array_equal(again.energy, found[0][0].evaluate(data).energy)


def test_more_structures_than_the_budget_are_refused(rounds):
    with pytest.raises(InputError, match="20 structures are more than the budget of 19"):
        al.Learner(19).fit(rounds[2][:20])


def test_thresholds_from_true_errors_take_frames_that_were_not_trained_on(rounds):
    """A training set says nothing of true errors, and nothing is not taken for something."""
    found, _, data = rounds
    explorer, rule = found[0][0].explorer(WALKERS), {"kind": "conformal", "tolerance": 0.5, "alpha": 0.2}
    with pytest.raises(InputError, match="conformal thresholds follow from labelled structures, and there are none"):
        explorer.run(data[:1], rule, labelled=data)
    held_out = data[20:24]
    wanted = al.thresholds(rule, found[0][0], held_out)
    run = explorer.run(data[:1], rule, labelled=data[:20], calibration=held_out)
    np.testing.assert_allclose(run.thresholds.record, wanted.record, rtol=1e-6)


@pytest.mark.usefixtures("labels_here")
def test_selectors_follow_errors_and_times_where_they_are_given(rounds, tmp_path):
    found, _, data = rounds
    potential, pool, known = found[0][0], data[20:], data[:20]
    assert potential.metadata["validation_forces_rmse"] > 0

    def gains(selector, **more):
        return [frame.info["gain"] for frame in al.select(selector, potential, pool, known, 2, **more)]

    adaptive = {"kind": "adaptive", "alpha": 0.3}
    assert gains(adaptive) != gains(adaptive, errors=[1.0, 1.0, 1.0])  # no progress: uncertainty weighs more
    al.label({"kind": "tblite"}, [molecule("H2O")], store=tmp_path / "labels.db")
    by_cost = {"kind": "cost_aware", "selector": {"kind": "top_k"}}
    assert gains(by_cost) != gains(by_cost, store=tmp_path / "labels.db")


def test_selectors_of_environments_compile_nothing_as_data_grow(rounds, count_compilations):
    found, _, data = rounds
    potential, pool = found[0][0], al.rattle(molecule("H2O"), 12, np.random.default_rng(5), stdev=0.1)
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
        al.select({"kind": "top_k"}, alone, rounds[2][20:], rounds[2][:20], 1)


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


def test_names_are_imported_when_they_are_used():
    program = (
        "import sys, almlip_jax\n"
        "assert 'jax' not in sys.modules and 'Learner' in dir(almlip_jax)\n"
        "from almlip_jax import Learner, label, select, thresholds, know\n"
        "assert all(hasattr(almlip_jax, name) for name in almlip_jax.__all__)\n"
        "try:\n    almlip_jax.Lerner\nexcept AttributeError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "has no attribute 'Lerner'" in done.stdout, done.stderr[-2000:]
