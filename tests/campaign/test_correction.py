"""Labels around the places where walkers left what the ensemble knows, and walkers that go on from there."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from pydantic import ValidationError
from tiny_campaign import SECTIONS, Killed, KillingProgress, result_of, run_or_resume, tiny_config

from almlip_jax.campaign.correction import corrections, places
from almlip_jax.campaign.rundir import RunDirectory
from almlip_jax.campaign.settings import CorrectionSettings
from almlip_jax.dynamics import Status
from almlip_jax.oracles import LabelStore
from almlip_jax.structures.io import read_structures
from almlip_jax.structures.repeats import geometry_key


def stretched(length: float) -> Atoms:
    return Atoms("N2", [[0, 0, 0], [0, 0, length]])


def explored() -> Any:
    """Four walkers: one completed, one stopped, one beyond trust, one unphysical; the first left the training set."""
    along = [stretched(1.1 + 0.01 * n) for n in range(4)]
    for n, frame in enumerate(along):
        frame.info["step"] = 10 * (n + 1)
    return SimpleNamespace(
        status=(Status.COMPLETED, Status.STOPPED, Status.BEYOND_TRUST, Status.UNPHYSICAL),
        final=[stretched(1.14), stretched(1.5), stretched(1.8), stretched(0.5)],
        departed_step=np.array([25, -1, 12, -1]),
        trajectories=[along, [], [], []],
    )


class Stretching:
    """A committee that differs by how far a bond is from 1.1 Angstrom, and says nothing beyond 2."""

    def evaluate(self, frames: list[Atoms]) -> Any:
        lengths = np.array([frame.get_distance(0, 1) for frame in frames])
        spread = np.where(lengths > 2, np.nan, np.abs(lengths - 1.1))
        return SimpleNamespace(
            scores={"force_std_max": spread}, atom_scores={"force_std": [np.full(2, one) for one in spread]}
        )


def test_places_are_those_that_are_asked_for():
    found = explored()
    assert {w: p.get_distance(0, 1) for w, p in places(CorrectionSettings(), found).items()} == {1: 1.5, 2: 1.8}
    assert [*places(CorrectionSettings(on=("leave",)), found)] == [2]
    left = places(CorrectionSettings(on=("departure",)), found)
    assert left[0].info["step"] == 30, "the first frame that was kept after step 25"
    assert left[2].get_distance(0, 1) == 1.8 and [*left] == [0, 2]


def test_places_take_turns_and_the_largest_spread_comes_first():
    settings = CorrectionSettings(around=30, stdev=0.1, count=5)
    chosen = corrections(settings, explored(), Stretching(), np.random.default_rng(0), set())
    assert [frame.info["correction"] for frame in chosen] == [2, 1, 2, 1, 2]
    spread = [frame.info["force_std_max"] for frame in chosen]
    assert spread[0] > spread[2] > spread[4] and spread[1] > spread[3] and np.isfinite(spread).all()
    assert spread[0] > 0.7 and spread[1] > 0.4, "beyond the places themselves"
    again = corrections(settings, explored(), Stretching(), np.random.default_rng(0), set())
    assert all(np.array_equal(a.positions, b.positions) for a, b in zip(chosen, again, strict=True))
    known = {geometry_key(frame) for frame in chosen}
    others = corrections(settings, explored(), Stretching(), np.random.default_rng(0), known)
    assert not known & {geometry_key(frame) for frame in others}
    alone = CorrectionSettings(around=0, count=5)
    warm = explored()
    warm.final[1].info["bath_temperature"] = 600.0
    itself = corrections(alone, warm, Stretching(), np.random.default_rng(0), set())
    assert [frame.get_distance(0, 1) for frame in itself] == [1.8, 1.5]
    assert [frame.info.get("bath_temperature") for frame in itself] == [None, 600.0]
    quiet = SimpleNamespace(**{**vars(explored()), "status": (Status.COMPLETED,) * 4})
    assert corrections(settings, quiet, Stretching(), np.random.default_rng(0), set()) == []


def test_what_cannot_be_corrected_is_refused(tmp_path):
    with pytest.raises(ValidationError, match="needs 'latent_distance' in monitor"):
        tiny_config(tmp_path, exploration={**SECTIONS["exploration"], "correct": {"on": ["departure"]}})
    with pytest.raises(ValidationError, match=r"exploration\.correct"):
        gate = {"kind": "absolute", "score": "extrapolation_grade"}
        of_one = {"gate": gate, "thresholds": {"kind": "grade"}, "correct": {}}
        tiny_config(tmp_path, ensemble={"size": 1}, exploration={**SECTIONS["exploration"], **of_one})


@pytest.mark.slow
@pytest.mark.usefixtures("compile_once")
def test_a_campaign_corrects_and_goes_on(tmp_path: Path) -> None:
    """Corrections stand first in the batch, are labelled, and their walkers begin the next round where they ended."""
    walkers = {"thresholds": {"kind": "fixed", "record": 0.05, "stop": 0.3}, "correct": {"around": 8, "count": 2}}
    shares = {"kind": "stratified", "by": "bath_temperature", "of": "batch", "selector": {"kind": "max_det"}}
    sections: dict[str, Any] = {
        "exploration": {**SECTIONS["exploration"], **walkers},
        "training": {"max_steps": 60, "validate_every": 30},
        "selection": {"batch": 4, "selector": shares},
    }
    assert run_or_resume(tmp_path, tmp_path / "whole", **sections).finished
    with pytest.raises(Killed):
        run_or_resume(tmp_path, tmp_path / "killed", KillingProgress(1, "select"), **sections)
    assert run_or_resume(tmp_path, tmp_path / "killed", **sections).finished
    assert result_of(tmp_path / "killed") == result_of(tmp_path / "whole")
    run = RunDirectory(tmp_path / "whole")
    first, second = run.round(0), run.round(1)
    ended = read_structures(first.last_frames)
    stopped = {n for n, frame in enumerate(ended) if frame.info["status"] == "stopped"}
    assert stopped, "the potential is bad enough"
    batch = read_structures(first.batch)
    corrected = [frame.info["correction"] for frame in batch if "correction" in frame.info]
    assert len(batch) == 4 and set(corrected) == stopped and 1 <= len(corrected) <= 2
    assert all("correction" in frame.info for frame in batch[: len(corrected)])
    assert Counter(frame.info["bath_temperature"] for frame in batch) == {300: 2, 600: 2}
    starts = read_structures(second.starts)
    for walker in stopped:
        np.testing.assert_allclose(starts[walker].positions, ended[walker].positions, atol=1e-8)
    with LabelStore(run.labels, readonly=True) as store:
        bought = [row.provenance["selector"] for row in store.labelled() if row.provenance.get("round") == 0]
    assert bought.count("correction") == len(corrected) and bought.count("stratified") == 4 - len(corrected)
