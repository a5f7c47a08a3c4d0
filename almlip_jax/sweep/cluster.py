"""A sweep on a cluster: its groups are calls in jobs, whose workers write to the folder that all machines see.

A job that dies costs the round it was at: its group is called again, and goes on from the states on the disk.
"""

from __future__ import annotations

import functools
import socket
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import Any

from almlip_jax.cluster import RemoteSettings, WorkerGone
from almlip_jax.errors import InputError
from almlip_jax.sweep.bench import Bench
from almlip_jax.sweep.course import rounds_left
from almlip_jax.sweep.points import Group, Point
from almlip_jax.sweep.records import SweepDirectory
from almlip_jax.sweep.worker import open_bench, work_at

LOOK_SECONDS = 5.0
"""Seconds between two looks at the states of the points."""

PATIENCE_SECONDS = 60.0
"""Seconds after which, at the latest, other machines see what one has written on a network file system."""

DEATHS = 3
"""Number of jobs that may die in one round of a group before the sweep gives up."""


@dataclass
class _Standing:
    """Where a group stands.

    Attributes:
        left: rounds to come, at most.
        written: when the states of its points were.
        deaths: jobs that died since its last complete round.
    """

    left: int
    written: tuple[int | None, ...]
    deaths: int = 0


class ClusterCrew:
    """Workers in jobs, one on each node or for each of its accelerators; a context manager that ends them.

    Args:
        bench: of the sweep, whose folder the caller has locked.
        executor: of the cluster, or of whatever else calls functions.
        tell: is told what the user should know.

    Raises:
        InputError: as `RemoteSettings.calls`.
    """

    def __init__(self, bench: Bench, executor: RemoteSettings, tell: Callable[[str], None]) -> None:
        self._bench = bench
        self._tell = tell
        # Parsl submits jobs through subprocesses: between a fork and its exec nothing of jax runs
        warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)
        folder = bench.folder.path.resolve()
        self._arguments = (bench.config.model_dump_json(), str(folder), bench.folder.lock_owner())
        self._calls = executor.calls(folder, whole_nodes=True, retries=0)

    def __enter__(self) -> ClusterCrew:
        return self

    def __exit__(self, *_: object) -> None:
        self._calls.close()

    def work(self, groups: Sequence[Group], on_rounds: Callable[[int], None]) -> None:
        """Runs all groups; comes back when every one is done.

        Args:
            groups: in the order in which they begin.
            on_rounds: told how many rounds of groups have become complete.

        Raises:
            InputError: what a group met, jobs that cannot be had or die again and again, or a folder that nodes do not
                share with this machine.
        """
        standings = {group: _Standing(rounds_left(self._bench, group), self._written(group)) for group in groups}
        calls = {self._call(group): group for group in groups}
        while calls:
            ended, _ = wait(calls, LOOK_SECONDS, FIRST_COMPLETED)
            if rounds := sum(self._new_rounds(group, standings[group]) for group in calls.values()):
                on_rounds(rounds)
            for call in ended:
                group = calls.pop(call)
                if not self._is_done(call, group, standings[group]):
                    calls[self._call(group)] = group
                elif left := standings[group].left:  # not seen before, or spared by an early end
                    on_rounds(left)

    def _call(self, group: Group) -> Future[Any]:
        return self._calls.call(run_group, *self._arguments, group)

    def _written(self, group: Group) -> tuple[int | None, ...]:
        return tuple(self._bench.folder.written(group.members[lane]) for lane in group.wanted)

    def _new_rounds(self, group: Group, standing: _Standing) -> int:
        """Rounds that have become complete since the last look."""
        if (written := self._written(group)) == standing.written:
            return 0
        before, standing.left = standing.left, rounds_left(self._bench, group)
        standing.written = written
        if standing.left < before:
            standing.deaths = 0
        return before - standing.left

    def _is_done(self, call: Future[Any], group: Group, standing: _Standing) -> bool:
        """Whether a group whose call has ended is done; otherwise it needs another one."""
        name = group.members[group.wanted[0]].name
        try:
            error = self._calls.outcome(call)
        except InputError:
            raise
        except WorkerGone as gone:
            standing.deaths += 1
            if standing.deaths == DEATHS:
                raise InputError(
                    f"{DEATHS} jobs died in the same round of {name} ({gone}); give them more time or memory, the same "
                    "command goes on."
                ) from gone
            self._tell(f"{name} goes on in another job from its last complete round ({gone})")
            return False
        except Exception as failed:  # whatever keeps a node from calling the function
            reason = " ".join(str(failed).split())
            raise InputError(
                f"nodes cannot work on the sweep ({type(failed).__name__}: {reason}); correct the executor, its "
                "worker_init above all."
            ) from failed
        if error is not None:
            raise error
        if isinstance(group.members[0], Point) and not _comes_true(lambda: rounds_left(self._bench, group) == 0):
            raise InputError(
                f"what a node wrote to {self._bench.folder.path} is not seen here; the sweep needs a file system that "
                "all machines share."
            )
        return True


def run_group(config: str, folder: str, owner: dict[str, Any], group: Group) -> Exception | None:
    """Runs a group; what a worker of a job is called with.

    Args:
        config: of the sweep as JSON, its folder known.
        folder: of the sweep.
        owner: who has locked it.
        group: of points, or of what they begin with.

    Returns:
        what it met, or None.
    """
    place, host = SweepDirectory(folder), socket.gethostname()
    if not _comes_true(lambda: place.lock_owner() == owner):
        return InputError(
            f"the node {host} does not see the folder {folder} of the sweep; the sweep needs a file system that all "
            "machines share."
        )

    def on_round() -> None:
        if place.lock_owner() != owner:  # the program was killed, and the sweep may go on elsewhere
            raise InputError(f"{folder} is not locked by the program that sent this group any more.")

    error = work_at(_bench(config, folder), group, on_round)
    return None if error is None else type(error)(f"on the node {host}: {error}")


@functools.cache
def _bench(config: str, folder: str) -> Bench:
    """The bench of this process, which keeps what is compiled."""
    return open_bench(config, folder)


def _comes_true(condition: Callable[[], bool]) -> bool:
    """Whether a condition holds, at the latest when the file system has been waited for."""
    end = time.monotonic() + PATIENCE_SECONDS
    while not (holds := condition()) and time.monotonic() < end:
        time.sleep(min(1.0, PATIENCE_SECONDS))
    return holds
