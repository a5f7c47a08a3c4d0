"""Edges of device lists and of the host's, to be held against each other."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from ase import Atoms

from almlip_jax.structures.graph import Graph
from almlip_jax.structures.neighbors import edge_vectors, neighborhood
from almlip_jax.structures.walkers import Room, WalkerNeighbors, walker_neighbors


def padded(structures: Sequence[Atoms], num_atoms: int | None = None) -> tuple[np.ndarray, ...]:
    """Positions, cells, pbc and atom mask of some structures as walkers."""
    size = num_atoms or max(len(atoms) for atoms in structures)
    positions = np.zeros((len(structures), size, 3))
    mask = np.zeros((len(structures), size), bool)
    for walker, atoms in enumerate(structures):
        positions[walker, : len(atoms)] = atoms.positions
        mask[walker, : len(atoms)] = True
    cells = np.stack([atoms.cell.array for atoms in structures])
    return positions, cells, np.stack([atoms.pbc for atoms in structures]), mask


@jax.jit
def make_graph(neighbors: WalkerNeighbors, positions: jax.Array, species: jax.Array) -> Graph:
    """The graph of neutral singlets."""
    charge = jnp.zeros(len(positions), positions.dtype)
    return neighbors.graph(positions, species, charge, charge + 1)


def make(structures: Sequence[Atoms], cutoff: float, skin: float, room: Room | None = None) -> WalkerNeighbors:
    return walker_neighbors(*padded(structures), cutoff, skin, room)


def graph_edges(graph: Graph, walker: int, num_atoms: int) -> np.ndarray:
    """Rows (i, j, vector) of a walker's edges in a canonical order."""
    atoms = np.arange(walker * num_atoms, (walker + 1) * num_atoms)
    mask = np.asarray(graph.edge_mask)[atoms]
    own = np.broadcast_to(np.arange(num_atoms)[:, None], mask.shape)[mask]
    neighbor = np.asarray(graph.neighbors)[atoms][mask] - walker * num_atoms
    return canonical(own, neighbor, np.asarray(graph.vectors)[atoms][mask])


def host_edges(atoms: Atoms, cutoff: float) -> np.ndarray:
    hood = neighborhood(atoms, cutoff)
    own = np.broadcast_to(np.arange(len(atoms))[:, None], hood.mask.shape)[hood.mask]
    return canonical(own, hood.neighbors[hood.mask], edge_vectors(atoms, hood)[hood.mask])


def canonical(own: np.ndarray, neighbor: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    rows = np.column_stack([own, neighbor, vectors])
    return rows[np.lexsort((*rows[:, 2:].round(4).T, rows[:, 1], rows[:, 0]))]


def assert_same_as_host(neighbors: WalkerNeighbors, structures: Sequence[Atoms], positions: jax.Array) -> Graph:
    size = positions.shape[1]
    graph = make_graph(neighbors, positions, jnp.zeros(positions.shape[:2], jnp.int32))
    for walker, atoms in enumerate(structures):
        moved = atoms.copy()
        moved.positions = np.asarray(positions)[walker, : len(atoms)]
        expected = host_edges(moved, neighbors.cutoff)
        found = graph_edges(graph, walker, size)
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, atol=1e-9)
    return graph


def assert_reverse(graph: Graph) -> None:
    """Following an edge and its reverse slot leads home, and the vectors are opposite; padding slots stay put."""
    there = graph.neighbors, graph.reverse
    own = np.broadcast_to(np.arange(graph.neighbors.shape[0])[:, None], graph.neighbors.shape)
    slot = np.broadcast_to(np.arange(graph.neighbors.shape[1]), graph.neighbors.shape)
    np.testing.assert_array_equal(graph.neighbors[there], own)
    np.testing.assert_array_equal(graph.reverse[there], slot)
    np.testing.assert_array_equal(graph.edge_mask[there], graph.edge_mask)
    np.testing.assert_allclose(graph.vectors[there], -graph.vectors, atol=1e-5)
    assert np.all(np.asarray(graph.vectors)[~np.asarray(graph.edge_mask)] == 0)
