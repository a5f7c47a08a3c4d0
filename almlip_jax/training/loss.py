"""The loss of each model: weighted penalties of energy per atom, force components, virial per atom, and other targets.

What a penalty is, `training.penalties` says, kind by kind.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import reduce

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from almlip_jax.ensembles import Belief, Prediction
from almlip_jax.structures.graph import Graph, Targets, atom_counts, sum_over_atoms
from almlip_jax.targets import Target
from almlip_jax.targets import targets as declared
from almlip_jax.training.penalties import SQUARES, LossSettings


@struct.dataclass
class Residuals:
    """Sums of penalties of a batch for one model, and what they are to be divided by; by names of `targets`.

    Attributes:
        sums: over structures or atoms of weight * mean over components of penalty(residual), where the residual of
            energies, virials and the like is divided by the number of atoms; squares of units for squares.
        counts: number of structures that have the label, or of their atoms where it is one of atoms (not weighted);
            with ``mlip`` that of all structures.
    """

    sums: Mapping[str, jax.Array]
    counts: Mapping[str, jax.Array]


def unweighted(targets: Targets) -> Targets:
    """Targets among which every label counts alike, whatever its weight (except 0: those do not count)."""
    alike = {name: (weights > 0).astype(weights.dtype) for name, weights in targets.weights.items()}
    return dataclasses.replace(targets, weights=alike)


def mean_of_heads(prediction: Prediction) -> Prediction:
    """The mean over the heads of a model, still with an axis [1] of heads."""
    return dataclasses.replace(
        prediction,
        energy=jnp.mean(prediction.energy, axis=0, keepdims=True),
        forces=jnp.mean(prediction.forces, axis=0, keepdims=True),
        virial=jnp.mean(prediction.virial, axis=0, keepdims=True),
    )


def residuals(
    prediction: Prediction, graph: Graph, targets: Targets, weights: jax.Array, loss: LossSettings = SQUARES
) -> Residuals:
    """Weighted penalties of the residuals of one model.

    Args:
        prediction: of one model, with an axis H over its heads on energy, forces and virial.
        graph: the batch.
        targets: its labels, energies relative to the reference energies.
        weights: [S] further weight of each structure (the model's bootstrap weight).
        loss: kind of penalty; the weights of the targets do not enter here.

    Returns:
        `Residuals`; the numbers of structures and atoms count labels, whatever the weights, so that a batch's
        expected loss does not depend on the bootstrap.
    """
    counts = atom_counts(graph)
    sums, numbers = {}, {}
    for target in declared(targets.values):
        axes = len(target.shape)
        error = _by_heads(prediction, target) - targets.values[target.name]
        if target.by_atoms and not loss.summed:
            error = error / counts.reshape(-1, *axes * (1,))
        penalty = loss.penalty(error, _belief(prediction, target, counts), target)
        if axes:
            penalty = _over_components(penalty, target, loss)
        if target.per == "atom":
            penalty = sum_over_atoms(penalty, graph)  # not those of padding
        has_label = (targets.weights[target.name] > 0).astype(counts.dtype)
        sums[target.name] = jnp.sum(weights * targets.weights[target.name] * penalty)
        if loss.summed:
            numbers[target.name] = jnp.sum(graph.structure_mask.astype(counts.dtype))
        else:
            numbers[target.name] = jnp.sum(has_label * counts if target.per == "atom" else has_label)
    return Residuals(sums, numbers)


def penalty_scales(
    loss: LossSettings, graph: Graph, targets: Targets, weights: jax.Array, counts: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    """What the square of one residual component of each structure is multiplied by in a loss of squares, [S].

    Args:
        loss: of squares.
        graph: the batch.
        targets: its labels.
        weights: [S] further weight of each structure.
        counts: what the sums of penalties are divided by, as in `Residuals`.
    """
    atoms, found = atom_counts(graph), {}
    for target in declared(targets.values):
        scale = loss.weight_of(target) * targets.weights[target.name] * weights / counts[target.name]
        if not loss.summed:
            scale = scale / np.prod(target.shape, dtype=int) / (atoms**2 if target.by_atoms else 1)
        found[target.name] = scale
    return found


def _over_components(penalty: jax.Array, target: Target, loss: LossSettings) -> jax.Array:
    """The mean over a target's components, or their sum; of a symmetric tensor, each counts once in a sum."""
    axes = tuple(range(-1, -1 - len(target.shape), -1))
    if not loss.summed:
        return jnp.mean(penalty, axis=axes)
    return jnp.sum(jnp.triu(penalty) if target.symmetry == "tensor" else penalty, axis=axes)


def _by_heads(prediction: Prediction, target: Target) -> jax.Array:
    """What one model says, with an axis over its heads, which share what only the model itself gives."""
    if target.basic:
        values: jax.Array = getattr(prediction, target.name)
        return values
    return prediction.further[target.name][None]


def _belief(prediction: Prediction, target: Target, counts: jax.Array) -> Belief | None:
    """What a model says about the error of a component; for what it gives besides energies it says nothing."""
    if prediction.noise is None or not target.basic:
        return None
    belief: Belief = getattr(prediction.noise, target.name)
    return (belief.per_atom(counts) if target.by_atoms else belief).for_components(len(target.shape))


def means(sums: Residuals) -> dict[str, jax.Array]:
    """Mean penalties by target: energy per atom, force component, virial per atom; 0 where nothing is labelled."""
    return {one.name: sums.sums[one.name] / jnp.maximum(sums.counts[one.name], 1) for one in declared(sums.sums)}


def weighted(loss: LossSettings, sums: Residuals) -> jax.Array:
    """The loss from its sums: mean penalties times their weights."""
    found = means(sums)
    return reduce(jnp.add, [loss.weight_of(target) * found[target.name] for target in declared(found)])
