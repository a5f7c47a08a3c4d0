"""The spool: labels on their way from the processes that paid for them to the one that stores them.

A worker reserves the disk space of a result before the calculation starts, and hands the result over by renaming a
complete file into place.  A label is therefore never half there, and is not lost where its receiver dies or the disk
fills up meanwhile.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from almlip_jax.oracles.base import Label
from almlip_jax.process_table import birth, is_alive
from almlip_jax.targets import further_targets

_BYTES_PER_NUMBER = 25  # at most
_BYTES_PER_ATOM = 100  # three numbers, and brackets
_BYTES_EXTRA = 4096


def label_to_json(label: Label) -> dict[str, Any]:
    """A label as plain data; JSON keeps every bit of its float64 numbers."""
    return {
        "identity": label.identity,
        "energy": label.energy,
        "forces": None if label.forces is None else label.forces.tolist(),
        "stress": None if label.stress is None else label.stress.tolist(),
        "error": label.error,
        "seconds": label.seconds,
        "calls": label.calls,
        "further": {name: value.tolist() for name, value in label.further.items()},
    }


def label_from_json(record: dict[str, Any]) -> Label:
    """The label that `label_to_json` wrote.

    Raises:
        ValueError, KeyError, TypeError: the record is none.
    """
    energy, forces, stress, error = (record[name] for name in ("energy", "forces", "stress", "error"))
    if error is None and (energy is None or forces is None):
        raise ValueError("neither a label nor the reason why there is none")
    return Label(
        identity=str(record["identity"]),
        energy=None if energy is None else float(energy),
        forces=None if forces is None else np.array(forces, np.float64).reshape(-1, 3),
        stress=None if stress is None else np.array(stress, np.float64).reshape(6),
        error=None if error is None else str(error),
        seconds=float(record["seconds"]),
        calls=int(record["calls"]),
        further={str(name): np.array(value, np.float64) for name, value in record.get("further", {}).items()},
    )


class Reservation:
    """Disk space for one label, taken before its calculation starts.

    Args:
        spool: the folder of the spool.
        identity: of the label.
        num_atoms: of its structure.

    Raises:
        OSError: the space cannot be had.
    """

    def __init__(self, spool: Path, identity: str, num_atoms: int) -> None:
        of_atoms, of_all = (
            sum(_BYTES_PER_NUMBER * math.prod(one.shape) for one in further_targets() if one.per == per)
            for per in ("atom", "structure")
        )
        self._target = spool / f"{identity}.json"
        self._part = spool / f"{identity}.{os.getpid()}-{birth(os.getpid()) or ''}.part"
        try:
            with self._part.open("wb") as file:
                _allocate(file.fileno(), _BYTES_EXTRA + of_all + (_BYTES_PER_ATOM + of_atoms) * num_atoms)
        except OSError:
            self.give_back()
            raise

    def hand_over(self, label: Label) -> None:
        """Puts the label into the spool, atomically."""
        content = json.dumps(label_to_json(label)).encode()
        try:
            self._put("r+b", content)
        except FileNotFoundError:
            # A store that was opened meanwhile takes processes of other machines for gone, and clears after them.
            self._put("wb", content)

    def _put(self, mode: str, content: bytes) -> None:
        with self._part.open(mode) as file:
            file.write(content)
            file.truncate()
        os.replace(self._part, self._target)

    def give_back(self) -> None:
        """Frees the space without a label."""
        self._part.unlink(missing_ok=True)


def in_spool(spool: Path, identity: str) -> bool:
    """Whether a label lies in the spool."""
    return (spool / f"{identity}.json").exists()


def label_in_spool(spool: Path | None, identity: str) -> Label | None:
    """The label that lies in the spool; None without one, or without a spool within reach."""
    if spool is None or not in_spool(spool, identity):
        return None
    return next((label for _, label in waiting_labels(spool, lambda _: True, f"{identity}.json")), None)


def waiting_labels(
    spool: Path, fits: Callable[[Label], bool | None], pattern: str = "*.json"
) -> Iterator[tuple[Path, Label]]:
    """The labels in the spool with the files that hold them, in the order of their identities.

    What is not a result is put aside, with ``.damaged`` in the place of its suffix.

    Args:
        spool: the folder.
        fits: whether a label can be that of the row it is for; None where there is no such row, and it stays.
        pattern: of the files to look at.
    """
    for path in sorted(spool.glob(pattern)):
        try:
            label = label_from_json(json.loads(path.read_text()))
            suits = fits(label) if path.stem == label.identity else False
        except (ValueError, KeyError, TypeError, AttributeError):
            # A power failure can leave a renamed file without its content.
            suits = False
        except OSError:
            continue
        if suits is False:
            path.rename(path.with_suffix(".damaged"))
        elif suits:
            yield path, label


def clear_reservations(spool: Path) -> list[str]:
    """Removes the reservations of processes that are gone, and returns the identities of what they were to hold."""
    gone = []
    for path in sorted(spool.glob("*.part")):
        identity, owner = _owner_of(path)
        if owner is None:
            continue
        if not is_alive(*owner):
            path.unlink(missing_ok=True)
            gone.append(identity)
    return gone


def at_work_elsewhere(spool: Path) -> dict[str, int]:
    """Identities of labels that living processes are calculating, with the numbers of those.

    These are workers of a program that was killed, which finish the label at hand.
    """
    found = {}
    for path in spool.glob("*.part"):
        identity, owner = _owner_of(path)
        if owner is not None and is_alive(*owner):
            found[identity] = owner[0]
    return found


def _owner_of(path: Path) -> tuple[str, tuple[int, int | None] | None]:
    """Identity of a reservation, and number and start time of its process; None for files that are not reservations."""
    identity, _, process = path.name.removesuffix(".part").partition(".")
    pid, _, born = process.partition("-")
    if not pid.isdigit():
        return identity, None
    return identity, (int(pid), int(born) if born.isdigit() else None)


def _allocate(descriptor: int, size: int) -> None:
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        # Some file systems cannot reserve space; the label is then written without that safety.
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            raise


@contextlib.contextmanager
def reserved(spool: Path | None, identity: str, num_atoms: int) -> Iterator[Reservation | None]:
    """A reservation that is given back where no label was handed over; None without a spool within reach."""
    if spool is None or not spool.is_dir():
        yield None
        return
    reservation = Reservation(spool, identity, num_atoms)
    try:
        yield reservation
    finally:
        reservation.give_back()
