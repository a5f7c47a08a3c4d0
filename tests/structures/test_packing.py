"""Packed datasets: edge vectors as accurate as from float64, memory as documented, integers that are wide enough."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule

from almlip_jax.oracles.base import bare
from almlip_jax.structures.graph import Graph
from almlip_jax.structures.neighbors import edge_vectors, largest_neighbor_count, neighborhood
from almlip_jax.structures.packing import BatchShape, Packed, pack, plan_batches, take_batch
from almlip_jax.structures.species import SpeciesTable

SPECIES = SpeciesTable((1, 6, 8, 29))
CUTOFF = 5.0


def crystal(seed: int) -> Atoms:
    atoms = bulk("Cu", a=3.4) * (5, 5, 4)
    atoms.rattle(0.1, seed=seed)
    return atoms


def scattered() -> Atoms:
    """Atoms many cells away from each other and from the origin, in a skewed cell."""
    atoms = crystal(1)
    rng = np.random.default_rng(0)
    atoms.positions += rng.integers(-400, 400, (100, 3)) @ atoms.cell.array
    return atoms


def far_molecule() -> Atoms:
    atoms = molecule("CH3CH2OH")
    atoms.rattle(0.05, seed=2)
    atoms.positions += [900.3, -7000.7, 12000.1]
    return atoms


def slab() -> Atoms:
    atoms = bulk("Cu", cubic=True) * (2, 2, 3)
    atoms.rattle(0.1, seed=3)
    atoms.pbc = [True, True, False]
    atoms.positions += [1.0, -50.0, 300.0]
    return atoms


def tiny_cell() -> Atoms:
    """One atom whose neighbours are all images of itself, several cells away."""
    return Atoms("Cu", positions=[[7.0, -3.0, 0.1]], cell=[[1.6, 0, 0], [0.3, 1.7, 0], [0.1, -0.4, 1.8]], pbc=True)


def huge_cell() -> Atoms:
    """Two atoms that meet across the face of a cell of 900 Angstrom."""
    return Atoms("H2", positions=[[0.2, 5, 5], [899.4, 5, 5.1]], cell=[900.0, 901.0, 902.0], pbc=True)


CASES = {one.__name__: one for one in (scattered, far_molecule, slab, tiny_cell, huge_cell)} | {
    "crystal": lambda: crystal(0),
    "molecule": lambda: molecule("H2O"),
}


def graph_of(structures: list[Atoms], dtype: type = np.float32) -> tuple[Packed, Graph]:
    """All structures in one batch that is taken inside of a compiled function."""
    atoms = sum(len(a) for a in structures)
    slots = largest_neighbor_count(structures, CUTOFF) + 1
    packed = pack(structures, SPECIES, CUTOFF, neighbors=slots, dtype=dtype)
    plan, _ = plan_batches(packed, np.arange(len(structures)), BatchShape(atoms + 2, slots, len(structures) + 1))
    return packed, jax.jit(lambda data: take_batch(data, plan, 0)[0])(packed.data)


@pytest.mark.parametrize("name", CASES)
def test_vectors_are_the_float64_ones_rounded_once(name):
    atoms = CASES[name]()
    graph = graph_of([molecule("H2O"), atoms])[1]
    hood = neighborhood(atoms, CUTOFF, capacity=graph.vectors.shape[1])
    exact = edge_vectors(atoms, hood)
    rows = slice(3, 3 + len(atoms))
    error = np.abs(np.asarray(graph.vectors[rows], np.float64) - exact)
    # what float64 itself loses, many cells away, comes on top
    own = 4 * np.spacing(np.abs(atoms.positions).max() + np.abs(atoms.cell.array).max())
    assert np.all(error <= 0.5 * np.spacing(np.abs(exact).astype(np.float32)) + 1e-9 + own)
    np.testing.assert_array_equal(graph.edge_mask[rows], hood.mask)
    np.testing.assert_array_equal(graph.neighbors[rows], hood.neighbors + 3)
    np.testing.assert_array_equal(graph.reverse[rows], hood.reverse)
    assert graph.reverse.dtype == graph.neighbors.dtype == np.int32


def test_float64_vectors_are_exact():
    with jax.enable_x64(True):
        structures = [one() for one in CASES.values()]
        graph = graph_of(structures, np.float64)[1]
        start = 0
        for atoms in structures:
            hood = neighborhood(atoms, CUTOFF, capacity=graph.vectors.shape[1])
            own = 8 * np.spacing(np.abs(atoms.positions).max() + np.abs(atoms.cell.array).max())
            rows = slice(start, start + len(atoms))
            np.testing.assert_allclose(graph.vectors[rows], edge_vectors(atoms, hood), rtol=0, atol=own)
            start += len(atoms)
        assert graph.vectors.dtype == np.float64


def test_opposite_edges_are_exact_negatives_and_padding_is_zero():
    graph = graph_of([one() for one in CASES.values()])[1]
    opposite = np.asarray(graph.vectors)[np.asarray(graph.neighbors), np.asarray(graph.reverse)]
    mask = np.asarray(graph.edge_mask)
    np.testing.assert_array_equal(opposite[mask], -np.asarray(graph.vectors)[mask])
    assert np.all(np.asarray(graph.vectors)[~mask] == 0)
    assert not mask[~np.asarray(graph.atom_mask)].any()


def test_positions_are_those_of_the_structures_up_to_origin_and_images():
    with jax.enable_x64(True):
        structures = [one() for one in CASES.values()]
        graph = graph_of(structures, np.float64)[1]
        start = 0
        for n, atoms in enumerate(structures):
            rows, periodic = slice(start, start + len(atoms)), np.where(atoms.pbc[:, None], atoms.cell.array, 0)
            np.testing.assert_allclose(graph.cell[n], periodic, rtol=1e-15)
            moved = np.asarray(graph.positions[rows]) - atoms.positions
            turns = (moved - moved[0]) @ np.linalg.pinv(periodic) if atoms.pbc.any() else moved - moved[0]
            np.testing.assert_allclose(turns, np.where(atoms.pbc, np.round(turns), 0), atol=1e-8)
            start += len(atoms)
        assert not np.any(graph.cell[len(structures) :])


def test_charge_and_spin_are_those_that_labels_are_computed_with():
    """Whatever a structure says them by, and neutral singlets where it says nothing, padding included."""
    said = {
        "charge": ({"charge": 1}, (1, 1)),
        "Multiplicity": ({"total_charge": -1.0, "Multiplicity": 2}, (-1, 2)),
        "uhf": ({"uhf": 2}, (0, 3)),
        "nothing": ({}, (0, 1)),
    }
    structures = [Atoms("OH2", molecule("H2O").positions, info=info) for info, _ in said.values()]
    structures += [molecule("O2"), molecule("H2O"), Atoms("O2", pbc=True, cell=[9] * 3, magmoms=[1, 1])]
    structures[-1].positions[1, 0] += 1.2
    structures[5].set_initial_charges([1.2, -0.1, -0.1])
    wanted = [state for _, state in said.values()] + [(0, 3), (1, 1), (0, 1), (0, 1)]
    graph = graph_of(structures)[1]
    np.testing.assert_array_equal(np.stack([graph.charge, graph.spin], axis=1), wanted)
    labelled = [bare(atoms).info for atoms in structures]
    assert [(info["charge"], info["spin"]) for info in labelled] == wanted[:-1]


@pytest.mark.parametrize(("slots", "spare_atoms", "spare_structures"), [(60, 1, 1), (256, 50, 7)])
def test_memory_is_as_documented(slots, spare_atoms, spare_structures):
    """``40 + 6 K`` bytes for each atom slot, 136 for each structure slot."""
    structures = [crystal(seed) for seed in range(3)]
    atoms, number = 300 + spare_atoms, 3 + spare_structures
    packed = pack(structures, SPECIES, CUTOFF, neighbors=slots, atoms=atoms, slots=number)
    found = sum(leaf.nbytes for leaf in jax.tree.leaves(packed.data))
    assert found == (40 + 6 * slots) * atoms + 136 * number


def test_integers_are_as_wide_as_needed():
    usual = graph_of([crystal(0), molecule("H2O")])[0].data
    types = usual.neighbor_offset.dtype, usual.shifts.dtype, usual.reverse.dtype
    assert types == (np.int16, np.int8, np.uint8)
    many_slots = pack([crystal(0)], SPECIES, CUTOFF, neighbors=257).data
    assert many_slots.reverse.dtype == np.uint16
    # a chain across a structure of more atoms than int16 can count, and images beyond the 127th
    length = 33_000
    chain = Atoms(
        f"H{length}", positions=np.arange(length)[:, None] * [0.9, 0, 0], cell=[0.9 * length, 50, 50], pbc=True
    )
    thin = Atoms("H", cell=[0.03, 60.0, 60.0], pbc=True)
    chained = pack([chain], SPECIES, 1.0, neighbors=2).data
    assert chained.neighbor_offset.dtype == np.int32
    assert int(chained.neighbor_offset[0].max()) == length - 1
    thinned = pack([thin], SPECIES, CUTOFF, neighbors=340).data
    assert thinned.shifts.dtype == np.int16 and int(jnp.abs(thinned.shifts).max()) == 166
