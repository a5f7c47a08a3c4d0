"""Frames of other programs' runs that are written for labels, because a score says that they are uncertain."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ase import Atoms
from scipy.sparse.csgraph import breadth_first_order, minimum_spanning_tree

from almlip_jax.errors import InputError
from almlip_jax.files import cannot_write, make_folder
from almlip_jax.scores import scores
from almlip_jax.structures.extxyz import write_frame
from almlip_jax.structures.io import require_xyz

if TYPE_CHECKING:
    from almlip_jax.potential.following import Following

_SAME_ENERGY = 1e-5  # eV an atom, by which two evaluations of a molecule may differ
_LARGEST_ALONE = 1000  # atoms whose distances from each other are looked at


@dataclass(frozen=True)
class Recording:
    """Which frames of a run are written for labels.

    Attributes:
        file: extended XYZ that frames are added to.
        score: of structures (`scores`).
        above: threshold of the score, in its unit.
        every: least number of steps between two frames.
        append: whether frames are added to those that the file holds; one that holds any is refused otherwise.
    """

    file: Path
    score: str = "force_std_max"
    above: float = 0.0
    every: int = 1
    append: bool = False


class Recorder:
    """Adds frames to a file, and counts them.

    Raises:
        InputError: the threshold is no number; or the file has another ending than those of extended XYZ, cannot be
            written, or holds something that would be lost.
    """

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.number = 0
        """Frames written."""
        self._last: tuple[int, float] | None = None  # step and energy of the last of them
        if math.isnan(recording.above):
            raise InputError("the threshold for frames to be recorded is not a number; give one.")
        require_xyz(recording.file)
        make_folder(recording.file.parent)
        check_kept(recording.file, append=recording.append)
        try:
            recording.file.open("a").close()
        except OSError as error:
            raise cannot_write(recording.file, error) from error

    def wants(self, step: int, results: Mapping[str, Any]) -> bool:
        """Whether the frame of a step is one to be labelled."""
        return self.uncertain(results) and not self.too_soon(step)

    def uncertain(self, results: Mapping[str, Any]) -> bool:
        """Whether the score lies above the threshold."""
        return bool(results[self.recording.score] > self.recording.above)

    def too_soon(self, step: int) -> bool:
        """Whether a frame of a step would follow the last one too closely."""
        return self._last is not None and abs(step - self._last[0]) < self.recording.every

    def wrote(self, step: int, atoms: Atoms, results: Mapping[str, Any]) -> bool:
        """Whether the last frame written is this one."""
        if self._last is None or self._last[0] != step:
            return False
        return abs(self._last[1] - results["energy"]) < _SAME_ENERGY * len(atoms)

    def write(self, step: int, atoms: Atoms, results: Mapping[str, Any]) -> None:
        """Writes a frame with what was predicted, under names that no reader takes for labels."""
        self._last, self.number = (step, float(results["energy"])), self.number + 1
        frame = atoms.copy()
        frame.info |= {"step": step, "predicted_energy": results["energy"]}
        frame.info |= {one.name: results[one.name] for one in scores() if one.name in results}
        frame.arrays["predicted_forces"] = results["forces"]
        frame.arrays["force_std"] = results["force_std"]
        with self.recording.file.open("a", encoding="utf-8", newline="\n") as file:
            write_frame(file, frame, f"step {step}")


def check_kept(file: Path, *, append: bool) -> None:
    """Refuses a file whose content would be lost, since a run that is started again is not to cost what it found.

    Args:
        file: that is written to.
        append: whether what is written is added to what it holds.

    Raises:
        InputError: it holds something, and nothing says to go on in it.
    """
    if not append and file.is_file() and file.stat().st_size > 0:
        raise InputError(
            f"{file} is there already, and would be lost; go on in it (--append, in Python append=True), or name "
            "another file."
        )


def alone(frame: Atoms, energy: float, following: Following) -> Atoms:
    """Part of a system as it is to be labelled: without the box and in one piece, unless it sees itself across that.

    Args:
        frame: the atoms that a potential sees; with more than a thousand the box stays.
        energy: eV, in the box.
        following: says what it is without.
    """
    if not frame.pbc.any() or len(frame) > _LARGEST_ALONE:
        return frame
    found = whole(frame)
    return found if abs(following(found, "scores")["energy"] - energy) < _SAME_ENERGY * len(found) else frame


def whole(atoms: Atoms) -> Atoms:
    """Atoms of a periodic structure without its cell, each beside its neighbours: along the shortest distances that
    connect them all.
    """
    vectors = atoms.get_all_distances(mic=True, vector=True)  # [N, N, 3], from the first to the second
    tree = minimum_spanning_tree(np.linalg.norm(vectors, axis=-1))
    order, before = breadth_first_order(tree, 0, directed=False)
    positions = atoms.positions.copy()
    for index in order[1:]:
        positions[index] = positions[before[index]] + vectors[before[index], index]
    return Atoms(numbers=atoms.numbers, positions=positions, info=atoms.info)
