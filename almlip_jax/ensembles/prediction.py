"""What an ensemble says of a graph: member predictions and their committee statistics.

Definitions of the statistics: M members, standard deviations with 1/M, and for forces the vector norm
``s_i = sqrt(mean_m |F_mi - F_i|^2)`` of atom i (not averaged over the components).  Each name holds one meaning in
code, configs, files and figures.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from almlip_jax.structures.graph import Graph, atom_counts, sum_over_atoms


@struct.dataclass
class Prediction:
    """Energies, forces, virial and features of a graph; with a leading member axis M from an ensemble.

    Attributes:
        energy: [(M,) S] eV, relative to the reference energies.
        forces: [(M,) A, 3] eV/Angstrom.
        virial: [(M,) S, 3, 3] eV, ``-dE/d(strain)``; stress = -virial / volume.
        features: [(M,) A, F] invariant features of the last hidden layer.
    """

    energy: jax.Array
    forces: jax.Array
    virial: jax.Array
    features: jax.Array


@struct.dataclass
class Committee:
    """Statistics over the member axis of a `Prediction`.

    Attributes:
        energy: [S] eV, mean (relative to the reference energies).
        forces: [A, 3] eV/Angstrom, mean.
        virial: [S, 3, 3] eV, mean.
        energy_std: [S] eV, of the structure.
        energy_std_per_atom: [S] eV/atom.
        force_std: [A] eV/Angstrom, s_i of each atom (0 for padding).
        force_std_mean: [S] eV/Angstrom, mean of s_i over the atoms of a structure.
        force_std_max: [S] eV/Angstrom, largest s_i of a structure.
        force_std_rel: [S], largest s_i / (|F_i| + 0.1 eV/Angstrom).
        max_disagreement: [S] eV, largest |E_m - E_m'| over pairs of members.
    """

    energy: jax.Array
    forces: jax.Array
    virial: jax.Array
    energy_std: jax.Array
    energy_std_per_atom: jax.Array
    force_std: jax.Array
    force_std_mean: jax.Array
    force_std_max: jax.Array
    force_std_rel: jax.Array
    max_disagreement: jax.Array


SCORES: tuple[str, ...] = (
    "energy_std",
    "energy_std_per_atom",
    "force_std_mean",
    "force_std_max",
    "force_std_rel",
    "max_disagreement",
)
"""Names of the per-structure scores that every `Committee` carries."""

_REL_FORCE_FLOOR = 0.1  # eV/Angstrom, in force_std_rel


def committee_statistics(prediction: Prediction, graph: Graph) -> Committee:
    """Reduces the member axis of a `Prediction` to the mean and every committee score.

    Args:
        prediction: with leading member axis, energy [M, S], forces [M, A, 3], virial [M, S, 3, 3].
        graph: the graph it was made for.

    Returns:
        `Committee`, arrays without the member axis.
    """
    energy = jnp.mean(prediction.energy, axis=0)
    forces = jnp.mean(prediction.forces, axis=0)
    energy_std = jnp.sqrt(jnp.mean((prediction.energy - energy) ** 2, axis=0))
    spread = jnp.sum((prediction.forces - forces) ** 2, axis=-1)  # [M, A]
    force_std = jnp.where(graph.atom_mask, jnp.sqrt(jnp.mean(spread, axis=0)), 0)
    relative = force_std / (jnp.linalg.norm(forces, axis=-1) + _REL_FORCE_FLOOR)
    counts = atom_counts(graph)
    return Committee(
        energy=energy,
        forces=forces,
        virial=jnp.mean(prediction.virial, axis=0),
        energy_std=energy_std,
        energy_std_per_atom=energy_std / counts,
        force_std=force_std,
        force_std_mean=sum_over_atoms(force_std, graph) / counts,
        force_std_max=_max_over_atoms(force_std, graph),
        force_std_rel=_max_over_atoms(relative, graph),
        max_disagreement=jnp.max(prediction.energy, axis=0) - jnp.min(prediction.energy, axis=0),
    )


def _max_over_atoms(values: jax.Array, graph: Graph) -> jax.Array:
    masked = jnp.where(graph.atom_mask, values, 0)
    # NaN must stay visible: a maximum that drops it would let an exploded frame pass a gate.
    return jnp.maximum(jax.ops.segment_max(masked, graph.structure, graph.num_structures), 0)
