"""Neighbour lists on the host: every edge within a cutoff, one for each periodic image, in dense slots.

The compiled library vesin finds the pairs; this file puts them into the slots of a `Graph` in an order that depends
only on the structure, and pairs every edge with its opposite.  Any mixture of periodic and open directions is fine, so
are triclinic and left-handed cells, cells smaller than the cutoff, and atoms outside the cell.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
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
class Edges:
    """The edges of one structure, one after the other, in a few bytes each; atoms N, edges E.

    They are sorted by atom i, then j, then shift.  An edge has its slot among those of its atom, counted from 0.

    Attributes:
        cutoff: Angstrom; all edges shorter than this.
        counts: [N], edges of each atom.
        neighbors: [E] int32, index of atom j.
        shifts: [E, 3] integers, as narrow as they allow; lattice translation of atom j.
        reverse: [E] integers, likewise; slot at atom j that holds the opposite edge (to atom i, with the opposite
            shift).
    """

    cutoff: float
    counts: np.ndarray
    neighbors: np.ndarray
    shifts: np.ndarray
    reverse: np.ndarray

    @property
    def centers(self) -> np.ndarray:
        """Index of atom i, [E]."""
        return np.repeat(np.arange(len(self.counts)), self.counts)

    @property
    def largest_count(self) -> int:
        """The most edges of any atom; 0 for none."""
        return int(self.counts.max(initial=0))

    def places(self, capacity: int) -> np.ndarray:
        """Where the edges lie in an array of ``capacity`` slots for each atom, flattened, [E].

        Raises:
            CapacityError: an atom has more neighbours.
        """
        if self.largest_count > capacity:
            raise CapacityError(
                f"an atom has {self.largest_count} neighbours within {self.cutoff} Angstrom but only {capacity} slots; "
                f"raise the neighbour capacity to at least {self.largest_count}."
            )
        begins = np.arange(len(self.counts)) * capacity - (np.cumsum(self.counts) - self.counts)
        return np.arange(len(self.neighbors)) + np.repeat(begins, self.counts)


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


def find_edges(atoms: Atoms, cutoff: float) -> Edges:
    """All edges of a structure with a length below the cutoff (Angstrom), an atom's own images included.

    Raises:
        InputError: as `neighborhood`.
    """
    pairs, num_atoms = _pairs(atoms, cutoff), len(atoms)
    half = len(pairs.center)
    center, neighbor = np.concatenate([pairs.center, pairs.neighbor]), np.concatenate([pairs.neighbor, pairs.center])
    shifts = np.concatenate([pairs.shifts, -pairs.shifts], axis=1)
    farthest = np.abs(pairs.shifts).max(axis=1, initial=0).tolist()
    order = _order(center, neighbor, shifts, num_atoms, farthest)
    center, neighbor, shifts = center.take(order), neighbor.take(order), shifts.take(order, axis=1)
    counts = np.bincount(center, minlength=num_atoms)
    slot = np.empty(2 * half, np.int64)
    slot[order] = np.arange(2 * half) - (np.cumsum(counts) - counts).take(center)
    opposite = np.where(order < half, order + half, order - half)
    return Edges(
        cutoff=cutoff,
        counts=counts,
        neighbors=neighbor.astype(np.int32),
        shifts=shifts.T.astype(_narrowest(max(farthest)), order="C"),
        reverse=slot.take(opposite).astype(_narrowest(int(counts.max(initial=0)))),
    )


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
    edges = find_edges(atoms, cutoff)
    slots = edges.largest_count if capacity is None else capacity
    places, num_atoms = edges.places(slots), len(atoms)
    neighbors = np.repeat(np.arange(num_atoms, dtype=np.int32)[:, None], slots, axis=1)
    shifts = np.zeros((num_atoms, slots, 3), np.int32)
    mask = np.zeros((num_atoms, slots), bool)
    reverse = np.tile(np.arange(slots, dtype=np.int32), (num_atoms, 1))
    neighbors.put(places, edges.neighbors)
    shifts.reshape(-1, 3)[places] = edges.shifts
    mask.put(places, True)
    reverse.put(places, edges.reverse)
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

    def largest(atoms: Atoms) -> int:
        pairs = _pairs(atoms, cutoff)
        return int(np.bincount(np.concatenate([pairs.center, pairs.neighbor])).max(initial=0))

    return max((largest(atoms) for atoms in structures), default=0)


def shortest_edge(atoms: Atoms, cutoff: float) -> float:
    """Length of the shortest edge below the cutoff, Angstrom; infinite where there is none.

    Raises:
        InputError: as `neighborhood`.
    """
    return float(lengths_within(atoms, cutoff).min(initial=np.inf))


def lengths_within(atoms: Atoms, cutoff: float) -> np.ndarray:
    """Lengths [P] of the edges below the cutoff, Angstrom, one of each edge and its opposite, in any order.

    Raises:
        InputError: as `neighborhood`.
    """
    return np.sqrt(_pairs(atoms, cutoff).squares)


def periodic_cell(cell: np.ndarray, pbc: np.ndarray) -> np.ndarray:
    """The cell [3, 3] with its open directions replaced by unit vectors normal to the periodic ones.

    Raises:
        InputError: a periodic direction has no cell vector, or the periodic ones are (nearly) linearly dependent.
    """
    return _box(np.asarray(cell, np.float64).tobytes(), np.asarray(pbc, bool).tobytes()).vectors


def periodic_inverse(cell: np.ndarray, pbc: np.ndarray) -> np.ndarray:
    """The inverse [3, 3] of `periodic_cell`, which raises alike: positions times it are fractions."""
    return _box(np.asarray(cell, np.float64).tobytes(), np.asarray(pbc, bool).tobytes()).inverse


class _Box(NamedTuple):
    """A periodic cell, its inverse and the distances [3] between its faces; not to be written to."""

    vectors: np.ndarray
    inverse: np.ndarray
    heights: np.ndarray


@lru_cache(maxsize=64)
def _box(cell_bytes: bytes, pbc_bytes: bytes) -> _Box:
    """What `periodic_cell` says of a cell; frames of one cell, and the steps of one search, compute it once."""
    cell, pbc = np.frombuffer(cell_bytes).reshape(3, 3), np.frombuffer(pbc_bytes, bool)
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
    vectors = complete_cell(np.where(pbc[:, None], cell, 0.0))
    inverse = np.linalg.inv(vectors)
    box = _Box(vectors, inverse, _heights(inverse))
    for array in box:
        array.setflags(write=False)
    return box


def _heights(inverse: np.ndarray) -> np.ndarray:
    """Distances [3] between opposite faces of the cell of an inverse."""
    return 1 / np.linalg.norm(inverse, axis=0)


class _Pairs(NamedTuple):
    """One of each edge and its opposite, in any order: i [P], j [P], shift [3, P], all int64; squared length [P]."""

    center: np.ndarray
    neighbor: np.ndarray
    shifts: np.ndarray
    squares: np.ndarray


def _pairs(atoms: Atoms, cutoff: float) -> _Pairs:
    """The pairs below a cutoff; refuses what cannot be searched."""
    if not (np.isfinite(cutoff) and cutoff > 0):
        raise InputError(f"the cutoff must be a positive length in Angstrom, not {cutoff}.")
    positions = np.asarray(atoms.positions, np.float64)
    reach = np.abs(positions).max(axis=0, initial=0.0).tolist()
    if not all(one <= _FARTHEST for one in reach):
        _refuse_positions(positions)
    pbc = np.asarray(atoms.pbc, bool)
    cell = np.asarray(atoms.cell.array, np.float64)
    radius = float(cutoff) + _MARGIN
    search = _search(positions, reach, _box(cell.tobytes(), pbc.tobytes()), pbc, radius)
    finder = NeighborList(cutoff=search.radius, full_list=False, n_threads=1)
    # without a copy of its own: these are views of the finder's memory
    pairs, shifts = finder.compute(
        points=search.points, box=search.box, periodic=search.pbc, quantities="PS", copy=False
    )
    center, neighbor = pairs.T.astype(np.int64, order="C")
    shifts = shifts.T.astype(np.int64, order="C")
    if search.home is not None:
        shifts += search.home.T.take(center, axis=1) - search.home.T.take(neighbor, axis=1)
    squares = _squares(np.ascontiguousarray(positions.T), center, neighbor, shifts, cell if pbc.any() else None)
    keep = squares < cutoff**2
    if search.home is not None:
        keep &= ~shifts[~pbc].any(axis=0)
    if keep.all():
        return _Pairs(center, neighbor, shifts, squares)
    kept = np.flatnonzero(keep)
    return _Pairs(center.take(kept), neighbor.take(kept), shifts.take(kept, axis=1), squares.take(kept))


def _squares(
    positions: np.ndarray, center: np.ndarray, neighbor: np.ndarray, shifts: np.ndarray, cell: np.ndarray | None
) -> np.ndarray:
    """Squared lengths [P] of edges, from positions [3, N] and shifts [3, P]; no cell where nothing is periodic.

    Each operation on a component is odd, so it does not matter which of an edge and its opposite is looked at.
    """
    x, y, z = (along.take(neighbor) - along.take(center) for along in positions)
    if cell is not None:
        first, second, third = shifts.astype(np.float64)
        for component, (a, b, c) in zip((x, y, z), cell.T.tolist(), strict=True):
            component += (first * a + second * b) + third * c
    squares: np.ndarray = (x * x + z * z) + y * y
    return squares


def _refuse_positions(positions: np.ndarray) -> None:
    """Says which atom lies nowhere, or too far away."""
    finite = np.isfinite(positions).all(axis=1)
    if not finite.all():
        raise InputError(f"the position of atom {int(np.argmin(finite))} is not finite; leave the structure out.")
    atom = int(np.argmax(np.abs(positions).max(axis=1) > _FARTHEST))
    raise InputError(f"atom {atom} lies too far from the origin, at {positions[atom].tolist()} Angstrom; move it.")


class _Search(NamedTuple):
    """A search that vesin can do, with the same pairs within the radius asked for.

    Attributes:
        points: [N, 3] Angstrom.
        box: [3, 3] Angstrom.
        pbc: [3] bool; open directions may be periodic here, with more than the radius between the images.
        home: [N, 3] cells that the points were brought back by; None where they are the positions.
        radius: Angstrom.
    """

    points: np.ndarray
    box: np.ndarray
    pbc: np.ndarray
    home: np.ndarray | None
    radius: float


def _search(positions: np.ndarray, reach: list[float], whole: _Box, pbc: np.ndarray, radius: float) -> _Search:
    """The search for pairs within a radius of positions that reach so far from the origin along each axis.

    Where space would be divided into many boxes, as with an atom far from all others, atoms come back into the cell,
    and what is empty is left out: along an open direction no pair spans a gap wider than the radius.
    """
    box = whole.vectors
    many = _MOST_BOXES / 2 if pbc.all() or not pbc.any() else _MANY_IF_MIXED
    if len(positions) == 0 or (
        math.prod(max(2 * one / radius, 1.0) for one in reach) < many
        and (not pbc.any() or np.prod(_boxes(positions, whole, pbc, radius)) < many)
    ):
        return _Search(positions, box, pbc, None, radius)
    home = np.zeros(positions.shape, np.int64)
    home[:, pbc] = np.floor(positions @ whole.inverse)[:, pbc]
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
    heights = _heights(np.linalg.inv(box))
    while (total := np.prod(numbers := np.maximum(heights / radius, 1.0))) > _MOST_BOXES / 2 and (
        numbers.min() < 4 * np.cbrt(total / _MOST_BOXES)
    ):
        radius *= 1.25
    return _Search(points, box, everywhere, home, radius)


def _boxes(points: np.ndarray, box: _Box, pbc: np.ndarray, radius: float) -> np.ndarray:
    """Into how many boxes of the size of a radius space is divided along each direction, [3] float."""
    extents = box.heights
    if not pbc.all():
        extents = np.where(pbc, extents, np.ptp(points @ box.inverse, axis=0) * extents)
    return np.maximum(extents / radius, 1.0)


def _order(
    first: np.ndarray, second: np.ndarray, shifts: np.ndarray, num_atoms: int, farthest: list[int]
) -> np.ndarray:
    """Indices [E] that sort edges by one atom, then the other, then the shift [3, E], no component beyond farthest."""
    sizes, bits = [2 * most + 1 for most in farthest], len(first).bit_length()
    total = num_atoms**2 * math.prod(sizes)
    if total >= 2**63:  # many atoms, and some of them many cells away
        return np.lexsort((*shifts[::-1], second, first))
    keys = first * num_atoms + second
    for along, size, most in zip(shifts, sizes, farthest, strict=True):
        if most:
            keys = keys * size + (along + most)
    if total << bits >= 2**63:
        return np.argsort(keys)
    # one whole number that ends with the index sorts several times faster than indices by a key
    return np.sort((keys << bits) | np.arange(len(keys))) & ((1 << bits) - 1)


def _narrowest(largest: int) -> np.dtype:
    """The narrowest type of integers that holds numbers of either sign up to one."""
    return np.min_scalar_type(-largest - 1)


def _vectors(start: np.ndarray, end: np.ndarray, shifts: np.ndarray, cell: np.ndarray) -> np.ndarray:
    translation = shifts[..., 0:1] * cell[0] + shifts[..., 1:2] * cell[1] + shifts[..., 2:3] * cell[2]
    return (end - start) + translation
