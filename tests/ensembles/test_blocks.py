"""Walkers in blocks, and members on devices: the same numbers and derivatives as all at once on one device."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule

from almlip_jax.ensembles import Ensemble, Heads, Prediction, atom_blocks, blocked, gathered, sharding, spread_members
from almlip_jax.ensembles.likelihoods import Evidential
from almlip_jax.models import MtpSettings, SharedDensitySettings, build_model
from almlip_jax.structures.graph import Graph, Places, forces_and_virial, sum_over_atoms
from almlip_jax.structures.species import SpeciesTable
from almlip_jax.structures.walkers import WalkerNeighbors, walker_neighbors

SPECIES = SpeciesTable((1, 8))
SHAPE = SharedDensitySettings(cutoff=3.5, radial=3, l_max=1, channels=3, hidden=(6,), repulsion=True)
ENSEMBLE = Ensemble(
    build_model(SHAPE, SPECIES),
    2,
    heads=Heads(2, Evidential()),
)
ATOMS = 6  # of a walker, padding included
needs_two_devices = pytest.mark.skipif(len(jax.devices()) < 2, reason="there is one device")


@pytest.fixture(scope="module", autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def starts() -> list[Atoms]:
    """Five walkers, of which two are periodic and three smaller than the others."""
    slab = molecule("H2O", vacuum=1.5)
    slab.pbc = (True, True, False)
    crystal = bulk("O", "sc", a=2.2) * (1, 2, 3)
    found = [molecule("H2O"), crystal, molecule("H2O2"), slab, molecule("H2O2") + Atoms("HH", [[3, 0, 0], [3, 1, 0]])]
    for seed, atoms in enumerate(found):
        atoms.rattle(0.1, seed=seed)
    return found


@pytest.fixture(scope="module")
def graph() -> Graph:
    walkers = starts()
    positions, mask = np.zeros((len(walkers), ATOMS, 3)), np.zeros((len(walkers), ATOMS), bool)
    species, cells = np.zeros(mask.shape, np.int32), np.stack([atoms.cell.array for atoms in walkers])
    for w, atoms in enumerate(walkers):
        positions[w, : len(atoms)], mask[w, : len(atoms)] = atoms.positions, True
        species[w, : len(atoms)] = SPECIES.index(atoms.numbers)
    pbc = np.stack([atoms.pbc for atoms in walkers])
    neighbors = walker_neighbors(positions, cells, pbc, mask, ENSEMBLE.cutoff, 0.3)
    charge, spin = jnp.arange(5.0) - 2, jnp.arange(5.0) + 1
    return jax.jit(WalkerNeighbors.graph)(neighbors, jnp.asarray(positions), jnp.asarray(species), charge, spin)


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda x: np.asarray(x, np.float64), jax.jit(ENSEMBLE.init)(jax.random.key(0)))


@pytest.fixture(scope="module")
def flat(graph, params):
    return jax.jit(ENSEMBLE.predict)(params, graph)


@pytest.mark.parametrize("atoms", [1, 2 * ATOMS])
def test_blocks_say_what_all_walkers_at_once_say(graph, params, flat, atoms):
    """One walker in each of five blocks; two in each of three, of which the last is not full."""
    same(jax.jit(blocked(ENSEMBLE.predict, atoms))(params, graph), flat)


@pytest.mark.parametrize("mtp", [False, True])
def test_blocks_of_atoms_say_what_all_atoms_at_once_say(graph, params, flat, monkeypatch, mtp):
    """Structures are cut anywhere; edges lead from block to block, and the last block is not full."""
    ensemble = ENSEMBLE
    if mtp:
        model = build_model(MtpSettings(cutoff=3.5, level=6, radial_basis_size=3, repulsion=True), SPECIES)
        ensemble = replace(ENSEMBLE, model=model)
        params = jax.tree.map(lambda x: np.asarray(x, np.float64), jax.jit(ensemble.init)(jax.random.key(0)))
        flat = jax.jit(ensemble.predict)(params, graph)
        assert np.abs(np.diff(flat.forces, axis=0)).max() > 1e-4
    monkeypatch.setattr(atom_blocks, "_ATOMS", 7)
    monkeypatch.setattr(atom_blocks, "_MANY", 7)
    assert atom_blocks.number_of_blocks(graph, ensemble.model.local) == 5
    same(jax.jit(lambda *given: ensemble.predict(*given))(params, graph), flat)
    assert (
        atom_blocks.number_of_blocks(graph, build_model(SHAPE.model_copy(update={"layers": 1}), SPECIES).local) == 1
    ), "neighbours hear of each other"


@needs_two_devices
def test_members_on_two_devices_say_what_they_say_on_one(graph, params, flat):
    """Two heads on each of two models, in blocks of walkers, with all that they say of their own errors."""
    apart = spread_members(params)
    assert {len(x.sharding.device_set) for x in jax.tree.leaves(apart)} == {2}
    program = jax.jit(gathered(blocked(ENSEMBLE.predict, 2 * ATOMS))).lower(apart, graph).compile()
    assert program.as_text().count(" all-gather(") == 1, "one exchange"
    same(program(apart, graph), flat)


def test_cores_share_walkers_out_where_these_are_large(monkeypatch):
    """Devices that somebody asked for share out whatever there is."""
    for own, shared in ((True, [1, 1, 8]), (False, [8, 8, 8])):
        monkeypatch.setattr(sharding, "cores_are_devices", lambda own=own: own)
        assert [sharding.walkers_to_share(8, atoms) for atoms in (72, 511, 512)] == shared


@needs_two_devices
def test_walkers_on_two_devices_meet_once_in_a_step(monkeypatch):
    """What goes on around the evaluation each device does for itself, though it is given walkers of its own."""
    monkeypatch.setattr(sharding, "_WORTH_SHARING", 0)
    one = replace(ENSEMBLE, size=1, heads=Heads())
    own = jax.tree.map(lambda x: np.asarray(x, np.float64), jax.jit(one.init)(jax.random.key(0)))
    start = np.stack([molecule("H2O").positions + 0.01 * n for n in range(4)])
    many, species = len(start), np.tile(SPECIES.index([8, 1, 1]).astype(np.int32), (4, 1))
    box = np.zeros((many, 3, 3)), np.zeros((many, 3), bool)
    neighbors = walker_neighbors(start, *box, np.ones((many, 3), bool), one.cutoff, 0.0)

    def moved(params, positions, evaluate):
        def step(_, now):
            graph = neighbors.graph(now, species, jnp.zeros(many), jnp.ones(many))
            return now + 1e-3 * evaluate(params, graph).forces[0].reshape(now.shape)

        return jax.lax.fori_loop(0, 5, step, positions)

    apart = spread_members(own, walkers=many)
    program = jax.jit(lambda params, start: moved(params, start, gathered(blocked(one.predict))))
    compiled = program.lower(apart, start).compile()
    text = compiled.as_text()
    others = ("all-reduce", "all-to-all", "collective-permute")
    assert [text.count(f" {name}(") for name in ("all-gather", *others)] == [1, 0, 0, 0]
    assert len({device for x in jax.tree.leaves(apart) for device in x.sharding.device_set}) == 2
    alone = jax.jit(lambda params, start: moved(params, start, one.predict))(own, start)
    np.testing.assert_allclose(compiled(apart, start), alone, rtol=1e-12)


def same(found: Prediction, flat: Prediction) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(flat)
    for values, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(flat), strict=True):
        assert np.any(wanted != 0)
        np.testing.assert_allclose(values, wanted, rtol=1e-10, atol=1e-12)


def springs(params: jax.Array, graph: Graph) -> Prediction:
    """Members whose edges are springs of stiffness ``params`` [M]."""

    def member(stiffness: jax.Array) -> Prediction:
        pull = jnp.where(graph.edge_mask[..., None], stiffness * graph.vectors, 0)
        energy = sum_over_atoms(0.5 * jnp.sum(pull * graph.vectors, axis=(1, 2)), graph)
        moment = sum_over_atoms(graph.positions[:, 0] ** 2, graph) + jnp.sum(graph.cell**2, axis=(1, 2))
        energy = energy + 0.1 * stiffness * (graph.charge - 2 * graph.spin) * moment  # all that a structure is given
        forces, virial = forces_and_virial(Places(pull), graph)
        return Prediction(energy=energy, forces=forces, virial=virial, features=jnp.cos(forces))

    return jax.vmap(member)(params)


@pytest.mark.parametrize(
    "shared_out",
    [lambda evaluate: evaluate, pytest.param(gathered, marks=needs_two_devices)],
    ids=["one device", "two devices"],
)
def test_derivatives_pass_through_blocks(graph, shared_out):
    """Of something that all outputs enter, with respect to parameters and edges."""

    def slopes(evaluate):
        def value(params, vectors):
            found = evaluate(params, replace(graph, vectors=vectors))
            return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(found))

        return jax.jit(jax.grad(value, argnums=(0, 1)))(jnp.asarray([0.7, 1.3]), graph.vectors)

    for values, wanted in zip(slopes(shared_out(blocked(springs, 2 * ATOMS))), slopes(springs), strict=True):
        assert np.any(wanted != 0)
        np.testing.assert_allclose(values, wanted, rtol=1e-10, atol=1e-10)


def test_the_largest_evaluation_is_that_of_a_block(graph):
    """Blocks are as large as allowed and alike in size; what fits is evaluated at once."""
    seen = []

    def watched(params, graph):
        seen.append(graph.atom_mask.shape[0] // ATOMS)
        return springs(params, graph)

    for atoms, wanted in ((1, 1), (3 * ATOMS - 1, 2), (4 * ATOMS, 3), (5 * ATOMS, 5)):
        jax.eval_shape(blocked(watched, atoms), jnp.ones(2), graph)
        assert seen == [wanted], "traced once"
        seen.clear()
