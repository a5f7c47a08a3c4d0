"""Feature maps that need more than a prediction: derivatives by all parameters, and of forces by the last layer."""

from __future__ import annotations

from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from almlip_jax.ensembles.ensemble import Ensemble
from almlip_jax.ensembles.mixed import AnyEnsemble, MixedEnsemble
from almlip_jax.ensembles.prediction import Prediction, rows_of_models
from almlip_jax.features.declared import Evaluation, FeatureMap
from almlip_jax.features.sketch import COLUMNS, Factors, random_factors, sketch, sketch_matrices
from almlip_jax.kernels import ensemble_sum
from almlip_jax.models.base import Params
from almlip_jax.models.constants import learned_leaves
from almlip_jax.precision import full_precision
from almlip_jax.structures.graph import Graph, atom_counts, sum_over_atoms

GradientFactors: TypeAlias = tuple[Factors, ...]
"""Random factors for each parameter array that is learned, in the order of ``jax.tree.leaves``."""


@partial(jax.jit, static_argnames="size")
@full_precision
def gradient_factors(params: Params, key: jax.Array, size: int = COLUMNS) -> GradientFactors:
    """Random factors that `full_gradient` sketches the gradient of each parameter array with, models apart.

    Args:
        params: of an ensemble, every leaf with a leading axis L.
        key: decides the factors.
        size: columns p of the sketch.
    """
    leaves = learned_leaves(params)
    keys = jax.random.split(key, len(leaves))
    return tuple(random_factors(k, _matrices(x).shape, size, x.dtype) for k, x in zip(keys, leaves, strict=True))


def full_gradient(ensemble: AnyEnsemble, params: Params, graph: Graph, factors: GradientFactors) -> jax.Array:
    """Gradient of the energy per atom with respect to all parameters of all models, sketched factor by factor.

    Each parameter array is measured in its own root mean square, so that the arrays of a model weigh alike whatever
    their scale, as they do under Adam; constants of a model are no parameters.  The kernel of the ensemble is the mean
    of those of its models (their neural tangent kernels, in these units).  Of several heads, the mean energy counts.

    Args:
        ensemble: models and members.
        params: of the ensemble.
        graph: of one structure in its only structure slot, S = 1.
        factors: what `gradient_factors` gives.

    Returns:
        [p].
    """

    def energy(params: Params) -> jax.Array:
        return jnp.sum(ensemble.energies(params, graph)[:, 0])  # models share no parameter: each finds its own

    gradient = learned_leaves(jax.grad(energy)(params))
    sketched = jnp.zeros(factors[0][0].shape[-2], gradient[0].dtype)
    for of_leaf, leaf, pair in zip(gradient, learned_leaves(params), factors, strict=True):
        size = jnp.sqrt(jnp.mean(_matrices(leaf) ** 2, axis=(-2, -1), keepdims=True))
        sketched = sketched + sketch_matrices(_matrices(of_leaf) * size, pair)
    models, heads = _models_and_heads(ensemble)
    return sketched / (heads * jnp.sqrt(models) * atom_counts(graph)[0])


def full_gradients(
    ensemble: AnyEnsemble, params: Params, graphs: Graph, factors: GradientFactors, side_by_side: int | None = None
) -> jax.Array:
    """`full_gradient` of each of some structures.

    Args:
        ensemble: models and members.
        params: of the ensemble.
        graphs: with a leading axis n, a graph of one structure each, or of none.
        factors: what `gradient_factors` gives.
        side_by_side: structures whose gradients are formed together; by default one on a CPU, whose caches hold the
            gradient of one and where empty graphs cost nothing, and 16 elsewhere, where one does not fill the device.

    Returns:
        [n, p]; 0 where there is no structure.
    """
    size, dtype = factors[0][0].shape[-2], factors[0][0].dtype
    together = side_by_side or (1 if jax.default_backend() == "cpu" else 16)

    def gradient(graph: Graph) -> jax.Array:
        return jax.lax.cond(
            graph.structure_mask[0],
            lambda: full_gradient(ensemble, params, graph, factors).astype(dtype),
            lambda: jnp.zeros(size, dtype),
        )

    return jax.lax.map(gradient, graphs, batch_size=None if together == 1 else together)


@partial(jax.jit, static_argnames=("ensemble", "of_atoms"))
@full_precision
def parameter_rows(ensemble: Ensemble, params: Params, graph: Graph, *, of_atoms: bool) -> jax.Array:
    """Gradients of the energy of a structure, or of each of its atoms, by all parameters that are learned.

    Args:
        ensemble: models and members, with one head each.
        params: of the ensemble.
        graph: of one structure.
        of_atoms: whether each atom has a row.

    Returns:
        [L, 1, P], or [L, A, P] with padding atoms among them; parameters in the order of ``jax.tree.leaves``.
    """
    shown = graph.atom_mask.astype(graph.vectors.dtype)

    def energies(params: Params) -> jax.Array:
        return ensemble.atom_energies(params, graph) * shown

    found, pull_back = jax.vjp(energies, params)
    wanted = jnp.eye(len(shown), dtype=found.dtype) if of_atoms else shown[None].astype(found.dtype)

    def row(weights: jax.Array) -> jax.Array:
        (gradient,) = pull_back(jnp.broadcast_to(weights, found.shape))  # models share no parameter
        leaves = [leaf.reshape(ensemble.size, -1) for leaf in learned_leaves(gradient)]
        return jnp.concatenate(leaves, axis=1)

    return jnp.swapaxes(jax.lax.map(row, wanted), 0, 1)


def force_gradient(
    ensemble: AnyEnsemble, params: Params, graph: Graph, prediction: Prediction, num_species: int
) -> jax.Array:
    """Gradient of the members' squared force disagreement with respect to their last layers, members side by side.

    Of ``1/2 sum_i |F_mi - F_i|^2 / N`` with the committee mean F held fixed, for each member m: what a training step
    with the committee's forces as labels would change.  It is long where members disagree, and points along what they
    disagree in: BADGE (Ash et al., ICLR 2020) for forces, the committee mean in the place of the most likely label.
    Constant factors of the layer are left out.

    Args:
        ensemble: models and members.
        params: of the ensemble.
        graph: the structures.
        prediction: of the ensemble, forces [M, A, 3].
        num_species: length of the species table.

    Returns:
        [S, M * Q * F], Q species or directions of their embedding; zero for an ensemble of one member.
    """
    # of an energy w . x the force is -w . dx/dR: along a displacement of the atoms, its gradient by w is minus dx
    moves = prediction.forces - jnp.mean(prediction.forces, axis=0)
    moves = jnp.where(graph.atom_mask[:, None], -moves, 0)
    change = _feature_changes(ensemble, params, graph, moves)
    code = prediction.code  # None where heads stand on the models, which tell species apart one by one
    rows = rows_of_models(change, code, graph, num_species)
    summed = jax.vmap(lambda one: sum_over_atoms(one, graph))(rows)
    return ensemble_sum(summed / atom_counts(graph)[:, None])


def _feature_changes(ensemble: AnyEnsemble, params: Params, graph: Graph, moves: jax.Array) -> jax.Array:
    """How the features of each member's model change along a displacement [M, A, 3] of the atoms, [M, A, F]."""
    if isinstance(ensemble, Ensemble):
        by_head = moves.reshape(ensemble.size, ensemble.heads.count, *moves.shape[1:])
        changes = jax.vmap(lambda one: ensemble.feature_change(params, graph, one), 1, 1)(by_head)
        return changes.reshape(-1, *changes.shape[2:])
    ends = [sum(group.members for group in ensemble.groups[: n + 1]) for n in range(len(ensemble.groups) - 1)]
    parts = zip(ensemble.groups, params, jnp.split(moves, ends), strict=True)
    found = [_feature_changes(group, one, graph, part) for group, one, part in parts]
    widest = max(part.shape[-1] for part in found)
    return jnp.concatenate([jnp.pad(part, ((0, 0), (0, 0), (0, widest - part.shape[-1]))) for part in found])


def _models_and_heads(ensemble: AnyEnsemble) -> tuple[int, int]:
    if isinstance(ensemble, MixedEnsemble):
        return sum(group.size for group in ensemble.groups), ensemble.groups[0].heads.count
    return ensemble.size, ensemble.heads.count


def _matrices(leaf: Any) -> jax.Array:
    """A parameter array [L, ..., n] as L matrices [m, n]; a vector is a matrix of one row."""
    values = jnp.asarray(leaf)
    last = values.shape[-1] if values.ndim > 1 else 1
    return values.reshape(values.shape[0], -1, last)


def _full_gradients(seen: Evaluation, factors: GradientFactors) -> jax.Array:
    assert seen.one_by_one is not None
    return full_gradients(seen.ensemble, seen.params, seen.one_by_one, factors)


def _force_gradient(seen: Evaluation, key: jax.Array) -> jax.Array:
    rows = force_gradient(seen.ensemble, seen.params, seen.graph, seen.prediction, seen.num_species)
    return sketch(rows, key, seen.columns)


FeatureMap(
    "full_gradient",
    "gradient of the energy per atom by all parameters, sketched",
    _full_gradients,
    lambda ensemble, params, key, columns: gradient_factors(params, key, columns),
    one_by_one=True,
    derives=True,
)
FeatureMap(
    "force_gradient",
    "gradient of the members' force disagreement by their last layers, sketched",
    _force_gradient,
    lambda ensemble, params, key, columns: key,
    of_members=True,
    derives=True,
)
