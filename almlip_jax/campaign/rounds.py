"""What the rounds of a campaign share, built once, and which of it each stage is given.

Learner, explorers and selector are made when first needed, with capacities for the largest dataset that the label
budget allows.  What was chosen by measurement (`Rounds.measured`) moves with the state of the campaign, so that a
resumed run computes with the same shapes, and therefore the same bits, as one that was not interrupted.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
from ase import Atoms

from almlip_jax.campaign import stages, teaching
from almlip_jax.campaign.batch import AtomRoom, Chooser, features_of
from almlip_jax.campaign.checks import needed_first
from almlip_jax.campaign.choice import ExplorationInputs
from almlip_jax.campaign.config import ExperimentConfig
from almlip_jax.campaign.cost import PaidLabel, paid_by_teacher, paid_labels
from almlip_jax.campaign.explorers import Explorers
from almlip_jax.campaign.inputs import Inputs
from almlip_jax.campaign.preparation import Source
from almlip_jax.campaign.round import Budget, Round, Trained
from almlip_jax.campaign.rundir import RunDirectory
from almlip_jax.campaign.stages import Results
from almlip_jax.campaign.systems import by_system, dealt_in_batches
from almlip_jax.campaign.teaching import Teacher
from almlip_jax.errors import InputError
from almlip_jax.files import understood, write_json
from almlip_jax.learner import Learner
from almlip_jax.oracles import Labeller
from almlip_jax.origins import Known, Origin, Taught
from almlip_jax.potential import ActiveStructures, Evaluated, Potential
from almlip_jax.progress import Progress
from almlip_jax.structures.io import read_structures
from almlip_jax.structures.packing import BatchShape
from almlip_jax.structures.repeats import geometry_key
from almlip_jax.training import Capacity


class Rounds:
    """Does the stages of any round; no stage is given this.

    Args:
        config: of the campaign.
        run: its directory.
        labeller: its label source with the store.
        measured: sizes that arrays came to in earlier sessions.
        progress: tells the user.
        teacher: where there is one.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        run: RunDirectory,
        labeller: Labeller,
        measured: Mapping[str, Any],
        progress: Progress,
        teacher: Teacher | None = None,
    ) -> None:
        self._teacher = teacher
        self._config = config
        self._run = run
        self._labeller = labeller
        self._known = measured
        self._progress = progress
        self._inputs = Inputs(config, run)
        self._potentials: dict[int, Potential] = {}
        self._trained: tuple[int, Trained] | None = None

    # -- stages -------------------------------------------------------------------------------------------------------

    def make_teacher_frames(self, index: int) -> Results:
        """See `teaching.make_frames`."""
        assert self._teacher is not None
        source = replace(self._source, labeller=self._teacher.driver)
        return teaching.make_frames(self._teacher, source, self._run, self._progress)

    def pretrain(self, index: int) -> Results:
        """See `teaching.pretrain`."""
        self._pretrained = self._pretrain()
        return {}

    def make_initial_set(self, index: int) -> Results:
        """See `stages.make_initial_set`."""
        split, initial = self._inputs.pool_split, self._config.initial
        if not isinstance(initial.from_pool, int) or (initial.from_pool and self._config.system.named):
            write_json(self._run.initial_pool, {"places": list(split.initial)})
        pool = self._inputs.of_pool(split.initial)
        made = self._inputs.generated_to_label
        chosen: list[Atoms] = []
        if (asked := initial.from_teacher) is not None:
            assert self._teacher is not None
            known = () if self._before is None else self._before.typical
            chosen = teaching.first_choice(
                asked,
                self._teacher,
                self._pretrained,
                self._teacher_frames,
                self._config.seed,
                self._progress,
                self._config.system.parts,
                known,
            )
        needed = needed_first(self._config)
        return stages.make_initial_set(initial, self._source, pool, made, self._round(index), chosen, needed=needed)

    def make_test_set(self, index: int) -> Results:
        """See `stages.make_test_set`."""
        pool = self._inputs.of_pool(self._inputs.pool_split.test)
        target = self._config.stopping.target_error
        return stages.make_test_set(self._config.test, self._source, pool, target, self._round(index))

    def train(self, index: int) -> Results:
        """See `stages.train`."""
        return {"dataset_size": self._keep(index, self._train(index)).metadata["dataset_size"]}

    def train_final(self, index: int) -> Results:
        """Trains the final potential on the dataset of the last round, with a length of its own."""
        self._train(index, final=True)
        return {}

    def evaluate(self, index: int) -> Results:
        """See `stages.evaluate`."""
        here = self._round(index)
        return stages.evaluate(self._test, partial(self._potential, index), here.folder, self._progress)

    def evaluate_final(self, index: int) -> Results:
        """Likewise of the final potential."""
        return stages.evaluate(self._test, partial(self._final, index), self._run.final, self._progress)

    def explore(self, index: int, budget: Budget, under_way: int | None) -> Results:
        """Finds candidates, as the kind of exploration does; ``under_way`` is a round that waits for its labels."""
        waiting = self._asked_by(under_way)
        given = ExplorationInputs(
            here=self._round(index),
            trained=self._judge(index),
            inputs=self._inputs,
            withheld=self._withheld.union(geometry_key(frame) for frame in waiting),
            explorers=self._explorers,
            budget=budget,
            under_way=waiting,
            held_out=self._inputs.held_out,
        )
        return self._config.exploration.stage(given)

    def select(self, index: int, budget: Budget, under_way: int | None) -> Results:
        """See `stages.select`; ``under_way`` is a round that waits for its labels."""
        fixed = bool(self._config.exploration.pool_files)
        trained, here, compare = partial(self._judge, index), self._round(index), None
        if self._config.selection.selector.asks_teacher:
            compare = partial(self._compared, here)
        return stages.select(
            self._chooser,
            here,
            trained,
            partial(self._paid, self.identities(under_way)),
            budget,
            fixed=fixed,
            shares=self._config.system.parts,
            compare=compare,
            under_way=self._asked_by(under_way),
        )

    def _compared(
        self, here: Round, frames: Sequence[Atoms], evaluated: Evaluated, potential: Potential
    ) -> Mapping[str, np.ndarray]:
        """See `teaching.compared`."""
        assert self._teacher is not None and isinstance(self._learner.start, Taught)
        return teaching.compared(self._teacher, self._learner.start, frames, evaluated, potential, here)

    def _paid(self, without: Collection[str]) -> list[PaidLabel]:
        """Labels whose times say what others cost; those of a teacher tell how costs grow where none was paid."""
        paid = paid_labels(self._labeller.store, without)
        if not paid and self._teacher is not None:
            return paid_by_teacher(self._teacher.labeller.store)
        return paid

    def label(self, index: int, due: Sequence[int], *, insist: bool) -> dict[int, int]:
        """See `stages.label`; ``due`` are the rounds whose labels are waited for."""
        asked = [self._asking(one) for one in due]
        return stages.label(self._labeller, self._round(index), asked, self._inputs.remarks, insist=insist)

    def begin_labels(self, index: int) -> None:
        """Has what a round asked for labelled while the campaign goes on."""
        asked = self._asking(index)
        if (told := self._labeller.begin(asked.frames, asked.notes)) is not None:
            self._progress.message(told)

    def identities(self, index: int | None) -> frozenset[str]:
        """Identities of the labels that a round asked for; none where there is no round."""
        return frozenset(self._labeller.identity(frame) for frame in self._asked_by(index))

    def _asked_by(self, index: int | None) -> list[Atoms]:
        return [] if index is None else self._asking(index).frames

    def _asking(self, index: int) -> stages.Asked:
        selector, monitor = self._config.selection.selector.kind, self._config.stopping.monitor
        return stages.asked(selector, monitor, self._round(index))

    # -- what they are given ------------------------------------------------------------------------------------------

    def _round(self, index: int) -> Round:
        types = self._config.system.types
        return Round(self._run, index, self._config.name, self._config.seed, self._progress, types)

    @cached_property
    def _source(self) -> Source:
        return Source(
            geometries=self._inputs.geometries,
            system=self._config.system,
            labeller=self._labeller,
            seed=self._config.seed,
            provenance={"campaign": self._config.name},
            say=self._progress.message,
            remarks=self._inputs.remarks,
        )

    @cached_property
    def _test(self) -> list[Atoms]:
        """The test set; none where the config asks for none."""
        return read_structures(self._run.test, require_labels=True) if self._run.test.exists() else []

    @cached_property
    def _withheld(self) -> frozenset[bytes]:
        """What identifies the structures of the test set."""
        return frozenset(geometry_key(atoms) for atoms in self._test)

    @cached_property
    def _largest(self) -> int:
        """Structures that a dataset can have at most: the initial ones and what rounds and budget allow."""
        stopping = self._config.stopping
        more = stopping.max_rounds * self._config.selection.batch
        if stopping.max_labels is not None:
            more = min(more, stopping.max_labels)
        return len(self._round(0).dataset()) + more

    @property
    def _of_trainings(self) -> dict[str, Any]:
        """What all trainings have in common, as `Learner` takes it."""
        config = self._config
        return {
            "model": config.model,
            "ensemble": config.ensemble,
            "seed": config.seed,
            "species": self._inputs.species,
            "precision": config.precision,
            "say": self._progress.message,
        }

    @cached_property
    def _learner(self) -> Learner:
        config, inputs = self._config, self._inputs
        start: Potential | Origin | None = inputs.start
        training, asked = config.training, self._of_trainings
        if config.teacher is not None:
            frames, before = self._teacher_frames, self._before
            start = teaching.taught(self._pretrained, frames, config.teacher, config.seed, before)
            training = config.teacher.tuning.of(training)
            if config.teacher.correction is not None:  # model and members are those of the potential that is corrected
                asked |= {"model": None, "ensemble": None}
        with understood(self._run.state):
            known = _capacity_from(self._known.get("training"))
        return Learner(
            self._largest,
            typical=[*self._round(0).dataset(), *inputs.geometries, *inputs.pool, *inputs.listed],
            training=training,
            isolated=inputs.isolated,
            capacity=known,
            start=start,
            mean_atoms=self._mean_atoms,
            most_atoms=self._most_atoms,
            **asked,
        )

    @property
    def _mean_atoms(self) -> float:
        """Of a structure of the largest dataset, where named systems share batches; 0 where there are none.

        Those of a fixed pool are all among the typical structures.
        """
        shares, inputs = self._config.system.parts, self._inputs
        if not shares or inputs.pool:
            return 0.0
        first = self._round(0).dataset()
        found = by_system([*first, *inputs.geometries, *inputs.listed], [*shares])
        dealt = dealt_in_batches(shares, self._config.selection.batch, self._largest - len(first))
        atoms = sum(number * max(map(len, found[name])) for name, number in dealt.items())
        return (sum(map(len, first)) + atoms) / self._largest

    @property
    def _most_atoms(self) -> int:
        """Of the largest dataset together: where the largest structures that there are take all batches.

        Those of a fixed pool once each; of others one may be chosen as large as a start again and again.
        """
        inputs, first = self._inputs, self._round(0).dataset()
        more, there = self._largest - len(first), sum(map(len, first))
        if inputs.pool:
            return there + sum(sorted((len(inputs.pool[n]) for n in inputs.pool_split.rest), reverse=True)[:more])
        return there + more * max(map(len, [*first, *inputs.geometries, *inputs.listed]), default=0)

    @cached_property
    def _teacher_frames(self) -> list[Atoms]:
        """Structures with the teacher's labels."""
        return read_structures(self._run.teacher.frames, require_labels=True)

    @cached_property
    def _pretrained(self) -> Potential:
        """What learned from the teacher; where its checkpoint is damaged it is trained again."""
        try:
            return Potential.load(self._run.teacher.potential)
        except InputError as error:
            self._progress.message(f"{error} The ensemble learns from the teacher's frames again.")
            return self._pretrain()

    @cached_property
    def _before(self) -> Known | None:
        """The potential of the oracle that learns from a teacher, where there is one."""
        start = self._inputs.start
        return None if start is None else Known(start, bool(self._config.training.replay))

    def _pretrain(self) -> Potential:
        config = self._config
        assert config.teacher is not None
        training = config.teacher.training.of(config.training)
        isolated, start = self._inputs.isolated, self._inputs.start
        if self._before is not None:
            isolated = self._before.isolated(isolated)
        learner = teaching.learner_of_teacher(
            self._teacher_frames, isolated, start, training=training, **self._of_trainings
        )
        return teaching.pretrain(learner, self._run, config.name, self._progress)

    @cached_property
    def _explorers(self) -> Explorers:
        return Explorers(self._inputs, self._largest, self._config.precision, self._known)

    @cached_property
    def _chooser(self) -> Chooser:
        selection, inputs, rest = self._config.selection, self._inputs, self._inputs.pool_split.rest
        most = self._config.exploration.most_candidates(len(rest))
        fixed, first = [len(inputs.pool[index]) for index in rest], self._round(0).dataset()
        given = [len(frame) for frame in [*first, *inputs.geometries, *inputs.listed]]
        if fixed:
            more = AtomRoom.of(fixed, self._largest - len(first), each_once=True)
            total = more.atoms + sum(len(frame) for frame in first)
            among, around = AtomRoom.of(fixed, most, each_once=True), AtomRoom(total, max(*given, more.largest))
        else:
            among, around = (AtomRoom.of(given, number, each_once=False) for number in (most, self._largest))
        return Chooser(selection.selector, selection.batch, most, self._largest, among, around)

    @property
    def measured(self) -> dict[str, Any]:
        """Sizes that arrays have come to, by what holds them; of what nobody has needed yet, in earlier sessions."""
        built = vars(self)
        explorers = built["_explorers"].measured if "_explorers" in built else {}
        capacity = built["_learner"].capacity if "_learner" in built else None
        return {**self._known, **explorers} | ({} if capacity is None else {"training": asdict(capacity)})

    # -- potentials ---------------------------------------------------------------------------------------------------

    def _judge(self, index: int) -> Trained:
        """The potential of a round with the evaluations of its stages, until another round has one."""
        if self._trained is None or self._trained[0] != index:
            features = features_of(self._config.selection.selector, self._config.seed)
            self._trained = index, Trained(self._potential(index), features, self._config.stopping.monitor)
        return self._trained[1]

    def _potential(self, index: int) -> Potential:
        """The potential of a round; where its checkpoint is damaged it is trained again, which gives the same one."""
        if index in self._potentials:
            return self._potentials[index]
        try:
            return self._keep(index, Potential.load(self._run.round(index).potential))
        except InputError as error:
            self._progress.message(f"{error} The potential of round {index} is trained again from its dataset.")
            return self._keep(index, self._train(index))

    def _final(self, index: int) -> Potential:
        """The final potential, likewise."""
        folder = self._run.final
        try:
            return Potential.load(folder.potential)
        except InputError as error:
            self._progress.message(f"{error} The final potential is trained again.")
            self.train_final(index)
            return Potential.load(folder.potential)

    def _train(self, index: int, *, final: bool = False) -> Potential:
        """Where starts are warm, the final training goes on from its round's potential, others from that before."""
        before, earlier = index if final else index - 1, None
        if self._config.training.warm_start and before >= 0:
            earlier = self._learner.earlier(self._potential(before), self._round(before).dataset())
        spanned = self._config.spanned
        return stages.train(
            self._learner,
            self._round(index),
            earlier,
            know=self._config.know_training_set,
            final=final,
            spanned=spanned,
            standing=None if spanned is None else self._standing(before),
        )

    def _standing(self, index: int) -> ActiveStructures | None:
        """The active set of a round; before the first, of the potential that the campaign begins with."""
        before = self._potential(index) if index >= 0 else self._inputs.start
        return None if before is None else before.active_set

    def _keep(self, index: int, potential: Potential) -> Potential:
        """Remembers a potential, and forgets those that are no longer needed."""
        self._potentials = {n: one for n, one in self._potentials.items() if n >= index - 1} | {index: potential}
        return potential


def _capacity_from(measured: Mapping[str, Any] | None) -> Capacity | None:
    if measured is None:
        return None
    return Capacity(**{**measured, "batch": BatchShape(**measured["batch"])})
