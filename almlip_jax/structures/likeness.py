"""Structures that are the same but for how they are written down: turned, mirrored, shifted, atoms in another order."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from ase import Atoms

from almlip_jax.structures.electronic_state import electronic_state
from almlip_jax.structures.neighbors import find_edges

_REACH = 6.0  # Angstrom; what is farther apart counts by its distance from the middle alone, where nothing is periodic
_APART = 5e-6  # of sums that change by about as much as atoms move, in Angstrom; files have six decimals and more


class Likeness:
    """Some structures, of which it can be asked whether another one is the same as one of them.

    Two count as the same where turning, mirroring, shifting and the order of atoms (and lattice vectors) are all that
    differs: the surroundings of their atoms within 6 Angstrom, species by species, agree to some 1e-6 Angstrom.

    >>> from ase.build import molecule
    >>> from almlip_jax.structures.likeness import Likeness
    >>> water, turned, bent = molecule("H2O"), molecule("H2O")[[2, 0, 1]], molecule("H2O")
    >>> turned.rotate(40, (1, 2, 3))
    >>> bent.positions[1, 1] += 0.01
    >>> known = Likeness([water])
    >>> turned in known, bent in known
    (True, False)
    """

    def __init__(self, frames: Iterable[Atoms]) -> None:
        grouped: dict[bytes, list[np.ndarray]] = {}
        for frame in frames:
            grouped.setdefault(_kind(frame), []).append(_invariants(frame))
        self._known: dict[bytes, tuple[np.ndarray, np.ndarray]] = {}
        for kind, rows in grouped.items():
            values = np.array(rows)
            values = values[np.argsort(values.mean(axis=1))]
            self._known[kind] = values.mean(axis=1), values

    def __contains__(self, frame: Atoms) -> bool:
        found = self._known.get(_kind(frame))
        if found is None:
            return False
        own = _invariants(frame)
        first, last = np.searchsorted(found[0], [own.mean() - _APART, own.mean() + _APART])
        near = found[1][first : last + 1]
        return bool((np.abs(near - own).max(axis=1, initial=0.0) <= _APART).any())


def _kind(frame: Atoms) -> bytes:
    """What two structures have to have in common to be compared at all."""
    told = [*np.sort(frame.numbers), int(frame.pbc.sum()), *electronic_state(frame)]
    return np.asarray(told, np.int64).tobytes()


def _invariants(frame: Atoms) -> np.ndarray:
    """[F] numbers that only what is the same has in common, each about as sensitive as a position in Angstrom."""
    edges = find_edges(frame, _REACH)
    shifts = edges.shifts @ frame.cell.array if len(edges.shifts) else np.zeros((0, 3))
    vectors = frame.positions[edges.neighbors] + shifts - frame.positions[edges.centers]
    length = np.linalg.norm(vectors, axis=1) / _REACH
    bump = (1 + frame.numbers[edges.neighbors] / 64) * (1 - length**2) ** 3  # comes smoothly to nothing at the reach
    columns = [np.bincount(edges.centers, bump * length**n, minlength=len(frame)) for n in (0, 1, 3)]
    if not frame.pbc.any():
        columns.append(np.linalg.norm(frame.positions - frame.positions.mean(axis=0), axis=1))
    sets = [frame.numbers == z for z in np.unique(frame.numbers)]
    return np.concatenate([np.sort(column[mine]) for column in columns for mine in sets])
