"""Student and teacher side by side: errors against each other and against labels of the target, and their times."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from ase import Atoms

from almlip_jax.distillation.settings import HELD_OUT, DistilConfig
from almlip_jax.evaluation.metrics import Labels, plain_errors
from almlip_jax.files import Cell
from almlip_jax.oracles import Labeller, LabelStore
from almlip_jax.potential import Potential
from almlip_jax.progress import Progress

STUDENT_OF_TEACHER = "student_against_teacher"
STUDENT = "student_against_labels"
TEACHER = "teacher_against_labels"

_REPEATS = 3

Errors = Mapping[str, Mapping[str, Mapping[str, float]]]
"""Group -> what is held against what -> errors, as `evaluation.metrics.plain_errors` names them."""


@dataclass(frozen=True)
class Times:
    """How long both take for a structure of those held out.

    Attributes:
        teacher: seconds of one label, the median.
        teacher_cores: threads that it had.
        student: seconds, of all structures evaluated together; the median of three times.
        student_cores: cores of the CPU that it had; 1 for an accelerator.
    """

    teacher: float
    teacher_cores: int
    student: float
    student_cores: int

    @property
    def times_faster(self) -> float:
        """How much less time of a core the student takes."""
        return self.teacher * self.teacher_cores / (self.student * self.student_cores)


def taught_tests(
    config: DistilConfig, tests: Sequence[Atoms], store: LabelStore, progress: Progress
) -> tuple[list[Atoms], list[Atoms]]:
    """Test structures with the labels of their files, and the same with those of the teacher.

    Structures that the teacher cannot label are left out of both and reported.
    """
    if not tests:
        return [], []
    with (
        Labeller(config.teacher, store, config.executor) as labeller,
        progress.stage("teacher on the tests", len(tests), unit="labels") as advance,
    ):
        about = {"purpose": "compare", "campaign": config.name}
        results = labeller.label(tests, about, on_label=lambda _: advance(1))
    failed = [result.error for result in results if result.atoms is None]
    if failed:
        progress.message(
            f"the teacher could not label {len(failed)} of {len(tests)} test structures, which are left out; the first "
            f"because: {failed[0]}"
        )
    pairs = [(test, result.atoms) for test, result in zip(tests, results, strict=True) if result.atoms is not None]
    return [test for test, _ in pairs], [taught for _, taught in pairs]


def compared(student: Potential, held_out: Sequence[Atoms], tests: Sequence[Atoms], taught: Sequence[Atoms]) -> Errors:
    """Errors of student and teacher.

    Args:
        student: the potential.
        held_out: structures with labels of the teacher that the student was not trained on.
        tests: structures with labels of the target, by ``info["group"]``.
        taught: the same with labels of the teacher.
    """
    found = {HELD_OUT: {STUDENT_OF_TEACHER: plain_errors(held_out, student.evaluate(held_out))}}
    groups: dict[str, list[int]] = {}
    for n, frame in enumerate(tests):
        groups.setdefault(str(frame.info["group"]), []).append(n)
    for group, members in groups.items():
        labelled, said = [tests[n] for n in members], [taught[n] for n in members]
        predicted = student.evaluate(labelled)
        found[group] = {
            STUDENT: plain_errors(labelled, predicted),
            TEACHER: plain_errors(labelled, Labels(said)),
            STUDENT_OF_TEACHER: plain_errors(said, predicted),
        }
    return found


def table_rows(errors: Errors) -> list[dict[str, Cell]]:
    """The errors as a table: a row for each group and what is held against what."""
    return [
        {"group": group, "compared": which, **values}
        for group, several in errors.items()
        for which, values in several.items()
    ]


def times(config: DistilConfig, student: Potential, held_out: Sequence[Atoms], store: LabelStore) -> Times:
    """Times of both for the structures that are held out; the student has evaluated them before."""
    labels = [store.get(str(frame.info["label_id"])) for frame in held_out]
    teacher = float(np.median([label.seconds for label in labels if label is not None]))
    seconds = float(np.median([_seconds(student, held_out) for _ in range(_REPEATS)])) / len(held_out)
    cores = jax.device_count() if jax.default_backend() == "cpu" else 1
    return Times(teacher, config.executor.threads, seconds, cores)


def _seconds(student: Potential, structures: Sequence[Atoms]) -> float:
    began = time.perf_counter()
    student.evaluate(structures)
    return time.perf_counter() - began
