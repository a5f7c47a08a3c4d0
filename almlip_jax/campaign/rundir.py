"""The run directory: where everything of a campaign lies, and how it is written so that a kill never damages it.

Layout (rounds are numbered from 0, folders have at least three digits)::

    run/
      config.yaml            resolved config
      versions.json          package versions, git commit, devices
      state.json             round, stage, finished, reason, converged, labels, ...
      labels.db              label store (ASE SQLite database)
      measured.json          shapes and capacities chosen by measurement
      test.extxyz            labelled test frames, info["group"]
      metrics.csv            one row a round
      comparison.csv         optional: learning curves of other selectors, to be drawn beside this one; columns
                             selector, labels, forces_rmse_<group>, ... (optionally seed)
      report.html
      lock                   the process that works here, while it does
      rounds/000/
          dataset.extxyz     labelled structures used for training, in order
          training.csv       one row an epoch
          unfinished_training/  state of the training while it is under way
          potential/         saved Potential
          evaluation.json    test metrics
          test_predictions.npz  forces_true [n, 3], forces_pred [n, 3], force_total [n], group [n]; energy_true [s],
                             energy_pred [s], energy_total [s], natoms [s]
          starts.extxyz      start structure of each walker
          walkers.npz        sigma and temperature along each walker, thresholds of the gate, recorded frames
          walkers/000.extxyz thinned trajectory of each walker
          pool.extxyz        recorded candidates with their scores
          batch.extxyz       selected candidates, in order
          labelled.extxyz    those that got labels

Every file is written to a temporary name beside its final one, flushed to the disk and renamed, so that a reader sees
the old content or the new one and nothing else.  This module needs no jax, so that ``almlip status`` is quick.
"""

from __future__ import annotations

import csv
import errno
import fcntl
import importlib.metadata
import io
import json
import math
import os
import platform
import re
import socket
import subprocess
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from almlip_jax.errors import InputError

Cell: TypeAlias = str | int | float | bool | None
"""What a CSV field may hold."""

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
    "parsl",
)
"""Distributions whose versions are written into a run."""

_PARTIAL = ".partial"


# ----------------------------------------------------------------------------------------------------------- places


@dataclass(frozen=True)
class RoundDirectory:
    """The files of one round.

    Attributes:
        path: its folder.
        index: the number of the round, from 0.
    """

    path: Path
    index: int

    @property
    def dataset(self) -> Path:
        """Labelled structures used for training in this round, in order (extxyz)."""
        return self.path / "dataset.extxyz"

    @property
    def training(self) -> Path:
        """One row an epoch: losses and errors (CSV)."""
        return self.path / "training.csv"

    @property
    def unfinished_training(self) -> Path:
        """State of a training that is under way; gone when its potential is there."""
        return self.path / "unfinished_training"

    @property
    def potential(self) -> Path:
        """The saved `Potential` (a folder)."""
        return self.path / "potential"

    @property
    def evaluation(self) -> Path:
        """Errors and calibration on the test set (JSON)."""
        return self.path / "evaluation.json"

    @property
    def test_predictions(self) -> Path:
        """Predicted and true energies and forces on the test set (npz; keys in the module's docstring)."""
        return self.path / "test_predictions.npz"

    @property
    def starts(self) -> Path:
        """Start structure of each walker, and what became of its relaxation (extxyz)."""
        return self.path / "starts.extxyz"

    @property
    def walkers(self) -> Path:
        """Committee scores and temperature along every walker (npz)."""
        return self.path / "walkers.npz"

    @property
    def trajectories(self) -> Path:
        """The folder of the walkers' trajectories."""
        return self.path / "walkers"

    def trajectory(self, walker: int) -> Path:
        """The thinned trajectory of a walker (extxyz)."""
        return self.trajectories / f"{walker:03d}.extxyz"

    @property
    def pool(self) -> Path:
        """Recorded candidates with their scores (extxyz)."""
        return self.path / "pool.extxyz"

    @property
    def batch(self) -> Path:
        """Selected candidates, best first (extxyz)."""
        return self.path / "batch.extxyz"

    @property
    def labelled(self) -> Path:
        """Selected candidates that got labels (extxyz)."""
        return self.path / "labelled.extxyz"

    def create(self) -> RoundDirectory:
        """Makes the folder where it does not exist yet."""
        _make_folder(self.path)
        return self


@dataclass(frozen=True, init=False)
class WorkDirectory:
    """A folder in which one process at a time works, with what every run leaves: its config and versions.

    Attributes:
        path: the folder; a string or a path may be given.
    """

    path: Path

    def __init__(self, path: str | os.PathLike[str]) -> None:
        object.__setattr__(self, "path", Path(path))

    @property
    def config(self) -> Path:
        """The resolved config (YAML)."""
        return self.path / "config.yaml"

    @property
    def versions(self) -> Path:
        """Package versions, git commit and devices (JSON); written by `write_versions`."""
        return self.path / "versions.json"

    @property
    def lock_file(self) -> Path:
        """Names the process that works here, while it does (JSON)."""
        return self.path / "lock"

    def create(self) -> Self:
        """Makes the folder where it does not exist yet."""
        _make_folder(self.path)
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
        except (OSError, ValueError):
            return None  # a lock is written atomically: an unreadable one names nobody who could be asked
        return owner if isinstance(owner, dict) else None

    def is_running(self) -> bool:
        """Whether a live process (or one on another host, which cannot be asked) holds the lock."""
        owner = self.lock_owner()
        return owner is not None and (owner.get("host") != socket.gethostname() or _alive(owner))

    def _remove_leftovers(self) -> None:
        """Removes temporary files of processes that no longer live (a reader may be writing its report just now)."""
        for leftover in self.path.rglob(f".*{_PARTIAL}*"):
            pid = leftover.name.partition(_PARTIAL)[0].rpartition(".")[2]
            if not (pid.isdigit() and _alive({"pid": int(pid)})):
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


class RunDirectory(WorkDirectory):
    """The files of a campaign; see the module's docstring for the layout."""

    @property
    def state(self) -> Path:
        """Where the campaign stands (JSON)."""
        return self.path / "state.json"

    @property
    def labels(self) -> Path:
        """The label store (ASE SQLite database)."""
        return self.path / "labels.db"

    @property
    def measured(self) -> Path:
        """Shapes and capacities chosen by measurement (JSON)."""
        return self.path / "measured.json"

    @property
    def test(self) -> Path:
        """Labelled test frames (extxyz)."""
        return self.path / "test.extxyz"

    @property
    def metrics(self) -> Path:
        """One row a round (CSV)."""
        return self.path / "metrics.csv"

    @property
    def comparison(self) -> Path:
        """Learning curves of other selectors, optional (CSV)."""
        return self.path / "comparison.csv"

    @property
    def report(self) -> Path:
        """The report (HTML)."""
        return self.path / "report.html"

    @property
    def rounds_folder(self) -> Path:
        """The folder of the rounds."""
        return self.path / "rounds"

    def round(self, index: int) -> RoundDirectory:
        """The files of a round, whether it exists yet or not."""
        return RoundDirectory(self.rounds_folder / f"{index:03d}", index)

    def rounds(self) -> list[RoundDirectory]:
        """The rounds that have a folder, in order; the last one may be unfinished."""
        if not self.rounds_folder.is_dir():
            return []
        names = (entry.name for entry in self.rounds_folder.iterdir() if entry.is_dir())
        return [self.round(index) for index in sorted(int(name) for name in names if re.fullmatch(r"\d{3,}", name))]

    def create(self) -> Self:
        """Makes the folder and that of the rounds where they do not exist yet."""
        _make_folder(self.rounds_folder)
        return self

    def require(self) -> RunDirectory:
        """Checks that this is a run directory.

        Raises:
            InputError: there is no such folder, or nothing in it that a campaign writes.
        """
        if not self.path.is_dir():
            raise InputError(f"there is no run directory at {self.path}; give the folder that 'almlip run' wrote.")
        if not any(file.exists() for file in (self.config, self.state, self.metrics, self.rounds_folder)):
            raise InputError(f"{self.path} holds no campaign (no config.yaml, state.json or rounds/).")
        return self


# ---------------------------------------------------------------------------------------------------------- writing


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path`` that takes its place, durably, when the context ends well.

    The temporary name keeps the suffix, so that writers that choose a format by it work.  After an exception the old
    file is untouched and the temporary one removed.

    Raises:
        InputError: the disk is full, or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{_PARTIAL}{path.suffix}")
    try:
        _make_folder(path.parent)
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
        _flush(path.parent)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        try:
            temporary.unlink(missing_ok=True)
        except OSError:  # the first error says more, and a leftover is removed with the next lock
            pass


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically (UTF-8)."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Writes a JSON file atomically; numpy values become plain ones, and NaN and infinities (not JSON) null."""
    write_text(path, json.dumps(plain(data), indent=2, allow_nan=False) + "\n")


def write_csv(path: Path, rows: Sequence[Mapping[str, Cell]]) -> None:
    """Writes a CSV file atomically.

    Args:
        path: the file.
        rows: one mapping a line; the columns are all keys in the order they first appear.  Floats are written so that
            they read back exactly; None and absent keys become empty fields.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: _field(value) for key, value in row.items()})
    write_text(path, buffer.getvalue())


def append_row(path: Path, row: Mapping[str, Cell], *, key: str | None = None) -> None:
    """Adds a line to a CSV file, rewriting it atomically; makes the file where there is none.

    Args:
        path: the file.
        row: the line.
        key: a column that names the line: one with the same value there is replaced in its place, so that a resumed
            run may write the line of a round again.
    """
    rows: list[Mapping[str, Cell]] = list(read_csv(path)) if path.exists() else []
    places = [i for i, old in enumerate(rows) if key is not None and old.get(key) == row[key]]
    if places:
        rows[places[0]] = row
    else:
        rows.append(row)
    write_csv(path, rows)


def write_npz(path: Path, arrays: Mapping[str, ArrayLike]) -> None:
    """Writes arrays (numbers, booleans, strings; no objects) atomically as compressed npz.

    Raises:
        TypeError: an array holds Python objects, which could not be read back safely.
    """
    ready = {name: np.asarray(value) for name, value in arrays.items()}
    for name, array in ready.items():
        if array.dtype.hasobject:
            raise TypeError(f"array '{name}' holds Python objects and cannot go into {path.name}.")
    with replacing(path) as temporary, temporary.open("wb") as file:
        _save_arrays(file, ready)


# ---------------------------------------------------------------------------------------------------------- reading


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        InputError: the file is missing, unreadable, or not a JSON object.
    """
    text = _read_text(path)
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise _damaged(path, f"not valid JSON, line {error.lineno}") from error
    if not isinstance(data, dict):
        raise _damaged(path, "not a JSON object")
    return data


def read_csv(path: Path) -> list[dict[str, Cell]]:
    """Reads a CSV file with a header; integers, floats, true/false and empty fields (None) get their types back.

    Raises:
        InputError: the file is missing, unreadable, empty, or has lines longer or shorter than its header.
    """
    reader = csv.DictReader(io.StringIO(_read_text(path)))
    if not reader.fieldnames:
        raise _damaged(path, "no header line")
    rows: list[dict[str, Cell]] = []
    for row in reader:
        if None in row or None in row.values():
            raise _damaged(path, f"line {reader.line_num} does not fit the header")
        rows.append({str(name): _value(text) for name, text in row.items()})
    return rows


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Reads all arrays of an npz file.

    Raises:
        InputError: the file is missing, unreadable or damaged, or holds Python objects.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except FileNotFoundError as error:
        raise _missing(path) from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        raise _damaged(path, "not a readable npz file") from error


def plain(data: Any) -> Any:
    """A copy of nested data with numpy values and paths as plain Python ones and non-finite floats as None."""
    if isinstance(data, Mapping):
        return {str(key): plain(value) for key, value in data.items()}
    if isinstance(data, (list, tuple, set, frozenset)):
        return [plain(value) for value in data]
    if isinstance(data, (np.ndarray, np.generic)):
        return plain(data.tolist())
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, os.PathLike):
        return os.fspath(data)
    return data


# --------------------------------------------------------------------------------------------------------- versions


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


def write_versions(run: WorkDirectory, versions: Mapping[str, Any] | None = None) -> None:
    """Writes ``versions.json``; what an earlier session of the same run used is kept under ``earlier`` if it differs.

    Args:
        run: the run directory.
        versions: what to write; default `collect_versions`.
    """
    now: dict[str, Any] = plain(collect_versions() if versions is None else versions)
    earlier: list[Any] = []
    if run.versions.exists():
        before = read_json(run.versions)
        earlier = before.pop("earlier", [])
        if before != now:
            earlier = [*earlier, before]
    write_json(run.versions, {**now, "earlier": earlier} if earlier else now)


# ------------------------------------------------------------------------------------------------------------ inner


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_write(path, error) from error


def _flush(path: Path) -> None:
    """Forces a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _save_arrays(file: io.BufferedWriter, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes npz members one by one, so that an array may have any name (`numpy.savez` reserves ``file``)."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            # the fixed date of ZipInfo keeps equal arrays equal files
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def _cannot_write(path: Path, error: OSError) -> InputError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return InputError(f"cannot write {path}: the disk is full; free some space and resume the run.")
    return InputError(f"cannot write {path}: {error.strerror or error}.")


def _missing(path: Path) -> InputError:
    return InputError(f"{path} is missing; the run has not come so far, or the file was removed.")


def _damaged(path: Path, why: str) -> InputError:
    return InputError(f"cannot read {path}: {why}; restore the file from a copy or delete it.")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise _missing(path) from error
    except UnicodeDecodeError as error:
        raise _damaged(path, "not a text file") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}.") from error


def _field(value: Cell) -> str:
    if value is None:
        return ""
    if isinstance(value, (bool, np.bool_)):
        return "true" if value else "false"
    if isinstance(value, (float, np.floating)):
        return repr(float(value))
    return str(value)


def _value(text: str) -> Cell:
    if text == "":
        return None
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


@contextmanager
def _short_exclusion(folder: Path) -> Iterator[None]:
    """Lets one process at a time read and change the lock file of a folder.

    A kernel lock alone would not do for the whole run: worker processes inherit it and outlive a killed parent.
    """
    try:
        descriptor = os.open(folder / ".lock.guard", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise _cannot_write(folder, error) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _this_process() -> dict[str, Any]:
    pid = os.getpid()
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return {"pid": pid, "host": socket.gethostname(), "born": _birth(pid), "since": since}


def _alive(owner: Mapping[str, Any]) -> bool:
    """Whether the process that a lock names lives on this host, and is not a later one with the same number."""
    pid = owner.get("pid")
    if not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # alive, of another user
    state = _process_state(pid)
    if state is None:
        return True
    status, born = state
    return status not in "ZX" and owner.get("born") in (None, born)


def _birth(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot; None where the system does not tell."""
    state = _process_state(pid)
    return None if state is None else state[1]


def _process_state(pid: int) -> tuple[str, int] | None:
    """Status letter (Z: ended, not yet waited for) and start time of a process; None where /proc does not tell."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()  # the name before it may hold blanks
    return fields[0], int(fields[19])


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
