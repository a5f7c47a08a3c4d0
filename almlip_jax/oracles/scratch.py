"""Folders that label sources write files into: made when first needed, and gone with the process that needed them.

A worker process is told its folder by its starter (`FOLDER`), which removes it when the worker ends, however it ended.
The folder's name holds the family of the worker, so that what was left where both were killed is found, and removed by
the next program that labels on this machine.
"""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
import weakref
from hashlib import sha256
from pathlib import Path
from uuid import uuid4

from almlip_jax.process_table import birth, is_alive, marked

FAMILY = "ALMLIP_LABEL_FAMILY"
"""Variable of the environment that a worker and all it starts have in common."""

FOLDER = "ALMLIP_LABEL_FOLDER"
"""Variable with the folder that a worker may write into; its starter removes it."""

_PREFIX = "almlip-label-"


def folder_of(family: str, below: Path | None = None) -> Path:
    """Where the worker of a family may write, in a folder or in that of temporary files; not made here."""
    return (below or Path(tempfile.gettempdir())).absolute() / f"{_PREFIX}{_here()}-{family}"


def remove_left_behind(below: Path | None = None) -> None:
    """Removes the folders that workers and scripts of this machine left behind when they were killed."""
    if not (here := _here()):
        return
    for folder in (below or Path(tempfile.gettempdir())).glob(f"{_PREFIX}{here}-*"):
        if not _is_at_work(folder.name.rpartition("-")[2]):
            remove(folder)


def remove(folder: Path) -> None:
    """Removes a folder as far as it can be; there may be none."""
    shutil.rmtree(folder, ignore_errors=True)


class Scratch:
    """A folder for files of a label source, that of the worker where this is one.

    Args:
        below: the folder that it is made in where this is no worker; by default that of temporary files.
    """

    def __init__(self, below: Path | None = None) -> None:
        self._below = below
        self._folder: Path | None = None

    @property
    def folder(self) -> Path:
        """The folder, made when it is first asked for."""
        if self._folder is None:
            given = os.environ.get(FOLDER)
            self._folder = Path(given) if given else self._own()
            self._folder.mkdir(parents=True, exist_ok=True)
        return self._folder

    def _own(self) -> Path:
        folder = folder_of(f"{os.getpid()}.{birth(os.getpid()) or ''}.{uuid4().hex[:8]}", self._below)
        weakref.finalize(self, remove, folder)
        return folder


def _is_at_work(owner: str) -> bool:
    """Whether a folder's owner lives: the family of a worker, or number and start time of a process."""
    pid, _, born = owner.partition(".")
    if not born:
        return bool(marked(FAMILY, owner))
    born = born.partition(".")[0]
    return is_alive(int(pid), int(born) if born else None)


def _here() -> str:
    """What tells this machine, and this namespace of processes on it, from others; empty where there is no /proc."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
    return sha256(f"{platform.node()} {namespace}".encode()).hexdigest()[:12]
