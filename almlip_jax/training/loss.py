"""The loss of each model: weighted penalties of energy per atom, force components and virial per atom.

A penalty turns each residual r into what is averaged:

- ``mse``: its square;
- ``huber``: ``r^2`` up to delta and ``delta (2 |r| - delta)`` beyond.  That is twice the usual Huber function, so that
  it equals the square for small residuals and the weights of the loss keep their meaning;
- ``nll``: the negative log-likelihood of the label, without constants, under the distribution that the model predicts:
  ``(ln sigma^2 + r^2 / sigma^2) / 2`` for a normal one (mean and variance of the heads, plus the variance of a noise
  that is learned); the Student distribution of an evidential model (Amini et al., NeurIPS 2020, eqs. 8 and 9);
- ``crps``: the continuous ranked probability score of that normal distribution (Gneiting and Raftery, JASA 102, 359,
  2007).

Models with several heads are penalised head by head under the first two.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.scipy.special import gammaln
from jax.scipy.stats import norm

from almlip_jax.ensembles import Belief, Prediction
from almlip_jax.structures.graph import Graph, Targets, atom_counts, sum_over_atoms
from almlip_jax.training.settings import LossSettings


@struct.dataclass
class Residuals:
    """Sums of penalties of a batch for one model, and what they are to be divided by.

    Attributes:
        energy: sum over structures of weight * penalty(residual / atoms), eV^2 for squares.
        forces: sum over atoms of weight * mean over components of penalty(residual), (eV/Angstrom)^2 for squares.
        virial: sum over structures of weight * mean over components of penalty(residual / atoms), eV^2 for squares.
        structures: [2] number of structures with an energy and with a virial (not weighted).
        atoms: number of atoms with forces.
    """

    energy: jax.Array
    forces: jax.Array
    virial: jax.Array
    structures: jax.Array
    atoms: jax.Array


SQUARES = LossSettings()
"""The penalties that mean squared errors are made of."""


def unweighted(targets: Targets) -> Targets:
    """Targets among which every label counts alike, whatever its weight (but for weight 0: those do not count)."""

    def alike(weights: jax.Array) -> jax.Array:
        return (weights > 0).astype(weights.dtype)

    return dataclasses.replace(
        targets,
        energy_weight=alike(targets.energy_weight),
        forces_weight=alike(targets.forces_weight),
        virial_weight=alike(targets.virial_weight),
    )


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
        loss: kind of penalty; the weights of energies, forces and virials do not enter here.

    Returns:
        `Residuals`; the numbers of structures and atoms count labels, whatever the weights, so that a batch's
        expected loss does not depend on the bootstrap.
    """
    counts, noise = atom_counts(graph), prediction.noise
    of_energy = None if noise is None else _per_atom(noise.energy, counts)
    of_forces = None if noise is None else _for_components(noise.forces, 1)
    of_virial = None if noise is None else _for_components(_per_atom(noise.virial, counts), 2)
    error = (prediction.energy - targets.energy) / counts
    energy = _penalty(error, of_energy, loss, loss.energy_delta, loss.energy_floor)
    error = prediction.forces - targets.forces
    component = _penalty(error, of_forces, loss, loss.forces_delta, loss.forces_floor)
    forces = sum_over_atoms(jnp.mean(component, axis=-1), graph)
    error = (prediction.virial - targets.virial) / counts[:, None, None]
    virial = jnp.mean(_penalty(error, of_virial, loss, loss.virial_delta, loss.virial_floor), axis=(-1, -2))
    has_forces = (targets.forces_weight > 0).astype(counts.dtype)
    return Residuals(
        energy=jnp.sum(weights * targets.energy_weight * energy),
        forces=jnp.sum(weights * targets.forces_weight * forces),
        virial=jnp.sum(weights * targets.virial_weight * virial),
        structures=jnp.stack([_labelled(targets.energy_weight), _labelled(targets.virial_weight)]),
        atoms=jnp.sum(has_forces * counts),
    )


def means(sums: Residuals) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mean penalties of energy per atom, force component and virial per atom; 0 where nothing is labelled."""
    with_energy, with_virial = sums.structures[..., 0], sums.structures[..., 1]
    return (
        sums.energy / jnp.maximum(with_energy, 1),
        sums.forces / jnp.maximum(sums.atoms, 1),
        sums.virial / jnp.maximum(with_virial, 1),
    )


def weighted(loss: LossSettings, sums: Residuals) -> jax.Array:
    """The loss from its sums: mean penalties times their weights."""
    energy, forces, virial = means(sums)
    return loss.energy * energy + loss.forces * forces + loss.virial * virial


def _penalty(residual: jax.Array, belief: Belief | None, loss: LossSettings, delta: float, floor: float) -> jax.Array:
    """Penalties without the axis of heads, from residuals [H, ...] and what the model says of them [...]."""
    if loss.kind == "mse":
        return jnp.mean(residual**2, axis=0)
    if loss.kind == "huber":
        size = jnp.abs(residual)
        return jnp.mean(jnp.where(size <= delta, residual**2, delta * (2 * size - delta)), axis=0)
    mean = jnp.mean(residual, axis=0)
    if loss.kind == "nll" and belief is not None and belief.evidence is not None:
        return _student(mean, belief, floor, loss.evidence_penalty)
    variance = jnp.mean((residual - mean) ** 2, axis=0) + floor**2
    if belief is not None:
        variance = variance + belief.variance + belief.epistemic
    return _normal(mean, variance) if loss.kind == "nll" else _ranked(mean, jnp.sqrt(variance))


def _normal(residual: jax.Array, variance: jax.Array) -> jax.Array:
    """Negative log-likelihood of a normal distribution without its constant."""
    return 0.5 * (jnp.log(variance) + residual**2 / variance)


def _student(residual: jax.Array, belief: Belief, floor: float, penalty: float) -> jax.Array:
    """Negative log-likelihood of a normal-inverse-gamma distribution, and what wrong evidence costs."""
    assert belief.evidence is not None and belief.shape is not None
    v, alpha = belief.evidence, belief.shape
    noise = belief.variance + floor**2
    omega = 2 * noise * (alpha - 1) * (1 + v)  # noise = beta / (alpha - 1)
    likelihood = (
        -0.5 * jnp.log(v)
        - alpha * jnp.log(omega)
        + (alpha + 0.5) * jnp.log(v * residual**2 + omega)
        + gammaln(alpha)
        - gammaln(alpha + 0.5)
    )
    return likelihood + penalty * jnp.abs(residual) / jax.lax.stop_gradient(jnp.sqrt(noise)) * (2 * v + alpha)


def _ranked(residual: jax.Array, sigma: jax.Array) -> jax.Array:
    """Continuous ranked probability score of a normal distribution, in the unit of the residual."""
    z = residual / sigma
    return sigma * (z * (2 * norm.cdf(z) - 1) + 2 * norm.pdf(z) - np.asarray(1 / np.sqrt(np.pi), z.dtype))


def _per_atom(belief: Belief, counts: jax.Array) -> Belief:
    """What belongs to a structure, for the same quantity per atom."""
    return Belief(belief.variance / counts**2, belief.evidence, belief.shape)


def _for_components(belief: Belief, axes: int) -> Belief:
    """One belief for all components, along further axes."""
    return jax.tree.map(lambda x: x.reshape(*x.shape, *axes * (1,)), belief)


def _labelled(weights: jax.Array) -> jax.Array:
    return jnp.sum((weights > 0).astype(weights.dtype))
