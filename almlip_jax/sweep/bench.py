"""What a process of a sweep builds once and uses for many points, so that nothing compiles again."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
from ase import Atoms

from almlip_jax.campaign.batch import AtomRoom, Looked, choose, features_of, shown
from almlip_jax.ensembles import build_ensemble
from almlip_jax.errors import InputError
from almlip_jax.evaluation import error_metrics
from almlip_jax.evaluation.tidy import CALIBRATION, error_columns
from almlip_jax.files import plain
from almlip_jax.keys import named_key
from almlip_jax.potential import Potential
from almlip_jax.potential.compositions import compositions_note
from almlip_jax.potential.states import states_note
from almlip_jax.scores import mean_score
from almlip_jax.selection import Selector
from almlip_jax.structures.packing import BatchShape
from almlip_jax.sweep.points import First, Group, Point, all_points, point_groups
from almlip_jax.sweep.pools import LabelledPool, Split, plan_for_budget, read_pool
from almlip_jax.sweep.records import Scores, SweepDirectory
from almlip_jax.sweep.settings import SweepConfig, SweepSystem, members_of
from almlip_jax.targets import further_targets
from almlip_jax.training import (
    AnyTrainer,
    Capacity,
    EpochReport,
    Job,
    SideBySideTrainer,
    Trainer,
    TrainingResult,
    build_trainer,
    validation_note,
)
from almlip_jax.training.penalties import with_all_keys


@dataclass(frozen=True)
class Choice:
    """A batch; its fields are those of `RoundRecord`.

    Attributes:
        picks: places in the pool, best first.
        gain: what the selector gave each of them.
        sigma_batch: mean monitored score of the batch; None where it is empty.
        sigma_pool: mean monitored score of the candidates that stay.
    """

    picks: tuple[int, ...]
    gain: tuple[float | None, ...]
    sigma_batch: float | None
    sigma_pool: float | None


class SystemBench:
    """The tools for one system.

    Args:
        config: of the sweep.
        pool: its structures.
    """

    def __init__(self, config: SweepConfig, pool: LabelledPool) -> None:
        self.config = config
        self.pool = pool
        self._trainers: dict[int, AnyTrainer] = {}
        self._side_by_side: dict[int, SideBySideTrainer] = {}
        self._selectors: dict[tuple[str, int], Selector] = {}
        self._splits: dict[int, Split] = {}

    # -- who begins with what -----------------------------------------------------------------------------------------

    @property
    def settings(self) -> SweepSystem:
        """Of the system."""
        return self.config.systems[self.pool.name]

    def split(self, seed: int) -> Split:
        """What a seed begins with."""
        if seed not in self._splits:
            self._splits[seed] = self.pool.split(self.settings, seed)
        return self._splits[seed]

    def dataset(self, seed: int, picked: Sequence[int] = ()) -> list[Atoms]:
        """The initial set, and what was selected since."""
        return [*self.pool.initial_set(self.split(seed)), *(self.pool.frames[place] for place in picked)]

    def key(self, seed: int, purpose: str, number: int) -> Any:
        """The random stream of a round, the same for every selector."""
        return named_key(seed, "sweep", self.pool.name, purpose, number)

    def weights_key(self, seed: int) -> Any:
        """The random stream of the members' weights of structures, the same for every selector and round."""
        return named_key(seed, "sweep", self.pool.name, "bootstrap")

    def identity(self, group: Group, lane: int) -> dict[str, Any]:
        """All that the results of a member of a group depend on, besides its name."""
        content: dict[str, Any] = {
            "content of its files": list(self.pool.files),
            "capacity (rounds, batch_sizes)": {k: v for k, v in asdict(self.capacity).items() if k != "largest"},
            "place side by side": [lane, group.width],
            "energies of isolated atoms": {str(z): energy for z, energy in self.isolated.items()},
        }
        if self.pool.atoms_in_tests:
            content["isolated atoms left out of its tests"] = self.pool.atoms_in_tests
        if self.pool.tests_in_given:
            content["tests left out of its initial set"] = self.pool.tests_in_given
        return settings_identity(self.config, group.members[lane]) | cast(dict[str, Any], plain(content))

    # -- training -----------------------------------------------------------------------------------------------------

    @property
    def isolated(self) -> dict[int, float]:
        """Energies of isolated atoms that occur, eV by atomic number."""
        return {z: self.pool.isolated[z] for z in self.pool.species.numbers if z in self.pool.isolated}

    @cached_property
    def largest_dataset(self) -> int:
        """Structures at the end of the longest point."""
        return len(self.dataset(self.config.seed_list[0])) + self.config.rounds * max(self.config.batch_sizes)

    @cached_property
    def capacity(self) -> Capacity:
        """Static sizes of every training."""
        size = self.config.ensemble_sizes[0]
        cutoff = build_ensemble(self.settings.model, members_of(self.settings, size), self.pool.species).cutoff
        return plan_for_budget(self.pool, cutoff, self.settings.training, self.largest_dataset)

    def trainer(self, size: int) -> AnyTrainer:
        """The trainer of ensembles of a size."""
        if size not in self._trainers:
            self._trainers[size] = build_trainer(
                self.settings.model,
                members_of(self.settings, size),
                self.pool.species,
                self.capacity,
                self.settings.training,
                np.dtype(self.config.precision),
                self.isolated,
            )
        return self._trainers[size]

    def train(
        self,
        size: int,
        width: int,
        jobs: Mapping[int, Job],
        on_epoch: Callable[[EpochReport], None],
        say: Callable[[str], None],
    ) -> dict[int, TrainingResult]:
        """Trains some lanes of a group; the others do the same work as one of these, whose results are not used.

        Lanes never mix, and the program is that of the whole group: what one gives does not depend on the others.

        Args:
            size: of the ensembles.
            width: number of lanes.
            jobs: by lane, with datasets of one size.
            on_epoch: is told about the first of them.
            say: is told about models that diverged.
        """
        if size not in self._side_by_side:
            trainer = self.trainer(size)
            assert isinstance(trainer, Trainer)  # the config refuses several architectures side by side
            self._side_by_side[size] = SideBySideTrainer(trainer, fixed=not self.pool.uniform)
        told = min(jobs)
        filled = [jobs.get(lane, jobs[told]) for lane in range(width)]
        results = self._side_by_side[size].train(
            filled, on_epoch=lambda lane, report: on_epoch(report) if lane == told else None, say=say
        )
        return {lane: results[lane] for lane in jobs}

    # -- tests --------------------------------------------------------------------------------------------------------

    def test(self, potential: Potential) -> dict[str, Scores]:
        """Errors and calibration on every test set."""
        evaluated = potential.evaluate(self.pool.tests, shape=self._shape(potential))
        groups = error_metrics(self.pool.tests, evaluated)["by_group"]
        return {name: _scores(groups[name]) for name in self.settings.tests}

    def _shape(self, potential: Potential) -> BatchShape:
        if self._batch_shape is None:
            self._batch_shape = potential.batch_shape([*self.pool.frames, *self.pool.tests, *self.pool.given])
        return self._batch_shape

    _batch_shape: BatchShape | None = None

    # -- selection ----------------------------------------------------------------------------------------------------

    def select(
        self, point: Point, number: int, potential: Potential, picked: Sequence[int], errors: Sequence[float]
    ) -> Choice:
        """Chooses the batch of a round from what is left of the pool.

        Args:
            point: whose selector, batch size and random streams.
            number: of the round.
            potential: of the round.
            picked: places in the pool of earlier batches.
            errors: force errors on the structures kept for validation, of the rounds so far, this one included.
        """
        settings = self.config.selectors[point.selector]
        split, gone = self.split(point.seed), set(picked)
        places = [place for place in split.pool if place not in gone]
        frames, dataset = [self.pool.frames[place] for place in places], self.dataset(point.seed, picked)
        features, shape = features_of(settings, point.seed), self._shape(potential)
        evaluated, context = (potential.evaluate(part, features=features, shape=shape) for part in (frames, dataset))
        among, around = shown(  # labels of files take no time
            settings,
            Looked(frames, evaluated, len(split.pool), self._atoms(split.pool)),
            Looked(dataset, context, self.largest_dataset, self._labelled_atoms),
            fitted_to=(potential, dataset),
            scalars=settings.scalars(errors),
        )
        rows = choose(self._selector(point), self.key(point.seed, "select", number), among, around)
        chosen = [row for row, _ in rows]
        scores = evaluated.scores[self.config.monitor]
        return Choice(
            picks=tuple(places[row] for row in chosen),
            gain=tuple(gain if math.isfinite(gain) else None for _, gain in rows),
            sigma_batch=mean_score(scores[chosen]),
            sigma_pool=mean_score(np.delete(scores, chosen)),
        )

    def _atoms(self, places: Sequence[int]) -> AtomRoom:
        """Rows for the atoms of the candidates of a seed."""
        sizes = [len(self.pool.frames[place]) for place in places]
        return AtomRoom(sum(sizes), max(len(frame) for frame in self.pool.frames))

    @cached_property
    def _labelled_atoms(self) -> AtomRoom:
        sizes = [len(frame) for frame in [*self.pool.given, *self.pool.frames]]
        return AtomRoom.of(sizes, self.largest_dataset, each_once=True)

    def _selector(self, point: Point) -> Selector:
        name = (point.selector, point.batch_size)
        if name not in self._selectors:
            self._selectors[name] = self.config.selectors[point.selector].build(point.batch_size)
        return self._selectors[name]


class Bench:
    """The tools of one process.

    Args:
        config: of the sweep, its folder known.
        folder: of the sweep.
    """

    def __init__(self, config: SweepConfig, folder: SweepDirectory) -> None:
        self.config = config
        self.folder = folder
        self._systems: dict[str, SystemBench] = {}

    def system(self, name: str) -> SystemBench:
        """The tools for a system, its files read when it is first asked for.

        Raises:
            InputError: a file cannot be used, or the pool is too small.
        """
        if name not in self._systems:
            self._systems[name] = SystemBench(self.config, read_pool(self.config, name))
        return self._systems[name]

    def of(self, group: Group) -> SystemBench:
        """The tools for the system of a group."""
        return self.system(group.members[0].system)

    def keep(
        self,
        group: Group,
        lane: int,
        number: int,
        result: TrainingResult,
        references: dict[int, float],
        seconds: float,
        dataset: Sequence[Atoms],
    ) -> Potential:
        """Saves the potential of a round.

        Args:
            group: of the training.
            lane: of its place there.
            number: of the round.
            result: of the training.
            references: eV by atomic number.
            seconds: its share of the wall time.
            dataset: what it was given.
        """
        tools, member = self.of(group), group.members[lane]
        sees_state = tools.trainer(member.ensemble_size).ensemble.sees_state
        potential = Potential(
            settings=tools.settings.model,
            members=result.members(members_of(tools.settings, member.ensemble_size)),
            species=tools.pool.species,
            params=result.params,
            reference_energies=references,
            isolated=frozenset(tools.isolated),
            metadata={
                "sweep": member.name,
                "round": number,
                "identity": _digest(tools.identity(group, lane)),
                "seconds_train": seconds,
            }
            | validation_note(result)
            | compositions_note(dataset)
            | states_note(dataset, sees_state=sees_state),
        )
        potential.save(self.folder.potential(member, number))
        return potential

    def kept(self, group: Group, lane: int, number: int) -> Potential | None:
        """The potential of a round that an interrupted sweep left behind; one that is damaged counts for nothing."""
        place = self.folder.potential(group.members[lane], number)
        try:
            potential = Potential.load(place) if place.exists() else None
        except InputError:
            return None
        if potential is None or potential.metadata.get("identity") != _digest(self.of(group).identity(group, lane)):
            return None
        return potential


def settings_identity(config: SweepConfig, member: First | Point) -> dict[str, Any]:
    """What of the identity of a point, or of what points begin with, the config alone says."""
    settings = config.systems[member.system]
    content: dict[str, Any] = {
        "initial set": settings.initial if isinstance(settings.initial, int) else "file",
        "choice of tests": {name: test.every for name, test in settings.tests.items()},
        "pool_size": settings.pool_size,
        "model": settings.model.model_dump(mode="json"),
        "ensemble": settings.ensemble.model_dump(mode="json", exclude={"size"}),
        "training": settings.training.model_dump(mode="json", exclude={"final_steps", "replay"}),
        "precision": config.precision,
    }
    readings = settings.readings
    if readings:
        content["keys and types of its files"] = readings
    if isinstance(member, Point):
        content["selector"] = _without_atoms(config.selectors[member.selector].model_dump(mode="json"))
        content["warm_start"] = config.warm_start
        content["monitor"] = config.monitor
    return cast(dict[str, Any], _of_effect(plain(content), settings.model.further))


def check_others(bench: Bench, wanted: Collection[Point]) -> None:
    """Refuses a folder whose table would hold points that are not asked for, and were made with other settings.

    Files of systems that are not asked for are not read, and lanes, which change last digits alone, do not matter.

    Raises:
        InputError: names the state of such a point.
    """
    config, systems = bench.config, {point.system for point in wanted}
    for group in point_groups(config, [point for point in all_points(config) if point not in wanted]):
        for lane in group.wanted:
            point = group.members[lane]
            assert isinstance(point, Point)
            if bench.folder.written(point) is None:
                continue
            of_files = bench.of(group).identity(group, lane) if point.system in systems else {}
            of_files.pop("place side by side", None)
            bench.folder.state(point, of_files | settings_identity(config, point), config.rounds)


def _without_atoms(settings: Any) -> Any:
    """Settings of a selector without empty ``atom_features``, which earlier versions did not know."""
    if isinstance(settings, dict):
        kept = {key: value for key, value in settings.items() if value or key != "atom_features"}
        return {key: _without_atoms(value) for key, value in kept.items()}
    return [_without_atoms(one) for one in settings] if isinstance(settings, list) else settings


def _of_effect(identity: dict[str, Any], further: Collection[str]) -> dict[str, Any]:
    """An identity without keys of targets that the model does not give: they change no result."""
    training, model = identity["training"], identity["model"]
    if training.get("projection") is None:  # earlier versions did not know it
        training.pop("projection", None)
    for part in (training, second := training.get("second_stage") or {}):
        if part.get("loss") is not None:  # earlier versions gave every loss the keys of all
            part["loss"] = with_all_keys(part["loss"])
        elif part is second:
            part.pop("loss", None)
    if not model.get("targets", True):  # of a user's own
        model.pop("targets")
    for target in further_targets():
        if target.name not in further:
            if model.get(target.name) is False:
                model.pop(target.name)
            for part in (training["loss"], second):
                part.pop(target.name, None)
                part.pop(f"{target.name}_delta", None)
    return identity


def _digest(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _scores(metrics: Mapping[str, Any]) -> Scores:
    """Columns of the table from `error_metrics`; None for what is not a number."""
    values = {name: metrics.get(name, math.nan) for name in error_columns()}
    values |= {name: metrics["calibration"]["forces"][name] for name in CALIBRATION}
    return {name: float(value) if math.isfinite(value) else None for name, value in values.items()}
