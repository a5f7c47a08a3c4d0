"""The run directory: where everything of a campaign lies.

Layout (rounds are numbered from 0, folders have at least three digits)::

    run/
      config.yaml            resolved config
      versions.json          package versions, git commit, devices
      state.json             round, stage, finished, reason, converged, labels, ...
      initial_pool.json      places in the pool of the initial set, where a selector chose them
      labels.db              label store (ASE SQLite database)
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
from almlip_jax.work_directory import WorkDirectory


@dataclass(frozen=True)
class PotentialDirectory:
    """The files of one trained potential.

    Attributes:
        path: its folder.
    """

    path: Path

    @property
    def training(self) -> Path:
        """One row an epoch: losses and errors (CSV)."""
        return self.path / "training.csv"

    @property
    def unfinished_training(self) -> Path:
        """State of a training that is under way; gone when its potential is there."""
        return self.path / "unfinished_training"

    @property
    def potential(self) -> Path:
        """The saved `Potential` (a folder)."""
        return self.path / "potential"

    @property
    def evaluation(self) -> Path:
        """Errors and calibration on the test set (JSON)."""
        return self.path / "evaluation.json"

    @property
    def test_predictions(self) -> Path:
        """Predicted and true energies and forces on the test set (npz; keys in the module's docstring)."""
        return self.path / "test_predictions.npz"

    def create(self) -> Self:
        """Makes the folder where it does not exist yet."""
        make_folder(self.path)
        return self


@dataclass(frozen=True)
class RoundDirectory(PotentialDirectory):
    """The files of one round.

    Attributes:
        path: its folder.
        index: the number of the round, from 0.
    """

    index: int

    @property
    def dataset(self) -> Path:
        """Labelled structures used for training in this round, in order (extxyz)."""
        return self.path / "dataset.extxyz"

    @property
    def starts(self) -> Path:
        """Start structure of each walker, and what became of its relaxation (extxyz)."""
        return self.path / "starts.extxyz"

    @property
    def walkers(self) -> Path:
        """Committee scores and temperature along every walker (npz)."""
        return self.path / "walkers.npz"

    @property
    def trajectories(self) -> Path:
        """The folder of the walkers' trajectories."""
        return self.path / "walkers"

    def trajectory(self, walker: int) -> Path:
        """The thinned trajectory of a walker (extxyz)."""
        return self.trajectories / f"{walker:03d}.extxyz"

    @property
    def last_frames(self) -> Path:
        """Last good frame of each walker, and how it ended (extxyz)."""
        return self.path / "final.extxyz"

    @property
    def drawn(self) -> Path:
        """Frames drawn at random from the trajectories, to be labelled for the gate's thresholds (extxyz)."""
        return self.path / "drawn.extxyz"

    @property
    def calibration(self) -> Path:
        """Those of them that got a label (extxyz)."""
        return self.path / "calibration.extxyz"

    @property
    def pool(self) -> Path:
        """Recorded candidates with their scores (extxyz)."""
        return self.path / "pool.extxyz"

    @property
    def batch(self) -> Path:
        """Selected candidates, best first (extxyz)."""
        return self.path / "batch.extxyz"

    @property
    def labelled(self) -> Path:
        """Selected candidates that got labels (extxyz)."""
        return self.path / "labelled.extxyz"


@dataclass(frozen=True, init=False)
class RunDirectory(WorkDirectory):
    """The files of a campaign; see the module's docstring for the layout."""

    @property
    def state(self) -> Path:
        """Where the campaign stands (JSON)."""
        return self.path / "state.json"

    @property
    def labels(self) -> Path:
        """The label store (ASE SQLite database)."""
        return self.path / "labels.db"

    @property
    def initial_pool(self) -> Path:
        """Places in the pool of the structures of the initial set, where a selector chose them (JSON)."""
        return self.path / "initial_pool.json"

    @property
    def measured(self) -> Path:
        """Shapes and capacities chosen by measurement (JSON)."""
        return self.path / "measured.json"

    @property
    def stage_seconds(self) -> Path:
        """The stage under way and the seconds it has taken so far (JSON)."""
        return self.path / "stage_seconds.json"

    @property
    def test(self) -> Path:
        """Labelled test frames (extxyz)."""
        return self.path / "test.extxyz"

    @property
    def metrics(self) -> Path:
        """One row a round (CSV)."""
        return self.path / "metrics.csv"

    @property
    def metrics_units(self) -> Path:
        """Unit of each column of the metrics (CSV)."""
        return self.path / "metrics_units.csv"

    @property
    def report(self) -> Path:
        """The report (HTML)."""
        return self.path / "report.html"

    @property
    def latest_potential(self) -> Path:
        """Link to the newest potential."""
        return self.path / "potential"

    @property
    def rounds_folder(self) -> Path:
        """The folder of the rounds."""
        return self.path / "rounds"

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
