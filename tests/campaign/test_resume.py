"""A campaign that was interrupted ends as one that was not: same labels in the same order, none paid twice."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest
from tiny_campaign import (
    SECTIONS,
    Killed,
    KillingProgress,
    kill_in,
    result_of,
    run_or_resume,
    start_process,
    tiny_config,
)

from almlip_jax.campaign import resume_campaign
from almlip_jax.campaign.rundir import RunDirectory
from almlip_jax.campaign.stage_clock import StageClock, TickingProgress
from almlip_jax.campaign.state import Stage, read_state
from almlip_jax.errors import InputError
from almlip_jax.files import read_json, write_json
from almlip_jax.progress import SilentProgress

pytestmark = pytest.mark.usefixtures("compile_once")

STAGES = ["train", "evaluate", "explore", "select", "label"]


class Notes(SilentProgress):
    """Keeps what the user is told."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def message(self, text: str) -> None:
        self.said.append(text)


@pytest.mark.parametrize("round_index, stage, within", [(0, "select", False), (1, "label", True)])
def test_a_campaign_that_was_broken_off_ends_the_same(
    reference: Path, tmp_path: Path, round_index: int, stage: str, within: bool
) -> None:
    with pytest.raises(Killed):
        run_or_resume(reference, tmp_path / "run", KillingProgress(round_index, stage, within=within))
    run = RunDirectory(tmp_path / "run")
    state = read_state(run)
    assert (state.round, state.stage) == (round_index, stage) and not state.finished
    kept = read_json(run.stage_seconds)
    assert kept["stage"] == f"round {round_index}, {stage}" and kept["seconds"] > 0
    write_json(run.stage_seconds, kept | {"seconds": 1000.0})
    assert run_or_resume(reference, tmp_path / "run").finished
    assert result_of(tmp_path / "run") == result_of(reference / "run")
    seconds = [record.seconds for record in read_state(run).history]
    assert seconds[round_index].pop(stage) > 1000, "what went before the interruption counts"
    assert max(max(one.values()) for one in seconds) < 1000 and not run.stage_seconds.exists()


def test_the_seconds_of_a_stage_outlast_a_kill(tmp_path: Path) -> None:
    """They are kept while work is reported, not in each report; another stage begins at zero."""
    now, file = [100.0], tmp_path / "seconds.json"
    killed = StageClock(file, lambda: now[0])
    under_way = killed.stage("round 0, train")
    under_way.__enter__()
    with TickingProgress(SilentProgress(), killed).stage("train", 9) as advance:
        for moment in (101.0, 130.0, 132.0):
            now[0] = moment
            advance()
    assert read_json(file) == {"stage": "round 0, train", "seconds": 30.0}
    for name, began, expected in (("round 0, train", 500.0, 37.0), ("round 1, train", 600.0, 7.0)):
        now[0], clock = began, StageClock(file, lambda: now[0])
        with clock.stage(name):
            now[0] += 7
            assert clock.seconds == expected
    file.write_text("{")
    with clock.stage("round 1, train"):
        assert clock.seconds == 0


def test_a_killed_process_ends_the_same(reference: Path, tmp_path: Path, own_cache: Path) -> None:
    process = start_process(reference, tmp_path / "run", own_cache)
    kill_in(process, tmp_path / "run", 0, "explore", delay=0.3)
    assert process.returncode == -signal.SIGKILL and not read_state(RunDirectory(tmp_path / "run")).finished
    assert run_or_resume(reference, tmp_path / "run").finished
    assert result_of(tmp_path / "run") == result_of(reference / "run")


@pytest.mark.slow
@pytest.mark.parametrize("round_index", [0, 1])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("delay", [0.0, 0.02, 0.5])
def test_killed_anywhere(
    reference: Path, tmp_path: Path, own_cache: Path, round_index: int, stage: str, delay: float
) -> None:
    kill_in(start_process(reference, tmp_path / "run", own_cache), tmp_path / "run", round_index, stage, delay)
    assert start_process(reference, tmp_path / "run", own_cache).wait(120) == 0
    assert result_of(tmp_path / "run") == result_of(reference / "run")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["initial", "test"])
def test_killed_in_the_preparation(reference: Path, tmp_path: Path, own_cache: Path, stage: str) -> None:
    kill_in(start_process(reference, tmp_path / "run", own_cache), tmp_path / "run", 0, stage, delay=0.1)
    assert start_process(reference, tmp_path / "run", own_cache).wait(120) == 0
    assert result_of(tmp_path / "run") == result_of(reference / "run")


@pytest.mark.slow
def test_killed_again_and_again(reference: Path, tmp_path: Path, own_cache: Path) -> None:
    for number in range(60):
        process = start_process(reference, tmp_path / "run", own_cache)
        try:
            assert process.wait(timeout=3 + 0.37 * number) == 0
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    assert result_of(tmp_path / "run") == result_of(reference / "run")


def test_a_finished_campaign_says_so_and_changes_nothing(reference: Path) -> None:
    before = result_of(reference / "run")
    outcome = run_or_resume(reference, reference / "run")
    assert outcome.finished and outcome.rule == "max_rounds" and outcome.labels == before["metrics"][-1]["labels"]
    assert result_of(reference / "run") == before


@pytest.mark.usefixtures("labels_here")
def test_a_larger_budget_goes_on_where_the_smaller_one_ended(reference: Path, tmp_path: Path) -> None:
    first = run_or_resume(reference, tmp_path / "run", stopping={"max_labels": 14})
    assert (first.rule, first.labels, first.round) == ("max_labels", 14, 1)
    second = run_or_resume(reference, tmp_path / "run", stopping={"max_labels": 100})
    assert (second.rule, second.labels, second.round) == ("max_rounds", 17, 2)
    assert result_of(tmp_path / "run") == result_of(reference / "run")


@pytest.mark.usefixtures("labels_here")
def test_the_last_batch_is_cut_to_the_budget(reference: Path, tmp_path: Path) -> None:
    outcome = run_or_resume(reference, tmp_path / "run", stopping={"max_labels": 15})
    assert (outcome.rule, outcome.labels, outcome.round) == ("max_labels", 15, 2)
    found, whole = result_of(tmp_path / "run")["sets"], result_of(reference / "run")["sets"]
    assert found["rounds/001/batch.extxyz"] == whole["rounds/001/batch.extxyz"][:1]


@pytest.mark.usefixtures("labels_here")
def test_a_damaged_checkpoint_is_made_again(reference: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run_or_resume(reference, tmp_path / "run", KillingProgress(1, "explore"))
    folder = RunDirectory(tmp_path / "run").round(1).potential
    for file in next(folder.glob("params-*")).rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    notes = Notes()
    run_or_resume(reference, tmp_path / "run", notes)
    assert any("potential" in text and "trained again" in text for text in notes.said)
    assert result_of(tmp_path / "run") == result_of(reference / "run")


@pytest.mark.slow
@pytest.mark.usefixtures("labels_here")
def test_warm_starts_go_on_from_what_was_kept(reference: Path, tmp_path: Path) -> None:
    warm = {"training": {"warm_start": True, "warm_steps": 100}}
    run_or_resume(reference, tmp_path / "whole", **warm)
    with pytest.raises(Killed):
        run_or_resume(reference, tmp_path / "run", KillingProgress(2, "train", within=True), **warm)
    for index in (0, 1):  # the last one needs the one before, and that the first
        (RunDirectory(tmp_path / "run").round(index).potential / "potential.json").write_text("{}")
    run_or_resume(reference, tmp_path / "run", **warm)
    assert result_of(tmp_path / "run") == result_of(tmp_path / "whole")
    assert result_of(tmp_path / "run")["metrics"][-1] != result_of(reference / "run")["metrics"][-1]


@pytest.mark.usefixtures("labels_here")
def test_a_full_disk_ends_the_run_with_a_sentence(
    reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from almlip_jax.campaign import stages

    def full(*arguments: object, **keywords: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(stages, "write_npz", full)  # in the middle of the first evaluation
        with pytest.raises(InputError, match=r"disk is full.*resume"):
            run_or_resume(reference, tmp_path / "run")
    assert read_state(RunDirectory(tmp_path / "run")).stage is Stage.EVALUATE
    assert run_or_resume(reference, tmp_path / "run").finished
    assert result_of(tmp_path / "run") == result_of(reference / "run")


def test_what_earlier_rounds_depend_on_cannot_change(reference: Path) -> None:
    before = (reference / "run" / "config.yaml").read_text()
    with pytest.raises(InputError, match="'model' differs"):
        run_or_resume(reference, reference / "run", model={**SECTIONS["model"], "channels": 5})
    assert (reference / "run" / "config.yaml").read_text() == before


def test_only_a_run_directory_can_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run directory"):
        resume_campaign(tiny_config(tmp_path), tmp_path / "nowhere")
