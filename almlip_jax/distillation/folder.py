"""The folder of a distillation.

Layout::

    out/
      config.yaml         resolved config
      versions.json       package versions, git commit, devices
      run.log             what progress reported, with times, and errors
      labels.db           what the teacher said about structures made here and about those of the tests
      train.extxyz        structures that the student begins with, with the teacher's labels
      held_out.extxyz     those that it is not trained on
      taught.json         what they were made with
      campaign/           the trainings and rounds of the student: a run directory, as `almlip run` makes it
      taught_tests.extxyz structures of the tests, with the teacher's labels
      potential/          the student
      training.csv        its last training
      errors.json         errors of student and teacher, times and calls
      errors.csv          the errors as a table
      lock                the process that works here, while it does
"""

from __future__ import annotations

from almlip_jax.campaign.rundir import RunDirectory
from almlip_jax.errors import InputError
from almlip_jax.work_directory import Inside, WorkDirectory


class DistilDirectory(WorkDirectory):
    """The files of a distillation; see the module's docstring."""

    labels = Inside("labels.db")
    """What the teacher said, the rounds of the student aside (ASE SQLite database)."""
    train = Inside("train.extxyz")
    """Structures to begin with (extxyz)."""
    held_out = Inside("held_out.extxyz")
    """Structures that are not trained on (extxyz)."""
    taught = Inside("taught.json")
    """What both were made with (JSON); there when they are."""
    taught_tests = Inside("taught_tests.extxyz")
    """Structures of the tests with the teacher's labels (extxyz)."""

    @property
    def campaign(self) -> RunDirectory:
        """Trainings and rounds."""
        return RunDirectory(self.path / "campaign")

    potential = Inside("potential")
    """The student."""
    training = Inside("training.csv")
    """Its last training (CSV)."""
    errors = Inside("errors.json")
    """Errors, times and calls (JSON)."""
    table = Inside("errors.csv")
    """Errors (CSV)."""

    def refuse_others(self) -> None:
        """Refuses a folder with files that are not those of a distillation.

        Raises:
            InputError: as said.
        """
        if not self.is_empty() and not self.labels.exists():
            raise InputError(
                f"{self.path} holds something other than a distillation; choose another folder with --out."
            )
