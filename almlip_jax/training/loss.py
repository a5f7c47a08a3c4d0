"""The loss of each member: weighted squared residuals of energy per atom, force components and virial per atom."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from almlip_jax.ensembles.prediction import Prediction
from almlip_jax.structures.graph import Graph, Targets, atom_counts, sum_over_atoms


@struct.dataclass
class Residuals:
    """Sums of squared residuals of a batch for one member, and what they are to be divided by.

    Attributes:
        energy: sum over structures of weight * (residual / atoms)^2, eV^2.
        forces: sum over atoms of weight * mean over components of squared residuals, (eV/Angstrom)^2.
        virial: sum over structures of weight * mean over components of (residual / atoms)^2, eV^2.
        structures: [2] number of structures with an energy and with a virial (not weighted).
        atoms: number of atoms with forces.
    """

    energy: jax.Array
    forces: jax.Array
    virial: jax.Array
    structures: jax.Array
    atoms: jax.Array


def residuals(prediction: Prediction, graph: Graph, targets: Targets, weights: jax.Array) -> Residuals:
    """Weighted squared residuals of one member.

    Args:
        prediction: of one member (no member axis).
        graph: the batch.
        targets: its labels, energies relative to the reference energies.
        weights: [S] further weight of each structure (the member's bootstrap weight).

    Returns:
        `Residuals`; the numbers of structures and atoms count labels, whatever the weights, so that a batch's
        expected loss does not depend on the bootstrap.
    """
    counts = atom_counts(graph)
    energy = ((prediction.energy - targets.energy) / counts) ** 2
    per_atom = jnp.mean((prediction.forces - targets.forces) ** 2, axis=-1)
    forces = sum_over_atoms(per_atom, graph)
    virial = jnp.mean(((prediction.virial - targets.virial) / counts[:, None, None]) ** 2, axis=(-1, -2))
    has_forces = (targets.forces_weight > 0).astype(counts.dtype)
    return Residuals(
        energy=jnp.sum(weights * targets.energy_weight * energy),
        forces=jnp.sum(weights * targets.forces_weight * forces),
        virial=jnp.sum(weights * targets.virial_weight * virial),
        structures=jnp.stack([_labelled(targets.energy_weight), _labelled(targets.virial_weight)]),
        atoms=jnp.sum(has_forces * counts),
    )


def _labelled(weights: jax.Array) -> jax.Array:
    return jnp.sum((weights > 0).astype(weights.dtype))


def means(sums: Residuals) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mean squared residuals of energy per atom, force component and virial per atom; 0 where nothing is labelled."""
    with_energy, with_virial = sums.structures[..., 0], sums.structures[..., 1]
    return (
        sums.energy / jnp.maximum(with_energy, 1),
        sums.forces / jnp.maximum(sums.atoms, 1),
        sums.virial / jnp.maximum(with_virial, 1),
    )
