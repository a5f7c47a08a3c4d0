"""One structure as an engine moves it: its edges with a skin on the host, and the graph that a program makes of them.

The list is found in float64 and kept until an edge might come within the cutoff that it does not hold: an atom moved
half the skin, or atoms and the strain of the cell took as much together.  What moves from call to call, positions and
cell, travels in two parts (`compact`), so that edge vectors are as accurate as those of a packed dataset.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ase import Atoms
from flax import struct

from almlip_jax.structures.compact import edge_vectors, home_cells, in_two_parts, middle_on_grid
from almlip_jax.structures.graph import Graph
from almlip_jax.structures.neighbors import Edges, find_edges, periodic_cell, periodic_inverse
from almlip_jax.structures.species import SpeciesTable

_LEAST = 4  # atoms or neighbours of the smallest bucket
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
        positions: [A, 2, 3] Angstrom, coarse and fine part, counted from the middle.
        cell: [3, 2, 3] Angstrom, coarse and fine part of each cell vector; 0 in directions that are not periodic.
        volume: [1] Angstrom^3; 1 where a structure is not periodic in three directions.
    """

    positions: jax.Array
    cell: jax.Array
    volume: jax.Array


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

    def look(self, atoms: Atoms, state: tuple[int, int]) -> tuple[Listed, Place]:
        """List and place of a structure with some charge and multiplicity.

        Raises:
            InputError: an element is not known, or neighbours cannot be looked for (`find_edges`).
        """
        home = self._home(atoms, state)
        if self._built is None or home is None:
            self._built = built = self._build(atoms, state)
            home = built.home
        return self._built.listed, self._place(atoms, home, self._built)

    def _home(self, atoms: Atoms, state: tuple[int, int]) -> np.ndarray | None:
        """By which cells [N, 3] atoms are brought to where the list knows them; None where it does not hold.

        With ``F = inv(h0) h`` the deformation of the cell since the list was made, an edge that was longer than cutoff
        plus skin is now longer than ``(cutoff + skin) s - 2 d``: s the least singular value of F (no less than
        1 - |F - 1|), d the farthest that an atom has moved beyond the deformation.
        """
        built = self._built
        if built is None or state != built.state or len(atoms) != len(built.atoms):
            return None
        was = built.atoms
        if not (np.array_equal(atoms.numbers, was.numbers) and np.array_equal(atoms.pbc, was.pbc)):
            return None
        cell, old, pbc = atoms.cell.array, was.cell.array, atoms.pbc
        affine, least = was.positions, 1.0
        if pbc.any() and not np.array_equal(cell, old):
            deformation = periodic_inverse(old, pbc) @ periodic_cell(cell, pbc)
            affine, least = affine @ deformation, 1.0 - float(np.linalg.norm(deformation - np.eye(3)))
        drift = atoms.positions[0] - affine[0]
        moved = atoms.positions - affine - drift
        home = built.home
        if pbc.any():  # an engine may bring atoms back into the cell
            jumps = np.where(pbc, np.rint(moved @ periodic_inverse(cell, pbc)), 0.0)
            if jumps.any():
                moved -= jumps @ np.where(pbc[:, None], cell, 0.0)
                home = home + jumps
        middle = 0.5 * (moved.min(axis=0) + moved.max(axis=0))
        farthest = float(np.sqrt(np.max(np.sum((moved - middle) ** 2, axis=1))))
        holds = (self.cutoff + self.skin) * least - 2 * farthest >= self.cutoff
        return home if holds and np.abs(drift).max() < _FARTHEST else None  # nor where something is not a number

    def _place(self, atoms: Atoms, home: np.ndarray, built: _Built) -> Place:
        """Positions and cell of a structure whose atoms are so many cells from where the list knows them."""
        pbc, cell = atoms.pbc, atoms.cell.array
        periodic = np.where(pbc[:, None], cell, 0.0)
        positions = np.zeros((len(built.listed.species), 2, 3), self.dtype)
        points = atoms.positions - built.origin - (home @ periodic if pbc.any() else 0.0)
        positions[: len(atoms)] = in_two_parts(points, self.dtype)
        volume = np.full(1, atoms.cell.volume if pbc.all() else 1.0, self.dtype)
        parts: dict[str, Any] = {"positions": positions, "cell": in_two_parts(periodic, self.dtype), "volume": volume}
        return Place(**parts)  # programs take arrays of the host as they are

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
