"""A campaign whose thresholds come from frames drawn at random: what is paid, what is trained on, and resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_campaign import SECTIONS, Killed, KillingProgress, result_of, run_or_resume

from almlip_jax.campaign.rundir import RunDirectory
from almlip_jax.files import read_csv, read_npz
from almlip_jax.oracles import LabelStore
from almlip_jax.structures.io import read_structures
from almlip_jax.structures.repeats import geometry_key

pytestmark = [pytest.mark.usefixtures("compile_once"), pytest.mark.slow]

RULE = {"kind": "conformal", "tolerance": 0.3, "alpha": 0.25, "frames": 2, "stop_factor": 50.0}
CHANGED: dict[str, Any] = {
    "exploration": {**SECTIONS["exploration"], "thresholds": RULE},
    "stopping": {"max_rounds": 2, "max_labels": 20},
}


@pytest.fixture(scope="module")
def whole(reference: Path, compiled_in: Any, cache: Path) -> RunDirectory:
    with compiled_in(cache):
        run_or_resume(reference, reference / "calibrated", **CHANGED)
    return RunDirectory(reference / "calibrated")


def keys(file: Path) -> list[bytes]:
    return [geometry_key(frame) for frame in read_structures(file)] if file.exists() else []


def test_frames_are_drawn_labelled_and_counted_but_never_trained_on(whole: RunDirectory) -> None:
    drawn = [keys(whole.round(index).drawn) for index in range(2)]
    assert [len(one) for one in drawn] == [2, 2] and drawn == [
        keys(whole.round(index).calibration) for index in range(2)
    ]
    for folder in whole.rounds():
        assert not {*drawn[0], *drawn[1]} & {*keys(folder.dataset), *keys(folder.batch)}
    visited = {key for file in whole.round(0).trajectories.glob("*.extxyz") for key in keys(file)}
    assert set(drawn[0]) <= visited
    with LabelStore(whole.labels, readonly=True) as store:
        rows = list(store.labelled("calibration"))
        calls = {name: entry["calls"] for name, entry in store.summary().items()}
    assert [(row.provenance["round"], row.provenance["selector"]) for row in rows] == [(0, "random")] * 2 + [
        (1, "random")
    ] * 2
    trained = sum(len(keys(whole.round(index).labelled)) for index in range(2))
    assert calls["calibration"] == 4 and calls["train"] == trained
    assert read_csv(whole.metrics)[-1]["labels"] == 11 + 4 + trained <= 20


def test_thresholds_of_elements_come_from_them(whole: RunDirectory) -> None:
    first, second = (read_npz(whole.round(index).walkers) for index in range(2))
    assert float(first["gate_record"]) == 0.3 and not len(first["gate_elements"])
    assert list(second["gate_elements"]) == ["H"]  # two atoms of oxygen are too few for a quarter
    assert float(second["gate_record"]) != 0.3 and np.all(second["gate_relative"] > 0)


@pytest.mark.parametrize("stage", ["label", "explore"])
def test_resuming_draws_and_labels_the_same_frames(
    whole: RunDirectory, tmp_path: Path, stage: str, reference: Path
) -> None:
    with pytest.raises(Killed):
        run_or_resume(reference, tmp_path / "run", KillingProgress(1, stage, within=True), **CHANGED)
    run_or_resume(reference, tmp_path / "run", **CHANGED)
    resumed = RunDirectory(tmp_path / "run")
    assert result_of(resumed.path) == result_of(whole.path)
    for index in range(2):
        for name in ("drawn", "calibration"):
            files = [getattr(run.round(index), name) for run in (whole, resumed)]
            assert files[0].read_bytes() == files[1].read_bytes()
