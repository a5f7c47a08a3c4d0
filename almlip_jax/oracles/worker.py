"""A label worker: a process of its own that builds a label source once and then runs the tasks it is sent.

It is started as a fresh interpreter that imports neither jax nor the program that started it.  Where its starter is
gone it finishes the label at hand, leaves it in the spool and ends.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

from ase import Atoms

from almlip_jax.errors import InputError
from almlip_jax.oracles.base import Label, LabelSource, SourceSettings, obtain_label
from almlip_jax.oracles.settings import parse_oracle
from almlip_jax.oracles.spool import reserved

_GRACE = 30.0  # s that a label may exceed its timeout before a worker without a starter ends itself
_BEAT = 0.2  # s between signs of life


@dataclass(frozen=True)
class Failure:
    """A task that ended with its process: the reason, and how often it was tried."""

    reason: str
    calls: int = 1


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
    """

    settings: SourceSettings
    source: LabelSource
    spool: Path | None
    alarm: bool = False
    beat: Callable[[], None] = lambda: None

    def label(self, atoms: Atoms, identity: str) -> Label:
        """Labels a structure, with as many attempts as the settings allow."""
        calls, seconds = 0, 0.0
        while True:
            self.beat()
            if self.alarm:
                signal.setitimer(signal.ITIMER_REAL, self.settings.timeout + _GRACE)
            label = obtain_label(self.source, self.settings, atoms, identity)
            if self.alarm:
                signal.setitimer(signal.ITIMER_REAL, 0)
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
        """The label; it lies in the spool, too, if that is within reach."""
        try:
            with reserved(context.spool, self.identity, len(self.atoms)) as reservation:
                label = context.label(self.atoms, self.identity)
                if reservation is not None:
                    reservation.hand_over(label)
        except OSError as error:
            return NoSpace(error)
        return label


def main(descriptor: int) -> None:
    """Serves the connection with this file descriptor until the other side closes it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    connection = Connection(descriptor)
    oracle, spool = connection.recv()
    last = time.monotonic()

    def beat() -> None:
        nonlocal last
        if time.monotonic() - last > _BEAT:
            last = time.monotonic()
            _send(connection, ("beat", None))

    try:
        settings = parse_oracle(oracle)
        context = Context(settings, settings.build(), spool, alarm=True, beat=beat)
    except InputError as error:
        _send(connection, ("refused", str(error)))
        return
    _send(connection, ("ready", None))
    while True:
        try:
            task: Task = connection.recv()
        except EOFError:
            return
        outcome = task.run(context)
        _send(connection, ("done", outcome))


def _send(connection: Connection, message: tuple[str, Any]) -> None:
    try:
        connection.send(message)
    except (BrokenPipeError, ConnectionResetError):
        # The starter is gone; what was paid for lies in the spool.
        os._exit(0)
