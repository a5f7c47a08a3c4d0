"""A folder that one process at a time works in: its lock, its config, and the versions it was made with."""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from almlip_jax.errors import InputError
from almlip_jax.files import PARTIAL, cannot_write, make_folder, plain, read_json, understood, write_json
from almlip_jax.process_table import birth, is_alive

PACKAGES: tuple[str, ...] = (
    "almlip-jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "e3nn-jax",
    "jax-md",
    "numpy",
    "scipy",
    "ase",
    "h5py",
    "vesin",
    "pydantic",
    "tblite",
    "pyscf",
    "nequix",
    "parsl",
)
"""Distributions whose versions are written into a run."""

_GUARD = ".lock.guard"


class Inside:
    """What lies under a name in the folder of an object, its ``path``: ``config = Inside("config.yaml")``."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, place: Any, kind: type) -> Path:
        return place.path / self.name


class WorkDirectory:
    """A folder in which one process at a time works, with what every run leaves: its config and versions.

    Attributes:
        path: the folder; a string or a path may be given.
    """

    path: Path

    config = Inside("config.yaml")
    """The resolved config (YAML)."""
    versions = Inside("versions.json")
    """Package versions, git commit and devices (JSON); written by `write_versions`."""
    lock_file = Inside("lock")
    """Names the process that works here, while it does (JSON)."""
    log = Inside("run.log")
    """What progress reported, session after session (text); written by `run_log.logged`."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        object.__setattr__(self, "path", Path(path))

    def is_empty(self) -> bool:
        """Whether nothing lies here, or only what a process leaves that could not begin, or was killed as it did."""
        if not self.path.is_dir():
            return True
        others = (file.name for file in self.path.iterdir() if PARTIAL not in file.name)
        return not set(others) - {self.lock_file.name, _GUARD, self.log.name}

    def create(self) -> Self:
        """Makes the folder where it does not exist yet."""
        make_folder(self.path)
        return self

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps every other process from working in this directory while the context lasts.

        The lock of a process that no longer lives on this host is taken over, and temporary files that it left behind
        are removed.

        Raises:
            InputError: another live process holds the lock, or a process on another host, which cannot be asked.
        """
        self.create()
        mine = _this_process()
        with _short_exclusion(self.path):
            self._refuse_if_held(self.lock_owner())
            self._remove_leftovers()
            write_json(self.lock_file, mine)
        try:
            yield
        finally:
            with _short_exclusion(self.path):
                if self.lock_owner() == mine:
                    self.lock_file.unlink(missing_ok=True)

    def lock_owner(self) -> dict[str, Any] | None:
        """What the lock file says (pid, host, born, since), or None without a readable one."""
        try:
            owner = json.loads(self.lock_file.read_text())
        except (OSError, ValueError, RecursionError):
            return None  # a lock is written atomically: an unreadable one names no process that could be asked
        return owner if isinstance(owner, dict) else None

    def is_running(self) -> bool:
        """Whether a live process (or one on another host, which cannot be asked) holds the lock."""
        owner = self.lock_owner()
        return owner is not None and (owner.get("host") != socket.gethostname() or _alive(owner))

    def _remove_leftovers(self) -> None:
        """Removes temporary files of processes that no longer live (a reader may be writing its report just now).

        Folders too: parameters of a potential are one, until they are whole.
        """
        for leftover in list(self.path.rglob(f".*{PARTIAL}*")):
            pid = leftover.name.partition(PARTIAL)[0].rpartition(".")[2]
            if pid.isdigit() and _alive({"pid": int(pid)}):
                continue
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)

    def _refuse_if_held(self, owner: Mapping[str, Any] | None) -> None:
        if owner is None:
            return
        pid, host, since = owner.get("pid"), owner.get("host"), owner.get("since")
        if host != socket.gethostname():
            raise InputError(
                f"{self.path} is in use by process {pid} on {host} since {since}; if that process has ended, "
                f"delete {self.lock_file} and try again."
            )
        if _alive(owner):
            raise InputError(
                f"{self.path} is in use by process {pid} since {since}; wait for it, stop it, or choose another "
                "run directory."
            )


# ------------------------------------------------------------------------------------------------------------- versions


def collect_versions() -> dict[str, Any]:
    """Versions of Python, the packages, the git commit of the source if any, the platform and the jax devices."""
    import jax  # only here: reading a run directory must stay quick

    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "git_commit": _git_commit(Path(__file__).parent),
        "backend": jax.default_backend(),
        "devices": [device.device_kind for device in jax.devices()],
    }


def write_versions(run: WorkDirectory, versions: Mapping[str, Any] | None = None) -> str | None:
    """Writes ``versions.json``; what an earlier session of the same run used is kept under ``earlier`` if it differs.

    Args:
        run: the run directory.
        versions: what to write; default `collect_versions`.

    Returns:
        a sentence where the session before worked on other devices, which changes the last bits of results.
    """
    now: dict[str, Any] = plain(collect_versions() if versions is None else versions)
    earlier: list[Any] = []
    then: list[str] = []
    if run.versions.exists():
        before = read_json(run.versions)
        with understood(run.versions):
            earlier = list(before.pop("earlier", []))
            then = [str(kind) for kind in before.get("devices") or []]
        if before != now:
            earlier = [*earlier, before]
    write_json(run.versions, {**now, "earlier": earlier} if earlier else now)
    here = now.get("devices")
    if not then or then == here or here is None:
        return None
    return f"works on {_counted(here)}, on {_counted(then)} before: from here on results differ in their last bits."


# ---------------------------------------------------------------------------------------------------------------- inner


def _counted(devices: Sequence[str]) -> str:
    """``2 devices (cpu)``."""
    kinds = ", ".join(dict.fromkeys(map(str, devices)))
    return f"{len(devices)} device{'s' if len(devices) > 1 else ''} ({kinds})"


@contextmanager
def _short_exclusion(folder: Path) -> Iterator[None]:
    """Lets one process at a time read and change the lock file of a folder.

    A kernel lock alone would not do for the whole run: worker processes inherit it and outlive a killed parent.
    """
    try:
        descriptor = os.open(folder / _GUARD, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise cannot_write(folder, error) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _this_process() -> dict[str, Any]:
    pid = os.getpid()
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return {"pid": pid, "host": socket.gethostname(), "born": birth(pid), "since": since}


def _alive(owner: Mapping[str, Any]) -> bool:
    """Whether the process that a lock names lives on this host, and is not a later one with the same number."""
    return is_alive(owner.get("pid"), owner.get("born"))


def _git_commit(folder: Path) -> str | None:
    """The commit of the checkout that holds a folder, with ``+changes`` where files differ from it."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    # an installed copy may lie inside somebody else's repository: its commit would mean nothing
    if "site-packages" in folder.parts or (commit := git("rev-parse", "HEAD")) is None:
        return None
    return f"{commit}+changes" if git("status", "--porcelain", "--", str(folder.parent)) else commit
