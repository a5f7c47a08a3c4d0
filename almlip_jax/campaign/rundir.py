"""The run directory: where everything of a campaign lies.

Layout (rounds are numbered from 0, folders have at least three digits)::

    run/
      config.yaml            resolved config
      versions.json          package versions, git commit, devices
      state.json             round, stage, finished, reason, converged, labels, ...
      initial_pool.json      places in the pool of the initial set, where a selector chose them
      labels.db              label store (ASE SQLite database)
      teacher.db             that of the teacher, where there is one
      driver.db              that of what drives its dynamics, where this is another source
      teacher/               its labelled frames (frames.extxyz), training.csv and the potential/ that learned from them
      measured.json          shapes and capacities chosen by measurement
      stage_seconds.json     the stage under way and the seconds it has taken so far; gone between stages
      test.extxyz            labelled test frames, info["group"]
      metrics.csv            one row a round
      metrics_units.csv      the unit of each column of metrics.csv
      report.html
      run.log                what progress reported, with times and errors, session after session
      potential              link to the newest potential (potential.txt with its path where there are no links)
      lock                   the process that works here, while it does
      rounds/000/
          dataset.extxyz     labelled structures used for training, in order
          training.csv       one row an epoch
          unfinished_training/  state of the training while it is under way
          potential/         saved Potential
          evaluation.json    test metrics
          test_predictions.npz  forces_true [n, 3], forces_pred [n, 3], force_total [n], group [n]; energy_true [s],
                             energy_pred [s], energy_total [s], natoms [s], structure_group [s]; stress_true [p, 6],
                             stress_pred [p, 6] and which structures they are of, stress_structure [p]; likewise
                             dipole_true [d, 3] of models that give dipoles
          starts.extxyz      start structure of each walker
          further_starts.extxyz  those that it may begin again at, with ``rewind: {to: starts}``
          walkers.npz        scores, temperature, energy, bias, pressure and volume along each walker, how it ended,
                             where it left the training distribution, thresholds of the gate, recorded frames
          walkers/000.extxyz thinned trajectory of each walker
          final.extxyz       last good frame of each walker
          drawn.extxyz       frames drawn at random, where thresholds come from true errors
          calibration.extxyz those that got labels
          pool.extxyz        recorded candidates with their scores
          batch.extxyz       selected candidates, in order
          labelled.extxyz    those that got labels
      final/                 optional: training.csv, potential/, evaluation.json, test_predictions.npz of the final
                             potential

Files are written as `almlip_jax.files` does.  This module needs no jax, so that ``almlip status`` is quick.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from almlip_jax.errors import InputError
from almlip_jax.files import make_folder
from almlip_jax.work_directory import Inside, WorkDirectory


@dataclass(frozen=True)
class PotentialDirectory:
    """The files of one trained potential.

    Attributes:
        path: its folder.
    """

    path: Path

    training = Inside("training.csv")
    """One row an epoch: losses and errors (CSV)."""
    unfinished_training = Inside("unfinished_training")
    """State of a training that is under way; gone when its potential is there."""
    potential = Inside("potential")
    """The saved `Potential` (a folder)."""
    evaluation = Inside("evaluation.json")
    """Errors and calibration on the test set (JSON)."""
    test_predictions = Inside("test_predictions.npz")
    """Predicted and true energies and forces on the test set (npz; keys in the module's docstring)."""

    def create(self) -> Self:
        """Makes the folder where it does not exist yet."""
        make_folder(self.path)
        return self


@dataclass(frozen=True)
class TeacherDirectory(PotentialDirectory):
    """The files of a teacher and of what it taught.

    Attributes:
        path: their folder.
    """

    frames = Inside("frames.extxyz")
    """Structures with the teacher's labels (extxyz)."""


@dataclass(frozen=True)
class RoundDirectory(PotentialDirectory):
    """The files of one round.

    Attributes:
        path: its folder.
        index: the number of the round, from 0.
    """

    index: int

    dataset = Inside("dataset.extxyz")
    """Labelled structures used for training in this round, in order (extxyz)."""
    starts = Inside("starts.extxyz")
    further_starts = Inside("further_starts.extxyz")
    """Start structure of each walker, and what became of its relaxation (extxyz)."""
    walkers = Inside("walkers.npz")
    """Committee scores and temperature along every walker (npz)."""
    trajectories = Inside("walkers")
    """The folder of the walkers' trajectories."""

    def trajectory(self, walker: int) -> Path:
        """The thinned trajectory of a walker (extxyz)."""
        return self.trajectories / f"{walker:03d}.extxyz"

    last_frames = Inside("final.extxyz")
    """Last good frame of each walker, and how it ended (extxyz)."""
    drawn = Inside("drawn.extxyz")
    """Frames drawn at random from the trajectories, to be labelled for the gate's thresholds (extxyz)."""
    calibration = Inside("calibration.extxyz")
    """Those of them that got a label (extxyz)."""
    pool = Inside("pool.extxyz")
    """Recorded candidates with their scores (extxyz)."""
    batch = Inside("batch.extxyz")
    """Selected candidates, best first (extxyz)."""
    labelled = Inside("labelled.extxyz")
    """Selected candidates that got labels (extxyz)."""


@dataclass(frozen=True, init=False)
class RunDirectory(WorkDirectory):
    """The files of a campaign; see the module's docstring for the layout."""

    state = Inside("state.json")
    """Where the campaign stands (JSON)."""
    labels = Inside("labels.db")
    """The label store (ASE SQLite database)."""
    initial_pool = Inside("initial_pool.json")
    """Places in the pool of the structures of the initial set, where a selector chose them (JSON)."""
    teacher_labels = Inside("teacher.db")
    """The label store of the teacher, whether there is one or not."""
    driver_labels = Inside("driver.db")
    """The label store of what drives its dynamics, where that is another source."""
    measured = Inside("measured.json")
    """Shapes and capacities chosen by measurement (JSON)."""
    stage_seconds = Inside("stage_seconds.json")
    """The stage under way and the seconds it has taken so far (JSON)."""
    test = Inside("test.extxyz")
    """Labelled test frames (extxyz)."""
    metrics = Inside("metrics.csv")
    """One row a round (CSV)."""
    metrics_units = Inside("metrics_units.csv")
    """Unit of each column of the metrics (CSV)."""
    report = Inside("report.html")
    """The report (HTML)."""
    latest_potential = Inside("potential")
    """Link to the newest potential."""
    rounds_folder = Inside("rounds")
    """The folder of the rounds."""

    @property
    def teacher(self) -> TeacherDirectory:
        """The files of the teacher, whether there is one or not."""
        return TeacherDirectory(self.path / "teacher")

    @property
    def final(self) -> PotentialDirectory:
        """The files of the final potential, whether there is one or not."""
        return PotentialDirectory(self.path / "final")

    def round(self, index: int) -> RoundDirectory:
        """The files of a round, whether it exists yet or not."""
        return RoundDirectory(self.rounds_folder / f"{index:03d}", index)

    def rounds(self) -> list[RoundDirectory]:
        """The rounds that have a folder, in order; the last one may be unfinished."""
        if not self.rounds_folder.is_dir():
            return []
        names = (entry.name for entry in self.rounds_folder.iterdir() if entry.is_dir())
        return [self.round(index) for index in sorted(int(name) for name in names if re.fullmatch(r"\d{3,}", name))]

    def create(self) -> Self:
        """Makes the folder and that of the rounds where they do not exist yet."""
        make_folder(self.rounds_folder)
        return self

    def require(self) -> RunDirectory:
        """Checks that this is a run directory.

        Raises:
            InputError: there is no such folder, or nothing in it that a campaign writes.
        """
        if not self.path.is_dir():
            raise InputError(f"there is no run directory at {self.path}; give the folder that 'almlip run' wrote.")
        if not any(file.exists() for file in (self.config, self.state, self.metrics, self.rounds_folder)):
            raise InputError(f"{self.path} holds no campaign (no config.yaml, state.json or rounds/).")
        return self
