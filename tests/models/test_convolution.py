"""Messages against an edge-by-edge e3nn tensor product, and the repulsion of nuclei against its formula."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import e3nn_jax as e3nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk

from almlip_jax.ensembles import Ensemble, Prediction
from almlip_jax.models import MaceSettings, Model, SharedDensitySettings, build_model, zbl_pair_energy
from almlip_jax.models.convolution import convolve, edge_functions, paths_between
from almlip_jax.models.radial import polynomial_cutoff
from almlip_jax.structures.graph import Graph
from almlip_jax.structures.neighbors import largest_neighbor_count
from almlip_jax.structures.packing import BatchShape, pack, plan_batches, take_batch
from almlip_jax.structures.species import SpeciesTable

CUTOFF = 3.2
SPECIES = SpeciesTable((6, 14))


@pytest.fixture(scope="module", autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def graph_of(atoms: Atoms, cutoff: float = CUTOFF) -> Graph:
    neighbors = largest_neighbor_count([atoms], cutoff) + 2
    packed = pack([atoms], SPECIES, cutoff, neighbors=neighbors, dtype=np.float64)
    plan, _ = plan_batches(packed, np.arange(1), BatchShape(len(atoms) + 1, neighbors, 2))
    return jax.device_get(take_batch(packed.data, plan, 0)[0])


def carbide() -> Atoms:
    atoms = bulk("SiC", "zincblende", a=4.36)
    atoms.rattle(0.1, seed=0)
    return atoms


def test_messages_are_sums_of_tensor_products():
    near = 2.4  # the four nearest neighbours: an edge at a time is slow
    graph, channels, rng = graph_of(carbide(), near), 2, np.random.default_rng(0)
    paths = paths_between(2, 2, 2)
    functions = partial(edge_functions, paths=paths, cutoff=near, cutoff_power=4, basis="bessel", count=3)
    edges = jax.jit(functions)(graph)
    atoms, slots = graph.edge_mask.shape
    features = tuple(rng.normal(size=(2 * l + 1, atoms, channels)) for l in range(3))
    weights = rng.normal(size=(atoms, slots, len(paths), channels)) * np.asarray(graph.edge_mask)[..., None, None]
    found = jax.jit(lambda *given: convolve(*given, edges, paths, range(len(paths)), graph))(features, weights)
    wanted = [np.zeros(block.shape) for block in found]
    parity = {0: "e", 1: "o"}

    @partial(jax.jit, static_argnums=0)
    def message(path, vector, values):
        harmonics = e3nn.spherical_harmonics(path.edge, e3nn.IrrepsArray("1o", vector), True, "component")
        own = e3nn.IrrepsArray(f"{path.neighbor}{parity[path.neighbor % 2]}", values)
        return e3nn.tensor_product(harmonics, own, filter_ir_out=[f"{path.out}{parity[path.out % 2]}"]).array

    for i, k in np.argwhere(np.asarray(graph.edge_mask)):
        j, vector = int(graph.neighbors[i, k]), np.asarray(graph.vectors[i, k])
        for n, path in enumerate(paths):
            for c in range(channels):
                out = message(path, vector, features[path.neighbor][:, j, c])
                wanted[n][:, i, c] += weights[i, k, n, c] * np.asarray(out)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-11)


def test_radial_functions_of_edges():
    graph = graph_of(carbide())
    shape = {"cutoff": CUTOFF, "cutoff_power": 4, "basis": "gaussian", "count": 5}
    edges = jax.jit(partial(edge_functions, paths=paths_between(0, 0, 0), **shape))(graph)
    distance = np.linalg.norm(graph.vectors, axis=-1)
    center = np.linspace(0, CUTOFF, 5)
    wanted = np.exp(-0.5 * ((distance[..., None] - center) / center[1]) ** 2)
    wanted *= np.asarray(polynomial_cutoff(jnp.asarray(distance), CUTOFF, 4))[..., None]
    np.testing.assert_allclose(edges.radial, np.where(graph.edge_mask[..., None], wanted, 0), atol=1e-13)


def test_zbl_of_two_nuclei():
    """Values of the universal potential computed by hand from its published constants."""
    r, z1, z2 = 0.5, 14.0, 6.0
    x = r / (0.46850 / (z1**0.23 + z2**0.23))
    phi = 0.18175 * np.exp(-3.19980 * x) + 0.50986 * np.exp(-0.94229 * x)
    phi += 0.28022 * np.exp(-0.40290 * x) + 0.02817 * np.exp(-0.20162 * x)
    np.testing.assert_allclose(jax.jit(zbl_pair_energy)(r, z1, z2), 14.399645 * z1 * z2 / r * phi, rtol=1e-6)


def test_repulsion_adds_its_energy_and_forces_and_ends_at_the_covalent_distance():
    plain = SharedDensitySettings(cutoff=CUTOFF, radial=3, l_max=1, channels=2, hidden=(4,))
    bare, shielded = (build_model(plain.model_copy(update={"repulsion": on}), SPECIES) for on in (False, True))
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), jax.jit(Ensemble(bare, 2).init)(jax.random.key(0)))
    compiled = jax.jit(lambda model, graph: Ensemble(model, 2).predict(params, graph), static_argnums=0)

    def predict(model: Model, graph: Graph) -> Prediction:
        return jax.device_get(compiled(model, graph))

    def difference(distance: float) -> tuple[float, float]:
        graph = graph_of(Atoms("SiC", [[0, 0, 0], [0, 0, distance]]))
        a, b = predict(bare, graph), predict(shielded, graph)
        np.testing.assert_allclose(b.energy[0] - a.energy[0], b.energy[1] - a.energy[1], rtol=1e-10, atol=1e-12)
        return float(b.energy[0, 0] - a.energy[0, 0]), float(b.forces[0, 1, 2] - a.forces[0, 1, 2])

    reach = 1.11 + 0.76  # covalent radii of Si and C
    cut = float(polynomial_cutoff(jnp.asarray(0.6 / reach), 1.0, 6))
    energy, force = difference(0.6)
    np.testing.assert_allclose(energy, cut * float(jax.jit(zbl_pair_energy)(0.6, 14.0, 6.0)), rtol=1e-10)
    h = 1e-5
    np.testing.assert_allclose(force, -(difference(0.6 + h)[0] - difference(0.6 - h)[0]) / (2 * h), rtol=1e-7)
    assert difference(reach + 0.01) == (0.0, 0.0) and difference(reach - 0.05)[0] > 0


def test_members_one_by_one_or_side_by_side_are_the_same():
    shape = MaceSettings(cutoff=CUTOFF, radial=3, channels=2, l_max=1, correlation=2, read_out=(4,))
    model = build_model(shape, SPECIES)
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), jax.jit(Ensemble(model, 3).init)(jax.random.key(0)))
    graph = graph_of(carbide())
    predict = jax.jit(lambda ensemble, params, graph: ensemble.predict(params, graph), static_argnums=0)
    together, in_turn = (predict(Ensemble(model, 3, mapping), params, graph) for mapping in ("vmap", "map"))
    for one, other in zip(jax.tree.leaves(together), jax.tree.leaves(in_turn), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-11)
    energies = jax.jit(Ensemble(model, 3, "map").energies)(params, graph)
    np.testing.assert_allclose(energies, together.energy, atol=1e-12)


@pytest.mark.parametrize("correlation", [1, 2, 4])
@pytest.mark.parametrize("hidden_l_max", [0, 2])
def test_every_shape_of_mace_is_invariant(correlation, hidden_l_max):
    settings = MaceSettings(
        cutoff=CUTOFF, radial=3, channels=2, l_max=2, hidden_l_max=hidden_l_max, correlation=correlation, read_out=(4,)
    )
    model = build_model(settings, SPECIES)
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), jax.jit(model.init)(jax.random.key(2)))
    energy = jax.jit(lambda graph: model.apply(params, model.geometry(graph), graph).energy)
    graph = graph_of(carbide())
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]
    np.testing.assert_allclose(energy(replace(graph, vectors=graph.vectors @ turn.T)), energy(graph), rtol=1e-9)
