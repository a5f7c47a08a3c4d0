"""Gradient features and the power spectrum against explicit derivatives, closed forms, rotation and permutation."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from scipy.spatial.transform import Rotation

from almlip_jax.ensembles import Ensemble, Heads, MixedEnsemble, Prediction
from almlip_jax.features import (
    committee_energy,
    composition,
    density_of,
    force_gradient,
    full_gradients,
    gradient_factors,
    power_spectrum,
    random_factors,
    sketch_matrices,
    spectrum_factors,
)
from almlip_jax.models import SharedDensitySettings, build_model
from almlip_jax.models.constants import learned_leaves
from almlip_jax.structures.graph import Graph, sum_over_atoms
from almlip_jax.structures.packing import BatchShape, pack, plan_batches, take_batch
from almlip_jax.structures.species import SpeciesTable

SETTINGS = SharedDensitySettings(cutoff=3.5, radial=4, l_max=1, channels=4, hidden=(8,))
SPECIES = SpeciesTable((1, 8))
SHAPE = BatchShape(atoms=10, neighbors=6, structures=3)
COLUMNS = 30


@pytest.fixture(scope="module", autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def structures() -> list[Atoms]:
    frames = [molecule("H2O"), molecule("H2O2"), molecule("H2O")]
    for n, frame in enumerate(frames):
        frame.rattle(0.1, seed=n)
    return frames


def graph_of(structures: list[Atoms], shape: BatchShape = SHAPE) -> Graph:
    packed = pack(structures, SPECIES, SETTINGS.cutoff, neighbors=shape.neighbors, dtype=np.float64)
    return take_batch(packed.data, plan_batches(packed, np.arange(len(structures)), shape)[0], 0)[0]


@pytest.fixture(scope="module")
def graph(structures) -> Graph:
    return graph_of(structures)


@pytest.fixture(
    scope="module",
    params=[pytest.param(Heads(), id="plain"), pytest.param(Heads(3), id="shallow", marks=pytest.mark.slow)],
)
def made(request, graph) -> tuple[Ensemble, dict]:
    ensemble = Ensemble(build_model(SETTINGS, SPECIES), 2, heads=request.param)

    @jax.jit
    def fresh(key: jax.Array) -> dict:
        params = jax.tree.map(lambda x: x.astype(jnp.float64), jax.jit(ensemble.init)(key))
        return jax.jit(ensemble.standardise)(params, jax.jit(ensemble.survey)(graph), 1.3)

    return ensemble, fresh(jax.random.key(1))


def rotated(structures: list[Atoms]) -> list[Atoms]:
    turn = Rotation.random(random_state=0).as_matrix()
    frames = [frame.copy() for frame in structures]
    for frame in frames:
        frame.positions = frame.positions @ turn.T
    return frames


_gradients = jax.jit(full_gradients, static_argnums=(0, 4))
_predict = jax.jit(lambda e, p, g: e.predict(p, g), static_argnums=0)
_forces = jax.jit(lambda e, p, g: force_gradient(e, p, g, e.predict(p, g), 2), static_argnums=0)


def test_full_gradient_is_the_sketch_of_the_jacobian(structures, graph, made):
    """Of all structures at once by automatic differentiation of the batch, each column by hand."""
    ensemble, params = made
    factors = gradient_factors(params, jax.random.key(3), size=COLUMNS)
    jacobian = jax.jit(jax.jacobian(lambda p: jnp.sum(ensemble.energies(p, graph), axis=0)))(params)  # [S, L, ...]
    by_hand = np.zeros((3, COLUMNS))
    for rows, leaf, (left, right) in zip(learned_leaves(jacobian), learned_leaves(params), factors, strict=True):
        for model in range(2):
            size = np.sqrt(np.mean(np.asarray(leaf[model]) ** 2))
            matrix = np.asarray(rows[:, model])
            matrix = matrix.reshape(3, -1, matrix.shape[-1] if matrix.ndim > 1 else 1)
            by_hand += size * np.einsum("pm,smn,pn->sp", left[model], matrix, right[model])
    by_hand /= ensemble.heads.count * np.sqrt(2) * np.sqrt(COLUMNS) * np.array([3, 4, 3])[:, None]
    alone = [graph_of([frame], BatchShape(5, 6, 1)) for frame in structures]
    empty = replace(alone[0], atom_mask=np.zeros(5, bool), structure_mask=np.zeros(1, bool))
    graphs = jax.tree.map(lambda *x: jnp.stack(x), *alone, empty)
    for side_by_side in (1, 3):
        found = _gradients(ensemble, params, graphs, factors, side_by_side)
        np.testing.assert_allclose(found[:3], by_hand, rtol=1e-9, atol=1e-12)
        assert not found[3].any()
    assert np.abs(by_hand[0]).min() > 0


def test_sketches_of_matrices_keep_scalar_products_on_average():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 3, 5, 4))
    keys = jax.random.split(jax.random.key(0), 3000)

    def product(key: jax.Array) -> jax.Array:
        factors = random_factors(key, (3, 5, 4), 20, jnp.float64)
        return sketch_matrices(a, factors) @ sketch_matrices(b, factors)

    products = jax.jit(jax.vmap(product))(keys)
    assert abs(products.mean() - np.sum(a * b)) < 4 * products.std() / np.sqrt(len(keys))
    assert products.std() / np.sqrt(len(keys)) < 0.1 * np.linalg.norm(a) * np.linalg.norm(b)


def test_force_gradient_is_the_derivative_of_the_squared_disagreement(graph, made):
    ensemble, params = made
    mean = jnp.mean(_predict(ensemble, params, graph).forces, axis=0)
    counts = np.array([3, 4, 3])

    def disagreement(params: dict) -> jax.Array:
        squares = jnp.sum((ensemble.predict(params, graph).forces - mean) ** 2, axis=(0, 2))
        return 0.5 * jax.ops.segment_sum(jnp.where(graph.atom_mask, squares, 0), graph.structure, 3) / counts

    jacobian = jax.jit(jax.jacobian(disagreement))(params)
    if ensemble.heads.plain:
        by_hand = jacobian["last"][:, :, None]  # [S, L, H = 1, species, F]
        scale = params["constants"]["energy_scale"][0]
    else:
        by_hand = jacobian["heads"]["last"]
        scale = params["heads"]["constants"]["scale"][0]
    members = ensemble.members
    found = _forces(ensemble, params, graph) * scale / np.sqrt(SETTINGS.hidden[-1]) * np.sqrt(members)
    np.testing.assert_allclose(found.reshape(by_hand.shape), by_hand, rtol=1e-8, atol=1e-12)
    assert np.abs(found).max() > 1e-4


def test_linear_rows_are_the_gradient_by_the_last_layer_of_each_member(graph, made):
    """Of a model its own layer, of heads theirs: energies are linear in it."""
    ensemble, params = made
    layer = params if ensemble.heads.plain else params["heads"]
    change = jnp.asarray(np.random.default_rng(0).normal(size=layer["last"].shape))
    moved = layer | {"last": layer["last"] + change}
    moved = moved if ensemble.heads.plain else params | {"heads": moved}
    found, before, after = jax.jit(
        lambda: (ensemble.linear(params, graph), ensemble.energies(params, graph), ensemble.energies(moved, graph))
    )()
    found = jax.vmap(lambda rows: sum_over_atoms(rows, graph))(found)
    by_member = jnp.einsum("lsd,lhd->lhs", found, change.reshape(2, -1, found.shape[-1])).reshape(before.shape)
    np.testing.assert_allclose(by_member, after - before, rtol=1e-9, atol=1e-12)


def test_rotation_and_grouping_do_not_change_the_force_gradient(structures, graph, made):
    """An ensemble of two groups is the ensemble of all; one member has no disagreement."""
    ensemble, params = made
    if not ensemble.heads.plain:
        pytest.skip("heads of one model do not form groups")
    found = _forces(ensemble, params, graph)
    turned = _forces(ensemble, params, graph_of(rotated(structures)))
    np.testing.assert_allclose(turned, found, rtol=1e-7, atol=1e-11)
    mixed = MixedEnsemble((replace(ensemble, size=1), replace(ensemble, size=1)))
    parts = (jax.tree.map(lambda x: x[:1], params), jax.tree.map(lambda x: x[1:], params))
    np.testing.assert_allclose(_forces(mixed, parts, graph), found, rtol=1e-9, atol=1e-12)
    alone = _forces(replace(ensemble, size=1), parts[0], graph)
    np.testing.assert_array_equal(alone, np.zeros((3, 2 * SETTINGS.hidden[-1])))


def test_committee_energy_has_the_covariance_as_kernel(graph):
    energy = np.random.default_rng(0).normal(size=(4, 3))
    rows = np.asarray(committee_energy(Prediction(jnp.asarray(energy), *3 * [jnp.zeros(())]), graph))
    per_atom = energy / np.array([3, 4, 3])
    np.testing.assert_allclose(rows @ rows.T, np.cov(per_atom.T, bias=True), rtol=1e-8, atol=1e-14)


def test_composition_is_the_share_of_each_species(graph):
    np.testing.assert_allclose(composition(graph, 2), [[2 / 3, 1 / 3], [0.5, 0.5], [2 / 3, 1 / 3]], rtol=1e-12)


def test_power_spectrum_is_the_sketch_of_the_explicit_one(structures, graph):
    """Its kernel, averaged over sketches, is that of the spectrum by its definition; rotation changes nothing."""
    density = density_of(3.5, SPECIES)
    values = np.asarray(jax.jit(density.geometry)(graph).values)
    explicit = np.zeros((3, 2, 5, values.shape[2], values.shape[2]))
    for atom in range(10):
        for l in range(5):
            block = values[l * l : (l + 1) ** 2, atom]
            weight = 1 / np.sqrt(2 * l + 1) / [3, 4, 3][graph.structure[atom]]
            explicit[graph.structure[atom], graph.species[atom], l] += weight * block.T @ block
    explicit = explicit.reshape(3, -1)
    one = jax.jit(lambda key, graph: power_spectrum(density, graph, spectrum_factors(density, key, 64, jnp.float64)))
    keys = jax.random.split(jax.random.key(0), 400)
    kernels = np.stack([rows @ rows.T for rows in map(np.asarray, (one(key, graph) for key in keys))])
    error = kernels.std(axis=0) / np.sqrt(len(keys))
    assert np.all(np.abs(kernels.mean(axis=0) - explicit @ explicit.T) < 4 * error)
    turned = [frame[::-1] for frame in rotated(structures)]
    np.testing.assert_allclose(one(keys[0], graph_of(turned)), one(keys[0], graph), rtol=1e-8, atol=1e-12)
