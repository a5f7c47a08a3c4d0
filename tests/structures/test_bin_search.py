"""The search through bins against the host's lists and the search over all pairs, in every kind of cell."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ase import Atoms
from hypothesis import given, settings
from hypothesis import strategies as st
from walker_edges import assert_reverse, assert_same_as_host, canonical, graph_edges, make, make_graph, padded

from almlip_jax.partial_import import import_part
from almlip_jax.structures import walkers
from almlip_jax.structures.bin_search import Bins, binned_slots, bins_for
from almlip_jax.structures.slots import Layout
from almlip_jax.structures.walkers import Room, WalkerNeighbors, walker_neighbors

CUTOFF, SKIN = 2.6, 0.4
ATOMS = 48
BINS = Bins(grid=(4, 2, 1), reach=(1, 1, 2), room=ATOMS, open=(True, True, True))


@pytest.fixture(scope="module", autouse=True)
def _bins_for_all(module_patch: pytest.MonkeyPatch) -> None:
    """Walkers of any size are searched through bins, in double precision."""
    module_patch.setattr(walkers, "_MANY", 1)


@pytest.fixture(scope="module")
def module_patch():
    with pytest.MonkeyPatch.context() as patch, jax.enable_x64(True):
        yield patch


def cell_for(rng: np.random.Generator, bins: Bins) -> np.ndarray:
    """A skewed cell whose planes are as close to each other as bins allow, in one direction at least."""
    cell = np.diag(rng.uniform(0.8, 1.6, 3) * rng.choice([-1, 1], 3)) + rng.uniform(-0.5, 0.5, (3, 3))
    thinness = np.linalg.norm(np.linalg.inv(cell), axis=0)
    return cell * np.max(1.0002 * (CUTOFF + SKIN) * thinness * bins.grid / bins.reach)


def any_walkers(seed: int) -> list[Atoms]:
    """A crystal's, a slab's or a wire's cell, and a cluster; atoms far outside, at borders and on top of each other."""
    rng = np.random.default_rng(seed)
    found = []
    for pbc in (np.ones(3, bool), rng.random(3) < 0.5, np.zeros(3, bool)):
        cell, number = cell_for(rng, BINS), int(rng.integers(1, ATOMS + 1))
        layout = rng.normal(0.5, rng.choice([0.1, 0.4, 2.0]), (number, 3))
        on_borders = rng.random((number, 3)) < 0.3
        layout = np.where(on_borders, rng.integers(-4, 5, (number, 3)) / 4, layout)
        found.append(Atoms(f"H{number}", positions=layout @ cell, cell=cell, pbc=pbc))
    return found


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_edges_are_the_hosts_in_any_cell(seed: int) -> None:
    structures = any_walkers(seed)
    neighbors = walker_neighbors(*padded(structures, ATOMS), CUTOFF, SKIN, Room(256, bins=BINS))
    assert neighbors.bins == BINS, "all examples share a program"
    assert not neighbors.overflow
    assert_reverse(assert_same_as_host(neighbors, structures, neighbors.built_at))


def gas(number: int, seed: int, pbc: tuple[bool, bool, bool] = (True, True, False)) -> Atoms:
    """Atoms at random in a skewed cell of four cutoffs and more."""
    rng = np.random.default_rng(seed)
    cell = np.array([[13.0, 0, 0], [3.0, 14.0, 0], [-2.0, 1.0, 12.5]])
    return Atoms(f"H{number}", positions=rng.random((number, 3)) @ cell, cell=cell, pbc=pbc)


@pytest.mark.slow
def test_both_searches_find_the_same_edges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Atoms drift over borders of bins and cells; padding, and one walker denser than the other."""
    structures = [gas(300, 0), gas(150, 1, (True, True, True))]
    binned = make(structures, CUTOFF, SKIN)
    assert binned.bins is not None and min(binned.bins.grid) >= 3
    monkeypatch.setattr(walkers, "_MANY", 10**6)
    paired = make(structures, CUTOFF, SKIN, Room(binned.capacity))
    assert paired.bins is None
    velocity = jax.random.normal(jax.random.key(0), binned.built_at.shape) * 0.15
    update, species = jax.jit(WalkerNeighbors.update), jnp.zeros(binned.atom_mask.shape, jnp.int32)
    for step in range(4):
        positions = binned.built_at + velocity * (step > 0)
        binned, paired = update(binned, positions), update(paired, positions)
        assert not binned.overflow and int(binned.largest_count) == int(paired.largest_count)
        graphs = [make_graph(one, positions, species) for one in (binned, paired)]
        assert_reverse(graphs[0])
        for walker in range(2):
            one, other = (graph_edges(graph, walker, positions.shape[1]) for graph in graphs)
            np.testing.assert_allclose(one, other, atol=1e-9)


@pytest.mark.slow
def test_an_atom_that_flies_away_needs_no_bins_on_its_way() -> None:
    cluster = gas(200, 2, (False, False, False))
    cluster.positions[7] = [3e3, -2e3, 5e4]
    cluster.positions[8] = cluster.positions[7] + [0, 1.5, 0]
    neighbors = make([cluster], CUTOFF, SKIN)
    assert neighbors.bins is not None and neighbors.bins.number < 500
    assert_reverse(assert_same_as_host(neighbors, [cluster], neighbors.built_at))
    broken = neighbors.built_at.at[0, 3, 1].set(jnp.nan).at[0, 4].add(9.0)  # the latter has all rebuilt
    rebuilt = jax.jit(WalkerNeighbors.update)(neighbors, broken)
    np.testing.assert_array_equal(rebuilt.built_at[0, 4], broken[0, 4])
    assert not rebuilt.overflow and not np.any(rebuilt.slots.mask[0, 3])


@pytest.mark.slow
def test_full_bins_and_thin_cells_are_flagged_and_cured() -> None:
    """What a compiled step cannot find, it says; the grown list has it."""
    start = gas(250, 3, (True, True, True))
    neighbors = make([start], CUTOFF, SKIN)
    update = jax.jit(WalkerNeighbors.update)
    crowd = start.copy()
    crowd.positions[:100] = crowd.positions[0] + 0.05 * (crowd.positions[:100] - crowd.positions[0])
    thin = start.copy()
    thin.set_cell(np.diag([1.0, 1.0, 0.6]) @ start.cell.array, scale_atoms=True)
    for moved in (crowd, thin):
        positions, cells = jnp.asarray(moved.positions)[None], jnp.asarray(moved.cell.array)[None]
        lost = update(neighbors, positions, cells)
        assert lost.unsearched and lost.overflow
        assert update(lost, neighbors.built_at, neighbors.built_cells).overflow, "until it is grown"
        grown = lost.grown(neighbors.built_at)  # the walker went back from there in the meantime
        assert grown.room != neighbors.room
        again = jax.jit(WalkerNeighbors.update)(grown, positions, cells)
        assert not again.overflow
        assert_reverse(assert_same_as_host(again, [moved], positions))
        assert make([start], CUTOFF, SKIN, grown.room).room == grown.room, "a chunk begins again with it"


@pytest.mark.slow
def test_edges_are_those_of_jax_mds_cell_list() -> None:
    """In a cube with periods, which that list serves."""
    partition, space = import_part("jax_md", "partition", "space")
    side, number = 13.0, 200
    positions = np.random.default_rng(5).random((number, 3)) * side
    displacement, _ = space.periodic(side)
    reference = partition.neighbor_list(displacement, side, CUTOFF, 0.0, format=partition.Dense).allocate(positions)
    assert reference.cell_size is not None
    index = np.asarray(reference.idx)
    real = index < number
    own = np.broadcast_to(np.arange(number)[:, None], index.shape)[real]
    vectors = -np.asarray(jax.vmap(displacement)(positions[own], positions[index[real]]))
    cube = Atoms(f"H{number}", positions, cell=[side] * 3, pbc=True)
    neighbors = make([cube], CUTOFF, 0.0)
    graph = make_graph(neighbors, neighbors.built_at, jnp.zeros((1, number), jnp.int32))
    np.testing.assert_allclose(graph_edges(graph, 0, number), canonical(own, index[real], vectors), atol=1e-9)


def test_nothing_grows_faster_than_the_number_of_atoms() -> None:
    """The largest array of a build, in the same density: eight times the atoms, eight times the numbers."""

    def largest(cells: int) -> int:
        number, side = 12 * cells**3, 3.01 * cells
        layout = Layout(
            jnp.zeros((1, number, 3)), side * jnp.eye(3)[None], jnp.ones((1, 3), bool), jnp.ones((1, number), bool)
        )
        bins = Bins((cells,) * 3, (1, 1, 1), 20, (False,) * 3)
        traced = jax.make_jaxpr(lambda p: binned_slots(p, 3.0, bins, 40))(layout)
        return max(variable.aval.size for variable in variables(traced.jaxpr))

    assert largest(16) <= 8 * largest(8)


def variables(jaxpr):
    """All that a program computes, what it calls included."""
    for equation in jaxpr.eqns:
        yield from equation.outvars
        for inner in jax.core.jaxprs_in_params(equation.params):
            yield from variables(inner)


def test_bins_are_as_many_as_fit_and_no_more_than_atoms_fill() -> None:
    def bins_of(atoms: Atoms, before: Bins | None = None) -> Bins:
        positions, cells, pbc, mask = padded([atoms])
        return bins_for(
            Layout(jnp.asarray(positions), jnp.asarray(cells), jnp.asarray(pbc), jnp.asarray(mask)), 3.0, before
        )

    atoms = gas(300, 6, (True, True, True))
    heights = 1 / np.linalg.norm(np.linalg.inv(atoms.cell.array), axis=0)
    assert bins_of(atoms).grid == tuple(np.floor(heights / 3.001).astype(int))
    empty = Atoms("H5", positions=np.arange(5)[:, None] * [1.0, 0, 0], cell=[200.0] * 3, pbc=True)
    assert bins_of(empty).number <= 27
    assert bins_of(empty, bins_of(empty)) == bins_of(empty)
