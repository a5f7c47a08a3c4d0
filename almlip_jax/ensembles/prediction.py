"""What an ensemble says of a graph: member predictions and their committee statistics.

Definitions of the statistics: M members, standard deviations with 1/M, and for forces the vector norm
``s_i = sqrt(mean_m |F_mi - F_i|^2)`` of atom i (not averaged over the components).  Each name holds one meaning in
code, configs, files and figures.

Where members also say something of their own errors (`ensembles.heads`), the law of total variance adds it up: the
epistemic variance is that of the members plus the mean of what each says of its prediction, the total one is the
epistemic one plus the mean noise.  For forces these are variances of vectors, three times that of a component.  Members
that say nothing of themselves have epistemic and total deviations equal to the spread.
"""

from __future__ import annotations

from typing import get_args

import jax
import jax.numpy as jnp
from flax import struct

from almlip_jax.ensembles.heads import Noise
from almlip_jax.score_names import ScoreName
from almlip_jax.structures.graph import Graph, atom_counts, sum_over_atoms


@struct.dataclass
class Prediction:
    """Energies, forces, virial and features of a graph; with a leading member axis M from an ensemble.

    Attributes:
        energy: [(M,) S] eV, relative to the reference energies.
        forces: [(M,) A, 3] eV/Angstrom.
        virial: [(M,) S, 3, 3] eV, ``-dE/d(strain)``; stress = -virial / volume.
        features: [(L,) A, F] invariant features of the last hidden layer, of each model.
        noise: with an axis over models L from an ensemble: what each model says of its own errors, if anything.
    """

    energy: jax.Array
    forces: jax.Array
    virial: jax.Array
    features: jax.Array
    noise: Noise | None = None


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
        energy_epistemic, energy_total: [S] eV, standard deviations of the structure.
        force_epistemic, force_total: [A] eV/Angstrom, deviations of the force vector of each atom.
        force_epistemic_mean, force_total_mean: [S] eV/Angstrom, their means over the atoms of a structure.
        force_epistemic_max, force_total_max: [S] eV/Angstrom, their largest values.
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
    energy_epistemic: jax.Array
    energy_total: jax.Array
    force_epistemic: jax.Array
    force_total: jax.Array
    force_epistemic_mean: jax.Array
    force_epistemic_max: jax.Array
    force_total_mean: jax.Array
    force_total_max: jax.Array


SCORES: tuple[str, ...] = get_args(ScoreName)
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
    energy_variance = jnp.mean((prediction.energy - energy) ** 2, axis=0)
    energy_std = jnp.sqrt(energy_variance)
    spread = jnp.mean(jnp.sum((prediction.forces - forces) ** 2, axis=-1), axis=0)
    force_std = _per_atom(spread, graph)
    relative = force_std / (jnp.linalg.norm(forces, axis=-1) + _REL_FORCE_FLOOR)
    counts = atom_counts(graph)
    force_std_mean = sum_over_atoms(force_std, graph) / counts
    force_std_max = _max_over_atoms(force_std, graph)
    more = _with_noise(prediction.noise, energy_variance, spread, graph) or {
        # nothing is computed twice where members say nothing of themselves
        **dict.fromkeys(("energy_epistemic", "energy_total"), energy_std),
        **dict.fromkeys(("force_epistemic", "force_total"), force_std),
        **dict.fromkeys(("force_epistemic_mean", "force_total_mean"), force_std_mean),
        **dict.fromkeys(("force_epistemic_max", "force_total_max"), force_std_max),
    }
    return Committee(
        energy=energy,
        forces=forces,
        virial=jnp.mean(prediction.virial, axis=0),
        energy_std=energy_std,
        energy_std_per_atom=energy_std / counts,
        force_std=force_std,
        force_std_mean=force_std_mean,
        force_std_max=force_std_max,
        force_std_rel=_max_over_atoms(relative, graph),
        max_disagreement=jnp.max(prediction.energy, axis=0) - jnp.min(prediction.energy, axis=0),
        **more,
    )


def _with_noise(
    noise: Noise | None, energy_variance: jax.Array, spread: jax.Array, graph: Graph
) -> dict[str, jax.Array]:
    """Epistemic and total deviations where the members say something of their own errors."""
    if noise is None:
        return {}
    counts = atom_counts(graph)
    energy = energy_variance + jnp.mean(noise.energy.epistemic, axis=0)
    forces = spread + 3 * jnp.mean(noise.forces.epistemic, axis=0)
    found: dict[str, jax.Array] = {}
    for name, e, f in (
        ("epistemic", energy, forces),
        (
            "total",
            energy + jnp.mean(noise.energy.variance, axis=0),
            forces + 3 * jnp.mean(noise.forces.variance, axis=0),
        ),
    ):
        of_atoms = _per_atom(f, graph)
        found |= {
            f"energy_{name}": jnp.sqrt(e),
            f"force_{name}": of_atoms,
            f"force_{name}_mean": sum_over_atoms(of_atoms, graph) / counts,
            f"force_{name}_max": _max_over_atoms(of_atoms, graph),
        }
    return found


def _per_atom(variance: jax.Array, graph: Graph) -> jax.Array:
    return jnp.where(graph.atom_mask, jnp.sqrt(variance), 0)


def _max_over_atoms(values: jax.Array, graph: Graph) -> jax.Array:
    masked = jnp.where(graph.atom_mask, values, 0)
    # NaN must stay visible: a maximum that drops it would let an exploded frame pass a gate.
    return jnp.maximum(jax.ops.segment_max(masked, graph.structure, graph.num_structures), 0)
