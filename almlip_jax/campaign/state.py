"""Where a campaign stands: one small JSON file, replaced whole after each stage, that decides what is done next.

A stage first writes its files, then the state moves on.  A run killed at any point therefore resumes at the start of
the stage it was in, with the same inputs: everything that a later stage depends on and that is not a file of its own
(the history of the rounds, capacities that grew) is in the state, so that it moves together with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Any

from almlip_jax.campaign.rundir import RunDirectory
from almlip_jax.errors import InputError
from almlip_jax.files import Cell, plain, read_record, write_csv, write_json
from almlip_jax.settings import Findings
from almlip_jax.unit_names import unit_of
from almlip_jax.yaml_text import read_yaml


class Stage(StrEnum):
    """What a campaign does next; the first four once (two of them with a teacher alone), the others in each round."""

    TEACHER = "teacher"
    PRETRAIN = "pretrain"
    INITIAL = "initial"
    TEST = "test"
    TRAIN = "train"
    EVALUATE = "evaluate"
    EXPLORE = "explore"
    SELECT = "select"
    LABEL = "label"


_ROUND = (Stage.TRAIN, Stage.EVALUATE, Stage.EXPLORE, Stage.SELECT, Stage.LABEL)


COSTS = ("label_seconds", "teacher_calls", "teacher_seconds")
"""Fields of the state, and of the records of rounds, that compare what the label source and a teacher cost."""


class RoundRecord(Findings):
    """What one round came to; fields of stages that have not run yet hold their defaults."""

    round: int
    """Number of the round, from 0."""
    labels: int = 0
    """Label-source calls so far when the round began, without those of the test set, failed ones included."""
    test_calls: int = 0
    """Label-source calls for the test set, every step of its MD included."""
    label_seconds: float | None = None
    """Seconds of the label source so far, without those of the test set; known where there is a teacher."""
    teacher_calls: int | None = None
    """Calls of the teacher so far, where there is one."""
    teacher_seconds: float | None = None
    """Their seconds."""
    dataset_size: int = 0
    """Labelled structures trained on."""
    errors: dict[str, float] = {}
    """Test errors, ``<metric>_<group>``; eV/atom, eV/Angstrom and eV/Angstrom^3."""
    frames_planned: int = 0
    """Frames that all walkers together would have come to had none ended early; 0 with a fixed pool."""
    frames_below: int = 0
    """Physical frames among them whose score lay below the record threshold of the run."""
    explored_anew: bool = False
    """Whether it was explored with other settings than the round before."""
    picoseconds: float = 0.0
    """Time that all walkers together ran, ps."""
    walkers: dict[str, int] = {}
    """How many walkers ended how."""
    candidates: int | None = None
    """Frames to select from; not known to be none where all that were recorded had been drawn for thresholds."""
    sigma_pool: float | None = None
    """Mean monitored score of the frames explored (or of the candidates left in a fixed pool)."""
    sigma_batch: float | None = None
    """Mean monitored score of the selected batch."""
    selected: int | None = None
    """Frames selected."""
    systems_candidates: dict[str, int] = {}
    """Candidates of each named system."""
    systems_selected: dict[str, int] = {}
    """Frames selected of each named system."""
    failed: int = 0
    """Selected frames that got no label."""
    seconds: dict[str, float] = {}
    """Wall time of each stage, s."""

    @property
    def share_below(self) -> float | None:
        """Share of the planned frames below the record threshold."""
        return self.frames_below / self.frames_planned if self.frames_planned else None

    @property
    def costs(self) -> dict[str, float]:
        """What is known of `COSTS`."""
        return _costs(self)

    def row(self) -> dict[str, Cell]:
        """The line of ``metrics.csv``."""
        return {
            "round": self.round,
            "labels": self.labels,
            "test_calls": self.test_calls,
            **self.costs,
            "dataset_size": self.dataset_size,
            **self.errors,
            "sigma_pool": self.sigma_pool,
            "sigma_batch": self.sigma_batch,
            "share_below": self.share_below,
            "picoseconds": self.picoseconds,
            "candidates": self.candidates,
            "selected": self.selected,
            **{f"candidates_{name}": number for name, number in self.systems_candidates.items()},
            **{f"selected_{name}": number for name, number in self.systems_selected.items()},
            "failed": self.failed,
            **{f"seconds_{stage}": self.seconds.get(stage) for stage in _ROUND},
        }


class FinalRecord(Findings):
    """What the final potential came to; it is there once its training has ended."""

    round: int
    """Number of the round whose dataset it was trained on."""
    steps: int
    """Length that the config asked for, in optimiser steps."""
    errors: dict[str, float] = {}
    """Test errors, ``<metric>_<group>``; eV/atom, eV/Angstrom and eV/Angstrom^3."""
    seconds: dict[str, float] = {}
    """Wall time of ``train`` and ``evaluate``, s; a stage without one has not been done."""


class CampaignState(Findings):
    """The content of ``state.json``."""

    round: int = 0
    """Number of the round, from 0."""
    stage: Stage = Stage.INITIAL
    """What is done next (after the end: what a larger budget would go on with)."""
    finished: bool = False
    """Whether a stopping rule held."""
    converged: bool = False
    """Whether it says that the potential is good enough."""
    rule: str | None = None
    """Name of the stopping rule that held."""
    reason: str | None = None
    """Why the campaign ended, what it waits for, or which error it ran into."""
    retry: bool = False
    """Whether failed labels are tried again when the campaign goes on."""
    tried_again: int | None = None
    """The last round in which they were; where they fail again it goes on without them."""
    labels: int = 0
    """Label-source calls so far, without those of the test set."""
    lost_calls: int = 0
    """How many of them the label store no longer knows, since it was removed or replaced."""
    test_calls: int = 0
    """Label-source calls for the test set so far."""
    lost_test_calls: int = 0
    """How many of them the label store no longer knows."""
    label_seconds: float | None = None
    """As in the records of the rounds, like the next two; they only grow, whatever becomes of the stores."""
    teacher_calls: int | None = None
    """Calls of the teacher."""
    teacher_seconds: float | None = None
    """Their seconds."""
    settled: dict[str, Any] = {}
    """Settings that the campaign keeps, as it began with them, and the version of its label source."""
    files: dict[str, str] = {}
    """SHA-256 of each file that later stages read, by its place in the run directory, and of the config."""
    measured: dict[str, Any] = {}
    """Shapes and capacities chosen by measurement; ``measured.json`` is a copy of it."""
    under_way: int | None = None
    """Round whose batch is being labelled while the campaign goes on; what it asked for counts as chosen."""
    explored_with: dict[str, Any] | None = None
    """The section ``exploration`` of the last exploration; None in runs of earlier versions."""
    closing: bool = False
    """Whether a stopping rule held while labels were under way: this round asks for none, and waits for those."""
    history: tuple[RoundRecord, ...] = ()
    """One record a round."""
    final: FinalRecord | None = None
    """The final potential, where there is one."""

    @property
    def costs(self) -> dict[str, float]:
        """What is known of `COSTS`."""
        return _costs(self)

    @property
    def record(self) -> RoundRecord:
        """The record of this round."""
        if self.history and self.history[-1].round == self.round:
            return self.history[-1]
        return RoundRecord(round=self.round)

    def rows(self) -> list[dict[str, Cell]]:
        """The lines of ``metrics.csv``: one a round, that of the last with the final potential's errors as well."""
        rows = [record.row() for record in self.history]
        if rows and self.final is not None:
            rows[-1].update({f"final_{name}": value for name, value in self.final.errors.items()})
        return rows

    def after(
        self, results: Mapping[str, Any], *, seconds: float, measured: Mapping[str, Any] | None = None
    ) -> CampaignState:
        """The state once the stage at hand is done.

        Args:
            results: fields of the round's record that the stage found out.
            seconds: wall time it took.
            measured: shapes and capacities; as before where not given.
        """
        following, round_index = _next(self.stage, self.round)
        update: dict[str, Any] = {"round": round_index, "stage": following, "reason": None}
        update["measured"] = self.measured if measured is None else plain(measured)
        if self.stage in _ROUND:
            times = {**self.record.seconds, str(self.stage): seconds}
            record = RoundRecord.model_validate({**self.record.model_dump(), **plain(results), "seconds": times})
            earlier = tuple(old for old in self.history if old.round < self.round)
            update["history"] = (*earlier, record)
        return self.model_copy(update=update)

    def labelled(self, failed: Mapping[int, int], under_way: int | None) -> CampaignState:
        """The state once the labels of some rounds are there.

        Args:
            failed: how many frames of each of these rounds got no label.
            under_way: round whose labels are being made from now on.
        """
        history = tuple(
            old.model_copy(update={"failed": failed[old.round]}) if old.round in failed else old for old in self.history
        )
        return self.model_copy(update={"history": history, "under_way": under_way, "closing": False})

    def before_exploration(self) -> CampaignState:
        """The state at the exploration of this round, without what another one has found."""
        times = {name: taken for name, taken in self.record.seconds.items() if name in (Stage.TRAIN, Stage.EVALUATE)}
        known = ("round", "labels", "test_calls", *COSTS, "dataset_size", "errors")
        record = RoundRecord(**{name: getattr(self.record, name) for name in known}, seconds=times)
        return self.model_copy(update={"stage": Stage.EXPLORE, "history": (*self.history[:-1], record)})

    def wound_up(self) -> CampaignState:
        """The state where this round asks for no labels, and waits for those that are under way."""
        update: dict[str, Any] = {"stage": Stage.LABEL, "closing": True}
        if self.record.selected:
            none = self.record.model_copy(update={"selected": 0, "systems_selected": {}})
            update["history"] = (*self.history[:-1], none)
        return self.model_copy(update=update)


def _costs(record: RoundRecord | CampaignState) -> dict[str, float]:
    return {name: value for name in COSTS if (value := getattr(record, name)) is not None}


def _next(stage: Stage, round_index: int) -> tuple[Stage, int]:
    order = list(Stage)
    if stage is Stage.LABEL:
        return Stage.TRAIN, round_index + 1
    return order[order.index(stage) + 1], round_index


def metric_units(run: RunDirectory, names: Iterable[str]) -> dict[str, str]:
    """Unit of each column of ``metrics.csv``, empty for a plain number; sigmas have that of the monitored score."""
    try:
        monitor = str(read_yaml(run.config).value["stopping"]["monitor"])
    except (InputError, KeyError, TypeError):
        monitor = ""  # an old config, or none
    return {name: unit_of(monitor if name in ("sigma_pool", "sigma_batch") else name) for name in names}


def read_state(run: RunDirectory) -> CampaignState:
    """The state of a run; that of a new one where nothing has been written yet.

    Raises:
        InputError: ``state.json`` is damaged.
    """
    return read_record(run.state, CampaignState) if run.state.exists() else CampaignState()


def write_state(run: RunDirectory, state: CampaignState) -> None:
    """Makes a state durable; the files derived from it (metrics, capacities) are written anew with it."""
    write_json(run.state, state.model_dump(mode="json"))
    if state.history:
        rows = state.rows()
        units = metric_units(run, [name for row in rows for name in row])
        write_csv(run.metrics, rows)
        write_csv(run.metrics_units, [{"column": name, "unit": unit} for name, unit in units.items()])
    write_json(run.measured, state.measured)
