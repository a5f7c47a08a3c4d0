"""Several whole ensembles in one program: seeds, folds, points of a sweep, each with its own data, order and key."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ase import Atoms

from almlip_jax.ensembles import spread_members
from almlip_jax.errors import InputError
from almlip_jax.models import Params
from almlip_jax.structures.packing import BatchPlan
from almlip_jax.training.dataset import TrainingSet
from almlip_jax.training.program import Run, State
from almlip_jax.training.trainer import EpochReport, Trainer, TrainingResult, is_over, report_of


@dataclass(frozen=True)
class Job:
    """One of the trainings.

    Attributes:
        dataset: labelled structures; as many as in every other job.
        key: of this training.
        reference_energies: eV by atomic number, subtracted from the labels.
        params: parameters to start from, or None for fresh ones.
    """

    dataset: Sequence[Atoms]
    key: jax.Array
    reference_energies: dict[int, float]
    params: Params | None = None


@dataclass
class _Course:
    """How far one of the trainings has come."""

    data: TrainingSet
    order: np.random.Generator
    history: list[EpochReport] = field(default_factory=list)
    params: Params | None = None  # what it has ended with


class SideBySideTrainer:
    """Runs trainings of equal shape side by side, each as `Trainer.train` would run it alone, up to rounding.

    On one device this saves what small operations cost beside their arithmetic; on several, the trainings are spread
    over them.

    Args:
        trainer: what they have in common: architecture, capacity, settings.
        fixed: take the program for plans that differ in length also where they do not.  The faster one for those may
            round otherwise; with this one alone, what a training gives does not depend on what runs beside it, only on
            how many there are and on its place among them.
    """

    def __init__(self, trainer: Trainer, *, fixed: bool = False) -> None:
        self.trainer = trainer
        self.fixed = fixed
        segment = trainer.program.segment
        self._even = jax.jit(jax.vmap(segment, in_axes=(0, 0, 0, None)), donate_argnums=(0,))
        # where plans differ in length, a training that is ahead waits in each step, which costs a copy of its state
        self._uneven = jax.jit(jax.vmap(segment, in_axes=(0, 0, 0, 0)), donate_argnums=(0,))

    def train(
        self,
        jobs: Sequence[Job],
        *,
        on_epoch: Callable[[int, EpochReport], None] | None = None,
        steps: int | None = None,
    ) -> list[TrainingResult]:
        """Trains every job.

        Args:
            jobs: with datasets of equal numbers of structures.
            on_epoch: called with the position of a job and its report after each validation.
            steps: length in optimiser steps, in place of that of the settings.

        Raises:
            CapacityError: a dataset does not fit.
            InputError: numbers of structures differ, nothing is labelled, or a loss is not finite from the start.
        """
        counts = {len(job.dataset) for job in jobs}
        if len(counts) != 1:
            raise InputError(f"trainings side by side need datasets of one size, not of {sorted(counts)} structures.")
        total = steps or self.trainer.total_steps(jobs[0].dataset, warm=jobs[0].params is not None)
        courses, state, run = self._prepare(jobs, total)
        began = time.monotonic()
        while any(course.params is None for course in courses):
            segments = [course.data.segment(course.order, self.trainer.settings.validate_every) for course in courses]
            state, raw = self._advance(state, run, segments)
            reports = jax.device_get(raw)
            for n, (course, (_, _, epochs)) in enumerate(zip(courses, segments, strict=True)):
                if course.params is not None:
                    continue
                epoch = epochs + (course.history[-1].epoch if course.history else 0)
                course.history.append(report_of(_nth(reports, n), epoch, total, time.monotonic() - began))
                if is_over(course.history):
                    course.params = jax.device_get(_nth(state.best, n))
                if on_epoch is not None:
                    on_epoch(n, course.history[-1])
        return [TrainingResult(params=course.params, history=tuple(course.history)) for course in courses]

    def _prepare(self, jobs: Sequence[Job], total_steps: int) -> tuple[list[_Course], State, Run]:
        """Every training before its first step, states and data stacked along a new first axis."""
        courses, states, runs = [], [], []
        for job in jobs:
            data = self.trainer.training_set(job.dataset, job.reference_energies)
            init_key, order_key = jax.random.split(job.key)
            courses.append(_Course(data, np.random.default_rng(np.asarray(jax.random.key_data(order_key)))))
            states.append(self.trainer.start(data, job.params, init_key))
            runs.append(self.trainer.prepare(data, total_steps))
        return courses, spread_members(_stacked(states)), spread_members(_stacked(runs))

    def _advance(
        self, state: State, run: Run, segments: Sequence[tuple[BatchPlan, int, int]]
    ) -> tuple[State, dict[str, jax.Array]]:
        plan = jax.tree.map(lambda *x: np.stack(x), *[plan for plan, _, _ in segments])
        lengths = np.array([length for _, length, _ in segments], np.int32)
        if not self.fixed and np.all(lengths == lengths[0]):
            return self._even(state, run, plan, jnp.asarray(lengths[0]))
        return self._uneven(state, run, plan, jnp.asarray(lengths))


def _stacked(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


def _nth(tree: Any, n: int) -> Any:
    return jax.tree.map(lambda x: x[n], tree)
