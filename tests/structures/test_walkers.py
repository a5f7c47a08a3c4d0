"""Device neighbour lists against the host's and jax-md's, while walkers move inside a compiled loop."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from hypothesis import given, settings
from hypothesis import strategies as st
from walker_edges import (
    assert_reverse,
    assert_same_as_host,
    canonical,
    graph_edges,
    host_edges,
    make,
    make_graph,
    padded,
)

from almlip_jax.errors import InputError
from almlip_jax.partial_import import import_part
from almlip_jax.structures import pair_search, walkers
from almlip_jax.structures.graph import Graph, Places, forces_and_virial
from almlip_jax.structures.walkers import Room, WalkerNeighbors, walker_neighbors


def random_walkers(seed: int, count: int) -> list[Atoms]:
    """Structures with different sizes, cells and periodic directions, atoms also outside the cell."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        pbc = rng.random(3) < 0.6
        cell = np.diag(rng.uniform(2.0, 9.0, 3) * rng.choice([-1, 1], 3)) + np.tril(rng.uniform(-2, 2, (3, 3)), -1)
        if rng.random() < 0.3:
            cell[~pbc] = 0
        num_atoms = rng.integers(1, 6)
        positions = rng.normal(size=(num_atoms, 3)) * rng.choice([1.0, 5.0, 20.0])
        made.append(Atoms(f"H{num_atoms}", positions=positions, cell=cell, pbc=pbc))
    made[0].pbc[0] = made[0].cell[0].any()  # at least one list that is not all pairs, where the cell allows
    return made


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1.7, 3.7]))
def test_edges_are_the_hosts_for_any_mixture_of_cells(seed: int, cutoff: float) -> None:
    with jax.enable_x64(True):
        structures = random_walkers(seed, 4)
        # One size for all examples, so that the test compiles once.
        neighbors = walker_neighbors(*padded(structures, 5), cutoff, 0.4, room=Room(400, (4, 4, 4)))
        graph = assert_same_as_host(neighbors, structures, neighbors.built_at)
        assert_reverse(graph)
        assert not neighbors.overflow


def mixed_walkers() -> list[Atoms]:
    rng = np.random.default_rng(7)
    copper = bulk("Cu", "fcc", a=3.6) * (2, 1, 1)  # far thinner than the cutoff
    slab = bulk("Si", cubic=True)
    slab.pbc = True, True, False
    water = molecule("H2O", vacuum=3.0)
    structures = [copper, slab, water]
    for atoms in structures:
        atoms.rattle(0.05, rng=rng)
    return structures


@pytest.mark.parametrize("skin", [0.0, 0.5])
def test_list_follows_walkers_inside_a_compiled_loop(skin: float) -> None:
    """Atoms drift through several rebuilds and out of their cells; the edges are the host's at every step."""
    with jax.enable_x64(True):
        structures = mixed_walkers()
        start = make(structures, 3.5, skin, room=Room(80))
        velocity = jax.random.normal(jax.random.key(0), start.built_at.shape) * 0.06
        species = jnp.zeros(start.atom_mask.shape, jnp.int32)

        @jax.jit
        def trajectory(neighbors: WalkerNeighbors) -> tuple[jax.Array, jax.Array, Graph]:
            def step(carry: tuple, _: None) -> tuple:
                positions, neighbors = carry
                positions = positions + velocity
                updated = neighbors.update(positions)
                rebuilt = jnp.any(updated.built_at != neighbors.built_at)
                return (positions, updated), (positions, rebuilt, make_graph(updated, positions, species))

            return jax.lax.scan(step, (neighbors.built_at, neighbors), length=12)[1]

        positions, rebuilt, graphs = trajectory(start)
        assert np.sum(rebuilt) == 12 if skin == 0 else 2 <= np.sum(rebuilt) < 12
        for step in range(12):
            graph = jax.tree.map(lambda leaf, step=step: leaf[step], graphs)
            assert_reverse(graph)
            for walker, atoms in enumerate(structures):
                moved = atoms.copy()
                moved.positions = positions[step, walker, : len(atoms)]
                found = graph_edges(graph, walker, positions.shape[2])
                np.testing.assert_allclose(found, host_edges(moved, 3.5), atol=1e-9)


@pytest.mark.parametrize("atom", [0, 1])
def test_head_on_approach_is_seen_as_soon_as_it_matters(atom: int) -> None:
    """Both atoms of one walker, outside the list, close in on each other; the other walker stays still."""
    with jax.enable_x64(True):
        cutoff, skin = 3.0, 0.4
        pair = Atoms("H2", positions=[[0, 0, 0], [cutoff + skin + 1e-3, 0, 0]], cell=[20.0] * 3, pbc=True)
        start = make([pair, pair], cutoff, skin)
        update = jax.jit(WalkerNeighbors.update)
        assert not np.any(start.slots.mask)
        toward = jnp.array([[[1.0, 0, 0], [-1.0, 0, 0]], [[0, 0, 0], [0, 0, 0]]])
        still = update(start, start.built_at + 0.499 * skin * toward)
        np.testing.assert_array_equal(still.built_at, start.built_at)
        near = start.built_at + 0.502 * skin * toward  # 3.0 - 0.6e-3 apart: just within the cutoff
        graph = make_graph(update(still, near), near, jnp.zeros((2, 2), jnp.int32))
        assert np.asarray(graph.edge_mask).sum(axis=1).tolist() == [1, 1, 0, 0]
        # One atom alone has to move as far before anything is rebuilt, whichever it is.
        alone = toward.at[0, 1 - atom].set(0)
        assert not np.any(update(start, start.built_at + 0.499 * skin * alone).built_at != start.built_at)
        moved = update(start, start.built_at + 0.501 * skin * alone)
        np.testing.assert_array_equal(moved.built_at, start.built_at + 0.501 * skin * alone)


def test_float32_finds_the_edges_of_float64() -> None:
    """Apart from edges as long as the cutoff to six digits, of which there are none here."""
    structures = mixed_walkers()
    neighbors = make(structures, 3.5, 0.5)
    graph = make_graph(neighbors, neighbors.built_at, jnp.zeros(neighbors.atom_mask.shape, jnp.int32))
    assert graph.vectors.dtype == jnp.float32
    for walker, atoms in enumerate(structures):
        found = graph_edges(graph, walker, neighbors.atom_mask.shape[1])
        np.testing.assert_allclose(found, host_edges(atoms, 3.5), atol=2e-5)


def test_atoms_half_a_cell_apart_have_both_images() -> None:
    """In the perfect crystal every pair sits on the border between two nearest images."""
    crystal = bulk("CsCl", "cesiumchloride", a=4.1)
    neighbors = make([crystal], 4.3, 0.0)
    graph = make_graph(neighbors, neighbors.built_at, jnp.zeros((1, 2), jnp.int32))
    assert np.asarray(graph.edge_mask).sum(axis=1).tolist() == [8 + 6, 8 + 6]
    assert_reverse(graph)


def test_lists_agree_with_jax_md() -> None:
    """Same edges, as (i, j, vector), as jax-md's dense list with images, for wrapped atoms in one skewed cell."""
    custom, partition = import_part("jax_md", "custom_partition", "partition")
    rng = np.random.default_rng(3)
    cell = 2.4 * np.array([[1.0, 0, 0], [0.3, 1.1, 0], [-0.2, 0.4, 0.9]])
    positions = (rng.random((6, 3)) @ cell).astype(np.float32)
    atoms = Atoms("H6", positions=positions, cell=cell, pbc=True)
    neighbors = make([atoms], 2.5, 0.0)
    graph = make_graph(neighbors, neighbors.built_at, jnp.zeros((1, 6), jnp.int32))
    reference = custom.neighbor_list_multi_image(
        None, jnp.asarray(cell.T), 2.5, fractional_coordinates=False, format=partition.NeighborListFormat.Dense
    ).allocate(jnp.asarray(positions))
    index = np.asarray(reference.idx)
    real = index < 6
    own = np.broadcast_to(np.arange(6)[:, None], index.shape)[real]
    vectors = positions[index[real]] + np.asarray(reference.shifts)[real] @ cell - positions[own]
    np.testing.assert_allclose(graph_edges(graph, 0, 6), canonical(own, index[real], vectors), atol=1e-5)


def test_small_molecules_take_all_pairs_and_never_rebuild() -> None:
    molecules = [molecule("CH3CH2OH"), molecule("H2O")]
    neighbors = make(molecules, 2.0, 0.5)
    assert neighbors.all_pairs and neighbors.capacity == 8
    moved = neighbors.built_at * 1.5
    assert neighbors.update(moved) is neighbors
    with jax.enable_x64(True):
        wide = make(molecules, 2.0, 0.5)
        assert_reverse(assert_same_as_host(wide, molecules, wide.built_at * 1.5))


def test_large_molecules_and_single_atoms_keep_a_list() -> None:
    with jax.enable_x64(True):
        chain = Atoms("H40", positions=np.arange(40)[:, None] * np.array([1.0, 0.1, 0.0]))
        neighbors = make([chain], 2.5, 0.5)
        assert not neighbors.all_pairs and neighbors.capacity == 8
        assert_reverse(assert_same_as_host(neighbors, [chain], neighbors.built_at))
        assert make([chain], 2.5, 0.5, room=Room(39)).all_pairs
        single = make([Atoms("H")], 2.5, 0.5)
        graph = assert_same_as_host(single, [Atoms("H")], single.built_at)
        assert not np.any(graph.edge_mask)


def test_overflow_is_flagged_and_cured() -> None:
    """A crystal squeezed inside a compiled program needs more slots than it has; the grown list is complete."""
    with jax.enable_x64(True):
        crystal = bulk("Cu", "fcc", a=3.6, cubic=True) * (2, 2, 2)
        neighbors = make([crystal], 2.7, 0.3, room=Room(12))
        assert not neighbors.overflow and neighbors.largest_count == 12
        squeezed = crystal.copy()
        squeezed.positions[1:] = squeezed.positions[0] + 0.5 * (squeezed.positions[1:] - squeezed.positions[0])
        positions = jnp.asarray(squeezed.positions)[None]
        crowded = jax.jit(WalkerNeighbors.update)(neighbors, positions)
        assert crowded.overflow and crowded.largest_count > 12
        assert jax.jit(WalkerNeighbors.update)(crowded, neighbors.built_at).overflow  # stays visible after the crowd
        grown = crowded.grown(positions)
        assert not grown.overflow and grown.capacity >= crowded.largest_count
        assert_reverse(assert_same_as_host(grown, [squeezed], positions))
        assert neighbors.grown(neighbors.built_at).capacity >= neighbors.capacity


def test_graph_carries_walkers_masks_and_volumes() -> None:
    structures = mixed_walkers()
    neighbors = make(structures, 3.5, 0.5)
    species = jnp.full(neighbors.atom_mask.shape, 2, jnp.int32)
    graph = make_graph(neighbors, neighbors.built_at, species)
    count, atoms = neighbors.atom_mask.shape
    assert graph.num_structures == count
    np.testing.assert_array_equal(graph.structure, np.repeat(np.arange(count), atoms))
    np.testing.assert_array_equal(graph.species, np.where(np.asarray(neighbors.atom_mask).ravel(), 2, 0))
    np.testing.assert_array_equal(np.asarray(graph.atom_mask).reshape(count, -1).sum(1), [2, 8, 3])
    np.testing.assert_allclose(graph.volume, [structures[0].get_volume(), 1.0, 1.0], rtol=1e-6)
    assert not np.any(np.asarray(graph.edge_mask)[~np.asarray(graph.atom_mask)])


def test_forces_through_the_list_are_the_gradient_of_the_energy() -> None:
    """With reverse slots, neighbours and shifts all right, forces by gathers equal the gradient over positions."""
    with jax.enable_x64(True):
        structures = mixed_walkers()
        neighbors = make(structures, 3.5, 0.5)
        species = jnp.zeros(neighbors.atom_mask.shape, jnp.int32)

        def edge_energy(vectors: jax.Array, mask: jax.Array) -> jax.Array:
            # Not even in the vector, so that mixing up an edge and its opposite would show.
            decay = jnp.exp(-jnp.sum(vectors**2, axis=-1)) * (1 + 0.3 * vectors[..., 0])
            return jnp.sum(jnp.where(mask, decay, 0))

        @jax.jit
        def both_forces(positions: jax.Array) -> tuple[jax.Array, jax.Array]:
            def energy(positions: jax.Array) -> jax.Array:
                graph = make_graph(neighbors, positions, species)
                return edge_energy(graph.vectors, graph.edge_mask)

            graph = make_graph(neighbors, positions, species)
            forces, _ = forces_and_virial(Places(jax.grad(edge_energy)(graph.vectors, graph.edge_mask)), graph)
            return forces, -jax.grad(energy)(positions).reshape(-1, 3)

        forces, expected = both_forces(neighbors.built_at)
        assert np.abs(expected).max() > 1e-3
        np.testing.assert_allclose(forces, expected, atol=1e-12)


def test_a_position_that_is_not_a_number_stays_visible_and_alone() -> None:
    neighbors = make(mixed_walkers(), 3.5, 0.5)
    broken = neighbors.built_at.at[1, 0, 0].set(jnp.nan)
    graph = make_graph(neighbors.update(broken), broken, jnp.zeros(neighbors.atom_mask.shape, jnp.int32))
    per_walker = np.isnan(np.asarray(graph.vectors)).reshape(3, -1).any(axis=1)
    assert per_walker.tolist() == [False, True, False]


def test_walkers_in_blocks_get_the_list_of_walkers_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    together = make(mixed_walkers(), 3.5, 0.5)
    monkeypatch.setattr(pair_search, "_BLOCK", 1)
    apart = jax.jit(walkers._rebuilt.__wrapped__)(together, together.built_at)
    jax.tree.map(np.testing.assert_array_equal, together, apart)


def test_given_shapes_are_kept_so_that_nothing_compiles_again() -> None:
    structures = mixed_walkers()
    first = make(structures, 3.5, 0.5)
    for atoms in structures:
        atoms.rattle(0.02, rng=np.random.default_rng(1))
    second = make(structures, 3.5, 0.5, room=first.room)
    assert jax.tree.structure(first) == jax.tree.structure(second)
    assert jax.tree.map(jnp.shape, first) == jax.tree.map(jnp.shape, second)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cutoff": 0.0}, "cutoff must be positive"),
        ({"skin": -0.1}, "skin not negative"),
        ({"cells": np.zeros((1, 3, 3))}, "walker 0: direction 0 is periodic but its cell vector is zero"),
        ({"pbc": np.ones((2, 3), bool)}, "walkers need positions"),
        ({"positions": np.zeros((2, 3))}, "walkers need positions"),
    ],
)
def test_senseless_walkers_are_refused(change: dict[str, object], message: str) -> None:
    positions, cells, pbc, mask = padded([bulk("Cu", "fcc", a=3.6)])
    arguments = {"positions": positions, "cells": cells, "pbc": pbc, "atom_mask": mask, "cutoff": 3.0, "skin": 0.3}
    with pytest.raises(InputError, match=message):
        walker_neighbors(**{**arguments, **change})


def test_a_list_keeps_its_precision_and_says_what_shapes_it_takes() -> None:
    """Programs that compute in double precision elsewhere hand over positions of theirs."""
    listed = make([bulk("Cu", "fcc", a=3.6)], 3.0, 0.3)
    with jax.enable_x64(True):
        places = jax.ShapeDtypeStruct((1, 1, 3), np.float64)
        for cells in ((), (jax.ShapeDtypeStruct((1, 3, 3), np.float64),)):
            moved = jax.eval_shape(listed.update, places, *cells)
            assert moved.built_at.dtype == moved.cells.dtype == np.float32
    with pytest.raises(InputError, match=r"positions of this list are \[1, 1, 3\], not \[1, 3\]"):
        listed.update(np.zeros((1, 3)))
    with pytest.raises(InputError, match=r"cells of this list are \[1, 3, 3\], not \[3, 3\]"):
        listed.update(np.zeros((1, 1, 3)), np.eye(3))
