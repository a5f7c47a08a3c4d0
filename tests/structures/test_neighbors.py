"""Host neighbour lists against an explicit sum over images, and the symmetries they must keep."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from hypothesis import given, settings
from hypothesis import strategies as st

from almlip_jax.errors import CapacityError, InputError
from almlip_jax.structures.neighbors import Neighborhood, edge_vectors, largest_neighbor_count, neighborhood

Edge = tuple[int, int, int, int, int]


def brute_force(atoms: Atoms, cutoff: float) -> set[Edge]:
    """Every (i, j, shift) below the cutoff, from a sum over more images than can matter."""
    cell, positions = atoms.cell.array, atoms.positions
    counts = np.zeros(3, int)
    if atoms.pbc.any():
        reach = cutoff + np.linalg.norm(np.ptp(positions, axis=0))
        dual = np.linalg.pinv(cell[atoms.pbc])  # [3, periodic directions]
        counts[atoms.pbc] = np.ceil(reach * np.linalg.norm(dual, axis=0)).astype(int)
    shifts = np.array(list(itertools.product(*(range(-n, n + 1) for n in counts))))
    edges = set()
    for i, j in itertools.product(range(len(atoms)), repeat=2):
        distance = np.linalg.norm((positions[j] - positions[i]) + shifts @ cell, axis=1)
        for shift in shifts[distance < cutoff]:
            if i != j or shift.any():
                edges.add((i, j, *(int(s) for s in shift)))
    return edges


def listed(hood: Neighborhood) -> list[Edge]:
    return [
        (int(i), int(hood.neighbors[i, k]), *(int(s) for s in hood.shifts[i, k]))
        for i, k in zip(*np.nonzero(hood.mask), strict=True)
    ]


@st.composite
def structures(draw: st.DrawFn) -> tuple[Atoms, float]:
    """A few atoms, some outside the cell, in a random (often small, skewed, left-handed) cell, and a cutoff."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    pbc = np.array(draw(st.tuples(*[st.booleans()] * 3)))
    lengths = rng.uniform(1.5, 7.0, 3) * rng.choice([-1, 1], 3)
    cell = np.diag(lengths) + np.tril(rng.uniform(-1.5, 1.5, (3, 3)), -1)
    if draw(st.booleans()):
        cell[~pbc] = 0.0
    num_atoms = draw(st.integers(1, 5))
    positions = rng.normal(size=(num_atoms, 3)) * draw(st.sampled_from([1.0, 4.0, 12.0]))
    return Atoms("H" * num_atoms, positions=positions, cell=cell, pbc=pbc), draw(st.floats(1.0, 4.0))


@settings(max_examples=80, deadline=None)
@given(structures())
def test_edges_are_those_of_an_explicit_image_sum(case: tuple[Atoms, float]) -> None:
    atoms, cutoff = case
    edges = listed(neighborhood(atoms, cutoff))
    assert edges == sorted(brute_force(atoms, cutoff))  # the order of the slots is part of the contract


@settings(max_examples=40, deadline=None)
@given(structures())
def test_reverse_slots_hold_the_opposite_edges(case: tuple[Atoms, float]) -> None:
    atoms, cutoff = case
    hood = neighborhood(atoms, cutoff, capacity=largest_neighbor_count([atoms], cutoff) + 2)
    vectors = edge_vectors(atoms, hood)
    there = hood.neighbors, hood.reverse
    own = np.broadcast_to(np.arange(len(atoms))[:, None], hood.mask.shape)
    slot = np.broadcast_to(np.arange(hood.mask.shape[1]), hood.mask.shape)
    np.testing.assert_array_equal(hood.neighbors[there], own)
    np.testing.assert_array_equal(hood.reverse[there], slot)
    np.testing.assert_array_equal(hood.shifts[there], -hood.shifts)
    np.testing.assert_array_equal(vectors[there], -vectors)
    lengths = np.linalg.norm(vectors, axis=-1)
    assert np.all(lengths[hood.mask] < cutoff)
    assert np.all(vectors[~hood.mask] == 0)


@settings(max_examples=40, deadline=None)
@given(structures(), st.integers(0, 2**32 - 1))
def test_moving_the_structure_or_its_atoms_by_lattice_vectors_keeps_the_edges(
    case: tuple[Atoms, float], seed: int
) -> None:
    atoms, cutoff = case
    rng = np.random.default_rng(seed)
    moved = atoms.copy()
    hops = np.where(atoms.pbc, rng.integers(-3, 4, (len(atoms), 3)), 0)
    moved.positions += hops @ atoms.cell.array + rng.normal(size=3)

    def geometry(structure: Atoms) -> np.ndarray:
        hood = neighborhood(structure, cutoff)
        own = np.broadcast_to(np.arange(len(structure))[:, None], hood.mask.shape)
        edges = np.column_stack([own[hood.mask], hood.neighbors[hood.mask], edge_vectors(structure, hood)[hood.mask]])
        return edges[np.lexsort(edges.round(6).T)]

    np.testing.assert_allclose(geometry(moved), geometry(atoms), atol=1e-9)


def test_crystal_shells_with_images_of_the_atom_itself() -> None:
    primitive = bulk("Cu", "fcc", a=3.6)
    first = 3.6 / np.sqrt(2)
    assert largest_neighbor_count([primitive], first + 0.01) == 12
    assert largest_neighbor_count([primitive], 3.6 + 0.01) == 12 + 6
    assert largest_neighbor_count([primitive, primitive * (2, 2, 2)], 3.6 * np.sqrt(1.5) + 0.01) == 12 + 6 + 24
    assert largest_neighbor_count([], 3.0) == 0


def test_an_edge_as_long_as_the_cutoff_is_none() -> None:
    pair = Atoms("H2", positions=[[0, 0, 0], [0, 0, 2.0]])
    assert not neighborhood(pair, 2.0).mask.any()
    assert neighborhood(pair, np.nextafter(2.0, 3.0)).mask.all()


def test_capacity_pads_with_slots_that_point_at_themselves() -> None:
    pair = Atoms("H2", positions=[[0, 0, 0], [0, 0, 1.0]])
    hood = neighborhood(pair, 2.0, capacity=3)
    assert hood.mask.tolist() == [[True, False, False]] * 2
    assert hood.neighbors.tolist() == [[1, 0, 0], [0, 1, 1]]
    assert hood.reverse.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert neighborhood(Atoms("H"), 2.0).mask.shape == (1, 0)


def test_a_small_capacity_names_the_size_needed() -> None:
    with pytest.raises(CapacityError, match="12 neighbours .* only 5 slots.* at least 12"):
        neighborhood(bulk("Cu", "fcc", a=3.6), 2.6, capacity=5)


@pytest.mark.parametrize(
    ("cell", "pbc", "message"),
    [
        (np.diag([4.0, 4.0, 0.0]), [True, True, True], "direction 2 is periodic but its cell vector is zero"),
        (np.ones((3, 3)), [True, True, False], "linearly dependent"),
        ([[4, 0, 0], [4, 1e-5, 0], [0, 0, 4]], [True, True, True], "linearly dependent"),
        (np.diag([4.0, np.nan, 4.0]), [True, True, True], "not finite"),
    ],
)
def test_degenerate_cells_are_refused(cell: np.ndarray, pbc: list[bool], message: str) -> None:
    with pytest.raises(InputError, match=message):
        neighborhood(Atoms("H", cell=cell, pbc=pbc), 3.0)


def test_open_directions_may_have_any_cell_vector() -> None:
    slab = Atoms("H2", positions=[[0, 0, 0], [0, 0, 30.0]], cell=[[2, 0, 0], [0, 2, 0], [2, 2, 0]], pbc=[1, 1, 0])
    assert sorted(brute_force(slab, 2.1)) == listed(neighborhood(slab, 2.1))


@pytest.mark.parametrize("cutoff", [0.0, -1.0, np.nan, np.inf])
def test_senseless_cutoffs_are_refused(cutoff: float) -> None:
    with pytest.raises(InputError, match="cutoff must be a positive length"):
        neighborhood(Atoms("H2", positions=np.eye(2, 3)), cutoff)


def test_positions_that_are_not_finite_are_refused_by_atom() -> None:
    with pytest.raises(InputError, match="atom 1 is not finite"):
        neighborhood(Atoms("H2", positions=[[0, 0, 0], [0, np.inf, 0]]), 3.0)


def test_the_order_of_slots_holds_for_atoms_millions_of_cells_away() -> None:
    atoms = bulk("Cu", "fcc", a=3.6, cubic=True)
    atoms.rattle(0.1, seed=0)
    near = neighborhood(atoms, 4.0)
    hops = np.array([[0, 0, 0], [3_000_000] * 3, [0, 0, 0], [-3_000_000] * 3])
    atoms.positions += hops @ atoms.cell.array
    hood = neighborhood(atoms, 4.0)
    edges = listed(hood)
    assert edges == sorted(edges)
    np.testing.assert_array_equal(hood.shifts + hops[hood.neighbors] - hops[:, None], near.shifts)
    np.testing.assert_array_equal(hood.neighbors, near.neighbors)
    own = np.broadcast_to(np.arange(4)[:, None], hood.mask.shape)
    np.testing.assert_array_equal(hood.neighbors[hood.neighbors, hood.reverse], own)
