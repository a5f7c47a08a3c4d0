"""The log of a folder that work is done in, ``run.log``: what progress reports, with the time, session after session.

Stages stand there once, at their end, with how long they took; so do messages, rounds, and what ended a session.  A log
that cannot be written (a full disk) is done without: it must not end a run.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from almlip_jax import __version__
from almlip_jax.errors import CapacityError, InputError, LabelError
from almlip_jax.progress import Advance, Progress, duration, field_text


class LoggedProgress:
    """Passes on to another progress what it is told, and writes it down; follows `Progress`.

    Args:
        shown: what the user sees.
        path: of the log, which is added to.
    """

    def __init__(self, shown: Progress, path: Path) -> None:
        self._shown = shown
        self._path = path

    def round(self, index: int, total: int) -> None:
        """A round begins."""
        self.note(f"round {index + 1}/{total}")
        self._shown.round(index, total)

    def message(self, text: str) -> None:
        """Something worth a line of its own."""
        self.note(text)
        self._shown.message(text)

    def expect(self, seconds: Mapping[str, float]) -> None:
        """How long each stage of a round took in an earlier session."""
        self._shown.expect(seconds)

    @contextmanager
    def stage(self, name: str, total: int | None = None, *, unit: str = "") -> Iterator[Advance]:
        """A stage as a context that yields `Advance`."""
        began, done, latest = time.monotonic(), 0, dict[str, float | int | str]()
        verb = "interrupted after"
        try:
            with self._shown.stage(name, total, unit=unit) as advance:

                def advancing(n: int = 1, **fields: float | int | str) -> None:
                    nonlocal done
                    done += n
                    latest.update(fields)
                    advance(n, **fields)

                yield advancing
            verb = "in"
        finally:
            amount = f"{done} {unit} " if unit else ""
            told = f"{name}: {amount}{verb} {duration(time.monotonic() - began)}  {field_text(latest)}"
            self.note(told.rstrip())

    def note(self, text: str) -> None:
        """Writes a line that the user does not see."""
        self.add(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {' '.join(text.split(chr(10)))}\n")

    def add(self, text: str) -> None:
        """Writes some lines as they are."""
        with contextlib.suppress(OSError), self._path.open("a", encoding="utf-8", errors="replace") as file:
            file.write(text)


@contextmanager
def logged(progress: Progress, path: Path) -> Iterator[LoggedProgress]:
    """A session whose progress goes into a log too, with its beginning, its end, and the error that ended it.

    Args:
        progress: what the user sees.
        path: of the log, in a folder that this process has locked.
    """
    log = LoggedProgress(progress, path)
    log.note(f"session begins: almlip-jax {__version__}, process {os.getpid()} on {socket.gethostname()}")
    try:
        yield log
    except (InputError, LabelError, CapacityError) as error:
        log.note(f"session ended by an error: {error}")
        raise
    except KeyboardInterrupt as stop:
        log.note(f"session interrupted ({type(stop).__name__})")
        raise
    except BaseException as error:
        log.note(f"session ended by an error: {type(error).__name__}: {error}".rstrip(": "))
        log.add(traceback.format_exc())
        raise
    log.note("session ended")
