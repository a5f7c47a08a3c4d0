"""Lists of one structure that moves: all edges are there whatever it did, and it is searched only where it must be."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, fcc111, molecule

from almlip_jax.errors import InputError
from almlip_jax.structures.followed import Follower, followed_graph, size_bucket
from almlip_jax.structures.neighbors import edge_vectors, neighborhood
from almlip_jax.structures.species import SpeciesTable

CUTOFF, SKIN = 3.5, 0.6
SPECIES = SpeciesTable((1, 6, 8, 13))

graph_of = jax.jit(followed_graph, static_argnums=2)


def follower(dtype: type = np.float32) -> Follower:
    return Follower(SPECIES, CUTOFF, SKIN, np.dtype(dtype))


def edges_of(following: Follower, atoms: Atoms) -> list[tuple[int, int, tuple[float, ...]]]:
    """Ends and vectors of the edges in a graph, sorted; opposite edges are held against each other on the way."""
    graph = jax.tree.map(np.asarray, graph_of(*following.look(atoms, (0, 1)), CUTOFF))
    mask = graph.edge_mask
    back = graph.vectors[graph.neighbors, graph.reverse]
    np.testing.assert_array_equal(back[mask], -graph.vectors[mask])
    assert not graph.vectors[~mask].any() and not mask[len(atoms) :].any()
    assert graph.atom_mask.sum() == len(atoms)
    own = np.broadcast_to(np.arange(len(mask))[:, None], mask.shape)[mask]
    found = zip(own, graph.neighbors[mask], np.round(graph.vectors[mask].astype(float), 4) + 0.0, strict=True)
    return sorted((int(i), int(j), tuple(v)) for i, j, v in found)


def edges_anew(atoms: Atoms) -> list[tuple[int, int, tuple[float, ...]]]:
    hood = neighborhood(atoms, CUTOFF)
    own = np.broadcast_to(np.arange(len(atoms))[:, None], hood.mask.shape)[hood.mask]
    vectors = np.round(edge_vectors(atoms, hood)[hood.mask], 4) + 0.0
    return sorted((int(i), int(j), tuple(v)) for i, j, v in zip(own, hood.neighbors[hood.mask], vectors, strict=True))


def same(ours: list, anew: list) -> bool:
    pairs = zip(ours, anew, strict=True)
    return len(ours) == len(anew) and all(a[:2] == b[:2] and np.allclose(a[2], b[2], atol=2e-4) for a, b in pairs)


def wire() -> Atoms:
    return Atoms("AlH2", [[0, 0, 0], [1.6, 0.3, 0.8], [-1.0, 1.2, 0.9]], cell=[0, 0, 2.4], pbc=(False, False, True))


STRUCTURES = {
    "molecule": lambda: molecule("CH3CH2OH"),
    "crystal with images": lambda: bulk("Al", "fcc", a=4.05),
    "slab": lambda: fcc111("Al", (2, 2, 2), vacuum=4.0),
    "wire": wire,
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_no_edge_is_missed_on_a_long_way(name):
    """Drift, diffusion, strain and atoms that an engine brings back into the cell or leaves far outside of it."""
    atoms, following, rng = STRUCTURES[name](), follower(), np.random.default_rng(0)
    for step in range(60):
        atoms.positions += 0.05 * rng.normal(size=(len(atoms), 3)) + 0.02
        if atoms.pbc.any() and step % 3 == 1:
            strain = np.eye(3) + 0.004 * rng.normal(size=(3, 3))
            atoms.set_cell(atoms.cell.array @ strain, scale_atoms=True)
        if atoms.pbc.any() and step % 4 == 2:
            atoms.wrap()
        if atoms.pbc.any() and step % 4 == 3:
            shifts = rng.integers(-3, 4, (len(atoms), 3)) * np.asarray(atoms.pbc)
            atoms.positions += shifts @ atoms.cell.array
        assert same(edges_of(following, atoms), edges_anew(atoms)), step
    assert len(atoms) == 1 or 1 < following.builds < 40


def test_it_is_searched_again_where_it_must_be():
    following, atoms = follower(), bulk("Al", "fcc", a=4.05, cubic=True) * (2, 1, 1)
    start = atoms.copy()

    def builds() -> int:
        following.look(atoms, (0, 1))
        return following.builds

    assert builds() == 1 and builds() == 1
    atoms.positions += [5.0, 0.3, -2.0]  # all of it
    atoms.positions[3] += [0.0, 0.0, 0.9 * SKIN]  # one alone, so that no two come nearer than by this
    atoms.wrap()
    assert builds() == 1
    atoms.positions[3] += [0.0, 0.0, 0.2 * SKIN]
    assert builds() == 2
    atoms.set_cell(atoms.cell.array * 1.01, scale_atoms=True)
    assert builds() == 2
    atoms.set_cell(atoms.cell.array * 0.9, scale_atoms=True)
    assert builds() == 3
    atoms.numbers[0] = 8
    assert builds() == 4
    atoms.pbc = (True, True, False)
    assert builds() == 5
    atoms = start
    del atoms[-1]
    assert builds() == 6


def test_sizes_come_in_buckets_and_grow():
    """Slots for neighbours are never given up, and never too few."""
    following = follower()
    thin, dense = bulk("Al", "fcc", a=4.6, cubic=True), bulk("Al", "fcc", a=3.2, cubic=True)
    shapes = [following.look(atoms, (0, 1))[0].neighbors.shape for atoms in (thin, dense, thin)]
    assert shapes[1] == shapes[2] and shapes[0][1] < shapes[1][1]
    assert same(edges_of(following, dense), edges_anew(dense))
    for size in range(1, 400):
        assert size <= size_bucket(size) <= max(1.25 * size + 3, 4)


def test_edges_are_as_accurate_as_their_numbers():
    """In a large cell, far from the origin, and in float64 to its last digits."""
    atoms = bulk("Al", "fcc", a=4.05, cubic=True) * (1, 1, 12)
    atoms.rattle(0.1, seed=1)
    atoms.positions += 7000.0
    hood = neighborhood(atoms, CUTOFF)
    for dtype, error in ((np.float32, 3e-7), (np.float64, 2e-12)):
        with jax.enable_x64(dtype == np.float64):
            graph = graph_of(*follower(dtype).look(atoms, (0, 1)), CUTOFF)
            lengths = np.linalg.norm(np.asarray(graph.vectors, np.float64), axis=-1)[np.asarray(graph.edge_mask)]
        expected = np.linalg.norm(edge_vectors(atoms, hood)[hood.mask], axis=-1)
        np.testing.assert_allclose(np.sort(lengths), np.sort(expected), atol=error)


def test_what_is_no_place_is_refused():
    following, atoms = follower(), molecule("H2O")
    following.look(atoms, (0, 1))
    atoms.positions[1, 2] = np.nan
    with pytest.raises(InputError, match="position of atom 1 is not finite"):
        following.look(atoms, (0, 1))
