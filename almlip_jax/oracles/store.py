"""The label store: every label ever paid for, and every failed one, in ASE's SQLite database.

One row is one label, under its identity (the row's ``unique_id``, which SQLite keeps unique).  The row is written as
*pending* before the calculation starts and completed when the result lands, so rows stand in the order of the requests.
Results arrive through a spool folder next to the database; one process at a time writes.  The file opens with
``ase db``.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import sqlite3
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, get_args

import numpy as np
from ase import Atoms
from ase.calculators.calculator import all_properties

from almlip_jax.errors import InputError
from almlip_jax.oracles.base import Label, bare
from almlip_jax.oracles.database import is_unfinished, make_database
from almlip_jax.oracles.spool import clear_reservations, in_spool, waiting_labels
from almlip_jax.targets import further_targets

if TYPE_CHECKING:
    from ase.db.row import AtomsRow  # imported where it is used: a label worker, which opens no store, starts sooner

Status = Literal["pending", "done", "failed"]

Decoded = TypeVar("Decoded")

_FURTHER = "further"
"""Where a row keeps what of a label ASE has no column for."""


class StorageError(InputError):
    """The label store cannot be read or written; the message says why and what to do."""


@dataclass(frozen=True)
class StoredLabel:
    """One row of the store.

    Attributes:
        atoms: the structure; carries the label in a `SinglePointCalculator` unless the label failed.
        label: the label, or the reason there is none.
        provenance: why it was asked for: ``purpose``, and what else the caller gave (campaign, round, walker, step,
            score, selector, ...).
    """

    atoms: Atoms
    label: Label
    provenance: Mapping[str, Any]


@dataclass
class _Row:
    """What is kept in memory of a row."""

    id: int
    status: Status
    purpose: str
    calls: int
    seconds: float
    cut_off: int = 0
    system: str = ""


class LabelStore:
    """The label store in a file; a context manager.

    Opening it for writing takes what lies in the spool into the database, so that labels computed for a process that
    was killed are found.

    Args:
        path: of the database; made where it does not exist.
        readonly: opens an existing store for reading only, also while another process writes.

    Raises:
        StorageError: another process writes to it, it is damaged, cannot be made, or does not exist (readonly).
    """

    def __init__(self, path: Path | str, *, readonly: bool = False) -> None:
        from ase.db import connect

        self.path = Path(path)
        self.spool = self.path.with_name(self.path.name + ".spool")
        self.readonly = readonly
        self._rows: dict[str, _Row] = {}
        self._lock: Any = None
        self._told: Callable[[], object] = lambda: None
        if readonly and not self.path.exists():
            raise StorageError(f"there is no label store at {self.path}.")
        with self._sentences():
            if not readonly:
                self.spool.mkdir(parents=True, exist_ok=True)
                self._lock = self._take_lock()
            try:
                if not readonly:
                    make_database(self.path)
                elif is_unfinished(self.path):
                    raise StorageError(f"the label store {self.path} holds nothing yet.")
                self._db = connect(self.path, type="db", use_lock_file=False)
                self._load()
                if not readonly:
                    self._take_in_spool()
            except BaseException:
                self.close()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets another process write."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def watch(self, tell: Callable[[], object]) -> None:
        """Calls a function after every transaction, so that what was paid can be counted elsewhere, too."""
        self._told = tell

    def __contains__(self, identity: str) -> bool:
        """Whether the label is done or failed."""
        return identity in self._rows and self._rows[identity].status != "pending"

    def get(self, identity: str) -> Label | None:
        """The label of this identity, done or failed; None where there is none yet."""
        return self.stored(identity).label if identity in self else None

    def stored(self, identity: str) -> StoredLabel:
        """The row of this identity, done or failed.

        Raises:
            KeyError: there is none.
        """
        if identity not in self:
            raise KeyError(identity)
        return self._read(self._rows[identity].id, _stored)

    def labelled(self, purpose: str | None = None, *, failed: bool = False) -> Iterator[StoredLabel]:
        """The rows that hold labels, in the order they were asked for.

        Args:
            purpose: only these, or all.
            failed: gives the failed labels instead.
        """
        wanted: Status = "failed" if failed else "done"
        for identity, row in sorted(self._rows.items(), key=lambda item: item[1].id):
            if row.status == wanted and purpose in (None, row.purpose):
                yield self.stored(identity)

    def select(self, **provenance: str | int) -> list[StoredLabel]:
        """The rows, done or failed, with these values of ``purpose``, ``round`` or ``trajectory``, in order."""
        self._require_there()
        with self._sentences():
            rows = list(self._db.select(sort="id", **provenance))
        with self._readable("a row"):
            return [_stored(row) for row in rows if row.status != "pending"]

    def count_calls(self, exclude_purpose: str | None = "test", *, without: Collection[str] = ()) -> int:
        """Calls of the label source that have been paid, those of failed labels and of retries included.

        Args:
            exclude_purpose: labels for this purpose do not count; None counts all.
            without: identities of labels that do not count either.
        """
        return sum(
            row.calls for name, row in self._rows.items() if row.purpose != exclude_purpose and name not in without
        )

    def count_seconds(self, *, without: Collection[str] = ()) -> float:
        """Seconds that labels have taken, without those of test sets and of some identities."""
        return sum(row.seconds for name, row in self._rows.items() if row.purpose != "test" and name not in without)

    def count_test_calls(self) -> int:
        """Calls that have been paid for test sets."""
        return self.count_calls(None) - self.count_calls()

    def summary(self) -> dict[str, dict[str, float]]:
        """For each purpose the numbers ``done``, ``failed``, ``pending``, ``calls``, ``cut_off`` and ``seconds``.

        What was cut off ended with its process before it gave a label, was made again, and is not among the calls.
        """
        table: dict[str, dict[str, float]] = {}
        for row in self._rows.values():
            entry = table.setdefault(row.purpose, dict(done=0, failed=0, pending=0, calls=0, cut_off=0, seconds=0.0))
            entry["cut_off"] += row.cut_off
            entry[row.status] += 1
            entry["calls"] += row.calls
            entry["seconds"] += row.seconds
        return table

    def calls_by_system(self) -> dict[str, dict[str, int]]:
        """Calls by the system that was noted with labels, then by purpose; those without one are left out."""
        table: dict[str, dict[str, int]] = {}
        for row in self._rows.values():
            if row.system:
                calls = table.setdefault(row.system, {})
                calls[row.purpose] = calls.get(row.purpose, 0) + row.calls
        return table

    def intend(self, requests: Sequence[tuple[str, Atoms, Mapping[str, Any]]]) -> None:
        """Writes rows for labels that are about to be made, all or none; what has a row already is left as it is.

        Args:
            requests: identity, structure and provenance of each; the provenance must hold ``purpose``.
        """
        new = {request[0]: request for request in requests if request[0] not in self._rows}
        self._write([(None, identity, bare(atoms), dict(given), None) for identity, atoms, given in new.values()])

    def land(self, labels: Sequence[Label]) -> None:
        """Completes pending rows, all or none, and clears them from the spool; a label that is there already stays.

        Raises:
            KeyError: a label was never intended.
        """
        fresh = {label.identity: label for label in labels if label.identity not in self}
        rows = []
        for label in fresh.values():
            row = self._rows[label.identity]
            atoms, provenance = self._read(row.id, _request)
            rows.append((row, label.identity, atoms, provenance, label))
        self._write(rows)
        for label in labels:
            (self.spool / f"{label.identity}.json").unlink(missing_ok=True)

    def record(self, entries: Sequence[tuple[Atoms, Mapping[str, Any], Label]]) -> None:
        """Writes complete rows, all or none; for labels whose structures were not known before they were made."""
        new = {label.identity: (atoms, given, label) for atoms, given, label in entries if label.identity not in self}
        self._write(
            [
                (self._rows.get(identity), identity, bare(atoms), dict(given), label)
                for identity, (atoms, given, label) in new.items()
            ]
        )

    def reopen_failed(self, among: Collection[str] | None = None) -> int:
        """Makes failed labels pending again, so that asking for them tries once more; returns how many.

        Their calls stay counted.

        Args:
            among: identities that are looked at; all where not given.
        """
        looked_at = self._rows if among is None else {one: self._rows[one] for one in among if one in self._rows}
        failed = [(identity, row) for identity, row in looked_at.items() if row.status == "failed"]
        rows = []
        for identity, row in failed:
            atoms, provenance = self._read(row.id, _request)
            rows.append((row, identity, atoms, provenance, None))
        self._write(rows)
        return len(failed)

    def _write(self, rows: Sequence[tuple[_Row | None, str, Atoms, dict[str, Any], Label | None]]) -> None:
        """Inserts or updates rows in one transaction, then in memory."""
        if not rows:
            return
        if self._lock is None:
            raise StorageError(f"the label store {self.path} is open for reading only.")
        from ase.db.core import now
        from ase.db.row import AtomsRow

        self._require_there()
        written: dict[str, _Row] = {}
        with self._sentences(), self._transaction() as database:
            for row, identity, atoms, provenance, label in rows:
                earlier = row or _Row(
                    0, "pending", str(provenance["purpose"]), 0, 0.0, 0, str(provenance.get("system", ""))
                )
                status: Status = "pending" if label is None else "done" if label.error is None else "failed"
                current = _Row(
                    earlier.id,
                    status,
                    earlier.purpose,
                    earlier.calls + (0 if label is None else label.calls),
                    earlier.seconds + (0.0 if label is None else label.seconds),
                    earlier.cut_off,
                    earlier.system,
                )
                entry = AtomsRow(atoms if label is None or label.error is not None else label.attach(atoms))
                entry["unique_id"], entry["ctime"], entry["user"] = identity, now(), None
                data = {
                    "provenance": _plain(provenance),
                    "charge": atoms.info["charge"],
                    "spin": atoms.info["spin"],
                    "error": None if label is None else label.error,
                }
                data |= _without_column(label)
                current.id = database.write(entry, _keys(current, provenance), data, id=earlier.id or None)
                written[identity] = current
        self._rows.update(written)
        self._told()

    def _require_there(self) -> None:
        """Refuses to go on with a file that is gone: SQLite would make an empty one in its place, without the rows.

        Raises:
            StorageError: it was removed or emptied since it was opened.
        """
        if not self.path.exists() or self.path.stat().st_size == 0:
            raise StorageError(
                f"the label store {self.path} was removed or emptied while it was in use; put it back, or start again "
                "without it (a campaign that is resumed takes labels from the files of its run)."
            )

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[Any]:
        try:
            with self._db as database:
                yield database
        finally:
            # Where even the commit fails, ASE leaves its connection open, with the transaction in it.
            if self._db.connection is not None:
                self._db.connection.close()
                self._db.connection = None

    def _load(self) -> None:
        query = "SELECT id, unique_id, key_value_pairs FROM systems"
        with self._db.managed_connection() as connection:
            for id, identity, encoded in connection.execute(query):
                with self._readable(f"row {id}"):
                    pairs = dict(json.loads(encoded))
                if "status" not in pairs:
                    raise StorageError(f"{self.path} is an ASE database but not a label store; name another file.")
                with self._readable(f"row {id}"):
                    self._rows[str(identity)] = _row(id, pairs)

    def _read(self, id: int, decode: Callable[[AtomsRow], Decoded]) -> Decoded:
        """What a row holds.

        Raises:
            StorageError: it cannot be read.
        """
        self._require_there()
        with self._sentences():
            with self._readable(f"row {id}"):
                return decode(self._db.get(id=id))

    @contextlib.contextmanager
    def _readable(self, what: str) -> Iterator[None]:
        """Turns what decoding a damaged row runs into, which may be anything, into a sentence."""
        try:
            yield
        except (sqlite3.Error, OSError, StorageError):
            raise
        except Exception as error:
            raise StorageError(
                f"{what} of the label store {self.path} is damaged ({type(error).__name__}: {error}); restore a copy "
                "of the store, or move it away: labels in the files of a run are taken from there when it is resumed."
            ) from error

    def _take_in_spool(self) -> None:
        self._note_cut_off(clear_reservations(self.spool))
        self.land([label for _, label in waiting_labels(self.spool, self._fits)])

    def take_in(self, identity: str) -> Label | None:
        """The label that another process has left in the spool for a pending row, now stored; None without one."""
        if not in_spool(self.spool, identity):
            return None
        for _, label in waiting_labels(self.spool, self._fits, f"{identity}.json"):
            self.land([label])
            return label
        return None

    def _fits(self, label: Label) -> bool | None:
        """Whether a label can be that of its row; None where it was not asked for."""
        row = self._rows.get(label.identity)
        if row is None:
            return None
        if label.error is not None or row.status != "pending":
            return True
        atoms, _ = self._read(row.id, _request)
        return label.forces is not None and label.forces.shape == (len(atoms), 3)

    def _note_cut_off(self, identities: Sequence[str]) -> None:
        """Counts calculations that ended with their processes, before they gave a label."""
        rows = []
        for identity in identities:
            row = self._rows.get(identity)
            if row is not None and row.status == "pending":
                atoms, provenance = self._read(row.id, _request)
                rows.append((replace(row, cut_off=row.cut_off + 1), identity, atoms, provenance, None))
        self._write(rows)

    def _take_lock(self) -> Any:
        lock = open(self.spool / "writer.lock", "w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.close()
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise StorageError(
                    f"another process is writing to the label store {self.path}; wait for it or stop it."
                ) from error
            raise
        return lock

    @contextlib.contextmanager
    def _sentences(self) -> Iterator[None]:
        """Turns what SQLite and the operating system say into sentences."""
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise storage_error(self.path, error) from error


def storage_error(path: Path, error: sqlite3.Error | OSError) -> StorageError:
    """What SQLite or the operating system reported about the store at a path, as a sentence that says what to do."""
    reason = str(error)
    if isinstance(error, OSError):
        reason = "disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else (error.strerror or reason)
    if "full" in reason:
        return StorageError(
            f"the disk is full, so labels cannot be written to {path}; free some space and resume "
            "(labels that are paid for are kept and will be taken in)."
        )
    if "locked" in reason:
        return StorageError(f"another process holds the label store {path}; wait for it or stop it, then resume.")
    if "not a database" in reason or "malformed" in reason:
        return StorageError(
            f"the label store {path} is damaged ({reason}); restore a copy of it, or move it away to start a new one "
            "(labels in the files of a run are taken from there when it is resumed)."
        )
    return StorageError(f"the label store {path} cannot be used: {reason}.")


def _keys(row: _Row, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a row that can be searched."""
    keys: dict[str, Any] = {"status": row.status, "purpose": row.purpose, "calls": row.calls, "seconds": row.seconds}
    if row.cut_off:
        keys["cut_off"] = row.cut_off
    if isinstance(provenance.get("round"), int):
        keys["round"] = provenance["round"]
    if row.system:
        keys["system"] = row.system
    if "trajectory" in provenance:
        keys["trajectory"] = provenance["trajectory"]
    return keys


def _plain(provenance: Mapping[str, Any]) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if isinstance(value, np.generic | np.ndarray):
            return value.tolist()
        return str(value)

    decoded: dict[str, Any] = json.loads(json.dumps(dict(provenance), default=plain))
    return decoded


def _row(id: int, pairs: Mapping[str, Any]) -> _Row:
    status = pairs["status"]
    if status not in get_args(Status):
        raise ValueError(f"status '{status}'")
    numbers = int(pairs["calls"]), float(pairs["seconds"]), int(pairs.get("cut_off", 0))
    return _Row(id, status, str(pairs["purpose"]), *numbers, str(pairs.get("system", "")))


def _request(row: AtomsRow) -> tuple[Atoms, dict[str, Any]]:
    return _atoms(row), dict(row.data["provenance"])


def _atoms(row: AtomsRow) -> Atoms:
    atoms: Atoms = row.toatoms()
    atoms.calc = None
    atoms.info = {"charge": int(row.data["charge"]), "spin": int(row.data["spin"])}
    return atoms


def _without_column(label: Label | None) -> dict[str, Any]:
    """What of a label ASE's rows have no place for."""
    further = {} if label is None or label.error is not None else label.further
    others = {name: np.asarray(value).tolist() for name, value in further.items() if name not in all_properties}
    return {_FURTHER: others} if others else {}


def _further(row: AtomsRow) -> dict[str, Any]:
    """What a row holds of the further targets, by their names in files."""
    others = row.data.get(_FURTHER, {})
    return {one.label: others.get(one.label, row.get(one.label)) for one in further_targets()}


def _stored(row: AtomsRow) -> StoredLabel:
    atoms, error = _atoms(row), row.data["error"]
    label = Label(
        identity=row["unique_id"],
        energy=row.get("energy"),
        forces=row.get("forces"),
        stress=row.get("stress"),
        error=error,
        seconds=row["seconds"],
        calls=row["calls"],
        further={name: np.asarray(value, np.float64) for name, value in _further(row).items() if value is not None},
    )
    return StoredLabel(label.attach(atoms) if error is None else atoms, label, row.data["provenance"])
