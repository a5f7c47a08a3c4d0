"""A label worker: a process of its own that builds a label source once and then runs the tasks it is sent.

It is started as a fresh interpreter that imports neither jax nor the program that started it.  Where its starter is
gone it finishes the label at hand, leaves it in the spool and ends; a label that then takes longer than it may is given
up.  Whatever it started ends with it.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

from ase import Atoms

from almlip_jax.errors import InputError
from almlip_jax.oracles.base import Label, LabelSource, SourceSettings, obtain_label
from almlip_jax.oracles.scratch import FAMILY, FOLDER, remove
from almlip_jax.oracles.spool import label_in_spool, reserved
from almlip_jax.process_table import descendants, is_alive, kill_all, marked
from almlip_jax.targets import adopt

SPOOL = "ALMLIP_LABEL_SPOOL"
"""Variable with the spool folder that they work for."""

_GRACE = 30.0  # s that a label may exceed its timeout before a worker without a starter ends itself
_BEAT = 0.2  # s between signs of life
_LOOK = 0.5  # s between looks at whether the starter lives


@dataclass(frozen=True)
class Failure:
    """A task that ended with its process.

    Attributes:
        reason: why.
        calls: how often it was tried.
        killed: whether something outside ended the process.
        stopped: whether its starter wanted it ended.
    """

    reason: str
    calls: int = 1
    killed: bool = False
    stopped: bool = False


@dataclass(frozen=True)
class NoSpace:
    """A task that was not begun, for want of a place for its result."""

    error: OSError


@dataclass
class Context:
    """What a task finds in its process.

    Attributes:
        settings: of the label source.
        source: the label source.
        spool: folder for results on their way; may be out of reach.
        alarm: whether this process may end itself when a label hangs and nobody else does.
        beat: gives a sign of life.
        began: when the label at hand began, on the monotonic clock; None between labels.
    """

    settings: SourceSettings
    source: LabelSource
    spool: Path | None
    alarm: bool = False
    beat: Callable[[], None] = lambda: None
    began: float | None = None

    def label(self, atoms: Atoms, identity: str) -> Label:
        """Labels a structure, with as many attempts as the settings allow."""
        calls, seconds = 0, 0.0
        while True:
            self.beat()
            self.began = time.monotonic()
            if self.alarm:
                signal.setitimer(signal.ITIMER_REAL, self.settings.timeout + _GRACE)
            label = obtain_label(self.source, self.settings, atoms, identity)
            if self.alarm:
                signal.setitimer(signal.ITIMER_REAL, 0)
            self.began = None
            calls, seconds = calls + 1, seconds + label.seconds
            if label.error is None or calls == self.settings.attempts:
                return replace(label, seconds=seconds, calls=calls)


class Task(Protocol):
    """Something a worker does; its outcome travels back."""

    def run(self, context: Context) -> Any:
        """Does it."""
        ...


@dataclass(frozen=True)
class LabelTask:
    """Labels one structure."""

    atoms: Atoms
    identity: str

    def run(self, context: Context) -> Label | NoSpace:
        """The label; it lies in the spool, too, if that is within reach.

        One that lies there already was paid for in a job that ended before it could tell.
        """
        if (paid := label_in_spool(context.spool, self.identity)) is not None:
            return paid
        try:
            with reserved(context.spool, self.identity, len(self.atoms)) as reservation:
                label = context.label(self.atoms, self.identity)
                if reservation is not None:
                    reservation.hand_over(label)
        except OSError as error:
            return NoSpace(error)
        return label


def main(descriptor: int, starter: int, born: int) -> None:
    """Serves the connection with this file descriptor until the other side closes it.

    Args:
        descriptor: of the connection.
        starter: number of the process at its other side.
        born: start time of that process, 0 where it is not known.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, _end_by_signal)
    connection = Connection(descriptor)
    last = time.monotonic()

    def beat() -> None:
        nonlocal last
        if time.monotonic() - last > _BEAT:
            last = time.monotonic()
            _send(connection, ("beat", None))

    try:
        settings, bound_to, spool = _received(connection)
        if settings.bound_to() != bound_to:
            raise InputError(
                f"what the label source '{settings.kind}' calculates has changed since this program began; resume it, "
                "so that its labels are kept apart from the earlier ones."
            )
        context = Context(settings, settings.build(), spool, alarm=True, beat=beat)
        threading.Thread(target=_outlive, args=(context, starter, born or None), daemon=True).start()
    except InputError as error:
        _send(connection, ("refused", str(error)))
        return
    _send(connection, ("ready", None))
    while True:
        try:
            task: Task = connection.recv()
        except (EOFError, OSError):
            end_family()
            return
        outcome = task.run(context)
        _send(connection, ("done", outcome))


def _received(connection: Connection) -> tuple[SourceSettings, str | None, Path | None]:
    """The settings of a label source, the version that its labels are bound to, and the spool folder.

    Before them come the targets that there are, whatever package or script declares them.

    Raises:
        InputError: this process cannot import what they are defined by.
    """
    try:
        known, settings, bound_to, spool = connection.recv()
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"a label worker cannot import the settings of the label source ({error}); define them in a module on "
            "PYTHONPATH."
        ) from error
    adopt(known)
    return settings, bound_to, spool


def _send(connection: Connection, message: tuple[str, Any]) -> None:
    try:
        connection.send(message)
    except (BrokenPipeError, ConnectionResetError):
        # The starter is gone; what was paid for lies in the spool.
        end_family()
        os._exit(0)


def _outlive(context: Context, starter: int, born: int | None) -> None:
    """Ends this process where its starter is gone and the label at hand takes longer than it may."""
    while True:
        time.sleep(_LOOK)
        began = context.began
        late = began is not None and time.monotonic() - began > context.settings.timeout
        if late and not is_alive(starter, born):
            end_family()
            os._exit(1)


def _end_by_signal(number: int, _: object) -> None:
    end_family()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def end_family() -> None:
    """Kills everything that this process started, whatever sessions it has made, and removes its folder."""
    family = os.environ.get(FAMILY)
    if family:
        below = descendants(os.getpid())
        kill_all(lambda: marked(FAMILY, family) | below)
    if folder := os.environ.get(FOLDER):
        remove(Path(folder))
