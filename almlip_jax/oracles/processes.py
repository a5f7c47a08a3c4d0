"""Worker processes as their starter sees them: ask, wait, and survive whatever a label source does.

Each worker is a fresh interpreter (no fork of a process with threads, no second import of the user's main script),
reached over a socket pair.  A worker that crashes or exceeds its time is ended with all its children and replaced.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

from almlip_jax.errors import InputError
from almlip_jax.oracles.base import Label, SourceSettings
from almlip_jax.oracles.worker import Failure, Task

_START_SECONDS = 300.0  # a label source may import slowly from a network file system
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from almlip_jax.oracles.worker import main; main(int(sys.argv[2]))"
)
_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)


class WorkerProcess:
    """One worker process, started when first asked and replaced after it died.

    Args:
        settings: of the label source.
        spool: folder for results on their way, or None.
        threads: that the label source may use; one thread gives the same bits every time.
    """

    def __init__(self, settings: SourceSettings, spool: Path | None, threads: int = 1) -> None:
        self._settings = settings
        self._spool = spool
        self._threads = threads
        self._stopped = False
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._output: IO[bytes] | None = None

    def ask(self, task: Task) -> Any:
        """The outcome of a task, or a `Failure` where the worker crashed or gave no sign of life for the timeout.

        Raises:
            InputError: the label source cannot be used, or a worker cannot be started.
        """
        connection = self._connection or self._start()
        if self._stopped:
            self.close()
            return Failure("stopped")
        try:
            connection.send(task)
            while connection.poll(self._settings.timeout):
                kind, content = connection.recv()
                if kind == "done":
                    return content
        except (EOFError, OSError):
            return Failure(f"the label source crashed ({self._end()})")
        self.close()
        return Failure(f"timed out after {self._settings.timeout:g} s")

    def stop(self) -> None:
        """Ends the worker, from any thread; the thread that waits for an answer gets a `Failure`, now and later."""
        self._stopped = True
        if (process := self._process) is not None and process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Ends the worker and all its children, and frees what it took."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._output is not None:
            self._output.close()
            self._output = None

    def _start(self) -> Connection:
        ours, theirs = Pipe()
        self._connection = ours
        # What the label source prints goes to a file that lives as long as the worker, for the reason of a crash.
        self._output = tempfile.TemporaryFile(prefix="almlip-label-")
        environment = dict(os.environ) | dict.fromkeys(_THREAD_VARIABLES, str(self._threads))
        path = json.dumps([*(entry or os.getcwd() for entry in sys.path), os.getcwd()])
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, path, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                env=environment,
                start_new_session=True,
            )
        try:
            ours.send((self._settings.model_dump_json(), self._spool))
            kind, content = ours.recv() if ours.poll(_START_SECONDS) else ("silent", "it gave no sign of life")
        except (EOFError, OSError):
            kind, content = "dead", self._end()
        if kind != "ready":
            self.close()
            raise InputError(content if kind == "refused" else f"a label worker could not be started: {content}.")
        return ours

    def _end(self) -> str:
        """How a worker that died ended, and the last it said."""
        assert self._process is not None and self._output is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)
        code, said = self._process.returncode, b""
        with contextlib.suppress(OSError):
            self._output.seek(max(os.fstat(self._output.fileno()).st_size - 2000, 0))
            said = self._output.read()
        self.close()
        how = "no exit status" if code is None else f"exit status {code}"
        if code is not None and code < 0:
            how = signal.Signals(-code).name
        lines = [line.strip() for line in said.decode(errors="replace").splitlines() if line.strip()]
        return f"{how}: {lines[-1][:200]}" if lines else how


def as_finished(futures: Mapping[Future[Any], int]) -> Iterator[tuple[int, Future[Any]]]:
    """Futures with their numbers, as they finish."""
    waiting = set(futures)
    while waiting:
        finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
        for future in sorted(finished, key=futures.__getitem__):
            yield futures[future], future


def ask_patiently(worker: WorkerProcess, task: Task, attempts: int) -> Any:
    """The outcome of a task that may be tried again when it crashes or hangs."""
    outcome = worker.ask(task)
    for attempt in range(2, attempts + 1):
        if not isinstance(outcome, Failure):
            break
        outcome = worker.ask(task)
        outcome = replace(outcome, calls=attempt) if isinstance(outcome, Failure | Label) else outcome
    return outcome
