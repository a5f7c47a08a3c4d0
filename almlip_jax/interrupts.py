"""Ctrl-C and SIGTERM: the first one ends the work in good order, a second one ends it at once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType

_TOGETHER = 0.3  # s: a terminal and a wrapper that passes the signal on both send it, which is one interruption
_SHOW_CURSOR = "\x1b[?25h"  # bars have hidden it


class Terminated(KeyboardInterrupt):
    """SIGTERM: handled like an interruption, but with another exit status."""


def exit_status(stop: KeyboardInterrupt) -> int:
    """128 and the number of the signal."""
    return 128 + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT)


class _Listener:
    """What one process has heard so far."""

    def __init__(self) -> None:
        self.first: float | None = None
        self.leaving = False

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        """Raises at the first signal; ends the process at a later one, or where it is about to end by itself."""
        now = time.monotonic()
        if self.leaving or (self.first is not None and now - self.first > _TOGETHER):
            sentence = "" if self.leaving else "almlip: interrupted again; stopped at once\n"
            with contextlib.suppress(OSError):
                cursor = _SHOW_CURSOR if os.isatty(2) else ""
                os.write(2, f"{cursor}{sentence}".encode())
            os._exit(128 + number)
        if self.first is None:
            self.first = now
            raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Within the block, and until the process ends, signals are heard in this way.

    A signal that the process was started to ignore, as behind ``nohup``, stays ignored.  A block within another one
    changes nothing.
    """
    held = (signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM))
    listener = next((one for one in held if isinstance(one, _Listener)), None) or _Listener()
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        if signal.getsignal(number) == usual:
            signal.signal(number, listener)
    try:
        yield
    finally:
        listener.leaving = True
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
