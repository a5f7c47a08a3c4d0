"""Feature maps against explicit gradients, batching and permutation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from almlip_jax.ensembles import Prediction
from almlip_jax.features import last_layer_gradient, latent, sketch
from almlip_jax.structures.graph import Graph


def batch(seed: int, sizes: tuple[int, ...] = (3, 5), padding: int = 2) -> tuple[Graph, Prediction]:
    rng = np.random.default_rng(seed)
    atoms = sum(sizes) + padding
    graph = Graph(
        species=jnp.asarray(rng.integers(0, 2, size=atoms)),
        vectors=jnp.zeros((atoms, 1, 3)),
        neighbors=jnp.zeros((atoms, 1), int),
        edge_mask=jnp.zeros((atoms, 1), bool),
        reverse=jnp.zeros((atoms, 1), int),
        atom_mask=jnp.arange(atoms) < sum(sizes),
        structure=jnp.asarray(np.concatenate([np.repeat(np.arange(len(sizes)), sizes), np.zeros(padding, int)])),
        structure_mask=jnp.ones(len(sizes), bool),
        volume=jnp.ones(len(sizes)),
        positions=jnp.zeros((atoms, 3)),
        cell=jnp.zeros((len(sizes), 3, 3)),
        charge=jnp.zeros(len(sizes)),
        spin=jnp.ones(len(sizes)),
    )
    features = jnp.asarray(rng.normal(size=(2, atoms, 4)))
    nothing = jnp.zeros((2, len(sizes)))
    return graph, Prediction(nothing, jnp.zeros((2, atoms, 3)), jnp.zeros((2, len(sizes), 3, 3)), features)


@pytest.mark.parametrize("per_atom", [False, True])
def test_last_layer_gradient_is_the_gradient(per_atom):
    graph, prediction = batch(0)
    found = last_layer_gradient(prediction, graph, 2, per_atom=per_atom).reshape(2, 2, 2, 4)  # [S, M, species, F]

    def energies(weights: jax.Array, features: jax.Array) -> jax.Array:
        atomic = jnp.sum(features * weights[graph.species], axis=-1)
        return jnp.stack([jnp.sum(atomic[:3]), jnp.sum(atomic[3:8])])

    for m in range(2):
        gradient = jax.jacobian(energies)(jnp.ones((2, 4)), prediction.features[m])
        counts = np.array([3, 5])[:, None, None] if per_atom else 1
        np.testing.assert_allclose(found[:, m], gradient / counts / np.sqrt(2), rtol=1e-5, atol=1e-6)


def test_latent_is_the_mean_over_atoms():
    graph, prediction = batch(1)
    found = latent(prediction, graph).reshape(2, 2, 4)
    np.testing.assert_allclose(found[1], prediction.features[:, 3:8].mean(axis=1) / np.sqrt(2), rtol=1e-5, atol=1e-6)


def test_sketch_keeps_scalar_products_on_average_and_ignores_batches():
    rows = jnp.asarray(np.random.default_rng(2).normal(size=(20, 900)))
    found = sketch(rows, jax.random.key(0), 400)
    np.testing.assert_allclose(sketch(rows[:3], jax.random.key(0), 400), found[:3], rtol=1e-4, atol=1e-4)
    assert found.shape == (20, 400) and sketch(rows, jax.random.key(0), 1000) is rows
    keys = jax.random.split(jax.random.key(1), 100)
    products = jax.vmap(lambda key: sketch(rows[:2], key, 400) @ sketch(rows[:2], key, 400).T)(keys)
    exact, error = rows[:2] @ rows[:2].T, products.std(axis=0) / 10
    assert np.all(np.abs(products.mean(axis=0) - exact) < 4 * error)
