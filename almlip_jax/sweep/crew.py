"""Processes that work on a sweep: each with a bench and a share of the cores of its own, fed group by group.

A process that loses its parent ends at once, and what it has completed stays: the sweep goes on from there.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from almlip_jax.cluster import SweepExecutorSettings
from almlip_jax.errors import InputError
from almlip_jax.sweep.points import Group

if TYPE_CHECKING:
    from almlip_jax.sweep.bench import Bench
    from almlip_jax.sweep.settings import SweepConfig


class ProcessesSettings(SweepExecutorSettings):
    """Points are worked on in processes on this machine."""

    kind: Literal["local"] = "local"

    processes: int = Field(default=1, ge=1, le=4096)
    """Number of processes, each with its share of the cores."""

    @property
    def in_process(self) -> bool:
        """With one process."""
        return self.processes == 1

    def crew(self, bench: Bench, most: int, tell: Callable[[str], None]) -> Crew:
        """Processes, no more than there are groups at a time."""
        return Crew(bench.config, bench.folder.path, min(self.processes, most))


class Crew:
    """Worker processes; a context manager that ends them.

    Args:
        config: of the sweep, its folder known.
        folder: of the sweep, which the caller has locked.
        number: of processes.
    """

    def __init__(self, config: SweepConfig, folder: Path, number: int) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would take over threads of jax
        self._workers: dict[Connection, BaseProcess] = {}
        for cores in shares(number):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_work, args=(theirs, config.model_dump_json(), str(folder), cores), daemon=True
            )
            process.start()
            theirs.close()
            self._workers[ours] = process

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        for connection, process in self._workers.items():
            process.terminate()
            process.join()
            connection.close()

    def work(self, groups: Sequence[Group], on_rounds: Callable[[int], None]) -> None:
        """Runs all groups; comes back when every one is done.

        Args:
            groups: in the order in which they begin.
            on_rounds: told how many rounds of groups have become complete.

        Raises:
            InputError: what a group met, or a process that ended by itself.
        """
        waiting = list(groups)
        busy: set[Connection] = set()
        for connection in self._workers:
            if waiting:
                self._send(connection, waiting.pop(0))
                busy.add(connection)
        while busy:
            for connection in [one for one in wait(list(busy)) if isinstance(one, Connection)]:
                found = self._heard(connection)
                if found == "round":
                    on_rounds(1)
                elif isinstance(found, Exception):
                    raise found
                elif waiting:
                    self._send(connection, waiting.pop(0))
                else:
                    busy.remove(connection)

    def _send(self, connection: Connection, group: Group) -> None:
        try:
            connection.send(group)
        except OSError:
            raise self._gone(connection) from None

    def _heard(self, connection: Connection) -> object:
        try:
            return connection.recv()
        except (EOFError, OSError):
            raise self._gone(connection) from None

    def _gone(self, connection: Connection) -> InputError:
        process = self._workers[connection]
        process.join()
        return InputError(
            f"a process of the sweep ended by itself (exit status {process.exitcode}; no memory left?); start the "
            "sweep again, with fewer processes where memory is short."
        )


def shares(number: int) -> list[set[int]]:
    """The cores of this process, shared out; some are shared where there are fewer cores than processes."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    each = max(1, len(cores) // number)
    return [{cores[(n * each + i) % len(cores)] for i in range(each)} for n in range(number)]


def _work(connection: Connection, config: str, folder: str, cores: set[int]) -> None:
    """What a worker process does until it is ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)  # before jax counts them
    from almlip_jax.sweep.worker import open_bench, work_at

    bench = open_bench(config, folder)
    while True:
        group: Group = connection.recv()
        error = work_at(bench, group, lambda: connection.send("round"))
        with contextlib.suppress(OSError):
            connection.send("done" if error is None else error)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
