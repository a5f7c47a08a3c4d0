"""What a sweep leaves on the disk, and how it is read back: one small state for each point, one table for all.

Layout::

    out/
      config.yaml            resolved config
      versions.json          package versions, git commit, devices
      results.csv            one row for each point, round and test set
      firsts/SYSTEM/...      for each seed and ensemble size: the potential of round 0 and its errors on the tests
      points/SYSTEM/SELECTOR/...
          state.json         what the rounds so far came to
          picks.json         places in the pool of the initial set and of each batch
          potentials/006/    of the last round
      parsl/                 jobs on a cluster: their scripts, and what they print
      lock                   the process that works here, while it does

The state of a point moves on when a round is complete, and everything that a later round needs is in it or next to it:
a sweep that was killed goes on, point by point and round by round.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from almlip_jax.errors import InputError
from almlip_jax.evaluation.tidy import columns
from almlip_jax.files import Cell, plain, read_record, write_csv, write_json
from almlip_jax.settings import Findings
from almlip_jax.sweep.points import First, Point
from almlip_jax.sweep.pools import Split
from almlip_jax.sweep.settings import SweepConfig
from almlip_jax.work_directory import Inside, WorkDirectory

FINISHED = "finished"
"""Why a point ended that has all its rounds."""

Scores = dict[str, float | None]
"""Errors and calibration on one test set, by column."""


class FirstRecord(Findings):
    """What the training of round 0 came to: ``first.json``."""

    identity: dict[str, Any]
    """All that it depends on."""
    tests: dict[str, Scores]
    """Errors by test set."""
    validation: float | None = None
    """Force error on the structures kept for validation, eV/Angstrom."""
    seconds_train: float
    """Wall time of the training, s."""
    seconds_test: float
    """Wall time of the test, s."""


class RoundRecord(Findings):
    """What one round of a point came to."""

    round: int
    """Number of the round, from 0."""
    labels: int
    """Labelled structures trained on."""
    tests: dict[str, Scores]
    """Errors by test set."""
    validation: float | None = None
    """Force error on the structures kept for validation, eV/Angstrom."""
    picks: tuple[int, ...] = ()
    """Places in the pool of the batch selected then, best first; none in the last round."""
    gain: tuple[float | None, ...] = ()
    """What the selector gave each of them."""
    sigma_batch: float | None = None
    """Mean monitored score of the batch."""
    sigma_pool: float | None = None
    """Mean monitored score of the candidates that stay in the pool."""
    seconds: dict[str, float]
    """Wall time by column."""


class PointState(Findings):
    """The content of ``state.json``."""

    identity: dict[str, Any]
    """All that the point depends on."""
    rounds: tuple[RoundRecord, ...] = ()
    """Those that are complete."""
    ended: str | None = None
    """Why nothing more comes: ``finished``, ``seconds_per_point`` or ``nothing selected``."""

    def may_be_of(self, rounds: int) -> bool:
        """Whether this is what a sweep of so many rounds comes to: one that is finished has all of them, none more."""
        return len(self.rounds) == rounds + 1 if self.ended == FINISHED else len(self.rounds) <= rounds

    @property
    def seconds(self) -> float:
        """Wall time so far."""
        return sum(record.seconds["seconds"] for record in self.rounds)

    @property
    def picked(self) -> list[int]:
        """Places in the pool of everything selected so far, in order."""
        return [place for record in self.rounds for place in record.picks]


Record = TypeVar("Record", FirstRecord, PointState)


class SweepDirectory(WorkDirectory):
    """The files of a sweep; see the module's docstring."""

    results = Inside("results.csv")
    """The table (CSV)."""

    def of(self, member: First | Point) -> Path:
        """The folder of a point, or of what points begin with."""
        return self.path / ("points" if isinstance(member, Point) else "firsts") / member.name

    def potential(self, member: First | Point, number: int) -> Path:
        """Its `Potential` of a round."""
        return self.of(member) / "potentials" / f"{number:03d}"

    def unfinished_training(self, member: First | Point) -> Path:
        """State of a training that is under way."""
        return self.of(member) / "unfinished_training"

    def first(self, member: First, identity: Mapping[str, Any] | None = None) -> FirstRecord | None:
        """What a training of round 0 came to, or None where it is not complete."""
        return _read(FirstRecord, self.of(member) / "first.json", identity)

    def write_first(self, member: First, record: FirstRecord) -> None:
        """Makes the record of a training of round 0 durable."""
        write_json(self.of(member) / "first.json", record.model_dump(mode="json"))

    def state(
        self, point: Point, identity: Mapping[str, Any] | None = None, rounds: int | None = None
    ) -> PointState | None:
        """Where a point stands; None where no round is complete.

        Args:
            point: which one.
            identity: what its state must have been made with, where that is looked at.
            rounds: of the sweep, likewise.

        Raises:
            InputError: the file is damaged, or is of a point with the same name that was made otherwise.
        """
        path = self.of(point) / "state.json"
        found = _read(PointState, path, identity)
        if found is not None and rounds is not None and not found.may_be_of(rounds):
            raise _made_otherwise(path, ["rounds"])
        return found

    def written(self, member: First | Point) -> int | None:
        """When the state of a point was written, in ns of a file system's clock; None where it was not."""
        try:
            return (self.of(member) / "state.json").stat().st_mtime_ns
        except FileNotFoundError:
            return None

    def write_state(self, point: Point, state: PointState, split: Split) -> None:
        """Makes the state of a point durable, and the picks that are derived from it."""
        rounds = [
            {"round": record.round, "indices": list(record.picks), "gain": list(record.gain)} for record in state.rounds
        ]
        write_json(
            self.of(point) / "picks.json",
            {"initial": list(split.initial), "pool_size": len(split.pool), "rounds": rounds},
        )
        write_json(self.of(point) / "state.json", state.model_dump(mode="json"))
        for number in range(len(state.rounds) - 1):
            if (old := self.potential(point, number)).exists():
                shutil.rmtree(old)


def _read(kind: type[Record], path: Path, identity: Mapping[str, Any] | None) -> Record | None:
    if not path.exists():
        return None
    found = read_record(path, kind)
    if identity is not None:
        wanted = plain(identity)
        different = [name for name in wanted if found.identity.get(name) != wanted[name]]
        if different:
            raise _made_otherwise(path, different)
    return found


def _made_otherwise(path: Path, different: Sequence[str]) -> InputError:
    return InputError(
        f"{path} was made with another {' and '.join(different)}, which its results depend on; choose another folder "
        "with --out."
    )


def table(config: SweepConfig, points: Iterable[tuple[Point, PointState]]) -> list[dict[str, Cell]]:
    """Rows of ``results.csv``: every complete round, and of points that ended early the other rounds without values."""
    rows: list[dict[str, Cell]] = []
    for point, state in points:
        fixed: dict[str, Cell] = {
            "system": point.system,
            "selector": point.selector,
            "seed": point.seed,
            "ensemble_size": point.ensemble_size,
            "batch_size": point.batch_size,
        }
        for record in state.rounds:
            common: dict[str, Cell] = {
                "sigma_batch": record.sigma_batch,
                "sigma_pool": record.sigma_pool,
                "monitor": config.monitor,
                **record.seconds,
            }
            for test, scores in record.tests.items():
                rows.append(
                    _row(fixed | {"round": record.round, "labels": record.labels, "test": test}, scores, common)
                )
        if state.ended is not None:
            for number in range(len(state.rounds), config.rounds + 1):
                rows += [_row(fixed | {"round": number, "test": test}) for test in config.systems[point.system].tests]
    return rows


def _row(*parts: Mapping[str, Cell]) -> dict[str, Cell]:
    known = {name: value for part in parts for name, value in part.items()}
    return {name: known.get(name) for name in columns()}


def write_table(folder: SweepDirectory, config: SweepConfig, points: Iterable[Point]) -> list[dict[str, Cell]]:
    """Writes ``results.csv`` from the states on the disk, and returns its rows."""
    states = [(point, state) for point in points if (state := folder.state(point)) is not None]
    rows = table(config, states)
    if rows:
        write_csv(folder.results, rows)
    return rows
