"""What lives in the loop (gates, biases, admission), as a pair of functions, and what these are shown.

Each is a frozen dataclass with ``init(context) -> state`` and ``apply(state, seen) -> (answer, state)``, both pure and
jittable.  Numbers that may differ from run to run are read by ``init`` and nowhere else, and live in the state as
arrays: their fields do not take part in comparisons, so that what differs in such numbers alone is equal, and one
compiled program serves it.

In a step the answer is asked for first, and the next state once it is known which walkers are there after the step and
whose frames went into the buffer: the loop applies again, with `Seen.visited` and `Seen.kept`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import DTypeLike

from almlip_jax.scores import largest_of

MOST_STEPS = 2 * 10**9
"""Steps that the counters of the compiled loop hold, in 32 bits."""


@struct.dataclass
class Thresholds:
    """The thresholds of a run, in the unit of the gate's score.

    Attributes:
        record: [W] frames above are candidates.
        stop: [W] a walker above ends.
    """

    record: jax.Array
    stop: jax.Array


@dataclass(frozen=True)
class RunContext:
    """What is known of a run before its first step.

    Attributes:
        walkers: W.
        atoms: N, of every walker, with padding.
        dtype: of floating numbers.
        thresholds: of the run.
        room: slots of the buffer.
        width: features of a frame that the admission compares; 0 where it does not look at them.
        regions: [W, 2] int, the same as ``slots``; None where each walker may take all.
    """

    walkers: int
    atoms: int
    dtype: DTypeLike
    thresholds: Thresholds
    room: int = 0
    width: int = 0
    regions: np.ndarray | None = None

    @property
    def slots(self) -> jax.Array:
        """Slots that frames of each walker may take, [W, 2] int: the first, and the one after the last."""
        everywhere = np.tile(np.array([0, self.room], np.int32), (self.walkers, 1))
        return jax.device_put(everywhere if self.regions is None else self.regions)


@struct.dataclass
class Seen:
    """The one evaluation of a step, and where the walkers are: what a bias may look at.

    Attributes:
        positions: [W, N, 3] Angstrom, never wrapped: molecules stay whole.
        cells: [W, 3, 3] Angstrom, rows are the cell vectors (anything where not periodic).
        pbc: [W, 3] bool.
        atom_mask: [W, N] bool, true for real atoms.
        masses: [W, N] amu (1 for padding atoms).
        kt: [W] eV.
        step: scalar int, steps done before this one.
        progress: scalar in [0, 1], share of the planned steps done.
        strength: [W] factor of each walker on every bias; at 0 nothing acts on the walker and it leaves no hills.
        member_energy: [M, W] eV.
        member_forces: [M, W, N, 3] eV/Angstrom.
        member_virial: [M, W, 3, 3] eV, -dE/d(strain).
        visited: [W] bool, whether the walker is at these positions after the step; what a walker did not visit (a Monte
            Carlo trial that was refused, an unphysical frame, a step after its end) leaves nothing in a state.
        kept: [W] bool, whether the frame went into the buffer; one that the spacing or the buffer refused did not, nor
            did one that was not recorded.  It decides on what is remembered, never on the answer.
    """

    positions: jax.Array
    cells: jax.Array
    pbc: jax.Array
    atom_mask: jax.Array
    masses: jax.Array
    kt: jax.Array
    step: jax.Array
    progress: jax.Array
    strength: jax.Array
    member_energy: jax.Array
    member_forces: jax.Array
    member_virial: jax.Array
    visited: jax.Array | bool = True
    kept: jax.Array | bool = True


@struct.dataclass(kw_only=True)
class Observables(Seen):
    """What a gate may look at: the same, and what the step came to, of the unbiased committee at the new positions.

    Attributes:
        scores: name -> [W], every score that needs no training set, and of novelty what was asked for (`scores`).
        atom_scores: name -> [W, N], the scores of atoms, likewise; 0 in padding.
        energy: [W] eV, relative to the reference energies.
        max_force: [W] eV/Angstrom, of the committee mean.
        closest_contact: [W], shortest distance as a fraction of the sum of the covalent radii.
        temperature: [W] K.
        bath_temperature: [W] K, what the walker should have.
        new_fragments: [W] int, parts more than at the start.
        finite: [W] bool, positions, energy, forces, spread and the gate's score are all numbers.
        begun_again: [W] bool, whether the walker was put elsewhere after the step before: nothing goes on in a row.
    """

    scores: Mapping[str, jax.Array]
    atom_scores: Mapping[str, jax.Array]
    energy: jax.Array
    max_force: jax.Array
    closest_contact: jax.Array
    temperature: jax.Array
    bath_temperature: jax.Array
    new_fragments: jax.Array
    finite: jax.Array
    begun_again: jax.Array | bool = False


def scaled_by_species(observables: Observables, score: str, factors: jax.Array) -> Observables:
    """The observables with a score that is the largest of atom scores times the factor of each atom.

    Args:
        observables: of a step.
        score: one that is the largest value of an atom (`scores.largest_of`).
        factors: [W, N], 1 over the relative threshold of an atom's species.
    """
    of_atoms = largest_of(score)
    assert of_atoms is not None  # settings refuse any other score
    largest = jnp.max(observables.atom_scores[of_atoms] * factors, axis=1)
    scores = dict(observables.scores) | {score: largest}
    return observables.replace(scores=scores)  # type: ignore[attr-defined, no-any-return]
