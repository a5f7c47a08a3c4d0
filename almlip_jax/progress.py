"""Progress of a campaign: rounds, the current stage and the time left, as bars, as plain lines, or not at all.

The loop speaks the small protocol `Progress`; what the user sees is chosen at the edge by `open_progress`::

    with open_progress() as progress:
        for index in range(rounds):
            progress.round(index, rounds)
            with progress.stage("train", epochs, unit="epochs") as advance:
                ...
                advance(1, forces_rmse=0.031)
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Literal, Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn
from rich.progress import Progress as RichBars
from rich.text import Text

from almlip_jax.unit_names import with_unit

Clock = Callable[[], float]
Mode = Literal["auto", "bars", "lines", "silent"]
_LONG = 2.0  # seconds


class Advance(Protocol):
    """Reports that a stage has moved on."""

    def __call__(self, n: int = 1, **fields: float | int | str) -> None:
        """Adds ``n`` units of work; ``fields`` are names and values worth showing (the latest of each name stays)."""


class Progress(Protocol):
    """How a campaign reports its progress; safe to call from any thread."""

    def round(self, index: int, total: int) -> None:
        """A round begins: its number from 0, and how many there are at most."""

    def stage(self, name: str, total: int | None = None, *, unit: str = "") -> AbstractContextManager[Advance]:
        """A stage of the round (or of the preparation) as a context that yields `Advance`; stages may nest."""

    def message(self, text: str) -> None:
        """Something worth a line of its own."""

    def expect(self, seconds: Mapping[str, float]) -> None:
        """How long each stage of a round took in an earlier session; a resumed run estimates the time left by it."""


@dataclass
class _Stage:
    """Work done in one stage, and when."""

    name: str
    total: int | None
    unit: str
    began: float
    done: int = 0
    first: tuple[float, int] | None = None
    fields: dict[str, float | int | str] = field(default_factory=dict)

    def advance(self, n: int, now: float) -> None:
        self.done += n
        if self.first is None:
            self.first = (now, self.done)

    def seconds_left(self, now: float) -> float | None:
        """From the pace since the first report: what came before it was compilation, which does not come again."""
        if self.total is None or self.first is None:
            return None
        at, count = self.first
        if self.done <= count:
            return None
        return max(0.0, (self.total - self.done) * (now - at) / (self.done - count))


class Forecast:
    """Times of stages and rounds, and what they imply for the time left.

    The last duration of each stage of a round stands for its next one.  The number of rounds is an upper bound (a
    stopping rule may hold earlier), and so is the time left of the run.
    """

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self.clock = clock
        self.index: int | None = None
        self.total: int | None = None
        self.open: list[_Stage] = []
        self._expected: dict[str, float] = {}
        self._finished: set[str] = set()
        self._round_is_known = False

    def round(self, index: int, total: int) -> None:
        """A round begins."""
        self._round_is_known = self._round_is_known or bool(self._finished)
        self.index, self.total = index, total
        self._finished.clear()

    def expect(self, seconds: Mapping[str, float]) -> None:
        """Takes durations from an earlier session."""
        self._expected.update(seconds)
        self._round_is_known = self._round_is_known or bool(seconds)

    def begin(self, name: str, total: int | None, unit: str) -> _Stage:
        """A stage begins."""
        stage = _Stage(name, total, unit, self.clock())
        self.open.append(stage)
        return stage

    def end(self, stage: _Stage, *, completed: bool) -> float:
        """A stage ends; its duration in seconds, which is remembered if it was completed within a round."""
        self.open.remove(stage)
        seconds = self.clock() - stage.began
        if completed and not self.open and self.index is not None:
            self._expected[stage.name] = seconds
            self._finished.add(stage.name)
        return seconds

    def stage_left(self, stage: _Stage) -> float | None:
        """Seconds left in a stage, None where nothing tells."""
        now = self.clock()
        left = stage.seconds_left(now)
        if left is None and stage.name in self._expected:
            left = max(0.0, self._expected[stage.name] - (now - stage.began))
        return left

    def run_left(self) -> float | None:
        """Seconds left in the run at most, None before a first round has shown what a round takes."""
        if self.index is None or self.total is None or not self._round_is_known:
            return None
        current = self.open[0] if self.open else None
        ahead = (self.total - self.index - 1) * sum(self._expected.values())
        done = self._finished | ({current.name} if current else set())
        later = sum(seconds for name, seconds in self._expected.items() if name not in done)
        return ahead + later + ((self.stage_left(current) or 0.0) if current else 0.0)


class _Tracked(ABC):
    """The part that every display shares: locking, the forecast, and stages as contexts."""

    def __init__(self, clock: Clock) -> None:
        self.forecast = Forecast(clock)
        self._lock = threading.RLock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def round(self, index: int, total: int) -> None:
        """A round begins: its number from 0, and how many there are at most."""
        with self._lock:
            self.forecast.round(index, total)
            self._show_round()

    def expect(self, seconds: Mapping[str, float]) -> None:
        """How long each stage of a round took in an earlier session."""
        with self._lock:
            self.forecast.expect(seconds)

    @contextmanager
    def stage(self, name: str, total: int | None = None, *, unit: str = "") -> Iterator[Advance]:
        """A stage as a context that yields `Advance`."""
        with self._lock:
            stage = self.forecast.begin(name, total, unit)
            self._show_begin(stage)

        def advance(n: int = 1, **fields: float | int | str) -> None:
            with self._lock:
                stage.advance(n, self.forecast.clock())
                stage.fields.update(fields)
                self._show_advance(stage)

        completed = False
        try:
            yield advance
            completed = True
        finally:
            with self._lock:
                seconds = self.forecast.end(stage, completed=completed)
                self._show_end(stage, seconds, completed)

    @abstractmethod
    def message(self, text: str) -> None: ...
    @abstractmethod
    def _show_round(self) -> None: ...
    @abstractmethod
    def _show_begin(self, stage: _Stage) -> None: ...
    @abstractmethod
    def _show_advance(self, stage: _Stage) -> None: ...
    @abstractmethod
    def _show_end(self, stage: _Stage, seconds: float, completed: bool) -> None: ...


class SilentProgress(_Tracked):
    """Shows nothing."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        super().__init__(clock)

    def message(self, text: str) -> None:
        """Drops the text."""

    def _show_round(self) -> None: ...
    def _show_begin(self, stage: _Stage) -> None: ...
    def _show_advance(self, stage: _Stage) -> None: ...
    def _show_end(self, stage: _Stage, seconds: float, completed: bool) -> None: ...


class LineProgress(_Tracked):
    """Plain lines for logs: one at the end of each stage, and one every ``interval`` seconds within it.

    Args:
        console: where to write.
        interval: seconds between two lines of the same stage.
        clock: the time in seconds.
    """

    def __init__(self, console: Console, interval: float = 15.0, clock: Clock = time.monotonic) -> None:
        super().__init__(clock)
        self._console = console
        self._interval = interval
        self._began = clock()
        self._last = clock()

    def message(self, text: str) -> None:
        """Writes a line."""
        with self._lock:
            self._line(text)

    def _line(self, *parts: str) -> None:
        elapsed = clock_time(self.forecast.clock() - self._began)
        text = "  ".join(part for part in parts if part)
        self._console.print(f"[{elapsed}] {text}", markup=False, highlight=False, soft_wrap=True)

    def _where(self) -> str:
        index, total = self.forecast.index, self.forecast.total
        return "" if index is None else f"round {index + 1}/{total}"

    def _show_round(self) -> None:
        left = self.forecast.run_left()
        self._line(self._where(), "" if left is None else f"run: at most {duration(left)} left")

    def _show_begin(self, stage: _Stage) -> None:
        self._last = self.forecast.clock()

    def _show_advance(self, stage: _Stage) -> None:
        now = self.forecast.clock()
        if now - self._last < self._interval or stage.done == stage.total:  # the line at the end says more
            return
        self._last = now
        stage_left, run_left = self.forecast.stage_left(stage), self.forecast.run_left()
        self._line(
            self._where(),
            f"{stage.name} {count(stage)}",
            field_text(stage.fields),
            "" if stage_left is None else f"{duration(stage_left)} left",
            "" if run_left is None else f"(run: at most {duration(run_left)})",
        )

    def _show_end(self, stage: _Stage, seconds: float, completed: bool) -> None:
        done = f"{stage.done} {stage.unit} " if stage.unit else ""
        verb = "in" if completed else "interrupted after"
        self._line(self._where(), f"{stage.name}: {done}{verb} {duration(seconds)}", field_text(stage.fields))


class BarProgress(_Tracked):
    """Bars in a terminal: one for the rounds, one for each open stage, with the time left of the run and the stage."""

    def __init__(self, console: Console, clock: Clock = time.monotonic) -> None:
        super().__init__(clock)
        self._stages: dict[TaskID, _Stage] = {}
        self._rounds: TaskID | None = None
        self._bars = RichBars(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            TextColumn("{task.fields[count]}", style="cyan"),
            _LeftColumn(self._left),
            TextColumn("{task.fields[text]}", style="dim"),
            console=console,
            transient=False,
        )

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def message(self, text: str) -> None:
        """Writes a line above the bars."""
        self._bars.console.print(text, markup=False, highlight=False)

    def _left(self, task: TaskID) -> str:
        with self._lock:
            stage = self._stages.get(task)
            left = self.forecast.run_left() if stage is None else self.forecast.stage_left(stage)
        if left is None:
            return ""
        return f"{duration(left)} left" if stage is not None else f"at most {duration(left)} left"

    def _show_round(self) -> None:
        index, total = self.forecast.index, self.forecast.total
        text = f"{(index or 0) + 1}/{total}"
        if self._rounds is None:
            self._rounds = self._bars.add_task("round", total=total, count=text, text="")
        self._bars.update(self._rounds, completed=index or 0, total=total, count=text)

    def _show_begin(self, stage: _Stage) -> None:
        name = "  " * len(self.forecast.open) + stage.name
        task = self._bars.add_task(name, total=stage.total, count=count(stage), text="")
        self._stages[task] = stage

    def _task(self, stage: _Stage) -> TaskID:
        return next(task for task, other in self._stages.items() if other is stage)

    def _show_advance(self, stage: _Stage) -> None:
        task = self._task(stage)
        self._bars.update(task, completed=stage.done, count=count(stage), text=field_text(stage.fields))

    def _show_end(self, stage: _Stage, seconds: float, completed: bool) -> None:
        task = self._task(stage)
        self._bars.remove_task(task)
        del self._stages[task]


class _LeftColumn(ProgressColumn):
    """The time left, asked anew whenever the bars are drawn."""

    def __init__(self, left: Callable[[TaskID], str]) -> None:
        super().__init__()
        self._left = left

    def render(self, task: Task) -> Text:
        return Text(self._left(task.id), style="magenta")


def open_progress(
    mode: Mode = "auto", *, console: Console | None = None, interval: float = 15.0
) -> SilentProgress | LineProgress | BarProgress:
    """The display of a campaign, a context manager that follows `Progress`.

    Args:
        mode: ``bars``, ``lines``, ``silent``, or ``auto``: bars in a terminal and lines elsewhere.
        console: where to write; default the standard error stream.
        interval: seconds between two lines of the same stage in mode ``lines``.
    """
    if mode == "silent":
        return SilentProgress()
    console = console or Console(stderr=True)
    if mode == "bars" or (mode == "auto" and console.is_terminal and not console.is_dumb_terminal):
        return BarProgress(console)
    return LineProgress(console, interval)


def reaching(advance: Advance) -> Callable[..., None]:
    """`advance` for work that knows how far it is in all: takes the units done so far, and the same fields."""
    done = 0

    def reached(position: int, **fields: float | int | str) -> None:
        nonlocal done
        advance(position - done, **fields)
        done = position

    return reached


@contextmanager
def when_long(progress: Progress, name: str, total: int, unit: str, clock: Clock = time.monotonic) -> Iterator[Advance]:
    """A stage that is told of only from when it has taken two seconds: of work that is short more often than not."""
    began, untold = clock(), 0
    with ExitStack() as stack:
        told: Advance | None = None

        def advance(n: int = 1, **fields: float | int | str) -> None:
            nonlocal told, untold
            untold += n
            if told is None and clock() - began > _LONG:
                told = stack.enter_context(progress.stage(name, total, unit=unit))
            if told is not None:
                told(untold, **fields)
                untold = 0

        yield advance


def duration(seconds: float) -> str:
    """A length of time for people: ``42 s``, ``3 min 10 s``, ``1 h 05 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def clock_time(seconds: float) -> str:
    """A length of time as ``hh:mm:ss``."""
    whole = round(seconds)
    return f"{whole // 3600:02d}:{whole % 3600 // 60:02d}:{whole % 60:02d}"


def count(stage: _Stage) -> str:
    """How far a stage is: ``120/300 epochs``."""
    total = "" if stage.total is None else f"/{stage.total}"
    return f"{stage.done}{total} {stage.unit}".strip()


def field_text(fields: Mapping[str, float | int | str]) -> str:
    """Names and values in one line, floats with three digits, with the units of their names; a dash for no number."""
    shown = {name: f"{value:.3g}" if isinstance(value, float) else str(value) for name, value in fields.items()}
    shown = {name: "-" if text == "nan" else text for name, text in shown.items()}
    return "  ".join(f"{name} {with_unit(text, name)}" for name, text in shown.items())
