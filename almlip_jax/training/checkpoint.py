"""A training that was interrupted goes on where it stood: its whole state in one file, replaced as a whole.

The file says which training it belongs to (`identity`: labels, settings, first parameters, key); one of another
training, or one that cannot be read, counts for nothing, and the training begins at its beginning.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from almlip_jax.files import PARTIAL, replacing

_FILE = "training.npz"
# of the file; 2: reports say which models they are of the kept parameters of; 3: linear parameters of searches by
# projection are in the order of the model
_FORMAT = 3
AGAIN = "again"
"""Folder next to the file, for models that are trained a second time."""


@dataclass(frozen=True)
class Saved:
    """What is needed to go on.

    Attributes:
        leaves: the arrays of the device state, in the order of its tree.
        order: state of the generator that draws the order of the structures.
        history: one mapping a validation, from the name of a number to its value.
    """

    leaves: Sequence[np.ndarray]
    order: Mapping[str, Any]
    history: Sequence[dict[str, Any]]


def identity(arrays: Any, *words: str) -> str:
    """A hash of everything that decides what a training gives.

    Args:
        arrays: pytree of arrays; shapes and types count too.
        words: settings and the like, as text.
    """
    found = hashlib.sha256()
    for word in (f"format {_FORMAT}", *words):
        found.update(f"{len(word)}:{word}".encode())
    for leaf in jax.tree.leaves(arrays):
        array = np.ascontiguousarray(leaf)
        found.update(f"{array.dtype}{array.shape}".encode())
        found.update(array.data.cast("B") if array.size else b"")
    return found.hexdigest()


def save(folder: Path, whose: str, saved: Saved) -> None:
    """Writes the file of a folder; at any moment there is the old one or the new one, whole.

    Raises:
        InputError: it cannot be written.
    """
    rest = json.dumps({"identity": whose, "order": saved.order, "reports": len(saved.history)})
    arrays = {f"leaf_{n}": np.asarray(leaf) for n, leaf in enumerate(saved.leaves)}
    for name in saved.history[0]:
        arrays[f"history_{name}"] = np.stack([np.asarray(report[name]) for report in saved.history])
    with replacing(folder / _FILE) as building, building.open("wb") as file:
        np.savez(file, rest=np.array(rest), **arrays)  # type: ignore[arg-type]


def load(folder: Path, whose: str) -> Saved | None:
    """What the folder holds of this training, or None."""
    try:
        with np.load(folder / _FILE, allow_pickle=False) as archive:
            rest = json.loads(str(archive["rest"]))
            if rest["identity"] != whose:
                return None
            count = sum(name.startswith("leaf_") for name in archive.files)
            leaves = [archive[f"leaf_{n}"] for n in range(count)]
            columns = {name: archive[name] for name in archive.files if name.startswith("history_")}
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None
    history = [
        {name.removeprefix("history_"): column[n] for name, column in columns.items()} for n in range(rest["reports"])
    ]
    return Saved(leaves, rest["order"], history)


def discard(folder: Path) -> None:
    """Removes what `save` wrote, half or whole, once the result of the training is kept elsewhere."""
    if folder.is_dir():
        for part in (folder / AGAIN, *folder.glob("group_*")):  # of a committee of architectures
            discard(part)
        for file in (folder / _FILE, *folder.glob(f".*{PARTIAL}*")):
            file.unlink(missing_ok=True)
        if not any(folder.iterdir()):
            folder.rmdir()
