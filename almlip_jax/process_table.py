"""Processes of this machine as /proc shows them: whether one lives, and which belong together.

Where there is no /proc (macOS), a process is known by its number alone, and only process groups belong together.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path

_PROC = Path("/proc")
_PASSES = 20  # over the table, before processes that keep starting others are given up


def state_of(pid: int) -> tuple[str, int, int] | None:
    """Status letter (Z: ended, not yet waited for), parent, and start time in ticks since boot; None if not known."""
    try:
        stat = (_PROC / str(pid) / "stat").read_text()
    except (OSError, ValueError):
        return None
    fields = stat.rpartition(")")[2].split()  # the name before it may hold blanks
    return fields[0], int(fields[1]), int(fields[19])


def birth(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot; None where the system does not tell."""
    state = state_of(pid)
    return None if state is None else state[2]


def is_alive(pid: object, born: object = None) -> bool:
    """Whether a process lives on this machine, and is not a later one with the same number.

    Args:
        pid: its number.
        born: its start time as `birth` gave it, or None where that is not known.
    """
    if not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # alive, of another user
    state = state_of(pid)
    if state is None:
        return True
    return state[0] not in "ZX" and born in (None, state[2])


def descendants(pid: int) -> set[int]:
    """Children of a process, their children, and so on, whatever sessions they have made."""
    children: dict[int, list[int]] = {}
    for one in _pids():
        if (state := state_of(one)) is not None:
            children.setdefault(state[1], []).append(one)
    found: set[int] = set()
    waiting = [pid]
    while waiting:
        new = [child for child in children.get(waiting.pop(), []) if child not in found]
        found.update(new)
        waiting.extend(new)
    return found


def marked(name: str, value: str) -> set[int]:
    """Living processes with this variable in the environment they were started with; children inherit it."""
    wanted = f"{name}={value}".encode()
    return {pid for pid in _pids() if wanted in _environment(pid) and is_alive(pid)}


def variable_of(pid: int, name: str) -> str | None:
    """A variable of the environment that a process was started with; None where there is none, or no way to know."""
    start = f"{name}=".encode()
    return next((os.fsdecode(entry[len(start) :]) for entry in _environment(pid) if entry.startswith(start)), None)


def command_of(pid: int) -> str:
    """The command line of a process; empty where it cannot be read."""
    try:
        return os.fsdecode((_PROC / str(pid) / "cmdline").read_bytes().replace(b"\0", b" "))
    except OSError:
        return ""


def kill_all(find: Callable[[], set[int]]) -> None:
    """Kills all processes that a function finds, but not this one, until it finds no more."""
    for _ in range(_PASSES):
        found = {pid for pid in find() - {os.getpid()} if is_alive(pid)}
        if not found:
            return
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)


def _pids() -> list[int]:
    try:
        return [int(entry) for entry in os.listdir(_PROC) if entry.isdigit()]
    except OSError:
        return []


def _environment(pid: int) -> list[bytes]:
    try:
        return (_PROC / str(pid) / "environ").read_bytes().split(b"\0")
    except OSError:
        return []
