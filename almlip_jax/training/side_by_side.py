"""Several whole ensembles in one program: seeds, folds, points of a sweep, each with its own data, order and key."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ase import Atoms
from jax.sharding import Mesh

from almlip_jax.ensembles import devices_side_by_side, laid_over
from almlip_jax.errors import InputError
from almlip_jax.models import Params
from almlip_jax.structures.packing import BatchPlan
from almlip_jax.training.dataset import Order, TrainingSet
from almlip_jax.training.program import Run, State, compiled
from almlip_jax.training.trainer import (
    EpochReport,
    Trainer,
    TrainingResult,
    again_key,
    diverged,
    is_over,
    mended_report,
    report_of,
    spread_state,
    weights_key_of,
)


@dataclass(frozen=True)
class Job:
    """One of the trainings.

    Attributes:
        dataset: labelled structures; as many as in every other job.
        key: of this training.
        reference_energies: eV by atomic number, subtracted from the labels.
        params: parameters to start from, or None for fresh ones.
        weights_key: decides the bootstrap weights; see `Trainer.train`.
    """

    dataset: Sequence[Atoms]
    key: jax.Array
    reference_energies: dict[int, float]
    params: Params | None = None
    weights_key: jax.Array | None = None


@dataclass
class _Course:
    """How far one of the trainings has come; its program goes on while others have not ended."""

    data: TrainingSet
    order: Order
    wanted: np.ndarray  # [L] models that it is for
    steps: int = 0
    history: list[EpochReport] = field(default_factory=list)
    params: Params | None = None  # what it has ended with


class _Together(NamedTuple):
    """The trainer of each of a number of trainings, and the devices that share them out."""

    trainer: Trainer
    devices: Mesh


class SideBySideTrainer:
    """Runs trainings of equal shape side by side, each as `Trainer.train` would run it alone, up to rounding.

    Those that a trainer does not stack (`Trainer.stacks`) run one after the other.

    On one device this saves the overhead of small operations.  Several share out the trainings, and where these do not
    fill all of them their members and the structures of their batches too (`ensembles.devices_side_by_side`).

    Args:
        trainer: what they have in common: architecture, capacity, settings.
        fixed: take the program for plans that differ in length also where they do not.  The faster one for those may
            round otherwise; with this one alone, what a training gives does not depend on what runs next to it, only on
            how many there are and on its place among them.

    Raises:
        InputError: the trainer is for labels of two sources.
    """

    def __init__(self, trainer: Trainer, *, fixed: bool = False) -> None:
        if trainer.share is not None:
            raise InputError("trainings side by side see no teacher's frames again; train one after the other.")
        self.trainer = trainer
        self.fixed = fixed
        self._programs: dict[int, _Together] = {}

    def train(
        self,
        jobs: Sequence[Job],
        *,
        on_epoch: Callable[[int, EpochReport], None] | None = None,
        steps: int | None = None,
        say: Callable[[str], None] | None = None,
    ) -> list[TrainingResult]:
        """Trains every job; models that diverged are trained once more, as by `Trainer.train`.

        Args:
            jobs: with datasets of equal numbers of structures.
            on_epoch: called with the position of a job and its report after each validation.
            steps: length in optimiser steps, in place of that of the settings.
            say: is told about models that diverged.

        Raises:
            CapacityError: a dataset does not fit.
            InputError: numbers of structures differ, nothing is labelled, or so many models of a job diverged twice
                that fewer than two are left.
        """
        counts = {len(job.dataset) for job in jobs}
        if len(counts) != 1:
            raise InputError(f"trainings side by side need datasets of one size, not of {sorted(counts)} structures.")
        total = steps or self.trainer.total_steps(jobs[0].dataset, warm=jobs[0].params is not None)
        if not self.trainer.stacks:
            return self._in_turn(jobs, total, on_epoch, say)
        everyone = [np.ones(self.trainer.ensemble.size, bool) for _ in jobs]
        firsts = self._attempt(jobs, total, everyone, on_epoch)
        lost = [diverged(first.history) for first in firsts]
        if not np.any(lost):
            return firsts
        for n, models in enumerate(lost):
            if say is not None and models.any():
                say(f"{self.trainer.named(models)} of training {n} diverged, and is trained once more.")

        def tell_mended(n: int, own: EpochReport) -> None:
            if on_epoch is not None and lost[n].any():
                on_epoch(n, mended_report(firsts[n].history[-1], own, lost[n]))

        # in the same program: whatever had not diverged does the same work once more, and the result is not used
        stream = [weights_key_of(job.key) if job.weights_key is None else job.weights_key for job in jobs]
        others = [replace(job, key=again_key(job.key), weights_key=one) for job, one in zip(jobs, stream, strict=True)]
        seconds = self._attempt(others, total, lost, tell_mended)
        return [
            self.trainer.settled(first, second, say) if models.any() else first
            for first, second, models in zip(firsts, seconds, lost, strict=True)
        ]

    def _in_turn(
        self,
        jobs: Sequence[Job],
        total: int,
        on_epoch: Callable[[int, EpochReport], None] | None,
        say: Callable[[str], None] | None,
    ) -> list[TrainingResult]:
        """One training after the other, each of a job that comes several times once."""
        done: dict[int, TrainingResult] = {}
        for n, job in enumerate(jobs):
            if id(job) in done:
                continue

            def tell(report: EpochReport, n: int = n) -> None:
                if on_epoch is not None:
                    on_epoch(n, report)

            done[id(job)] = self.trainer.train(
                job.dataset,
                job.params,
                job.key,
                reference_energies=job.reference_energies,
                on_epoch=tell,
                steps=total,
                weights_key=job.weights_key,
                say=say,
            )
        return [done[id(job)] for job in jobs]

    def _attempt(
        self,
        jobs: Sequence[Job],
        total: int,
        wanted: Sequence[np.ndarray],
        on_epoch: Callable[[int, EpochReport], None] | None,
    ) -> list[TrainingResult]:
        """One course of every job, until all of their wanted models [L] have ended."""
        courses, state, run = self._prepare(jobs, total, wanted)
        began = time.monotonic()
        while any(course.params is None for course in courses):
            segments = [
                self._cut(course, course.order.segment(course.data, self.trainer.settings.validate_every), total)
                for course in courses
            ]
            state, raw = self._advance(state, run, segments)
            reports = jax.device_get(raw)
            for n, (course, (_, length, epochs)) in enumerate(zip(courses, segments, strict=True)):
                course.steps += length
                if course.params is not None:
                    continue
                epoch = epochs + (course.history[-1].epoch if course.history else 0)
                course.history.append(report_of(_nth(reports, n), epoch, total, time.monotonic() - began))
                if is_over(course.history, course.wanted):
                    course.params = jax.device_get(_nth(state.best, n))
                if on_epoch is not None:
                    on_epoch(n, course.history[-1])
        return [TrainingResult(params=course.params, history=tuple(course.history)) for course in courses]

    @staticmethod
    def _cut(course: _Course, segment: tuple[BatchPlan, int, int], total: int) -> tuple[BatchPlan, int, int]:
        """A plan, its length and its epochs, no longer than what is left of a training."""
        plan, length, epochs = segment
        steps = min(length, total - course.steps)
        return plan, steps, round(epochs * steps / length)

    def _prepare(
        self, jobs: Sequence[Job], total_steps: int, wanted: Sequence[np.ndarray]
    ) -> tuple[list[_Course], State, Run]:
        """Every training before its first step, states and data stacked along a new first axis."""
        own, devices = self._together(len(jobs))
        courses, states, runs = [], [], []
        for job, models in zip(jobs, wanted, strict=True):
            data = own.training_set(job.dataset, job.reference_energies)
            init_key, order_key = jax.random.split(job.key)
            courses.append(_Course(data, own.order(order_key), models))
            states.append(own.start(data, job.params, init_key))
            stream = weights_key_of(job.key) if job.weights_key is None else job.weights_key
            runs.append(own.prepare(data, total_steps, stream))
        return courses, spread_state(_stacked(states), devices), laid_over(_stacked(runs), devices, of_members=False)

    def _together(self, number: int) -> _Together:
        """What that many trainings run on."""
        if number not in self._programs:
            own = self.trainer
            devices = devices_side_by_side(number, own.ensemble.size, own.capacity.batch.structures)
            self._programs[number] = _Together(own.on(devices), devices)
        return self._programs[number]

    def _advance(
        self, state: State, run: Run, segments: Sequence[tuple[BatchPlan, int, int]]
    ) -> tuple[State, dict[str, jax.Array]]:
        plan = jax.tree.map(lambda *x: np.stack(x), *[plan for plan, _, _ in segments])
        lengths = np.array([length for _, length, _ in segments], np.int32)
        programs = compiled(self._together(len(segments)).trainer.program)
        if not self.fixed and np.all(lengths == lengths[0]):
            return programs.even(state, run, plan, jnp.asarray(lengths[0]))
        return programs.uneven(state, run, plan, jnp.asarray(lengths))


def _stacked(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


def _nth(tree: Any, n: int) -> Any:
    return jax.tree.map(lambda x: x[n], tree)
