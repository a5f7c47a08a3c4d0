"""The state of a campaign: its order of stages, its round trip through JSON, and damage that is said so."""

from __future__ import annotations

from pathlib import Path

import pytest

from almlip_jax.campaign.rundir import RunDirectory
from almlip_jax.campaign.state import CampaignState, RoundRecord, Stage, read_state, write_state
from almlip_jax.errors import InputError
from almlip_jax.files import read_csv, read_json


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "run").create()


def walk(state: CampaignState, steps: int) -> list[tuple[int, str]]:
    seen = []
    for _ in range(steps):
        seen.append((state.round, str(state.stage)))
        state = state.after({}, seconds=1.0)
    return seen


def test_stages_follow_the_protocol() -> None:
    rounds = ["train", "evaluate", "explore", "select", "label"]
    wanted = [(0, "initial"), (0, "test"), *((0, s) for s in rounds), *((1, s) for s in rounds), (2, "train")]
    assert walk(CampaignState(), len(wanted)) == wanted


def test_results_gather_in_the_record_of_their_round() -> None:
    state = CampaignState(stage=Stage.TRAIN)
    state = state.after({"labels": 12, "dataset_size": 10}, seconds=2.0)
    state = state.after({"errors": {"forces_rmse_300K": 0.1}}, seconds=0.5)
    assert len(state.history) == 1
    record = state.history[0]
    assert (record.labels, record.dataset_size, record.errors) == (12, 10, {"forces_rmse_300K": 0.1})
    assert record.seconds == {"train": 2.0, "evaluate": 0.5}


def test_a_stage_done_again_leaves_no_trace_of_the_first_time() -> None:
    state = CampaignState(stage=Stage.EXPLORE, history=(RoundRecord(round=0, candidates=3, seconds={"explore": 9.0}),))
    again = state.after({"candidates": 4}, seconds=1.0).history
    assert len(again) == 1 and again[0].candidates == 4 and again[0].seconds == {"explore": 1.0}


def test_round_trip_is_exact(run: RunDirectory) -> None:
    record = RoundRecord(round=0, labels=7, errors={"forces_rmse_300K": 0.1 + 0.2}, sigma_pool=1 / 3, candidates=0)
    state = CampaignState(
        round=0, stage=Stage.SELECT, labels=7, measured={"training": {"atoms": 71}}, history=(record,)
    )
    write_state(run, state)
    assert read_state(run) == state
    assert read_json(run.measured) == {"training": {"atoms": 71}}
    (row,) = read_csv(run.metrics)
    assert row["forces_rmse_300K"] == 0.1 + 0.2 and row["sigma_pool"] == 1 / 3 and row["sigma_batch"] is None


def test_status_finds_the_agreed_names(run: RunDirectory) -> None:
    write_state(run, CampaignState())
    assert {"round", "stage", "labels", "converged", "reason", "finished"} <= set(read_json(run.state))


def test_a_new_run_starts_at_the_beginning(run: RunDirectory) -> None:
    assert read_state(run) == CampaignState()


@pytest.mark.parametrize("text", ["{", '{"round": "first"}', '{"rond": 1}', '{"stage": "sleep"}'])
def test_a_damaged_state_is_named(run: RunDirectory, text: str) -> None:
    run.state.write_text(text)
    with pytest.raises(InputError, match=r"state\.json"):
        read_state(run)
