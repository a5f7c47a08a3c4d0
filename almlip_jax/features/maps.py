"""Feature maps of what a prediction holds: what in it tells structures, and surroundings of atoms, apart."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from almlip_jax.ensembles.prediction import Prediction
from almlip_jax.features.declared import FeatureMap
from almlip_jax.kernels import ensemble_sum
from almlip_jax.structures.graph import Graph, atom_counts, sum_over_atoms


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

    The last layer has a weight for each feature and each species, or direction of an embedding of the species
    (`models.base.linear_rows`), so that the gradient sums the features over the atoms of each.  Constant factors of the
    layer are left out: selection is blind to them.

    Args:
        prediction: of an ensemble, features [L, A, F] of its models.
        graph: the structures.
        num_species: length of the species table.
        per_atom: divide by the number of atoms, so that structures of different size compare.

    Returns:
        [S, L * Q * F], Q species or directions.
    """
    rows = prediction.linear_rows(graph, num_species)
    summed = jax.vmap(lambda one: sum_over_atoms(one, graph))(rows)
    if per_atom:
        summed = summed / atom_counts(graph)[:, None]
    return ensemble_sum(summed)


def committee_energy(prediction: Prediction, graph: Graph) -> jax.Array:
    """Deviations of the energies of the members from their mean, per atom.

    The scalar product of two structures is the covariance of their energies per atom over the committee: structures on
    which the members err together lie in one direction.

    Args:
        prediction: of an ensemble, energy [M, S] eV.
        graph: the structures.

    Returns:
        [S, M] eV/atom over sqrt(M); of rank M - 1.
    """
    deviations = prediction.energy - jnp.mean(prediction.energy, axis=0)
    return ensemble_sum((deviations / atom_counts(graph))[..., None])


def composition(graph: Graph, num_species: int) -> jax.Array:
    """Share of each species in the atoms of a structure, [S, num_species]; the same for all frames of one molecule."""
    chosen = jax.nn.one_hot(graph.species, num_species, dtype=graph.vectors.dtype)
    return sum_over_atoms(chosen, graph) / atom_counts(graph)[:, None]


FeatureMap(
    "latent",
    "mean over atoms of what enters the last layer",
    lambda seen, _: latent(seen.prediction, seen.graph),
    atoms=lambda seen, _: ensemble_sum(seen.prediction.features),
)
FeatureMap(
    "last_layer_gradient",
    "gradient of the energy per atom by the last layer",
    lambda seen, _: last_layer_gradient(seen.prediction, seen.graph, seen.num_species),
    atoms=lambda seen, _: ensemble_sum(seen.prediction.linear_rows(seen.graph, seen.num_species)),
)
FeatureMap(
    "committee_energy",
    "deviations of the members' energies from their mean, per atom",
    lambda seen, _: committee_energy(seen.prediction, seen.graph),
    of_members=True,
)
FeatureMap(
    "composition",
    "share of each species in the atoms",
    lambda seen, _: composition(seen.graph, seen.num_species),
    learned=False,
)
