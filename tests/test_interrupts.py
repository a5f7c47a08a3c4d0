"""Ctrl-C and SIGTERM: once in good order, twice at once, and never a traceback."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from almlip_jax.interrupts import _TOGETHER

PROGRAM = """
import sys, time
from almlip_jax import cli

@cli.app.command()
def slow():
    try:
        print("at work", flush=True)
        time.sleep(60)
    finally:
        print("closing", flush=True)
        time.sleep({closing})
        print("closed", flush=True)

sys.argv = ["almlip", "slow"]
cli.main()
"""


def _hearing() -> None:
    """A child hears Ctrl-C even where these tests run in the background of a shell, and do not."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def ended_by(signals: list[signal.Signals], closing: float, *, late: bool = False) -> tuple[int, str, str]:
    """Exit status, what is left of standard output, and standard error of a command that gets some signals.

    ``late``: those after the first one come once that has been heard, and not at the same time any more.
    """
    command = [sys.executable, "-c", PROGRAM.format(closing=closing)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, preexec_fn=_hearing, **pipes) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "at work\n"
        process.send_signal(signals[0])
        heard = process.stdout.readline() if late else None
        time.sleep(late * (_TOGETHER + 0.2))
        for another in signals[1:]:
            process.send_signal(another)
        assert (heard or process.stdout.readline()) == "closing\n"
        out, err = process.communicate(timeout=120)
    return process.returncode, out, err


@pytest.mark.parametrize(("one", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_first_signal_ends_the_work_in_good_order(one, status):
    assert ended_by([one], 0.1) == (status, "closed\n", "almlip: interrupted\n")


@pytest.mark.parametrize(("second", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_one_ends_it_at_once(second, status):
    code, out, err = ended_by([signal.SIGINT, second], 60, late=True)
    assert (code, out) == (status, "") and err == "almlip: interrupted again; stopped at once\n"


STARTING = """
import os, signal, sys

class Slow:  # stands where a slow package is found
    def find_spec(self, name, path, target=None):
        if name == "typer":
            os.kill(os.getpid(), signal.{name})

sys.meta_path.insert(0, Slow())
from almlip_jax.__main__ import main
sys.argv = ["almlip", "--version"]
main()
"""


@pytest.mark.parametrize(("one", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_the_program_is_imported_is_one_sentence(one, status):
    command = [sys.executable, "-c", STARTING.format(name=one.name)]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=_hearing, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (status, "", "almlip: interrupted\n")


def test_what_comes_twice_at_the_same_time_is_one_signal():
    assert ended_by([signal.SIGINT, signal.SIGINT], 0.5) == (130, "closed\n", "almlip: interrupted\n")
