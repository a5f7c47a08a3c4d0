"""Labels that are made while the campaign goes on: the same campaign whatever time they take, and none bought twice."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import sleepy_labels
from ase import Atoms
from tiny_campaign import Killed, KillingProgress, kill_in, result_of, run_or_resume, start_process, tiny_config

import almlip_jax
from almlip_jax.campaign.report import write_report
from almlip_jax.campaign.rundir import RunDirectory
from almlip_jax.campaign.state import CampaignState, Stage, read_state
from almlip_jax.campaign.status import campaign_status
from almlip_jax.files import read_csv
from almlip_jax.keys import numpy_generator
from almlip_jax.oracles import Label, rattle
from almlip_jax.structures.io import read_structures, write_structures
from almlip_jax.structures.repeats import geometry_key

pytestmark = pytest.mark.usefixtures("compile_once")

PAIRS = 12


@pytest.fixture(scope="module")
def sections(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A campaign on a pool of twins, structures that hardly differ, whose labels are springs.

    Of the sizes of the tiny campaign, so that its programs serve again.
    """
    folder = tmp_path_factory.mktemp("twins")
    start = tiny_config(folder).system.structures
    assert isinstance(start, Path)
    frames = rattle(read_structures(start)[0], 16 + PAIRS, numpy_generator(3, "twins"), stdev=0.08)
    write_structures(folder / "initial.extxyz", [_labelled(frame) for frame in frames[:5]])
    write_structures(folder / "test.extxyz", [_labelled(frame) for frame in frames[8:16]])
    twins = [frame.copy() for frame in frames[16:]]
    for twin in twins:
        twin.positions += 1e-5 * np.arange(9).reshape(3, 3)
    write_structures(folder / "pool.extxyz", [*frames[16:], *twins])
    return {
        "campaign": {"overlap": True},
        "oracle": {"kind": "user", "function": "sleepy_labels:make", "code_version": "1"},
        "executor": {"kind": "local", "workers": 2},
        "initial": {"rattle": None, "md": (), "dataset": str(folder / "initial.extxyz")},
        "test": {"md": (), "files": [{"path": str(folder / "test.extxyz")}]},
        "exploration": {"kind": "pool", "files": str(folder / "pool.extxyz")},
        "selection": {"batch": 3, "selector": {"kind": "max_det"}},
        "stopping": {"max_rounds": 3},
    }


def _labelled(atoms: Atoms) -> Atoms:
    return Label("", *sleepy_labels.energy_and_forces(atoms)).attach(atoms)


@pytest.fixture(scope="module")
def overlapped(
    sections: dict[str, Any], reference: Path, cache: Path, compiled_in: Any, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The run directory of a campaign whose labels take no time."""
    folder = tmp_path_factory.mktemp("overlapped")
    with compiled_in(cache), pytest.MonkeyPatch.context() as patch:
        patch.setenv(sleepy_labels.CALLS, str(folder / "calls"))
        outcome = run_or_resume(folder, folder / "run", **sections)
    assert (outcome.rule, outcome.round, outcome.labels) == ("max_rounds", 3, 9)
    return folder / "run"


@pytest.fixture(scope="module")
def moving(
    reference: Path, cache: Path, compiled_in: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """The run directory of a campaign with walkers that nobody interrupts, and its sections."""
    folder = tmp_path_factory.mktemp("moving")
    rule = {"kind": "conformal", "tolerance": 0.02, "alpha": 0.25, "frames": 2, "stop_factor": 50.0}
    sections = {
        "campaign": {"overlap": True},
        "oracle": {"kind": "user", "function": "sleepy_labels:make", "code_version": "1"},
        "executor": {"kind": "local", "workers": 2},
        "initial": {"md": ()},
        "test": {"md": [{"temperature": 300, "steps": 20, "every": 5, "equilibration": 5}]},
        "exploration": {"thresholds": rule},
        "stopping": {"max_rounds": 3},
    }
    with compiled_in(cache):
        outcome = run_or_resume(folder, folder / "run", **sections)
    assert (outcome.rule, outcome.round) == ("max_rounds", 3)
    return folder / "run", sections


def keys(path: Path) -> list[bytes]:
    return [geometry_key(atoms) for atoms in read_structures(path)]


def test_a_training_sees_the_labels_of_all_rounds_but_the_one_before(overlapped: Path) -> None:
    """And that of the end sees all of them."""
    run = RunDirectory(overlapped)
    first, *batches = [keys(path) for path in (run.round(0).dataset, *(run.round(n).labelled for n in range(3)))]
    assert [len(batch) for batch in batches] == [3, 3, 3]
    assert [keys(run.round(n).dataset) for n in range(4)] == [
        first,
        first,
        first + batches[0],
        first + batches[0] + batches[1] + batches[2],
    ]
    rows = read_csv(run.metrics)
    assert [row["labels"] for row in rows] == [0, 0, 3, 9], "what the training of a round has cost"
    assert [row["failed"] for row in rows] == [0, 0, 0, 0]
    state = read_state(run)
    assert state.finished and state.under_way is None and not state.closing
    assert set(Counter((overlapped.parent / "calls").read_text().split()).values()) == {1}


def test_nothing_is_bought_whose_twin_is_under_way(overlapped: Path) -> None:
    """The potential of the second round knows nothing of the first batch, and would choose the like of it again."""
    batches = [read_structures(RunDirectory(overlapped).round(n).batch) for n in range(3)]
    bought = [int(frame.info["pool_index"]) for batch in batches for frame in batch]
    assert len(set(bought)) == 9
    assert len({index % PAIRS for index in bought[:6]}) == 6


def test_a_campaign_is_the_same_whatever_time_its_labels_take(
    overlapped: Path, sections: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And wherever it is broken off."""
    monkeypatch.setenv(sleepy_labels.SLEEP, "0.8")
    monkeypatch.setenv(sleepy_labels.CALLS, str(tmp_path / "calls"))
    run = RunDirectory(tmp_path / "run")
    for round_index, stage in [(1, "select"), (2, "label")]:
        with pytest.raises(Killed):
            run_or_resume(overlapped.parent, run.path, KillingProgress(round_index, stage), **sections)
        assert read_state(run).under_way == round_index - 1
        waiting = campaign_status(run.path)["under_way"]
        assert (waiting["round"], waiting["asked"]) == (round_index - 1, 3) and 0 <= waiting["arrived"] <= 3
        told = f"labels of round {round_index - 1}: {waiting['arrived']} of 3 are there"
        assert told in " ".join(write_report(run.path).read_text().split())
    assert run_or_resume(overlapped.parent, run.path, **sections).finished
    assert result_of(run.path) == result_of(overlapped)
    assert campaign_status(run.path)["under_way"] is None


def test_a_rule_that_holds_lets_what_is_paid_be_trained_on(
    overlapped: Path, sections: dict[str, Any], tmp_path: Path
) -> None:
    rule = {"max_rounds": 3, "user": {"function": "sleepy_labels:make_rule"}}
    outcome = run_or_resume(overlapped.parent, tmp_path / "run", **{**sections, "stopping": rule})
    assert (outcome.rule, outcome.round, outcome.labels, outcome.converged) == ("user", 2, 3, True)
    run = RunDirectory(tmp_path / "run")
    assert keys(run.round(2).dataset) == keys(run.round(0).dataset) + keys(run.round(0).labelled)
    assert not run.round(1).pool.exists(), "nothing more was looked for"
    # a larger limit goes on from there
    larger = {"max_rounds": 3, "max_labels": 4}
    outcome = run_or_resume(overlapped.parent, tmp_path / "run", **{**sections, "stopping": larger})
    assert (outcome.rule, outcome.round, outcome.labels) == ("max_labels", 3, 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("round_index", "stage", "delay"), [(1, "train", 0.3), (1, "select", 0.0), (1, "label", 0.5), (2, "explore", 0.1)]
)
def test_killed_anywhere(
    round_index: int,
    stage: str,
    delay: float,
    moving: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    own_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With walkers, thresholds from frames drawn at random, and labels that take random times."""
    whole, sections = moving
    monkeypatch.setenv(sleepy_labels.SLEEP, "2")
    folder, run = whole.parent, RunDirectory(tmp_path / "run")
    kill_in(start_process(folder, run.path, own_cache, **sections), run.path, round_index, stage, delay)
    assert not read_state(run).finished
    assert start_process(folder, run.path, own_cache, **sections).wait(300) == 0
    assert result_of(run.path) == result_of(whole)
    found, expected = (almlip_jax.load(RunDirectory(path).round(3).potential).params for path in (run.path, whole))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.slow
def test_what_is_under_way_counts_for_the_budget(
    overlapped: Path, sections: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(sleepy_labels.SLEEP, "1")
    budget = {"max_rounds": 3, "max_labels": 5}
    outcome = run_or_resume(overlapped.parent, tmp_path / "run", **{**sections, "stopping": budget})
    assert (outcome.rule, outcome.round, outcome.labels) == ("max_labels", 2, 5)
    run = RunDirectory(tmp_path / "run")
    assert keys(run.round(1).batch) == keys(RunDirectory(overlapped).round(1).batch)[:2]
    assert len(keys(run.round(2).dataset)) == 5 + 5


def test_a_batch_that_was_selected_before_a_rule_held_is_not_bought() -> None:
    """Winding up drops it from the record, and asks for nothing in this round."""
    state = CampaignState(stage=Stage.TRAIN, under_way=0, round=1)
    for results in ({"labels": 3}, {}, {"candidates": 4}, {"selected": 2, "systems_selected": {"a": 2}}):
        state = state.after(results, seconds=1.0)
    assert state.stage is Stage.LABEL
    state = state.wound_up()
    assert (state.stage, state.closing, state.record.selected) == (Stage.LABEL, True, 0)
    assert state.record.systems_selected == {} and state.record.candidates == 4
    state = state.after({}, seconds=1.0).labelled({0: 1}, None)
    assert (state.round, state.stage, state.closing, state.under_way) == (2, Stage.TRAIN, False, None)
