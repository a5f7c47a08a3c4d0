"""Progress: the time left is right, lines are plain and few, bars do not get in the way."""

from __future__ import annotations

import io
import threading

import pytest
from rich.console import Console

from almlip_jax.progress import (
    BarProgress,
    Forecast,
    LineProgress,
    Progress,
    SilentProgress,
    duration,
    open_progress,
    reaching,
    when_long,
)


class FakeClock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def lines(clock: FakeClock, interval: float = 15.0) -> tuple[LineProgress, io.StringIO]:
    out = io.StringIO()
    return LineProgress(Console(file=out, width=40), interval, clock), out


def test_the_time_left_of_a_stage_does_not_count_compilation(clock: FakeClock) -> None:
    forecast = Forecast(clock)
    stage = forecast.begin("train", 100, "epochs")
    clock.now = 50.0  # compilation and the first epoch
    stage.advance(1, clock())
    assert forecast.stage_left(stage) is None
    clock.now = 59.0
    stage.advance(9, clock())
    assert forecast.stage_left(stage) == pytest.approx(90.0)


def test_work_that_is_short_is_not_told_of(clock: FakeClock) -> None:
    """And of work that is long all that was done before counts, with the time that is left from then on."""
    progress, out = lines(clock, interval=1.0)
    for pace in (0.1, 1.0):
        with when_long(progress, "compare", 10, "structures", clock) as advance:
            for _ in range(10):
                clock.now += pace
                advance()
        assert bool(out.getvalue()) == (pace == 1.0)
    said = out.getvalue().splitlines()
    assert "compare 4/10 structures  6 s left" in said[0] and "compare: 10 structures in" in said[-1]


def test_the_time_left_of_the_run_follows_from_the_last_round(clock: FakeClock) -> None:
    forecast = Forecast(clock)
    setup = forecast.begin("test set", None, "")
    clock.now = 1000.0
    forecast.end(setup, completed=True)
    for name, seconds in [("train", 30.0), ("explore", 10.0), ("label", 20.0)]:
        if forecast.index is None:
            forecast.round(0, 4)
        stage = forecast.begin(name, 10, "")
        assert forecast.run_left() is None
        clock.now += seconds
        forecast.end(stage, completed=True)
    forecast.round(1, 4)
    assert forecast.run_left() == pytest.approx(3 * 60.0), "preparation is no part of a round"
    train = forecast.begin("train", 100, "epochs")
    clock.now += 10.0
    train.advance(1, clock())
    assert forecast.run_left() == pytest.approx(20 + 30 + 2 * 60)
    clock.now += 10.0
    train.advance(50, clock())
    assert forecast.run_left() == pytest.approx(49 / 5 + 30 + 2 * 60), "the present pace counts where it is known"
    forecast.end(train, completed=True)
    assert forecast.run_left() == pytest.approx(30 + 2 * (20 + 30))


def test_work_may_say_how_far_it_is_in_all() -> None:
    told: list[tuple[int, dict[str, float | int | str]]] = []
    reached = reaching(lambda n=1, **fields: told.append((n, fields)))
    for step in (50, 80, 80):
        reached(step, walkers=2)
    assert told == [(50, {"walkers": 2}), (30, {"walkers": 2}), (0, {"walkers": 2})]


def test_a_stage_broken_off_teaches_nothing(clock: FakeClock) -> None:
    progress = SilentProgress(clock)
    progress.expect({"train": 40.0})
    progress.round(2, 4)
    with pytest.raises(RuntimeError), progress.stage("train", 10):
        clock.now += 1.0
        raise RuntimeError
    assert progress.forecast.open == []
    assert progress.forecast.run_left() == pytest.approx(80.0)


def test_a_resumed_run_knows_the_time_left_at_once(clock: FakeClock) -> None:
    progress = SilentProgress(clock)
    progress.round(5, 7)
    assert progress.forecast.run_left() is None
    progress.expect({"train": 40.0, "explore": 10.0})
    assert progress.forecast.run_left() == pytest.approx(100.0)


def test_lines_are_plain_and_come_every_so_often(clock: FakeClock) -> None:
    progress, out = lines(clock, interval=15.0)
    with progress:
        progress.round(2, 12)
        with progress.stage("train", 240, unit="epochs") as advance:
            for _ in range(240):
                clock.now += 0.25
                advance(1, forces_rmse=0.0312345, member=3)
        progress.message("stopped: [red]budget[/red]")
    text = out.getvalue()
    assert "\x1b" not in text and "\r" not in text
    written = text.splitlines()
    assert len(written) == 1 + 3 + 1 + 1, "round, three of four quarters of a minute, the end, the message"
    assert written[0] == "[00:00:00] round 3/12"
    assert written[1] == "[00:00:15] round 3/12  train 60/240 epochs  forces_rmse 0.0312 eV/A  member 3  45 s left"
    assert written[-2] == "[00:01:00] round 3/12  train: 240 epochs in 1 min 00 s  forces_rmse 0.0312 eV/A  member 3"
    assert written[-1].endswith("stopped: [red]budget[/red]")


def test_a_broken_stage_says_so(clock: FakeClock) -> None:
    progress, out = lines(clock)
    with pytest.raises(KeyboardInterrupt), progress.stage("label", 10, unit="labels") as advance:
        advance(2)
        clock.now += 61
        raise KeyboardInterrupt
    assert "label: 2 labels interrupted after 1 min 01 s" in out.getvalue()


def test_nested_stages(clock: FakeClock) -> None:
    progress, out = lines(clock)
    progress.round(0, 2)
    with progress.stage("label", 1):
        clock.now += 5
        with progress.stage("retry", 1):
            clock.now += 2
    progress.round(1, 2)
    assert progress.forecast.run_left() == pytest.approx(7.0), "an inner stage is part of the outer one"
    assert out.getvalue().count(" in ") == 2


def test_bars_show_rounds_stage_and_time_left(clock: FakeClock) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=140, color_system=None)
    with BarProgress(console, clock) as progress:
        progress.expect({"train": 60.0})
        progress.round(3, 12)
        with progress.stage("train", 300, unit="epochs") as advance:
            advance(100)
            clock.now = 10.0
            advance(100, forces_rmse=0.02)
            progress._bars.refresh()
        progress.message("round 4 done")
        progress._bars.refresh()
        assert len(progress._bars.tasks) == 1, "a finished stage leaves the screen"
    text = out.getvalue()
    for part in ("4/12", "200/300 epochs", "10 s left", "at most 8 min 10 s left", "forces_rmse 0.02", "round 4 done"):
        assert part in text, part


def test_the_display_follows_the_terminal() -> None:
    assert isinstance(open_progress(console=Console(file=io.StringIO())), LineProgress)
    assert isinstance(open_progress(console=Console(file=io.StringIO(), force_terminal=True)), BarProgress)
    assert isinstance(open_progress("silent"), SilentProgress)
    dumb = Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "dumb"})
    assert isinstance(open_progress(console=dumb), LineProgress)


def test_all_displays_follow_the_protocol_and_silence_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    displays: list[Progress] = [open_progress("silent"), lines(FakeClock())[0]]
    for progress in displays:
        progress.round(0, 1)
        with progress.stage("x") as advance:
            advance()
        progress.message("m")
    assert capfd.readouterr() == ("", "")


def test_reports_from_several_threads_are_all_counted(clock: FakeClock) -> None:
    progress = SilentProgress(clock)
    with progress.stage("label", 4000) as advance:
        threads = [threading.Thread(target=lambda: [advance(1) for _ in range(1000)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert progress.forecast.open[0].done == 4000


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min 00 s"), (190, "3 min 10 s"), (3599.7, "1 h 00 min"), (3900, "1 h 05 min")],
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text
