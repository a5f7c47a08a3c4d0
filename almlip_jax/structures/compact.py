"""Compact geometry: what a dataset keeps of its edges, and the edge vectors that come of it, as accurate as float64.

A float32 position of 20 Angstrom is wrong by up to 1e-6 Angstrom, and so would be a difference of two.  Positions and
cells are therefore kept in two parts, ``coarse`` on a grid of 2^-10 Angstrom and ``fine`` for the rest: sums and
differences of coarse parts are exact up to 16384 Angstrom, those of fine parts are tiny, and their sum is rounded once.
An edge is then no more than small integers: where its neighbour is, and how many cells further.
"""

from __future__ import annotations

import jax
import numpy as np
from ase import Atoms

from almlip_jax.structures.neighbors import Edges, periodic_inverse

_GRID = 2.0**-10  # Angstrom
_PER_ANGSTROM = 1 / _GRID


def in_two_parts(values: np.ndarray, dtype: np.dtype | type) -> np.ndarray:
    """Lengths [..., 3] in Angstrom, float64, as coarse and fine part [..., 2, 3] of another type."""
    parts = np.empty((*values.shape[:-1], 2, values.shape[-1]), dtype)
    divide(values, parts)
    return parts


def divide(values: np.ndarray, parts: np.ndarray) -> None:
    """Writes lengths [..., 3] in Angstrom as coarse and fine part into [..., 2, 3]."""
    coarse = values * _PER_ANGSTROM  # exact, as it is a power of two
    np.rint(coarse, out=coarse)
    coarse *= _GRID
    parts[..., 0, :] = coarse
    np.subtract(values, coarse, out=parts[..., 1, :], casting="same_kind")


def wrapped(atoms: Atoms, edges: Edges) -> tuple[np.ndarray, np.ndarray]:
    """Positions [N, 3] inside the cell and about the origin, Angstrom, and the shifts [E, 3] that belong to them.

    The edge vectors are those of the structure as it was; shifts are as small as the cutoff allows.
    """
    positions, shifts = np.array(atoms.positions, np.float64), edges.shifts
    if atoms.pbc.any():
        cell, cells = np.asarray(atoms.cell.array, np.float64), home_cells(atoms)
        positions -= cells[:, 0:1] * cell[0] + cells[:, 1:2] * cell[1] + cells[:, 2:3] * cell[2]
        if cells.any():
            shifts = shifts + (cells.take(edges.neighbors, axis=0) - cells.take(edges.centers, axis=0))
    positions -= middle_on_grid(positions)
    return positions, shifts


def home_cells(atoms: Atoms) -> np.ndarray:
    """How many cells each atom lies outside of its own, [N, 3] int64; 0 in directions that are not periodic."""
    if not atoms.pbc.any():
        return np.zeros((len(atoms), 3), np.int64)
    fractions = atoms.positions @ periodic_inverse(np.asarray(atoms.cell.array, np.float64), atoms.pbc)
    return np.where(atoms.pbc, np.floor(fractions), 0.0).astype(np.int64)


def middle_on_grid(positions: np.ndarray) -> np.ndarray:
    """The middle [3] of positions [N, 3], on the grid, so that counting from there rounds nothing; 0 of none."""
    if not len(positions):
        return np.zeros(3)
    middle: np.ndarray = np.round(0.5 * (positions.min(axis=0) + positions.max(axis=0)) / _GRID) * _GRID
    return middle


def edge_vectors(positions: jax.Array, cells: jax.Array, neighbors: jax.Array, shifts: jax.Array) -> jax.Array:
    """Vectors ``R_j + shift . cell - R_i`` of all edges, [A, K, 3] Angstrom, on the device.

    They are the float64 ones rounded once (by half a unit in the last place, and 1e-9 Angstrom where that is less), and
    opposite edges are exact negatives of each other.

    Args:
        positions: [A, 2, 3] Angstrom, coarse and fine.
        cells: [A, 3, 2, 3] Angstrom, coarse and fine, of each atom's structure.
        neighbors: [A, K] int, index of atom j; the atom itself in padding slots.
        shifts: [A, K, 3] int; 0 in padding slots.
    """
    times = shifts.astype(positions.dtype)

    def part(start: jax.Array, cell: jax.Array) -> jax.Array:  # [A, 3] and [A, 3, 3]; each sum and product is odd
        moved = sum(times[..., d : d + 1] * cell[:, None, d] for d in range(3))
        return (start[neighbors] - start[:, None]) + moved

    return part(positions[:, 0], cells[:, :, 0]) + part(positions[:, 1], cells[:, :, 1])
