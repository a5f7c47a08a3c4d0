"""Labelling: requests in, labels in the order of the requests out; run here, in local processes, or on a cluster.

The order of events makes it durable: rows for all requests are written, calculations start, each result lands in the
spool, then in the store.  A run killed anywhere finds on its return what was paid for and asks only for the rest.
"""

from __future__ import annotations

import contextlib
import os
import queue
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, Self

from ase import Atoms
from pydantic import Field

from almlip_jax.cluster import ExecutorSettings
from almlip_jax.errors import InputError
from almlip_jax.oracles.base import Delivery, Label, PendingLabels, SourceSettings, bare
from almlip_jax.oracles.identity import identifier
from almlip_jax.oracles.processes import WorkerProcess, as_finished, ask_patiently, end_leftovers
from almlip_jax.oracles.scratch import remove_left_behind
from almlip_jax.oracles.spool import at_work_elsewhere
from almlip_jax.oracles.store import LabelStore
from almlip_jax.oracles.underway import Underway, label_of
from almlip_jax.oracles.worker import Context, LabelTask, Task

_LOOK_SECONDS = 0.1  # between looks at labels that others calculate
_FLUSH_SECONDS = 0.5  # finished labels wait at most this long (in the spool) for their transaction


class LocalSettings(ExecutorSettings):
    """Labels are calculated in processes on this machine."""

    may_be_idle: ClassVar[bool] = True

    kind: Literal["local"] = "local"

    workers: int | None = Field(default=None, ge=1, le=4096)
    """Number of processes; by default as many as there are cores."""

    threads_per_worker: int = Field(default=1, ge=1, le=4096)
    """Threads of the label source in each process; only with 1 do labels come out the same to the last bit."""

    @property
    def threads(self) -> int:
        """As given."""
        return self.threads_per_worker

    def backend(self, oracle: SourceSettings, spool: Path) -> Backend:
        """Worker processes."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return ProcessBackend(oracle, spool, self.workers or max(cores // self.threads, 1), self.threads)


@dataclass(frozen=True)
class LabelResult:
    """What became of one request.

    Attributes:
        atoms: the requested structure with its label in a `SinglePointCalculator`, or None where the label failed.
        error: why it failed, or None.
        identity: of the label.
        cached: whether the label was in the store before this request.
        seconds: that its calculation took.
    """

    atoms: Atoms | None
    error: str | None
    identity: str
    cached: bool
    seconds: float


class Backend(Protocol):
    """Runs tasks somewhere, each in a process that it may crash."""

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[int, Any]]:
        """Numbers of tasks with their outcomes, as they finish."""
        ...

    def prepare(self) -> None:
        """Builds the label source, if that does not take a job."""
        ...

    def close(self) -> None:
        """Ends everything that still runs."""
        ...


class InlineBackend:
    """Runs tasks in this very process; for sources that only look labels up."""

    def __init__(self, oracle: SourceSettings) -> None:
        self._context = Context(oracle, oracle.build(), spool=None)

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[int, Any]]:
        """Numbers of tasks with their outcomes."""
        for n, task in enumerate(tasks):
            yield n, task.run(self._context)

    def prepare(self) -> None:
        """Does nothing: the source is built."""

    def close(self) -> None:
        """Does nothing."""


class ProcessBackend:
    """Runs tasks in local worker processes, which are started when needed and kept."""

    def __init__(self, oracle: SourceSettings, spool: Path, workers: int, threads: int) -> None:
        end_leftovers(spool)
        remove_left_behind(oracle.files_below())
        self._attempts = oracle.attempts
        self._workers = [WorkerProcess(oracle, spool, threads, oracle.bound_to()) for _ in range(workers)]
        self._idle: queue.LifoQueue[WorkerProcess] = queue.LifoQueue()
        for worker in reversed(self._workers):
            self._idle.put(worker)
        # One thread waits for each worker; all work is done in the workers.
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="label")

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[int, Any]]:
        """Numbers of tasks with their outcomes, as they finish."""
        futures = {self._threads.submit(self._ask, task): n for n, task in enumerate(tasks)}
        try:
            for n, future in as_finished(futures):
                yield n, future.result()
        finally:
            for future in futures:
                future.cancel()

    def prepare(self) -> None:
        """Starts the worker that will be asked first."""
        self._workers[0].start()

    def close(self) -> None:
        """Ends all workers."""
        for worker in self._workers:
            worker.stop()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for worker in self._workers:
            worker.close()

    def _ask(self, task: Task) -> Any:
        worker = self._idle.get()
        try:
            return ask_patiently(worker, task, self._attempts)
        finally:
            self._idle.put(worker)


def build_backend(oracle: SourceSettings, executor: ExecutorSettings, spool: Path) -> Backend:
    """What runs label tasks: this process for a source that only looks labels up, otherwise what the executor says.

    Raises:
        InputError: the executor says a place that there is not.
    """
    return InlineBackend(oracle) if oracle.in_process else executor.backend(oracle, spool)


Provenance = Mapping[str, Any]
"""Why a label is asked for: ``purpose`` (initial, train, test, ...), and what else may be of interest."""


class Labeller:
    """Labels structures with one label source into one store; a context manager that keeps its workers alive.

    Args:
        oracle: settings of the label source.
        store: the open label store.
        executor: where to calculate; local processes by default.
    """

    def __init__(self, oracle: SourceSettings, store: LabelStore, executor: ExecutorSettings | None = None) -> None:
        self.oracle = oracle
        self.store = store
        self.identity = identifier(oracle)
        self._executor = executor or LocalSettings()
        self._backend: Backend | None = None
        self._underway: Underway | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends all workers; labels that were begun and are not there yet are given up."""
        self._underway = None
        if self._backend is not None:
            self._backend.close()
            self._backend = None

    @property
    def backend(self) -> Backend:
        """Where tasks run; made when first needed."""
        if self._backend is None:
            self._backend = build_backend(self.oracle, self._executor, self.store.spool.resolve())
        return self._backend

    def prepare(self) -> None:
        """Lets a label source that cannot be used say so before anything else is done; on a cluster its jobs do.

        Raises:
            InputError: the label source cannot be used, or what was made elsewhere cannot be read.
        """
        if self.oracle.delivery() is None:
            self.backend.prepare()

    def begin(self, structures: Sequence[Atoms], provenance: Provenance | Sequence[Provenance]) -> str | None:
        """Has structures labelled while the caller does something else; `label` of the same ones waits for them.

        Returns:
            what is to be done elsewhere, where labels are made there; None where they are calculated.

        Raises:
            InputError: what was made elsewhere cannot be read.
            StorageError: what was asked for cannot be stored.
        """
        for _ in self._awaited():  # those that were begun before come first
            pass
        _, wanted = self._asked(structures, provenance)
        if not wanted:
            return None
        delivery = self.oracle.delivery()
        if delivery is not None:
            try:
                for _ in self._fetch(delivery, wanted):
                    pass
            except PendingLabels as pending:
                return str(pending)
            return None
        elsewhere, wanted = self._left(wanted)
        tasks = [LabelTask(bare(atoms), identity) for identity, atoms in wanted.items() if identity not in elsewhere]
        if tasks:
            self._underway = Underway(self.backend.run(tasks), tasks, self.store.path, self.store.spool)
        return None

    def land(self) -> None:
        """Stores what has arrived of the labels that were begun, without waiting for more.

        Raises:
            InputError: the label source cannot be used.
            StorageError: labels cannot be stored.
        """
        if self._underway is None:
            return
        self.store.land(self._underway.arrived())
        try:
            if self._underway.ended():
                self._underway = None
        except BaseException:
            self._underway = None
            raise

    def label(
        self,
        structures: Sequence[Atoms],
        provenance: Provenance | Sequence[Provenance],
        on_label: Callable[[LabelResult], object] | None = None,
        *,
        retry: bool = False,
    ) -> list[LabelResult]:
        """Labels structures; those in the store already, and repeats among them, cost nothing.

        Args:
            structures: what to label.
            provenance: of each structure, or one for all; must hold ``purpose``.
            on_label: called for each new label as it arrives, in the order of arrival.
            retry: whether labels that have failed earlier are asked for again; otherwise they are failed.

        Returns:
            one result for each structure, in order; failed labels are results too.

        Raises:
            InputError: the label source cannot be used.
            StorageError: labels cannot be stored.
            PendingLabels: an external label source has not delivered; what it has delivered is stored.
        """
        if retry:
            self.store.reopen_failed([self.identity(atoms) for atoms in structures])
        identities, wanted = self._asked(structures, provenance)
        fresh = set(wanted)

        def result(identity: str, atoms: Atoms, label: Label) -> LabelResult:
            labelled = None if label.error is not None else label.attach(atoms)
            return LabelResult(labelled, label.error, identity, identity not in fresh, label.seconds)

        with contextlib.closing(self._obtain(wanted)) as arrivals:
            for label in arrivals:
                if on_label is not None:
                    on_label(result(label.identity, wanted[label.identity], label))
        labels = {identity: self.store.stored(identity).label for identity in dict.fromkeys(identities)}
        return [result(i, atoms, labels[i]) for i, atoms in zip(identities, structures, strict=True)]

    def _asked(
        self, structures: Sequence[Atoms], provenance: Provenance | Sequence[Provenance]
    ) -> tuple[list[str], dict[str, Atoms]]:
        """Identities of all structures, and the structures that have no label yet; rows for these are written."""
        given = [provenance] * len(structures) if isinstance(provenance, Mapping) else list(provenance)
        if len(given) != len(structures):
            raise InputError(f"{len(structures)} structures came with the provenance of {len(given)}; give one each.")
        identities = [self.identity(atoms) for atoms in structures]
        wanted = {i: a for i, a in zip(identities, structures, strict=True) if i not in self.store}
        self.store.intend(list(zip(identities, structures, given, strict=True)))
        return identities, wanted

    def _obtain(self, wanted: Mapping[str, Atoms]) -> Generator[Label, None, None]:
        yield from (label for label in self._awaited() if label.identity in wanted)
        wanted = {identity: atoms for identity, atoms in wanted.items() if identity not in self.store}
        delivery = self.oracle.delivery() if wanted else None
        if delivery is not None:
            yield from self._fetch(delivery, wanted)
        elif wanted:
            yield from self._calculate(wanted)

    def _awaited(self) -> Iterator[Label]:
        """The labels that were begun, as they arrive."""
        underway, self._underway = self._underway, None
        if underway is not None:
            yield from self._landing(iter(underway))

    def _fetch(self, delivery: Delivery, wanted: Mapping[str, Atoms]) -> Iterator[Label]:
        found = [delivery.label(identity, atoms) for identity, atoms in wanted.items()]
        arrived = [label for label in found if label is not None]
        self.store.land(arrived)
        yield from arrived
        missing = [(identity, atoms) for identity, atoms in wanted.items() if identity not in self.store]
        if missing:
            known = (row.atoms for failed in (False, True) for row in self.store.labelled(failed=failed))
            raise delivery.request(missing, known)

    def _left(self, wanted: Mapping[str, Atoms]) -> tuple[dict[str, int], dict[str, Atoms]]:
        """What workers of a killed program are still at, and what of the labels wanted is in no spool and no store."""
        elsewhere = at_work_elsewhere(self.store.spool)
        for identity in wanted:
            if identity not in elsewhere:  # one of them may have finished since the store was opened
                self.store.take_in(identity)
        return elsewhere, {identity: atoms for identity, atoms in wanted.items() if identity not in self.store}

    def _calculate(self, wanted: Mapping[str, Atoms]) -> Iterator[Label]:
        """The labels wanted, as they arrive; what workers of a killed program are still at is waited for."""
        elsewhere, left = self._left(wanted)
        yield from (self.store.stored(identity).label for identity in wanted if identity not in left)
        left_at = {identity: atoms for identity, atoms in left.items() if identity in elsewhere}
        yield from self._run({i: a for i, a in left.items() if i not in left_at})
        for identity in left_at:
            label = self._await(identity)
            if label is not None:
                yield label
        yield from self._run({i: a for i, a in left_at.items() if i not in self.store})

    def _await(self, identity: str) -> Label | None:
        """The label that a worker of a killed program is calculating; None where that ended without one."""
        while identity in at_work_elsewhere(self.store.spool):
            time.sleep(_LOOK_SECONDS)
        return self.store.take_in(identity)

    def _run(self, wanted: Mapping[str, Atoms]) -> Iterator[Label]:
        if not wanted:
            return
        tasks = [LabelTask(bare(atoms), identity) for identity, atoms in wanted.items()]
        outcomes = self.backend.run(tasks)
        yield from self._landing(label_of(outcome, tasks[n], self.store.path) for n, outcome in outcomes)

    def _landing(self, labels: Iterator[Label]) -> Iterator[Label]:
        """The same labels, which go into the store as they arrive."""
        arrived: list[Label] = []
        flushed = time.monotonic()
        try:
            for label in labels:
                arrived.append(label)
                if time.monotonic() - flushed > _FLUSH_SECONDS:
                    self.store.land(arrived)
                    arrived, flushed = [], time.monotonic()
                yield label
        finally:
            self.store.land(arrived)


def label_structures(
    structures: Sequence[Atoms],
    oracle: SourceSettings,
    store: LabelStore,
    *,
    executor: ExecutorSettings | None = None,
    provenance: Provenance | Sequence[Provenance],
    on_label: Callable[[LabelResult], object] | None = None,
    retry: bool = False,
) -> list[LabelResult]:
    """Labels structures once, as `Labeller.label`, with workers that live for this call only."""
    with Labeller(oracle, store, executor) as labeller:
        return labeller.label(structures, provenance, on_label, retry=retry)
