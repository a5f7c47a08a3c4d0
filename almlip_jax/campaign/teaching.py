"""What a teacher teaches, as stages: its own dynamics, a training on its labels, and the first frames to label."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from almlip_jax.campaign.batch import Looked, choose_shared, features_of, shown
from almlip_jax.campaign.cost import paid_by_teacher
from almlip_jax.campaign.preparation import Source
from almlip_jax.campaign.round import Round
from almlip_jax.campaign.rundir import RunDirectory
from almlip_jax.campaign.stages import Results, trained
from almlip_jax.campaign.teacher import FromTeacherSettings, TeacherSettings
from almlip_jax.delta_learning import Corrected
from almlip_jax.errors import LabelError
from almlip_jax.keys import named_key, numpy_generator
from almlip_jax.learner import Learner
from almlip_jax.oracles import (
    Labeller,
    LabelResult,
    LabelStore,
    MDRun,
    SourceSettings,
    Trajectory,
    evenly,
    is_spent,
    label_within,
    run_label_md,
)
from almlip_jax.origins import Known, Taught, TaughtOn
from almlip_jax.potential import Evaluated, Potential
from almlip_jax.progress import Progress
from almlip_jax.selection import TEACHER_ENERGY, TEACHER_FORCES, TEACHER_SCORES
from almlip_jax.structures.carried import BATH_TEMPERATURE, carried, named, system_of
from almlip_jax.structures.io import read_structures, write_structures
from almlip_jax.structures.species import SpeciesTable
from almlip_jax.training import reference_energies

PURPOSE = "teacher"
"""Of labels of dynamics with a teacher, or with what drives them."""
FRAMES = "frames"
"""Of labels of frames that another source's dynamics gave."""


@dataclass(frozen=True)
class Teacher:
    """A teacher at work: its labels, kept apart from those of the oracle.

    Attributes:
        settings: of the section ``teacher``.
        labeller: its label source with its store.
        driver: what drives its dynamics, with a store of its own; the same where there is no other source.
    """

    settings: TeacherSettings
    labeller: Labeller
    driver: Labeller

    @classmethod
    def open(cls, settings: TeacherSettings, run: RunDirectory) -> Teacher:
        """The teacher of a run directory, whose stores this process writes to."""
        with ExitStack() as opened:

            def labels(source: SourceSettings, path: Path) -> Labeller:
                store = opened.enter_context(LabelStore(path))
                return opened.enter_context(Labeller(source, store, settings.executor))

            labeller = labels(settings.source, run.teacher_labels)
            driver = labeller if settings.driver is None else labels(settings.driver, run.driver_labels)
            opened.pop_all()
        return cls(settings, labeller, driver)

    def close(self) -> None:
        """Ends the workers and closes the stores."""
        for labeller in self._labellers:
            labeller.close()
            labeller.store.close()

    def watch(self, tell: Callable[[], object]) -> None:
        """Calls a function after every transaction of its stores."""
        for labeller in self._labellers:
            labeller.store.watch(tell)

    def reopen_failed(self) -> None:
        """Has failed labels tried again, those of what drives its dynamics too."""
        for labeller in self._labellers:
            labeller.store.reopen_failed()

    @property
    def _labellers(self) -> list[Labeller]:
        """Each once."""
        return [self.labeller] if self.driver is self.labeller else [self.labeller, self.driver]

    @property
    def calls(self) -> int:
        """Calls that the stores know."""
        return sum(labeller.store.count_calls(None) for labeller in self._labellers)

    @property
    def seconds(self) -> float:
        """Their seconds."""
        return sum(entry["seconds"] for one in self._labellers for entry in one.store.summary().values())


def make_frames(teacher: Teacher, source: Source, run: RunDirectory, progress: Progress) -> Results:
    """Dynamics for the teacher at each temperature, whose frames are written with its labels.

    Args:
        teacher: with what drives the dynamics.
        source: start geometries, and the driver in the place of the label source.
        run: the run directory.
        progress: tells the user.

    Raises:
        LabelError: there is no labelled frame.
    """
    source.labeller.prepare()
    planned_runs = teacher.settings.runs(source.geometries)
    runs = [run for own in planned_runs for run in own]
    calls = sum(run.total_steps for run in runs) + sum(map(bool, planned_runs))
    found: list[Trajectory] = []
    with progress.stage("teacher", calls, unit="labels") as advance:
        told = replace(source, advance=advance)
        dynamics = list(zip(source.geometries, planned_runs, strict=True))
        for start, own in dynamics:
            found += _trajectories(told, start, own, dynamics)
    frames = [frame for trajectory in found for frame in trajectory.frames]
    planned = sum(run.steps // run.every for run in runs)
    if any(is_spent(one.seconds, run.seconds) for run, one in zip(runs, found, strict=True)) and len(frames) < planned:
        progress.message(
            f"dynamics for the teacher gave {len(frames)} of {planned} frames, as their share of teacher.seconds "
            f"{teacher.settings.seconds:g} is spent."
        )
    if teacher.driver is not teacher.labeller:
        frames = _labelled(teacher, found, source, progress)
    if not frames:
        raise LabelError(
            "dynamics for the teacher gave no labelled frame. Correct the cause (see the messages above; "
            "teacher.seconds may be too few) and resume: failed labels are tried again."
        )
    write_structures(run.teacher.create().frames, frames)
    return {}


def frame_keys(settings: TeacherSettings, geometries: Sequence[Atoms]) -> list[str]:
    """Keys of `info` that some of the teacher's frames will have; not the step, where another source drives."""
    given = {key for start in geometries for key in carried(start).info}
    return sorted(given | {"origin", BATH_TEMPERATURE} | ({"step"} if settings.driver is None else set()))


def _trajectories(
    source: Source, start: Atoms, runs: Sequence[MDRun], dynamics: Sequence[tuple[Atoms, Sequence[MDRun]]]
) -> list[Trajectory]:
    """The trajectories of a start, among the dynamics of all."""
    found = run_label_md(
        start,
        source.labeller,
        runs,
        seed=source.seed,
        purpose=PURPOSE,
        provenance={**source.provenance, **named(start)},
        on_run=lambda run: source.advance(run.total_steps),
        dynamics=dynamics,
    )
    for run, trajectory in zip(runs, found, strict=True):
        if trajectory.error is not None:
            of = f" of '{name}'" if (name := system_of(start)) is not None else ""
            source.say(f"dynamics for the teacher{of} at {run.temperature:g} K ended early: {trajectory.error}")
        for frame in trajectory.frames:
            frame.info.update(origin=f"teacher-{run.temperature:g}K")
    return found


def _labelled(teacher: Teacher, trajectories: Sequence[Trajectory], source: Source, progress: Progress) -> list[Atoms]:
    """Frames of another source's dynamics with labels of the teacher, without those that it fails at.

    With a budget of seconds as many as the dynamics have left of it, spread evenly over trajectories and time.
    """
    frames = [frame for trajectory in trajectories for frame in trajectory.frames]
    given, seconds = {**source.provenance, "purpose": FRAMES}, teacher.settings.seconds
    order = list(range(len(frames))) if seconds is None else evenly([len(one.frames) for one in trajectories])
    wanted = [carried(frames[place]) for place in order]
    with progress.stage("frames", len(frames), unit="labels") as advance:

        def on_label(_: LabelResult) -> None:
            advance(1)

        if seconds is None:
            results = teacher.labeller.label(wanted, given, on_label)
        else:
            left = seconds - _seconds_of_dynamics(trajectories, source)
            results = label_within(teacher.labeller, wanted, given, left, on_label)
    if len(results) < len(frames):
        progress.message(
            f"the teacher labels {len(results)} of {len(frames)} frames, spread evenly over its dynamics, as "
            f"teacher.seconds {seconds:g} are spent."
        )
    errors = [result.error for result in results if result.atoms is None]
    if errors:
        done = len(results) - len(errors)
        source.say(f"the teacher labels {done} of {len(results)} frames, first failure: {errors[0]}")
    found = []
    for place, result in sorted(zip(order, results, strict=False), key=itemgetter(0)):
        if result.atoms is not None:
            result.atoms.info |= {key: frames[place].info[key] for key in ("origin", BATH_TEMPERATURE)}
            found.append(result.atoms)
    return found


def _seconds_of_dynamics(trajectories: Sequence[Trajectory], source: Source) -> float:
    """What dynamics and their start geometries have taken of what drives them."""
    labeller = source.labeller
    starts = {labeller.identity(start) for start in source.geometries}
    labels = [labeller.store.get(identity) for identity in starts]
    return sum(one.seconds for one in trajectories) + sum(label.seconds for label in labels if label is not None)


def learner_of_teacher(
    frames: Sequence[Atoms], isolated: Mapping[int, float], start: Potential | None = None, **asked: Any
) -> Learner:
    """What learns from a teacher's frames.

    It knows the elements in them (and those of ``start``) alone: features of others would be scaled by structures that
    hold none, and spoil the rounds, which begin with fresh parameters for them.

    Args:
        frames: with its labels.
        isolated: energies of isolated atoms of the oracle: models count energies from isolated atoms of these elements
            here too, from what a fit gives for the teacher.
        start: a potential of the oracle that it begins with; its network is taken as it is, its energies are not.
        asked: model, ensemble, training and the like, as `Learner` takes them.
    """
    met = {int(z) for frame in frames for z in frame.numbers} | (set() if start is None else {*start.species.numbers})
    species = SpeciesTable(tuple(z for z in asked.pop("species").numbers if z in met))
    fitted = reference_energies(frames, species) if isolated else {}
    begun = None if start is None else Taught(start)
    known = {z: fitted[z] for z in isolated if z in met}
    return Learner(len(frames), typical=frames, isolated=known, start=begun, species=species, **asked)


def pretrain(learner: Learner, run: RunDirectory, campaign: str, progress: Progress) -> Potential:
    """Trains the ensemble on the teacher's frames and saves the potential."""
    folder, seed = run.teacher, learner.seed
    frames = read_structures(folder.frames, require_labels=True)
    return trained(
        learner,
        frames,
        learner.beginning(frames, None),
        named_key(seed, "teacher", "train"),
        numpy_generator(seed, "teacher", "replay"),
        folder,
        progress,
        name="pretrain",
        metadata={"campaign": campaign, "teacher": True},
    )


def taught(
    potential: Potential, frames: Sequence[Atoms], settings: TeacherSettings, seed: int, before: Known | None = None
) -> Taught:
    """What trainings of the rounds begin with; frames are taken in an order that is drawn once.

    Args:
        potential: that learned from the teacher.
        frames: with the teacher's labels.
        settings: of the teacher.
        seed: of the campaign.
        before: what the potential was before, where it was one of the oracle.
    """
    if settings.correction is not None:
        return Corrected.of(potential, frames, settings.correction, seed)
    order = numpy_generator(seed, "teacher", "order").permutation(len(frames)) if settings.replay else ()
    again = tuple(frames[n] for n in order)
    if before is None:
        return Taught(potential, again, settings.replay, settings.replay_share)
    return TaughtOn(potential, again, settings.replay, settings.replay_share, before)


def compared(
    teacher: Teacher, known: Taught, frames: Sequence[Atoms], evaluated: Evaluated, potential: Potential, here: Round
) -> dict[str, np.ndarray]:
    """How far the ensemble is from the teacher, which labels all the frames: `TEACHER_SCORES`, [n] each.

    Args:
        teacher: whose labels are kept in its store, so that none is calculated twice.
        known: what it taught.
        frames: candidates.
        evaluated: what the potential of the round says of them.
        potential: of the round.
        here: the round.
    """
    with here.progress.stage("teacher", len(frames), unit="labels") as advance:
        provenance = {**here.provenance, "purpose": "agreement"}
        results = teacher.labeller.label(frames, provenance, on_label=lambda _: advance(1))
    found = {name: np.full(len(frames), np.nan) for name in TEACHER_SCORES}
    there = [n for n, result in enumerate(results) if result.atoms is not None]
    labelled = [result.atoms for result in results if result.atoms is not None]
    aligned = known.aligned(labelled, potential.params, potential.reference_energies)
    for n, frame in zip(there, aligned, strict=True):
        apart = evaluated.forces[n] - frame.get_forces(apply_constraint=False)
        found[TEACHER_FORCES][n] = np.sqrt(np.mean(np.square(apart, dtype=np.float64)))
        found[TEACHER_ENERGY][n] = abs(evaluated.energy[n] - frame.get_potential_energy()) / len(frame)
    if len(there) < len(frames):
        first = next(result.error for result in results if result.atoms is None)
        here.progress.message(f"the teacher labels {len(there)} of {len(frames)} candidates, first failure: {first}")
    return found


def first_choice(
    settings: FromTeacherSettings,
    teacher: Teacher,
    potential: Potential,
    frames: Sequence[Atoms],
    seed: int,
    progress: Progress,
    shares: Mapping[str, float] | None = None,
    known: Sequence[Atoms] = (),
) -> list[Atoms]:
    """The frames of a teacher that are labelled first, without its labels: best first, named systems taking turns.

    Args:
        settings: how many, and how they are chosen.
        teacher: whose times say what labels cost, where the selector weighs by it.
        potential: that learned from the teacher.
        frames: to choose from.
        seed: of the campaign.
        progress: tells the user.
        shares: of named systems among them.
        known: labelled by the oracle already, which the selector sees as such.
    """
    count, paid = min(settings.count, len(frames)), partial(paid_by_teacher, teacher.labeller.store)
    features, shape = features_of(settings.selector, seed), potential.batch_shape([*frames, *known])
    with progress.stage("select", len(frames), unit="structures") as advance:
        evaluated = potential.evaluate(frames, features=features, shape=shape, on_batch=advance)
        around = Looked(known, potential.evaluate(known, features=features, shape=shape)) if known else None
        pair = shown(settings.selector, Looked(frames, evaluated), around, paid=paid)
        selector, key_of = settings.selector.build(count), partial(named_key, seed, "teacher", "select")
        chosen = choose_shared(selector, key_of, frames, pair, shares or {}, count)
    batch = [carried(frames[index]) for index, _ in chosen]
    for frame, (index, _) in zip(batch, chosen, strict=True):
        told = frames[index].info
        frame.info |= {BATH_TEMPERATURE: told[BATH_TEMPERATURE]} if BATH_TEMPERATURE in told else {}
    return batch
