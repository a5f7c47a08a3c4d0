"""Whether two structures are the same up to lattice vectors and the order of equal atoms, and which atom is which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from ase import Atoms
from ase.geometry import wrap_positions

from almlip_jax.structures.electronic_state import agrees_in_state


@dataclass(frozen=True)
class Match:
    """A frame that is the structure looked for.

    Attributes:
        frame: its number.
        order: [N] int; atom i of the structure is atom ``order[i]`` of the frame.
    """

    frame: int
    order: np.ndarray


class ImageIndex:
    """Finds structures among frames, whatever image of the cell and order their atoms are in.

    Args:
        frames: to search.
    """

    def __init__(self, frames: Sequence[Atoms]) -> None:
        self.frames = frames
        self._groups: dict[tuple[bytes, bytes], list[int]] = {}
        for n, frame in enumerate(frames):
            self._groups.setdefault(_kind(frame), []).append(n)
        self._marks = {kind: np.stack([_marks(frames[n]) for n in group]) for kind, group in self._groups.items()}

    def alike(self, atoms: Atoms) -> list[int]:
        """Frames with the same elements and periodic directions."""
        return self._groups.get(_kind(atoms), [])

    def find(self, atoms: Atoms, tolerance: float) -> Match | None:
        """The frame that differs least from a structure, if no coordinate differs by more than `tolerance` (Angstrom).

        Frames that state a charge or spin (in ``info``) other than the structure's are passed over.
        """
        group = self.alike(atoms)
        if not group:
            return None
        near = np.all(np.abs(self._marks[_kind(atoms)] - _marks(atoms)) <= _mark_tolerance(atoms, tolerance), axis=1)
        best, found = tolerance, None
        for n in (group[i] for i in np.flatnonzero(near)):
            if not agrees_in_state(self.frames[n], atoms) or _cell_difference(self.frames[n], atoms) > tolerance:
                continue
            order, distance = correspondence(atoms, self.frames[n])
            if distance <= best and len(set(order.tolist())) == len(order) and (found is None or distance < best):
                best, found = distance, Match(n, order)
        return found

    def nearest(self, atoms: Atoms) -> float | None:
        """Angstrom to the nearest frame of the same kind (of its cell or an atom); None where there is none."""
        group = [self.frames[n] for n in self.alike(atoms)]
        apart = [max(_cell_difference(frame, atoms), correspondence(atoms, frame)[1]) for frame in group]
        return min(apart) if apart else None


def correspondence(atoms: Atoms, frame: Atoms) -> tuple[np.ndarray, float]:
    """For each atom of a structure the nearest equal one of a frame, and the largest difference of a coordinate.

    Args:
        atoms: the structure; its cell is that of both.
        frame: with the same elements.

    Returns:
        [N] indices into the frame, and Angstrom.
    """
    order, largest = np.zeros(len(atoms), int), 0.0
    for number in np.unique(atoms.numbers):
        ours, theirs = (np.flatnonzero(one.numbers == number) for one in (atoms, frame))
        apart = atoms.positions[ours, None] - frame.positions[None, theirs]
        if atoms.pbc.any():
            apart = wrap_positions(apart.reshape(-1, 3), atoms.cell, atoms.pbc, (0, 0, 0)).reshape(apart.shape)
        distance = np.max(np.abs(apart), axis=2)
        nearest = np.argmin(distance, axis=1)
        order[ours] = theirs[nearest]
        largest = max(largest, float(distance[np.arange(len(ours)), nearest].max()))
    return order, largest


def _cell_difference(one: Atoms, other: Atoms) -> float:
    """Largest difference of the vectors of periodic directions, Angstrom; the others say nothing."""
    return float(np.max(np.abs(one.cell.array - other.cell.array)[np.asarray(one.pbc)], initial=0.0))


def _kind(atoms: Atoms) -> tuple[bytes, bytes]:
    return np.sort(atoms.numbers).astype(np.int64).tobytes(), np.asarray(atoms.pbc, bool).tobytes()


def _marks(atoms: Atoms) -> np.ndarray:
    """Numbers that lattice vectors and the order of the atoms do not change, cheap to compare.

    Sums over all atoms, weighted by atomic number: of coordinates for molecules, of phases for crystals.
    """
    if not atoms.pbc.any():
        return np.asarray(atoms.numbers @ atoms.positions, np.float64)
    if not atoms.pbc.all():
        return np.zeros(1)
    phases = np.exp(2j * np.pi * (atoms.positions @ np.linalg.inv(atoms.cell.array)))
    sums = atoms.numbers @ phases
    return np.concatenate([sums.real, sums.imag])


def _mark_tolerance(atoms: Atoms, tolerance: float) -> float:
    most = float(np.sum(atoms.numbers)) * tolerance
    if not atoms.pbc.all():
        return most + 1e-9
    # Cells may differ by the tolerance as well, which moves fractional coordinates of atoms outside the cell further.
    inverse = np.abs(np.linalg.inv(atoms.cell.array)).sum(axis=0).max()
    turns = 1.0 + float(np.max(np.abs(atoms.positions @ np.linalg.inv(atoms.cell.array)), initial=0.0))
    return most * 2 * np.pi * inverse * (1.0 + 3.0 * turns) + 1e-9
