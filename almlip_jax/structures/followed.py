"""One structure as an engine moves it: its edges with a skin on the host, and the graph that a program makes of them.

The list is found in float64 and kept until an edge might come within the cutoff that it does not hold: an atom moved
half the skin, or atoms and the strain of the cell took as much together.  What moves from call to call, positions and
cell, travels in two parts (`compact`), so that edge vectors are as accurate as those of a packed dataset.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ase import Atoms
from flax import struct

from almlip_jax.structures.compact import divide, edge_vectors, home_cells, in_two_parts, middle_on_grid
from almlip_jax.structures.graph import Graph
from almlip_jax.structures.neighbors import Edges, find_edges, periodic_cell, periodic_inverse
from almlip_jax.structures.species import SpeciesTable

_LEAST = 4  # atoms or neighbours of the smallest bucket
_OF_CELL = 19  # numbers of a place that are not positions
_UNIT = np.eye(3)
_FARTHEST = 1000.0  # Angstrom that a structure drifts as a whole before its list counts positions from elsewhere


def size_bucket(size: int) -> int:
    """The smallest bucket that holds a size: four between powers of two, so that at most a fifth of it is empty.

    >>> from almlip_jax.structures.followed import size_bucket
    >>> [size_bucket(size) for size in (3, 60, 61, 62, 64, 65)]
    [4, 64, 64, 64, 64, 80]
    """
    step = max(_LEAST, 2 ** max((max(size, 1) - 1).bit_length() - 3, 0))
    return -(-max(size, 1) // step) * step


@struct.dataclass
class Listed:
    """What of a structure stays while its list holds; A atom slots, K neighbour slots, padding included.

    Attributes:
        species: [A] int.
        atom_mask: [A] bool.
        neighbors: [A, K] int, as in `Graph`.
        shifts: [A, K, 3] int, lattice translation of the neighbour.
        reverse: [A, K] int.
        edge_mask: [A, K] bool, edges within cutoff and skin.
        charge: [1] e.
        spin: [1], multiplicity 2S+1.
    """

    species: jax.Array
    atom_mask: jax.Array
    neighbors: jax.Array
    shifts: jax.Array
    reverse: jax.Array
    edge_mask: jax.Array
    charge: jax.Array
    spin: jax.Array


@struct.dataclass
class Place:
    """What of a structure moves.

    Attributes:
        numbers: [6 A + 19], what the properties are parts of: a program takes one array sooner than three.
    """

    numbers: Any

    @property
    def positions(self) -> Any:
        """[A, 2, 3] Angstrom, coarse and fine part, counted from the middle."""
        return self.numbers[:-_OF_CELL].reshape(-1, 2, 3)

    @property
    def cell(self) -> Any:
        """[3, 2, 3] Angstrom, coarse and fine part of each cell vector; 0 in directions that are not periodic."""
        return self.numbers[-_OF_CELL:-1].reshape(3, 2, 3)

    @property
    def volume(self) -> Any:
        """[1] Angstrom^3; 1 where a structure is not periodic in three directions."""
        return self.numbers[-1:]


def followed_graph(listed: Listed, place: Place, cutoff: float) -> Graph:
    """The graph of one structure, with those edges of a list that are shorter than the cutoff (Angstrom).

    An edge whose length is not a number is kept, so that a broken structure cannot look like one without neighbours.
    """
    atoms, slots = listed.neighbors.shape
    cells = jnp.broadcast_to(place.cell, (atoms, 3, 2, 3))
    vectors = edge_vectors(place.positions, cells, listed.neighbors, listed.shifts)
    edge = listed.edge_mask & ~(jnp.sum(vectors**2, axis=-1) >= cutoff**2)
    own, slot = jnp.arange(atoms, dtype=jnp.int32)[:, None], jnp.arange(slots, dtype=jnp.int32)
    return Graph(
        species=listed.species,
        vectors=jnp.where(edge[..., None], vectors, 0),
        neighbors=jnp.where(edge, listed.neighbors, own),
        edge_mask=edge,
        reverse=jnp.where(edge, listed.reverse, slot),
        atom_mask=listed.atom_mask,
        structure=jnp.zeros(atoms, jnp.int32),
        structure_mask=jnp.ones(1, bool),
        volume=place.volume,
        positions=jnp.sum(place.positions, axis=1),
        cell=jnp.sum(place.cell, axis=1)[None],
        charge=listed.charge,
        spin=listed.spin,
    )


@dataclass(frozen=True)
class _Built:
    """Where a list was found.

    Attributes:
        atoms: the structure there.
        state: its charge and multiplicity.
        home: [N, 3] cells that its atoms were brought back by.
        origin: [3] Angstrom, where positions are counted from.
        listed: the list.
    """

    atoms: Atoms
    state: tuple[int, int]
    home: np.ndarray
    origin: np.ndarray
    listed: Listed

    @cached_property
    def rows(self) -> int:
        """Slots of atoms."""
        return len(self.listed.atom_mask)

    @cached_property
    def away(self) -> bool:
        """Whether any atom was brought back."""
        return bool(self.home.any())

    @cached_property
    def elements(self) -> bytes:
        """Atomic numbers; bytes are compared sooner than arrays."""
        return self.atoms.numbers.tobytes()

    @cached_property
    def cell(self) -> tuple[bytes, bytes]:
        """Cell vectors, and along which of them the structure is periodic."""
        return self.atoms.cell.array.tobytes(), self.atoms.pbc.tobytes()


class _Cell(NamedTuple):
    """What a cell comes to.

    Attributes:
        key: the cell, and in which directions it is periodic, as bytes.
        periodic: [3, 3] Angstrom, 0 in other directions.
        numbers: [19], the end of a `Place`.
    """

    key: tuple[bytes, bytes]
    periodic: np.ndarray
    numbers: np.ndarray


def cell_volume(cell: np.ndarray) -> float:
    """Volume of a cell [3, 3] in Angstrom^3, as `ase.cell.Cell.volume` but sooner."""
    (a, b, c), (d, e, f), (g, h, i) = cell.tolist()
    return float(abs(a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)))


def _diagonal(moved: np.ndarray) -> float:
    """Of the box that holds [N, 3] points: no less than twice `_farthest`, and found sooner."""
    x, y, z = (np.maximum.reduce(moved) - np.minimum.reduce(moved)).tolist()
    return math.sqrt(x * x + y * y + z * z)


def _farthest(moved: np.ndarray) -> float:
    """How far [N, 3] the farthest is from the middle of all."""
    middle = 0.5 * (np.minimum.reduce(moved) + np.maximum.reduce(moved))
    off = moved - middle
    return math.sqrt(np.einsum("ij,ij->i", off, off).max())


class Follower:
    """Follows one structure, or one after the other, and looks for neighbours again only where it has to.

    Args:
        species: the elements that are known.
        cutoff: Angstrom.
        skin: Angstrom, by which the list reaches beyond the cutoff.
        dtype: of what programs are given.
    """

    def __init__(self, species: SpeciesTable, cutoff: float, skin: float, dtype: np.dtype) -> None:
        self.species, self.cutoff, self.skin, self.dtype = species, cutoff, skin, dtype
        self.builds = 0
        """How often neighbours were looked for."""
        self._built: _Built | None = None
        self._slots: dict[int, int] = {}  # neighbour slots by atom slots; none is given up
        self._last: _Cell | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the list, which is on a device."""
        return self.__dict__ | {"_built": None}

    def look(self, atoms: Atoms, state: tuple[int, int]) -> tuple[Listed, Place]:
        """List and place of a structure with some charge and multiplicity.

        Raises:
            InputError: an element is not known, or neighbours cannot be looked for (`find_edges`).
        """
        built = self._built
        if built is not None:
            built = self._holding(atoms, state, built)
        if built is None:
            built = self._build(atoms, state)
        self._built = built
        return built.listed, self._place(atoms, built)

    def _holding(self, atoms: Atoms, state: tuple[int, int], built: _Built) -> _Built | None:
        """Where the list was found, its atoms in the images in which they are now; None where it does not hold.

        With ``F = inv(h0) h`` the deformation of the cell since the list was made, an edge that was longer than cutoff
        plus skin is now longer than ``(cutoff + skin) s - 2 d``: s the least singular value of F (no less than
        1 - |F - 1|), d the farthest that an atom has moved beyond the deformation.
        """
        was, pbc = built.atoms, atoms.pbc
        old_cell, old_pbc = built.cell
        if state != built.state or atoms.numbers.tobytes() != built.elements or pbc.tobytes() != old_pbc:
            return None
        positions, cell, old = atoms.positions, atoms.cell.array, was.cell.array
        affine, least, periodic = was.positions, 1.0, True in pbc.tolist()
        if periodic and cell.tobytes() != old_cell:
            deformation = periodic_inverse(old, pbc) @ (cell if pbc.all() else periodic_cell(cell, pbc))
            strain = (deformation - _UNIT).ravel()
            affine, least = affine @ deformation, 1.0 - math.sqrt(strain @ strain)
        drift = positions[0] - affine[0]
        if not all(abs(along) < _FARTHEST for along in drift.tolist()):  # nor where something is not a number
            return None
        moved = positions - (affine + drift)
        room = (self.cutoff + self.skin) * least - self.cutoff  # an edge may become so much shorter
        if _diagonal(moved) <= room or 2 * _farthest(moved) <= room:
            return built
        if not periodic:
            return None
        # an engine may have brought atoms back into the cell
        jumps = np.where(pbc, np.rint(moved @ periodic_inverse(cell, pbc)), 0.0)
        moved -= jumps @ np.where(pbc[:, None], cell, 0.0)
        if not (jumps.any() and 2 * _farthest(moved) <= room):
            return None
        there = was.copy()
        there.positions += jumps @ np.where(pbc[:, None], old, 0.0)
        return replace(built, atoms=there, home=built.home + jumps)

    def _place(self, atoms: Atoms, built: _Built) -> Place:
        """Positions and cell of a structure, its atoms brought back to where the list knows them."""
        cell = self._cell(atoms)
        place = Place(np.zeros(6 * built.rows + _OF_CELL, self.dtype))  # programs take arrays of the host as they are
        points = atoms.positions - built.origin
        if built.away:
            points -= built.home @ cell.periodic
        divide(points, place.positions[: len(atoms)])
        place.numbers[-_OF_CELL:] = cell.numbers
        return place

    def _cell(self, atoms: Atoms) -> _Cell:
        """What the cell comes to; that of the call before, where it is the same."""
        pbc, cell = atoms.pbc, atoms.cell.array
        key = cell.tobytes(), pbc.tobytes()
        if self._last is None or self._last.key != key:
            whole = bool(pbc.all())
            periodic = cell.copy() if whole else np.where(pbc[:, None], cell, 0.0)
            volume = cell_volume(cell) if whole else 1.0
            self._last = _Cell(key, periodic, np.append(in_two_parts(periodic, self.dtype), self.dtype.type(volume)))
        return self._last

    def _build(self, atoms: Atoms, state: tuple[int, int]) -> _Built:
        """The list of a structure, in a bucket of slots."""
        species = self.species.index(atoms.numbers)
        edges = find_edges(atoms, self.cutoff + self.skin)
        self.builds += 1
        rows = size_bucket(len(atoms))
        slots = self._slots[rows] = max(size_bucket(edges.largest_count), self._slots.get(rows, 0))
        home = home_cells(atoms)
        points = atoms.positions - home @ np.where(atoms.pbc[:, None], atoms.cell.array, 0.0)
        listed = _listed(species, edges, home, (rows, slots), state, self.dtype)
        return _Built(atoms.copy(), state, home, middle_on_grid(points), listed)


def _listed(
    species: np.ndarray,
    edges: Edges,
    home: np.ndarray,
    shape: tuple[int, int],
    state: tuple[int, int],
    dtype: np.dtype,
) -> Listed:
    """The edges of a structure in slots, its atoms brought back by some cells."""
    rows, slots = shape
    places = edges.places(slots)
    neighbors = np.repeat(np.arange(rows, dtype=np.int32)[:, None], slots, axis=1)
    shifts = np.zeros((rows, slots, 3), np.int32)
    reverse = np.tile(np.arange(slots, dtype=np.int32), (rows, 1))
    mask = np.zeros((rows, slots), bool)
    neighbors.put(places, edges.neighbors)
    shifts.reshape(-1, 3)[places] = edges.shifts + (home[edges.neighbors] - home[edges.centers])
    reverse.put(places, edges.reverse)
    mask.put(places, True)
    padded = np.zeros(rows, np.int32)
    padded[: len(species)] = species
    arrays = {"species": padded, "atom_mask": np.arange(rows) < len(species)}
    arrays |= {"neighbors": neighbors, "shifts": shifts, "reverse": reverse, "edge_mask": mask}
    arrays |= {name: np.full(1, number, dtype) for name, number in zip(("charge", "spin"), state, strict=True)}
    return Listed(**jax.device_put(arrays))
