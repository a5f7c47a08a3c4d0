"""Per-structure feature maps: what of a prediction tells structures apart for selection."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from almlip_jax.ensembles.prediction import Prediction
from almlip_jax.kernels import ensemble_sum
from almlip_jax.structures.graph import Graph, atom_counts, sum_over_atoms

FEATURES: tuple[str, ...] = ("latent", "last_layer_gradient")
"""Names of the feature maps."""


def latent(prediction: Prediction, graph: Graph) -> jax.Array:
    """Mean over the atoms of the features that enter the last layer, models side by side.

    The kernel of the ensemble is the mean of the kernels of its models: their features are put side by side and divided
    by sqrt(L).

    Args:
        prediction: of an ensemble, features [L, A, F] of its models.
        graph: the structures.

    Returns:
        [S, L * F].
    """
    pooled = jax.vmap(lambda one: sum_over_atoms(one, graph))(prediction.features) / atom_counts(graph)[:, None]
    return ensemble_sum(pooled)


def last_layer_gradient(prediction: Prediction, graph: Graph, num_species: int, *, per_atom: bool = True) -> jax.Array:
    """Gradient of a structure's energy with respect to the last, linear layer, models side by side.

    The last layer has a weight for each species and feature, so the gradient sums the features over the atoms of each
    species.  Constant factors of the layer are left out: selection is blind to them.

    Args:
        prediction: of an ensemble, features [L, A, F] of its models.
        graph: the structures.
        num_species: length of the species table.
        per_atom: divide by the number of atoms, so that structures of different size compare.

    Returns:
        [S, L * num_species * F].
    """
    chosen = jax.nn.one_hot(graph.species, num_species, dtype=prediction.features.dtype)

    def one(features: jax.Array) -> jax.Array:
        by_species = chosen[:, :, None] * features[:, None, :]
        return sum_over_atoms(by_species.reshape(features.shape[0], -1), graph)

    summed = jax.vmap(one)(prediction.features)
    if per_atom:
        summed = summed / atom_counts(graph)[:, None]
    return ensemble_sum(summed)


def sketch(features: jax.Array, key: jax.Array, size: int = 512) -> jax.Array:
    """Random projection of rows to p columns that keeps scalar products on average: phi R / sqrt(p), R ~ N(0, 1).

    Each row is projected on its own: the result does not depend on how rows are batched.

    Args:
        features: [n, d].
        key: decides R.
        size: p; features of at most this many columns are returned as they are.

    Returns:
        [n, min(d, p)].
    """
    if features.shape[-1] <= size:
        return features
    projection = jax.random.normal(key, (features.shape[-1], size), features.dtype)
    return features @ projection / jnp.sqrt(size)
