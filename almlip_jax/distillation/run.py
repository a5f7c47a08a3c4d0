"""Distillation from beginning to end: teach, train in a campaign whose label source is the teacher, compare.

Every step finds what is there already, so that the same call goes on after an interruption.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from almlip_jax.campaign import resume_campaign, run_campaign
from almlip_jax.campaign.loop import Outcome
from almlip_jax.campaign.settings import InitialSettings
from almlip_jax.config import config_text
from almlip_jax.distillation.comparison import Errors, Times, compared, table_rows, taught_tests, times
from almlip_jax.distillation.folder import DistilDirectory
from almlip_jax.distillation.settings import HELD_OUT, DistilConfig, own_labels
from almlip_jax.distillation.teaching import check_distillation, teach
from almlip_jax.files import write_csv, write_json, write_text
from almlip_jax.kinds import check_user_code
from almlip_jax.oracles import LabelStore
from almlip_jax.potential import Potential
from almlip_jax.progress import Progress, SilentProgress
from almlip_jax.run_log import logged
from almlip_jax.settings import from_here
from almlip_jax.structures.io import read_structures, write_structures
from almlip_jax.structures.labels import LabelKeys
from almlip_jax.work_directory import write_versions


@dataclass(frozen=True)
class Distilled:
    """What a distillation has come to.

    Attributes:
        out: its folder.
        finished: whether there is a student; otherwise it waits for labels made elsewhere.
        reason: what it waits for.
        errors: of student and teacher.
        times: of both.
        calls: of the teacher, those for the tests included.
    """

    out: Path
    finished: bool
    reason: str = ""
    errors: Errors = field(default_factory=dict)
    times: Times | None = None
    calls: int = 0

    def summary(self) -> dict[str, Any]:
        """As plain data."""
        seconds: Mapping[str, float] = {}
        if self.times is not None:
            seconds = {
                "teacher_seconds": self.times.teacher,
                "teacher_cores": self.times.teacher_cores,
                "student_seconds": self.times.student,
                "student_cores": self.times.student_cores,
                "times_faster": self.times.times_faster,
            }
        said: dict[str, Any] = {"out": str(self.out), "finished": self.finished, "reason": self.reason}
        return said | {"calls": self.calls, "errors": self.errors, **seconds}


def run_distillation(config: DistilConfig, out: Path, *, progress: Progress | None = None) -> Distilled:
    """Trains a student on what its teacher says, and compares both; goes on with what is there already.

    Args:
        config: teacher, structures, student and tests, with paths that hold from the working directory.
        out: the folder.
        progress: tells the user; nothing is told by default.

    Raises:
        InputError: something in the config or an input file cannot be used, or the folder holds something else.
        LabelError: the teacher labelled nothing.
        PendingLabels: the teacher is an external label source that has not delivered.
    """
    config, place = from_here(config), DistilDirectory(out)
    place.refuse_others()
    check_user_code(config)
    with (
        place.lock(),
        logged(progress or SilentProgress(), place.log) as told,
        jax.enable_x64(config.precision == "float64"),
    ):
        given = check_distillation(config, told.message)
        with LabelStore(place.labels) as store:
            teach(config, given, place, store, told)
            write_text(place.config, config_text(config))
            if said := write_versions(place):
                told.message(said)
            outcome = _train(config, place, told)
            if not outcome.finished or outcome.potential is None:
                return Distilled(place.path, False, outcome.reason, calls=store.count_calls(None) + outcome.labels)
            return _compare(config, place, store, outcome, told)


def _train(config: DistilConfig, place: DistilDirectory, progress: Progress) -> Outcome:
    """The student's campaign."""
    initial = InitialSettings(dataset=place.train.resolve(), keys=LabelKeys())
    campaign = config.campaign(initial, own_labels(place.held_out.resolve()))
    work = resume_campaign if place.campaign.state.exists() else run_campaign
    return work(campaign, place.campaign.path, progress=progress)


def _compare(
    config: DistilConfig, place: DistilDirectory, store: LabelStore, outcome: Outcome, progress: Progress
) -> Distilled:
    assert outcome.potential is not None
    student = Potential.load(outcome.potential)
    held_out = read_structures(place.held_out, require_labels=True)
    tested = [frame for frame in read_structures(place.campaign.test) if frame.info["group"] != HELD_OUT]
    tests, taught = taught_tests(config, tested, store, progress)
    if taught:
        write_structures(place.taught_tests, taught)
    errors = compared(student, held_out, tests, taught)
    result = Distilled(
        out=place.path,
        finished=True,
        errors=errors,
        times=times(config, student, held_out, store),
        calls=store.count_calls(None) + outcome.labels,
    )
    student.save(place.potential)
    write_text(place.training, (outcome.potential.parent / "training.csv").read_text())
    write_csv(place.table, table_rows(errors))
    write_json(place.errors, result.summary())
    return result
