"""Worker processes as their starter sees them: ask, wait, and survive whatever a label source does.

Each worker is a fresh interpreter (no fork of a process with threads, no second import of the user's main script),
reached over a socket pair.  A worker that crashes or exceeds its time is ended with all its children and replaced.
They are known by a variable of their environment, which they inherit, whatever sessions they make of their own.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

from almlip_jax.errors import InputError
from almlip_jax.oracles.base import Label, SourceSettings
from almlip_jax.oracles.scratch import FAMILY, FOLDER, folder_of, remove
from almlip_jax.oracles.worker import SPOOL, Failure, Task
from almlip_jax.process_table import birth, command_of, descendants, kill_all, marked, variable_of
from almlip_jax.settings import LEAN
from almlip_jax.targets import targets

_START_SECONDS = 300.0  # a label source may import slowly from a network file system
_MAIN = "from almlip_jax.oracles.worker import main"
_BOOT = f"import json, sys; sys.path[:] = json.loads(sys.argv[1]); {_MAIN}; main(*map(int, sys.argv[2:]))"
_KILLED_ATTEMPTS = 3  # of a label whose worker is killed from outside: more would hardly end otherwise
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
        bound_to: what `SourceSettings.bound_to` was where the labels are asked for.
    """

    def __init__(self, settings: SourceSettings, spool: Path | None, threads: int, bound_to: str | None) -> None:
        self._settings = settings
        self._bound_to = bound_to
        self._spool = spool
        self._threads = threads
        self._stopped = False
        self._family = ""
        self._folder: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._output: IO[bytes] | None = None

    def ask(self, task: Task) -> Any:
        """The outcome of a task, or a `Failure` where the worker crashed or gave no sign of life for the timeout.

        Raises:
            InputError: the label source cannot be used, or a worker cannot be started.
        """
        if self._stopped:
            return Failure("stopped", stopped=True)
        connection = self.start()
        if self._stopped:
            self.close()
            return Failure("stopped", stopped=True)
        try:
            connection.send(task)
            while connection.poll(self._settings.timeout):
                kind, content = connection.recv()
                if kind == "done":
                    return content
        except (EOFError, OSError):
            code, said = self._end()
            if code in (-signal.SIGKILL, -signal.SIGTERM):
                return Failure(f"its process was killed from outside ({said}; no memory left?)", killed=True)
            return Failure(f"the label source crashed ({said})")
        self.close()
        return Failure(f"timed out after {self._settings.timeout:g} s")

    def start(self) -> Connection:
        """Starts the worker where it does not run yet; errors as for `ask`."""
        return self._connection or self._start()

    def stop(self) -> None:
        """Ends the worker, from any thread; the thread that waits for an answer gets a `Failure`, now and later."""
        self._stopped = True
        if (process := self._process) is not None and process.poll() is None:
            self._kill(process)

    def close(self) -> None:
        """Ends the worker and all its children, and frees what it took, the folder of its files too."""
        process, self._process = self._process, None
        if process is not None:
            self._kill(process)
            process.wait()
        if self._folder is not None:
            remove(self._folder)
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._output is not None:
            self._output.close()
            self._output = None

    def _kill(self, process: subprocess.Popen[bytes]) -> None:
        """Ends the worker and everything that it started."""
        below = descendants(process.pid) if process.poll() is None else set()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        kill_all(lambda: marked(FAMILY, self._family) | below)

    def _start(self) -> Connection:
        ours, theirs = Pipe()
        self._connection = ours
        # What the label source prints goes to a file that lives as long as the worker, for the reason of a crash.
        self._output = tempfile.TemporaryFile(prefix="almlip-label-")
        self._family = uuid.uuid4().hex
        self._folder = folder_of(self._family, self._settings.files_below())
        environment = dict(os.environ) | dict.fromkeys(_THREAD_VARIABLES, str(self._threads))
        environment |= {FAMILY: self._family, FOLDER: str(self._folder), SPOOL: str(self._spool or "")}
        starter = os.getpid()
        born = str(birth(starter) or 0)
        path = json.dumps([*(entry or os.getcwd() for entry in sys.path), os.getcwd()])
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-X", LEAN, "-c", _BOOT, path, str(theirs.fileno()), str(starter), born],
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                env=environment,
                start_new_session=True,
            )
        try:
            ours.send((targets(), self._settings, self._bound_to, self._spool))
            kind, content = ours.recv() if ours.poll(_START_SECONDS) else ("silent", "it gave no sign of life")
        except (EOFError, OSError):
            kind, content = "dead", self._end()[1]
        if kind != "ready":
            self.close()
            raise InputError(content if kind == "refused" else f"a label worker could not be started: {content}.")
        return ours

    def _end(self) -> tuple[int | None, str]:
        """The exit status of a worker that died, and how it ended with the last it said."""
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
        return code, f"{how}: {lines[-1][:200]}" if lines else how


def as_finished(futures: Mapping[Future[Any], int]) -> Iterator[tuple[int, Future[Any]]]:
    """Futures with their numbers, as they finish or are cancelled."""
    ended: queue.SimpleQueue[Future[Any]] = queue.SimpleQueue()
    for future in futures:
        future.add_done_callback(ended.put)
    for _ in futures:
        future = ended.get()
        yield futures[future], future


def ask_patiently(worker: WorkerProcess, task: Task, attempts: int) -> Any:
    """The outcome of a task that may be tried again when it crashes or hangs, or its worker is killed from outside."""
    attempt = 0
    while True:
        outcome = worker.ask(task)
        attempt += 1
        if attempt > 1 and isinstance(outcome, Failure | Label):
            outcome = replace(outcome, calls=outcome.calls + attempt - 1)  # a worker tries several times by itself
        if not isinstance(outcome, Failure) or outcome.stopped:
            return outcome
        if attempt >= (max(attempts, _KILLED_ATTEMPTS) if outcome.killed else attempts):
            return outcome


def end_leftovers(spool: Path) -> None:
    """Kills what label sources of a spool started and left behind when their worker was killed.

    Workers that a killed program left behind are at work and stay, with all that they started.
    """
    families: dict[str, set[int]] = {}
    for pid in marked(SPOOL, str(spool)):
        if (family := variable_of(pid, FAMILY)) is not None:
            families.setdefault(family, set()).add(pid)
    for pids in families.values():
        if not any(_MAIN in command_of(pid) for pid in pids):
            kill_all(lambda pids=pids: pids)  # type: ignore[misc]
