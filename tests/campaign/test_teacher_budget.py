"""`teacher.seconds` bounds what dynamics and labels of frames cost, driver and teacher together.

And what failed of either source is tried again.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from ase.build import molecule
from tiny_campaign import Killed

from almlip_jax.campaign.preparation import Source
from almlip_jax.campaign.rundir import RunDirectory
from almlip_jax.campaign.settings import SystemSettings
from almlip_jax.campaign.teacher import TeacherSettings
from almlip_jax.campaign.teaching import Teacher, frame_keys, make_frames
from almlip_jax.errors import LabelError
from almlip_jax.oracles import Label, LabelStore
from almlip_jax.progress import SilentProgress
from almlip_jax.structures.io import read_structures

LABEL = 0.05
START = molecule("H2O")
START.info |= {"charge": 0, "spin": 1}


def source(seconds: float) -> dict[str, Any]:
    """A label source that takes at least some seconds."""
    return {
        "kind": "user",
        "function": "sleepy_labels:make",
        "parameters": {"least": seconds},
        "code_version": "1",
    }


SETTINGS: dict[str, Any] = {
    "source": source(LABEL),
    "driver": source(0.0),
    "executor": {"kind": "local", "workers": 1},
    "temperatures": [300, 600],
    "frames": 60,
    "every": 2,
    "equilibration": 2,
    "seconds": 1.0,
}


class Telling(SilentProgress):
    """Keeps what is said, and ends the program after some labels of frames."""

    def __init__(self, labels: int | None = None) -> None:
        super().__init__()
        self.said: list[str] = []
        self.left = labels

    def message(self, text: str) -> None:
        """Keeps it."""
        self.said.append(text)

    def stage(self, name: str, total: int | None = None, *, unit: str = "") -> Any:
        """A stage that may be the end."""
        return _Counted(super().stage(name, total, unit=unit), self if name == "frames" else None)


class _Counted:
    def __init__(self, stage: Any, progress: Telling | None) -> None:
        self.stage, self.progress = stage, progress

    def __enter__(self) -> Any:
        advance = self.stage.__enter__()

        def counting(n: int = 1, **fields: Any) -> None:
            advance(n, **fields)
            if self.progress is not None and self.progress.left is not None:
                self.progress.left -= n
                if self.progress.left < 0:
                    raise Killed

        return counting

    def __exit__(self, *error: Any) -> Any:
        return self.stage.__exit__(*error)


def taught(folder: Path, progress: Telling, **changes: Any) -> list[Any]:
    run = RunDirectory(folder)
    folder.mkdir(exist_ok=True)
    settings = TeacherSettings.model_validate({**SETTINGS, **changes})
    teacher = Teacher.open(settings, run)
    try:
        source = Source([START], SystemSettings(), teacher.driver, 0, {"campaign": "budget"}, progress.message)
        make_frames(teacher, source, run, progress)
        seconds = teacher.seconds
    finally:
        teacher.close()
    return [seconds, read_structures(run.teacher.frames)]


@pytest.fixture(scope="module")
def driven(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Telling, float, list[Any]]:
    """A folder in which the budget ended labels, what was said, its seconds and frames."""
    folder, progress = tmp_path_factory.mktemp("driven"), Telling()
    return folder, progress, *taught(folder, progress)


def test_labels_of_a_dear_teacher_end_with_the_budget(driven: tuple[Path, Telling, float, list[Any]]) -> None:
    folder, progress, seconds, frames = driven
    assert 1.0 <= seconds < 1.0 + 3 * LABEL
    count = len(frames)
    assert 6 < count < 60 and any(f"labels {count} of 60 frames, spread evenly" in text for text in progress.said)
    kept = Counter(frame.info["bath_temperature"] for frame in frames)
    assert set(kept) == {300.0, 600.0} and abs(kept[300.0] - kept[600.0]) <= 1
    with LabelStore(RunDirectory(folder).driver_labels, readonly=True) as store:
        rows = [row for row in store.labelled("teacher") if "step" in row.provenance]
    asked = TeacherSettings.model_validate(SETTINGS)
    assert set(frame_keys(asked, [START])) == {"bath_temperature", "charge", "origin", "spin"} <= set(frames[0].info)
    late = {row.atoms.positions.tobytes() for row in rows if row.provenance["step"] > 32}
    assert sum(frame.positions.tobytes() in late for frame in frames) >= count // 2 - 2  # early and late ones


def test_a_killed_run_counts_what_it_has_bought(
    driven: tuple[Path, Telling, float, list[Any]], tmp_path: Path
) -> None:
    folder, _, _, frames = driven
    with pytest.raises(Killed):
        taught(tmp_path / "run", Telling(labels=4))
    with LabelStore(RunDirectory(tmp_path / "run").teacher_labels, readonly=True) as store:
        bought = {row.atoms.positions.tobytes() for row in store.labelled()}
    assert len(bought) >= 4
    seconds, again = taught(tmp_path / "run", Telling())
    assert 1.0 <= seconds < 1.0 + 3 * LABEL and len(again) > 4
    held = {frame.positions.tobytes() for frame in again}
    assert bought <= held
    both = held & {frame.positions.tobytes() for frame in frames}
    assert len(both) == min(len(held), len(frames))  # the same ones, but for how many the seconds sufficed


def test_dynamics_end_with_their_share(tmp_path: Path) -> None:
    progress = Telling()
    alone = {"driver": None, "frames": 200, "seconds": 0.6}
    seconds, frames = taught(tmp_path / "alone", progress, **alone)
    assert 0.6 <= seconds < 0.6 + 4 * LABEL
    asked = TeacherSettings.model_validate({**SETTINGS, **alone})
    assert set(frame_keys(asked, [START])) <= set(frames[0].info)
    assert any(f"gave {len(frames)} of 200 frames, as their share of teacher.seconds 0.6" in t for t in progress.said)
    seconds, frames = taught(tmp_path / "slow", progress, driver=source(0.04), frames=200)
    assert seconds < 1.0 + 3 * LABEL and 1 <= len(frames) <= 4  # 0.25 s for each trajectory, six steps and the start
    with LabelStore(RunDirectory(tmp_path / "slow").teacher_labels, readonly=True) as store:
        assert store.summary()["frames"]["done"] == len(frames)
    with pytest.raises(LabelError, match=r"teacher\.seconds may be too few"):
        taught(tmp_path / "few", progress, driver=None, seconds=0.01)


def test_labels_of_a_driver_that_failed_are_tried_again(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    teacher = Teacher.open(TeacherSettings.model_validate(SETTINGS), RunDirectory(tmp_path / "run"))
    told: list[int] = []
    try:
        teacher.watch(lambda: told.append(teacher.calls))
        for number, labeller in enumerate((teacher.labeller, teacher.driver)):
            atoms = molecule("H2O")
            label = Label(labeller.identity(atoms), error="no convergence")
            labeller.store.record([(atoms, {"purpose": "teacher"}, label)])
            assert label.identity in labeller.store and told == list(range(1, number + 2))
        teacher.reopen_failed()
        for labeller in (teacher.labeller, teacher.driver):
            assert labeller.identity(molecule("H2O")) not in labeller.store
    finally:
        teacher.close()
