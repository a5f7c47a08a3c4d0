"""How long a stage has taken so far, kept on disk while it is under way: what a kill interrupts counts too."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from almlip_jax.errors import InputError
from almlip_jax.files import read_json, write_json
from almlip_jax.progress import Advance, Progress

_EVERY = 10.0  # seconds between two writings: what a kill may lose


class StageClock:
    """Wall time of one stage after the other, that of interrupted sessions included.

    Args:
        path: file with the name of the stage under way and its seconds so far.
        now: the time in seconds.
    """

    def __init__(self, path: Path, now: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._now = now
        self._lock = threading.Lock()  # labels are reported from any thread
        self._stage: str | None = None
        self._began = self._kept = 0.0

    @property
    def seconds(self) -> float:
        """Of the stage under way."""
        return self._now() - self._began

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A stage under way; where a session before was interrupted in it, its seconds go on from there."""
        self._began = self._kept = self._now()
        self._began -= self._earlier(name)
        self._stage = name
        try:
            yield
        finally:
            self._keep()
            self._stage = None

    def tick(self) -> None:
        """Keeps the seconds so far, where that is some time ago; called whenever work has been done."""
        if self._stage is not None and self._now() - self._kept >= _EVERY:
            self._keep()

    def forget(self) -> None:
        """Removes what is kept, once the stage is done and its seconds stand elsewhere."""
        self._path.unlink(missing_ok=True)

    def _keep(self) -> None:
        # a full disk ends a run where something is lost by it
        with self._lock, contextlib.suppress(InputError):
            self._kept = self._now()
            write_json(self._path, {"stage": self._stage, "seconds": self.seconds})

    def _earlier(self, name: str) -> float:
        """Seconds of a stage in sessions before; 0 where nothing is kept of it."""
        try:
            kept = read_json(self._path)
            return max(0.0, float(kept["seconds"])) if kept["stage"] == name else 0.0
        except (InputError, KeyError, TypeError, ValueError):
            return 0.0


class TickingProgress:
    """Passes on what it is told, and has a clock keep the seconds of the stage under way; follows `Progress`.

    Args:
        shown: what the user sees.
        clock: of the stages.
    """

    def __init__(self, shown: Progress, clock: StageClock) -> None:
        self._shown = shown
        self._clock = clock

    def round(self, index: int, total: int) -> None:
        """A round begins."""
        self._shown.round(index, total)

    def message(self, text: str) -> None:
        """Something worth a line of its own."""
        self._shown.message(text)

    def expect(self, seconds: Mapping[str, float]) -> None:
        """How long each stage of a round took in an earlier session."""
        self._shown.expect(seconds)

    @contextmanager
    def stage(self, name: str, total: int | None = None, *, unit: str = "") -> Iterator[Advance]:
        """A stage as a context that yields `Advance`."""
        with self._shown.stage(name, total, unit=unit) as advance:

            def ticking(n: int = 1, **fields: float | int | str) -> None:
                advance(n, **fields)
                self._clock.tick()

            yield ticking
