"""Neighbour lists on the host: every edge within a cutoff, one for each periodic image, in dense slots.

The compiled library vesin finds the pairs; this file puts them into the slots of a `Graph` in an order that depends
only on the structure, and pairs every edge with its opposite.  Any mixture of periodic and open directions is fine, so
are triclinic and left-handed cells, cells smaller than the cutoff, and atoms outside the cell.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from ase import Atoms
from ase.geometry import complete_cell
from vesin import NeighborList

from almlip_jax.errors import CapacityError, InputError

_MARGIN = 1e-6  # Angstrom; vesin searches this much further, so that its rounding does not decide an edge
_FARTHEST = 1e9  # Angstrom from the origin, a decimetre; beyond, positions are a mistake and have few decimals left
_MOST_BOXES = 1e5  # vesin divides space into no more boxes, and where it is long and thin then into none
_MANY_IF_MIXED = 200  # boxes that vesin searches fast where some directions are open and others periodic
_THINNEST = 1e-2  # Angstrom; periodic cells flatter than this are a mistake, and would need endless images


@dataclass(frozen=True)
class Neighborhood:
    """The edges of one structure in dense slots; atoms N, slots K.

    A padding slot points at itself (``neighbors[i, k] = i``, ``reverse[i, k] = k``, shift zero), so that following
    `neighbors` and `reverse` twice leads home from every slot.

    Attributes:
        neighbors: [N, K] int32, index of atom j; the slots of an atom are sorted by j, then by shift.
        shifts: [N, K, 3] int32, lattice translation of atom j: the edge vector is ``R_j + shift . cell - R_i``.
        mask: [N, K] bool, true where the slot holds an edge.
        reverse: [N, K] int32, slot at atom j that holds the opposite edge (to atom i, with the opposite shift).
    """

    neighbors: np.ndarray
    shifts: np.ndarray
    mask: np.ndarray
    reverse: np.ndarray


def neighborhood(atoms: Atoms, cutoff: float, capacity: int | None = None) -> Neighborhood:
    """All edges with a length below the cutoff, one for each image, an atom's own images included.

    Args:
        atoms: a structure with 0 to 3 periodic directions; positions need not lie inside the cell.
        cutoff: Angstrom; an edge of exactly this length is not one.
        capacity: slots K of each atom; the largest count of the structure where not given.

    Raises:
        InputError: the cutoff is not positive, positions or cell are not finite, or a periodic cell is degenerate.
        CapacityError: an atom has more neighbours than `capacity`.
    """
    center, neighbor, shift = _edges(atoms, cutoff)
    num_atoms = len(atoms)
    counts = np.bincount(center, minlength=num_atoms)
    needed = int(counts.max(initial=0))
    slots = needed if capacity is None else capacity
    if needed > slots:
        raise CapacityError(
            f"an atom has {needed} neighbours within {cutoff} Angstrom but only {slots} slots; "
            f"raise the neighbour capacity to at least {needed}."
        )
    slot = np.arange(len(center)) - np.repeat(np.cumsum(counts) - counts, counts)
    own = np.broadcast_to(np.arange(num_atoms, dtype=np.int32)[:, None], (num_atoms, slots))
    neighbors = own.copy()
    shifts = np.zeros((num_atoms, slots, 3), np.int32)
    mask = np.zeros((num_atoms, slots), bool)
    reverse = np.tile(np.arange(slots, dtype=np.int32), (num_atoms, 1))
    neighbors[center, slot] = neighbor
    shifts[center, slot] = shift
    mask[center, slot] = True
    reverse[center, slot] = slot[_opposite(center, neighbor, shift)]
    return Neighborhood(neighbors, shifts, mask, reverse)


def edge_vectors(atoms: Atoms, hood: Neighborhood) -> np.ndarray:
    """Edge vectors ``R_j + shift . cell - R_i`` [N, K, 3] in Angstrom, float64; zero in padding slots.

    Opposite edges are exact negatives of each other.
    """
    positions = np.asarray(atoms.positions, np.float64)
    vectors = _vectors(positions[:, None], positions[hood.neighbors], hood.shifts, np.asarray(atoms.cell.array))
    return np.where(hood.mask[..., None], vectors, 0.0)


def largest_neighbor_count(structures: Iterable[Atoms], cutoff: float) -> int:
    """The most neighbours any atom of some structures has within the cutoff (Angstrom); 0 for no structures.

    Raises:
        InputError: as `neighborhood`.
    """
    return max((int(np.bincount(_pairs(atoms, cutoff)[0]).max(initial=0)) for atoms in structures), default=0)


def shortest_edge(atoms: Atoms, cutoff: float) -> float:
    """Length of the shortest edge below the cutoff, Angstrom; infinite where there is none.

    Raises:
        InputError: as `neighborhood`.
    """
    return float(np.sqrt(_pairs(atoms, cutoff)[3].min(initial=np.inf)))


def periodic_cell(cell: np.ndarray, pbc: np.ndarray) -> np.ndarray:
    """The cell [3, 3] with its open directions replaced by unit vectors normal to the periodic ones.

    Raises:
        InputError: a periodic direction has no cell vector, or the periodic ones are (nearly) linearly dependent.
    """
    cell, pbc = np.asarray(cell, np.float64), np.asarray(pbc, bool)
    if not np.all(np.isfinite(cell)):
        raise InputError("the cell has a component that is not finite; give finite cell vectors.")
    missing = pbc & ~np.any(cell, axis=1)
    if np.any(missing):
        raise InputError(
            f"direction {int(np.argmax(missing))} is periodic but its cell vector is zero; "
            "give a cell vector or make the direction non-periodic."
        )
    periodic = cell[pbc]
    # The smallest singular value bounds the distance between lattice planes from below.
    if len(periodic) and np.linalg.svd(periodic, compute_uv=False)[-1] < _THINNEST:
        raise InputError("the cell vectors of the periodic directions are linearly dependent; correct the cell.")
    return complete_cell(np.where(pbc[:, None], cell, 0.0))


def _edges(atoms: Atoms, cutoff: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Edges as i [E], j [E], shift [E, 3], sorted by i, then j, then shift; refuses what cannot be searched."""
    center, neighbor, shifts, _ = _pairs(atoms, cutoff)
    order = _order(center, neighbor, shifts)
    return center[order], neighbor[order], shifts[order]


def _pairs(atoms: Atoms, cutoff: float) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Edges in any order: i [E], j [E], shift [E, 3], squared length [E]; refuses what cannot be searched."""
    if not (np.isfinite(cutoff) and cutoff > 0):
        raise InputError(f"the cutoff must be a positive length in Angstrom, not {cutoff}.")
    positions = np.asarray(atoms.positions, np.float64)
    finite = np.isfinite(positions).all(axis=1)
    if not finite.all():
        raise InputError(f"the position of atom {int(np.argmin(finite))} is not finite; leave the structure out.")
    far = np.abs(positions).max(axis=1, initial=0.0) > _FARTHEST
    if far.any():
        atom = int(np.argmax(far))
        raise InputError(f"atom {atom} lies too far from the origin, at {positions[atom].tolist()} Angstrom; move it.")
    pbc = np.asarray(atoms.pbc, bool)
    cell = np.asarray(atoms.cell.array, np.float64)
    box = periodic_cell(cell, pbc)
    search = _search(positions, box, pbc, float(cutoff) + _MARGIN)
    finder = NeighborList(cutoff=search.radius, full_list=True, n_threads=1)
    pairs, shifts = finder.compute(points=search.points, box=search.box, periodic=search.pbc, quantities="PS")
    center, neighbor = pairs.astype(np.int32).T
    shifts = shifts + search.home[center] - search.home[neighbor]
    # Each operation of `_vectors` is odd, so an edge and its opposite pass or fail the cutoff together.
    vectors = _vectors(positions[center], positions[neighbor], shifts, cell)
    squares = np.einsum("ed,ed->e", vectors, vectors)
    keep = (squares < cutoff**2) & ~shifts[:, ~pbc].any(axis=1)
    return center[keep], neighbor[keep], shifts[keep].astype(np.int32), squares[keep]


class _Search(NamedTuple):
    """A search that vesin can do, with the same pairs within the radius asked for.

    Attributes:
        points: [N, 3] Angstrom.
        box: [3, 3] Angstrom.
        pbc: [3] bool; open directions may be periodic here, with more than the radius between the images.
        home: [N, 3] cells that the points were brought back by.
        radius: Angstrom.
    """

    points: np.ndarray
    box: np.ndarray
    pbc: np.ndarray
    home: np.ndarray
    radius: float


def _search(positions: np.ndarray, box: np.ndarray, pbc: np.ndarray, radius: float) -> _Search:
    """The search for pairs within a radius.

    Where space would be divided into many boxes, as with an atom far from all others, atoms come back into the cell,
    and what is empty is left out: along an open direction no pair spans a gap wider than the radius.
    """
    home = np.zeros(positions.shape, np.int64)
    many = _MOST_BOXES / 2 if pbc.all() or not pbc.any() else _MANY_IF_MIXED
    if len(positions) == 0 or (
        np.prod(_boxes(positions, box, pbc, radius)) < many
        and np.prod(np.maximum(2 * np.abs(positions).max(axis=0) / radius, 1.0)) < many
    ):
        return _Search(positions, box, pbc, home, radius)
    home[:, pbc] = np.floor(positions @ np.linalg.inv(box))[:, pbc]
    if np.abs(home).max() > _FARTHEST:
        atom = int(np.argmax(np.abs(home).max(axis=1)))
        raise InputError(f"atom {atom} lies more than {_FARTHEST:g} cells outside of its cell; bring it back.")
    points, box = positions - home @ box, box.copy()
    for axis in box[~pbc]:  # unit vectors, normal to each other and to the periodic directions
        along = points @ axis
        order = np.argsort(along)
        gaps = np.diff(along[order], prepend=0.0)
        excess = np.empty(len(along))
        excess[order] = gaps[0] + np.cumsum(np.maximum(gaps - 2 * radius, 0.0) * (np.arange(len(gaps)) > 0))
        points -= excess[:, None] * axis
    for direction in np.flatnonzero(~pbc):
        box[direction] *= np.ptp(points @ box[direction]) + 3 * radius
    everywhere = np.ones(3, bool)
    # Beyond its number of boxes vesin scales all three down alike, and fails where the smallest would be none.
    while (total := np.prod(numbers := _boxes(points, box, everywhere, radius))) > _MOST_BOXES / 2 and (
        numbers.min() < 4 * np.cbrt(total / _MOST_BOXES)
    ):
        radius *= 1.25
    return _Search(points, box, everywhere, home, radius)


def _boxes(points: np.ndarray, box: np.ndarray, pbc: np.ndarray, radius: float) -> np.ndarray:
    """Into how many boxes of the size of a radius space is divided along each direction, [3] float."""
    normals = np.linalg.inv(box)  # in columns
    heights = 1 / np.linalg.norm(normals, axis=0)
    extents = np.where(pbc, heights, np.ptp(points @ normals, axis=0) * heights)
    return np.maximum(extents / radius, 1.0)


def _order(first: np.ndarray, second: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    """Indices [E] that sort edges by one atom, then the other, then the shift."""
    if len(first) == 0:
        return np.zeros(0, np.intp)
    low = shifts.min(axis=0)
    columns = (first, second, *(shifts - low).T)
    try:  # one whole number for each edge sorts several times faster than five columns
        return np.argsort(np.ravel_multi_index(columns, tuple(int(column.max()) + 1 for column in columns)))
    except ValueError:  # it would need more than 63 bits: many atoms, and some of them many cells away
        return np.lexsort(columns[::-1])


def _vectors(start: np.ndarray, end: np.ndarray, shifts: np.ndarray, cell: np.ndarray) -> np.ndarray:
    translation = shifts[..., 0:1] * cell[0] + shifts[..., 1:2] * cell[1] + shifts[..., 2:3] * cell[2]
    return (end - start) + translation


def _opposite(center: np.ndarray, neighbor: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    """Index [E] of the opposite of each edge of a list sorted as `_edges` sorts it."""
    order = _order(neighbor, center, -shifts)
    opposite = np.empty(len(center), np.intp)
    opposite[order] = np.arange(len(center))
    return opposite
