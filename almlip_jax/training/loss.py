"""The loss of each member: weighted residuals of energy per atom, force components and virial per atom.

A penalty turns each residual r into what is averaged: its square, or Huber's ``r^2`` up to delta and
``delta (2 |r| - delta)`` beyond.  That is twice the usual Huber function, so that it equals the square for small
residuals and the weights of the loss keep their meaning.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from almlip_jax.ensembles.prediction import Prediction
from almlip_jax.structures.graph import Graph, Targets, atom_counts, sum_over_atoms
from almlip_jax.training.settings import LossSettings


@struct.dataclass
class Residuals:
    """Sums of penalties of a batch for one member, and what they are to be divided by.

    Attributes:
        energy: sum over structures of weight * penalty(residual / atoms), eV^2.
        forces: sum over atoms of weight * mean over components of penalty(residual), (eV/Angstrom)^2.
        virial: sum over structures of weight * mean over components of penalty(residual / atoms), eV^2.
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


def residuals(
    prediction: Prediction, graph: Graph, targets: Targets, weights: jax.Array, penalties: LossSettings = SQUARES
) -> Residuals:
    """Weighted penalties of the residuals of one member.

    Args:
        prediction: of one member (no member axis).
        graph: the batch.
        targets: its labels, energies relative to the reference energies.
        weights: [S] further weight of each structure (the member's bootstrap weight).
        penalties: squares or Huber's function; the weights of energies, forces and virials do not enter here.

    Returns:
        `Residuals`; the numbers of structures and atoms count labels, whatever the weights, so that a batch's
        expected loss does not depend on the bootstrap.
    """
    counts = atom_counts(graph)
    huber = penalties.kind == "huber"
    energy = _penalty((prediction.energy - targets.energy) / counts, penalties.energy_delta if huber else None)
    component = _penalty(prediction.forces - targets.forces, penalties.forces_delta if huber else None)
    forces = sum_over_atoms(jnp.mean(component, axis=-1), graph)
    strain = (prediction.virial - targets.virial) / counts[:, None, None]
    virial = jnp.mean(_penalty(strain, penalties.virial_delta if huber else None), axis=(-1, -2))
    has_forces = (targets.forces_weight > 0).astype(counts.dtype)
    return Residuals(
        energy=jnp.sum(weights * targets.energy_weight * energy),
        forces=jnp.sum(weights * targets.forces_weight * forces),
        virial=jnp.sum(weights * targets.virial_weight * virial),
        structures=jnp.stack([_labelled(targets.energy_weight), _labelled(targets.virial_weight)]),
        atoms=jnp.sum(has_forces * counts),
    )


def _penalty(residual: jax.Array, delta: float | None) -> jax.Array:
    """The square, or Huber's function where a delta is given."""
    if delta is None:
        return residual**2
    size = jnp.abs(residual)
    return jnp.where(size <= delta, residual**2, delta * (2 * size - delta))


def _labelled(weights: jax.Array) -> jax.Array:
    return jnp.sum((weights > 0).astype(weights.dtype))


def means(sums: Residuals) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mean penalties of energy per atom, force component and virial per atom; 0 where nothing is labelled."""
    with_energy, with_virial = sums.structures[..., 0], sums.structures[..., 1]
    return (
        sums.energy / jnp.maximum(with_energy, 1),
        sums.forces / jnp.maximum(sums.atoms, 1),
        sums.virial / jnp.maximum(with_virial, 1),
    )
