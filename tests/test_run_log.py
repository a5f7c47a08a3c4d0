"""The log of a folder: what the user is told stands there once, with times, session after session."""

from __future__ import annotations

import errno
import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from almlip_jax.errors import InputError
from almlip_jax.progress import LineProgress
from almlip_jax.run_log import logged


def session(path: Path, error: BaseException | None = None) -> str:
    """A session as a campaign has it; what the user saw."""
    seen = io.StringIO()
    with logged(LineProgress(Console(file=seen, width=200)), path) as log:
        log.round(0, 3)
        with log.stage("train", 4, unit="steps") as advance:
            advance(2, forces_rmse=float("nan"))
            advance(2, forces_rmse=0.5)
            if error is not None:
                raise error
        log.message("one label failed:\nnot converged")
    return seen.getvalue()


def test_sessions_follow_each_other_and_nothing_is_told_twice(tmp_path: Path) -> None:
    path = tmp_path / "run.log"
    seen = session(path)
    assert seen.count("one label failed") == 1 and seen.count("train:") == 1, seen
    for error in (InputError("a.extxyz is empty; give another."), RuntimeError("a fault"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            session(path, error)
    lines = path.read_text().splitlines()
    dated = [line for line in lines if re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ", line)]
    said = [line[21:] for line in dated]
    assert said[1:5] == [
        "round 1/3",
        "train: 4 steps in 0 s  forces_rmse 0.5 eV/A",
        "one label failed: not converged",
        "session ended",
    ]
    assert sum(line.startswith("session begins: almlip-jax") for line in said) == 4
    assert sum("train: 4 steps interrupted after 0 s" in line for line in said) == 3
    assert "session ended by an error: a.extxyz is empty; give another." in said
    assert "session ended by an error: RuntimeError: a fault" in said
    assert said[-1] == "session interrupted (KeyboardInterrupt)"
    assert lines.count("Traceback (most recent call last):") == 1, "of the fault alone"


def test_a_full_disk_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    assert "one label failed" in session(tmp_path / "run.log")


def test_no_validation_is_a_dash(tmp_path: Path) -> None:
    seen = io.StringIO()
    with logged(LineProgress(Console(file=seen, width=200)), tmp_path / "run.log") as log:
        with log.stage("train", unit="steps") as advance:
            advance(1, forces_rmse=float("nan"))
    for text in (seen.getvalue(), (tmp_path / "run.log").read_text()):
        assert "nan" not in text and "forces_rmse -" in text
