"""Structures that are the same but for how they are written down: turned, mirrored, shifted, atoms in another order."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

import numpy as np
from ase import Atoms

from almlip_jax.structures.electronic_state import electronic_state
from almlip_jax.structures.neighbors import find_edges, lengths_within, shortest_edge

_REACH = 6.0  # Angstrom; what is farther apart counts by its distance from the middle alone, where nothing is periodic
_APART = 5e-6  # of sums that change by about as much as atoms move, in Angstrom; files have six decimals and more
_GLANCE = 1.35  # of the shortest distance: how far is looked for the numbers that most structures are told apart by


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
        grouped: dict[bytes, list[Atoms]] = {}
        for frame in frames:
            grouped.setdefault(_kind(frame), []).append(frame)
        self._known = {kind: _Group(some) for kind, some in grouped.items()}

    def __contains__(self, frame: object) -> bool:
        return isinstance(frame, Atoms) and (found := self._known.get(_kind(frame))) is not None and found.holds(frame)


class _Group:
    """Structures of one kind.  Two numbers of each, which take a tenth of the time of all, rule most others out."""

    def __init__(self, frames: list[Atoms]) -> None:
        self._reach = min(_REACH, _GLANCE * max(shortest_edge(frame, _REACH) for frame in frames[:8]))
        glances = np.array([_glance(frame, self._reach) for frame in frames])
        order = np.argsort(glances[:, 0], kind="stable")
        self._glances = glances[order]
        self._known = [_Known(frames[place]) for place in order]

    def holds(self, frame: Atoms) -> bool:
        glance = _glance(frame, self._reach)
        first, last = np.searchsorted(self._glances[:, 0], [glance[0] - _APART, glance[0] + _APART])
        near = first + np.flatnonzero(np.abs(self._glances[first:last, 1] - glance[1]) <= _APART)
        if not len(near):
            return False
        own = _invariants(frame)
        return any(np.abs(self._known[place].invariants - own).max(initial=0.0) <= _APART for place in near)


class _Known:
    """A structure, all of whose numbers are computed when they are first needed."""

    def __init__(self, frame: Atoms) -> None:
        self._frame = frame

    @cached_property
    def invariants(self) -> np.ndarray:
        return _invariants(self._frame)


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


def _glance(frame: Atoms, reach: float) -> np.ndarray:
    """[2] numbers that what is the same has in common, about as sensitive as a position, too."""
    if not frame.pbc.any():
        from_middle = np.linalg.norm(frame.positions - frame.positions.mean(axis=0), axis=1)
        return np.array([from_middle.max(initial=0.0), from_middle.mean()])
    lengths = lengths_within(frame, reach)
    near = (1 - (lengths / reach) ** 2) ** 3
    return np.array([lengths.min(initial=reach), reach * near.sum() / len(frame)])
