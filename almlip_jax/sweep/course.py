"""The course of points: train, test, select, label, round after round, for all points of a group side by side.

Every input of a round is in the state of the point or in its last potential, and every random number comes from a
stream named after system, seed and round.  A round done again, alone or together with others, gives the same bits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from ase import Atoms

from almlip_jax.campaign.batch import undecided
from almlip_jax.errors import InputError
from almlip_jax.fitting import with_kept_references
from almlip_jax.potential import Potential
from almlip_jax.progress import Progress, reaching
from almlip_jax.structures.species import SpeciesTable
from almlip_jax.sweep.bench import Bench, SystemBench
from almlip_jax.sweep.points import First, Group, Point, first_of
from almlip_jax.sweep.records import FINISHED, FirstRecord, PointState, RoundRecord, Scores
from almlip_jax.sweep.settings import members_of
from almlip_jax.training import (
    VALIDATION_ERROR,
    CommitteeTrainer,
    EpochReport,
    Job,
    TrainingResult,
    checkpoint,
    find_references,
    params_for,
)

OnRound = Callable[[], None]
"""Told when a round of a group is complete."""

OUT_OF_TIME = "seconds_per_point"
"""Why a point ended that took too long."""


@dataclass
class _Training:
    """One training of a round.

    Attributes:
        lane: of its group.
        member: whose it is.
        dataset: what it is trained on.
        start: potential whose parameters it begins with, or None for fresh ones.
        met: elements that this potential has learned of.
    """

    lane: int
    member: First | Point
    dataset: list[Atoms]
    start: Potential | None = None
    met: frozenset[int] = frozenset()


def train_firsts(bench: Bench, group: Group, progress: Progress, on_round: OnRound) -> None:
    """The trainings of round 0 that many points share, and their tests."""
    tools = bench.of(group)
    missing = []
    for lane in group.wanted:
        member = group.members[lane]
        assert isinstance(member, First)
        if bench.folder.first(member, tools.identity(group, lane)) is None:
            missing.append(_Training(lane, member, tools.dataset(member.seed)))
    if missing:
        potentials = _trained(bench, group, missing, 0, progress)
        for one in missing:
            assert isinstance(one.member, First)
            began = time.monotonic()
            with progress.stage("test"):
                tests = tools.test(potentials[one.lane])
            record = FirstRecord(
                identity=tools.identity(group, one.lane),
                tests=tests,
                validation=potentials[one.lane].metadata.get(VALIDATION_ERROR),
                seconds_train=potentials[one.lane].metadata["seconds_train"],
                seconds_test=time.monotonic() - began,
            )
            bench.folder.write_first(one.member, record)
    on_round()


def run_points(bench: Bench, group: Group, progress: Progress, on_round: OnRound) -> None:
    """All rounds of the points of a group, from where they stand."""
    courses = [Course(bench, group, lane) for lane in group.wanted]
    while going := [course for course in courses if course.state.ended is None]:
        number = min(len(course.state.rounds) for course in going)
        ready = [course for course in going if len(course.state.rounds) == number]
        if number > 0:
            trainings = [course.training() for course in ready]
            potentials = _trained(bench, group, trainings, number, progress)
            for course in ready:
                course.potential = potentials[course.lane]
        for course in ready:
            course.complete(progress)
        on_round()


def rounds_left(bench: Bench, group: Group) -> int:
    """How often `on_round` will be called at most."""
    if isinstance(group.members[0], First):
        return 1
    left = []
    for lane in group.wanted:
        state = standing(bench, group, lane)
        left.append(0 if state.ended else bench.config.rounds + 1 - len(state.rounds))
    return max(left)


def standing(bench: Bench, group: Group, lane: int) -> PointState:
    """Where a point stands; one that a smaller limit of time had ended goes on.

    Raises:
        InputError: what is on the disk was made with other settings.
    """
    point, limit = group.members[lane], bench.config.seconds_per_point
    assert isinstance(point, Point)
    identity = bench.of(group).identity(group, lane)
    state = bench.folder.state(point, identity, bench.config.rounds) or PointState(identity=identity)
    if state.ended == OUT_OF_TIME and (limit is None or state.seconds <= limit):
        return state.model_copy(update={"ended": None})
    return state


class Course:
    """One point on its way.

    Args:
        bench: tools.
        group: to which it belongs.
        lane: its place there.

    Raises:
        InputError: what is on the disk belongs to another point.
    """

    def __init__(self, bench: Bench, group: Group, lane: int) -> None:
        point = group.members[lane]
        assert isinstance(point, Point)
        self.bench = bench
        self.tools: SystemBench = bench.of(group)
        self.point = point
        self.lane = lane
        self.state = standing(bench, group, lane)
        self.potential: Potential | None = None

    def training(self) -> _Training:
        """What the next round trains."""
        dataset = self.tools.dataset(self.point.seed, self.state.picked)
        if not self.bench.config.warm_start:
            return _Training(self.lane, self.point, dataset)
        start = self._last_potential()
        before = self.tools.dataset(self.point.seed, self.state.picked[: -len(self.state.rounds[-1].picks)])
        met = frozenset(SpeciesTable.of(before).numbers) | start.isolated
        return _Training(self.lane, self.point, dataset, start, met)

    def complete(self, progress: Progress) -> None:
        """Tests, selects and labels with the potential of the round, and makes the round durable."""
        began = time.monotonic()
        potential = self._last_potential()  # after a training, that of this round
        record = self._tested(potential, progress) if self.state.rounds else self._shared()
        if record.round < self.bench.config.rounds:
            record = self._selected(record, potential, progress)
        total = record.seconds["seconds"] + time.monotonic() - began
        self._add(record.model_copy(update={"seconds": record.seconds | {"seconds": total}}))

    def _shared(self) -> RoundRecord:
        """Round 0: the numbers of the potential that all points of the seed share."""
        first = self.bench.folder.first(first_of(self.point))
        if first is None:
            raise InputError(f"{self.bench.folder.of(first_of(self.point))} is gone; start the sweep again.")
        seconds = {"seconds_train": first.seconds_train, "seconds": first.seconds_train + first.seconds_test}
        return self._record(first.tests, first.validation, seconds)

    def _tested(self, potential: Potential, progress: Progress) -> RoundRecord:
        with progress.stage("test"):
            tests = self.tools.test(potential)
        seconds = float(potential.metadata["seconds_train"])
        validation = potential.metadata.get(VALIDATION_ERROR)
        return self._record(tests, validation, {"seconds_train": seconds, "seconds": seconds})

    def _record(self, tests: Mapping[str, Scores], validation: float | None, seconds: dict[str, float]) -> RoundRecord:
        return RoundRecord(
            round=len(self.state.rounds),
            labels=len(self.tools.dataset(self.point.seed, self.state.picked)),
            tests=dict(tests),
            validation=validation,
            seconds=seconds,
        )

    def _selected(self, record: RoundRecord, potential: Potential, progress: Progress) -> RoundRecord:
        """The record with the batch of the round."""
        began, state = time.monotonic(), self.state
        with progress.stage("select"):
            errors = [float("nan") if one.validation is None else one.validation for one in [*state.rounds, record]]
            choice = self.tools.select(self.point, record.round, potential, state.picked, errors)
        if remark := undecided(choice.gain, len(self.tools.split(self.point.seed).pool) - len(state.picked)):
            progress.message(f"{self.point.name}: {remark}")
        selected = time.monotonic()
        self.tools.dataset(self.point.seed, [*state.picked, *choice.picks])  # labels lie in the files
        seconds = {"seconds_select": selected - began, "seconds_label": time.monotonic() - selected}
        changes = asdict(choice) | {"seconds": record.seconds | seconds}
        return RoundRecord.model_validate(record.model_dump() | changes)

    def _add(self, record: RoundRecord) -> None:
        config = self.bench.config
        state = self.state.model_copy(update={"rounds": (*self.state.rounds, record)})
        ended = None
        if record.round == config.rounds:
            ended = FINISHED
        elif not record.picks:
            ended = "nothing selected"
        elif config.seconds_per_point is not None and state.seconds > config.seconds_per_point:
            ended = OUT_OF_TIME
        self.state = state.model_copy(update={"ended": ended})
        self.bench.folder.write_state(self.point, self.state, self.tools.split(self.point.seed))

    def _last_potential(self) -> Potential:
        """That of the last complete round; where none is, that of the seed."""
        if self.potential is None:
            last = len(self.state.rounds) - 1
            member = self.point if last > 0 else first_of(self.point)
            try:
                self.potential = Potential.load(self.bench.folder.potential(member, max(last, 0)))
            except InputError as error:
                place = self.bench.folder.of(member)
                hint = f"Or delete {place} and start the sweep again, which makes it anew."
                raise InputError(f"{error} {hint}") from error
        return self.potential


def _trained(
    bench: Bench, group: Group, trainings: Sequence[_Training], number: int, progress: Progress
) -> dict[int, Potential]:
    """The potentials of a round by lane, those that an interrupted round left behind among them."""
    found = {one.lane: kept for one in trainings if (kept := bench.kept(group, one.lane, number)) is not None}
    missing = [one for one in trainings if one.lane not in found]
    for size in sorted({len(one.dataset) for one in missing}):
        same = [one for one in missing if len(one.dataset) == size]
        with _told(bench, same[0], progress) as on_epoch:
            began = time.monotonic()
            train = _alone if group.width == 1 else _side_by_side
            results = train(bench, group, same, number, on_epoch, progress.message)
            seconds = _share(time.monotonic() - began, [results[one.lane][0] for one in same])
        for one in same:
            found[one.lane] = bench.keep(group, one.lane, number, *results[one.lane], seconds, one.dataset)
            checkpoint.discard(bench.folder.unfinished_training(one.member))
    return found


def _share(seconds: float, results: Sequence[TrainingResult]) -> float:
    """Wall time of each of some trainings, which took so long in this process; what came before a kill counts too."""
    return max(seconds, *(result.history[-1].seconds for result in results)) / len(results)


@contextmanager
def _told(bench: Bench, one: _Training, progress: Progress) -> Iterator[Callable[[EpochReport], None]]:
    """A stage of the progress for a training, and those next to it."""
    trainer = bench.system(one.member.system).trainer(one.member.ensemble_size)
    parts = trainer.trainers if isinstance(trainer, CommitteeTrainer) else (trainer,)
    total = sum(part.total_steps(one.dataset, warm=one.start is not None) for part in parts)
    with progress.stage("train", total, unit="steps") as advance:
        reached = reaching(advance)
        yield lambda report: reached(report.step, of=one.member.name, **report.errors)


_Trained = dict[int, tuple[TrainingResult, dict[int, float]]]


def _alone(
    bench: Bench,
    group: Group,
    trainings: Sequence[_Training],
    number: int,
    on_epoch: Callable[[EpochReport], None],
    say: Callable[[str], None],
) -> _Trained:
    """The only training of a group, which goes on where it was interrupted."""
    (one,) = trainings
    tools = bench.of(group)
    begun, references = _beginning(tools, one)
    params = None
    if begun is not None:
        wanted = members_of(tools.settings, one.member.ensemble_size)
        params = params_for(wanted, begun.member_settings, begun.params)
    result = tools.trainer(one.member.ensemble_size).train(
        one.dataset,
        params,
        tools.key(one.member.seed, "train", number),
        reference_energies=references,
        on_epoch=on_epoch,
        say=say,
        weights_key=tools.weights_key(one.member.seed),
        checkpoint=bench.folder.unfinished_training(one.member),
    )
    return {one.lane: (result, references)}


def _side_by_side(
    bench: Bench,
    group: Group,
    trainings: Sequence[_Training],
    number: int,
    on_epoch: Callable[[EpochReport], None],
    say: Callable[[str], None],
) -> _Trained:
    tools = bench.of(group)
    begun, references = {}, {}
    for one in trainings:
        begun[one.lane], references[one.lane] = _beginning(tools, one)
    jobs = {
        one.lane: Job(
            one.dataset,
            tools.key(one.member.seed, "train", number),
            references[one.lane],
            None if (first := begun[one.lane]) is None else first.params,
            tools.weights_key(one.member.seed),
        )
        for one in trainings
    }
    results = tools.train(trainings[0].member.ensemble_size, group.width, jobs, on_epoch, say)
    return {lane: (result, references[lane]) for lane, result in results.items()}


def _beginning(tools: SystemBench, one: _Training) -> tuple[Potential | None, dict[int, float]]:
    """What a training begins with, None where parameters are fresh, and its reference energies."""
    if one.start is not None:
        begun = with_kept_references(one.start, one.dataset, one.met)
        return begun, dict(begun.reference_energies)
    told = tools.trainer(one.member.ensemble_size).ensemble.sees_state
    return None, find_references(one.dataset, tools.pool.species, isolated=tools.isolated, charges=told).energies
