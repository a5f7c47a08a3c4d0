"""Labels that are calculated elsewhere, as on a cluster: the same tasks in its workers.

Each worker keeps one label worker process of its own, so that time limits and crashes are dealt with as they
are locally.  Where the run directory is on a file system that the nodes share, results land in its spool too, and
survive the end of the program that asked for them.
"""

from __future__ import annotations

import functools
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from almlip_jax.cluster import RemoteSettings
from almlip_jax.errors import InputError
from almlip_jax.oracles.base import SourceSettings
from almlip_jax.oracles.processes import WorkerProcess, as_finished, ask_patiently
from almlip_jax.oracles.scratch import remove_left_behind
from almlip_jax.oracles.worker import Failure, Task
from almlip_jax.targets import adopt, targets


class ClusterBackend:
    """Runs tasks as calls.

    Args:
        oracle: settings of the label source.
        executor: where they are called.
        spool: folder for results on their way; files of the executor's own go there too.

    Raises:
        InputError: as `RemoteSettings.calls`.
    """

    def __init__(self, oracle: SourceSettings, executor: RemoteSettings, spool: Path) -> None:
        self._arguments = (pickle.dumps((targets(), oracle, oracle.bound_to())), str(spool), executor.threads)
        self._calls = executor.calls(spool, whole_nodes=False, retries=2)

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[int, Any]]:
        """Numbers of tasks with their outcomes, as they finish; a task that the cluster lost is a `Failure`.

        Raises:
            InputError: the label source cannot be used, or no jobs can be had.
        """
        calls = {self._calls.call(run_isolated, *self._arguments, task): n for n, task in enumerate(tasks)}
        for n, call in as_finished(calls):
            try:
                yield n, self._calls.outcome(call)
            except InputError:
                raise
            except Exception as error:  # whatever is said when nodes or workers are gone
                yield n, Failure(f"lost on the cluster ({type(error).__name__}: {error})")

    def prepare(self) -> None:
        """Does nothing: a job may wait for long."""

    def close(self) -> None:
        """Ends the workers."""
        self._calls.close()


@functools.cache
def _worker(source: bytes, spool: str, threads: int) -> tuple[WorkerProcess, int]:
    known, oracle, bound_to = pickle.loads(source)
    adopt(known)
    remove_left_behind(oracle.files_below())
    return WorkerProcess(oracle, Path(spool), threads, bound_to), oracle.attempts


def run_isolated(source: bytes, spool: str, threads: int, task: Task) -> Any:
    """Runs a task in the label worker that belongs to this process; what a worker elsewhere is called with.

    Args:
        source: the targets that there are, settings of the label source and what its labels are bound to, pickled.
        spool: folder for results on their way.
        threads: of the label source.
        task: what to run.
    """
    worker, attempts = _worker(source, spool, threads)
    return ask_patiently(worker, task, attempts)
