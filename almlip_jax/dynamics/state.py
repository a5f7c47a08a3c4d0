"""What the compiled loop works on: how walkers fare, what a run keeps, what a step changes, and what it tells."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import Any

import jax
from flax import struct

from almlip_jax.dynamics.admission import Context
from almlip_jax.dynamics.motion import Drive, Motion
from almlip_jax.dynamics.recorder import Recorder
from almlip_jax.dynamics.sanity import SanityLimits
from almlip_jax.dynamics.seen import Thresholds
from almlip_jax.potential import FittedScore
from almlip_jax.structures.walkers import WalkerNeighbors


class Status(IntEnum):
    """How a walker fares."""

    RUNNING = 0
    COMPLETED = 1
    STOPPED = 2
    UNPHYSICAL = 3
    BUFFER_FULL = 4
    CONVERGED = 5
    BEYOND_TRUST = 6


@struct.dataclass
class Setup:
    """What stays the same during a run; arrays, so that the next run needs no other program.

    Attributes:
        species: [W, N] int.
        atom_mask: [W, N] bool.
        pbc: [W, 3] bool.
        charge: [W] e.
        spin: [W], multiplicity 2S+1.
        radii: [number of species] covalent radii, Angstrom.
        drive: temperatures, pressures, timestep, numbers of the integrator.
        limits: of sanity.
        first_fragments: [W] int, parts of each structure at the start, or at that of its starts that has most; of
            periodic ones, which are not looked at, as many as there can be.
        thresholds: of the run, which frames are counted against whatever the gate makes of them.
        strength: [W] factor of each walker on every bias.
        gate_factors: [W, N], 1 over the relative threshold of each atom's species.
        novelty: name -> fitted score.
        departure: scalar, latent distance beyond which an atom has left the training distribution.
        context: the training set as the admission to the buffer sees it.
        key: of the admission.
        steps: scalar int, steps of each walker.
        record_every: scalar int.
        snapshot_every: scalar int, steps between frames kept to begin again from.
        restarts: scalar int, times that a walker may begin again.
    """

    species: jax.Array
    atom_mask: jax.Array
    pbc: jax.Array
    charge: jax.Array
    spin: jax.Array
    radii: jax.Array
    drive: Drive
    limits: SanityLimits
    first_fragments: jax.Array
    thresholds: Thresholds
    strength: jax.Array
    gate_factors: jax.Array
    novelty: Mapping[str, FittedScore]
    departure: jax.Array
    context: Context
    key: jax.Array
    steps: jax.Array
    record_every: jax.Array
    snapshot_every: jax.Array
    restarts: jax.Array


@struct.dataclass
class Ends:
    """How walkers ended, and what happened to them on the way; all [W].

    Attributes:
        status: int of `Status`.
        cause: int of `sanity.Cause`.
        step: int, step at which a walker ended; -1 while it runs.
        atom: int, atom with the largest spread at that step.
        member: int, the first member whose evaluation was not finite at that step, or the start, while others' were; -1
            where there is none.
        visited: int, frames that the walker came to; a refused Monte Carlo trial does not count.
        below: int, physical frames among them whose score lay below the record threshold of the run.
        restarts: int, times that the walker began again.
        origin: int, step at which it last began.
        departed_step: int, first step at which an atom had left the training distribution; -1 before.
        departed_atom: int, which.
        departure: largest latent distance of an atom at any step.
    """

    status: jax.Array
    cause: jax.Array
    step: jax.Array
    atom: jax.Array
    member: jax.Array
    visited: jax.Array
    below: jax.Array
    restarts: jax.Array
    origin: jax.Array
    departed_step: jax.Array
    departed_atom: jax.Array
    departure: jax.Array


@struct.dataclass
class Snapshots:
    """Where each walker can begin again, its start first, then safe frames or further starts: [W, S, ...].

    ``count`` [W] of them were put down in all.
    """

    position: jax.Array
    cell: jax.Array
    force: jax.Array
    virial: jax.Array
    count: jax.Array


@struct.dataclass
class State:
    """Everything that changes; a pytree that can be kept and gone on from, bit for bit.

    Attributes:
        motion: positions, momenta, forces, masses, random streams, cells.
        neighbors: neighbour list of all walkers.
        bias: state of the biases.
        gate: state of the gate.
        admission: state of the admission to the buffer.
        recorder: recorded frames.
        ends: how walkers fare.
        tree: [W, N] int, a spanning tree of each structure, by which dissociation is found; N = 0 where it is not.
        snapshots: frames to begin again from; none where walkers do not.
        step: scalar int, steps done.
    """

    motion: Motion
    neighbors: WalkerNeighbors
    bias: Any
    gate: Any
    admission: Any
    recorder: Recorder
    ends: Ends
    tree: jax.Array
    snapshots: Snapshots | None
    step: jax.Array

    @property
    def running(self) -> jax.Array:
        """[W] bool."""
        return self.ends.status == int(Status.RUNNING)


@struct.dataclass
class Traces:
    """What is kept of the steps of a chunk, thinned; NaN where a walker had ended, or a trial was refused.

    Frames (F) are NaN where they are unphysical, too; lines (T) show what made them so.

    Attributes:
        scores: name -> [T, W], every score.
        temperature: [T, W] K.
        energy: [T, W] eV, mean of the members, relative to the reference energies.
        bias: [T, W] eV, energy of the biases.
        kinetic: [T, W] eV, kinetic energy.
        supplied: [T, W] eV, energy given to the walker so far by what is not its energy function: thermostats, swaps,
            changing biases; NaN where it is not counted.
        watched: name -> [T, W], what biases show of themselves; see `Bias.quantities`.
        pressure: [T, W] eV/Angstrom^3, a third of the trace of the internal pressure.
        volume: [T, W] Angstrom^3.
        positions: [F, W, N, 3] Angstrom.
        momenta: [F, W, N, 3] sqrt(amu eV).
        cells: [F, W, 3, 3] Angstrom.
        force_std: [F, W, N] eV/Angstrom.
        forces: [F, W, N, 3] eV/Angstrom, mean of the members, without biases.
        frame_energy: [F, W] eV, as ``energy``.
        frame_temperature: [F, W] K, as ``temperature``.
    """

    scores: dict[str, jax.Array]
    temperature: jax.Array
    energy: jax.Array
    bias: jax.Array
    kinetic: jax.Array
    supplied: jax.Array
    watched: dict[str, jax.Array]
    pressure: jax.Array
    volume: jax.Array
    positions: jax.Array
    momenta: jax.Array
    cells: jax.Array
    force_std: jax.Array
    forces: jax.Array
    frame_energy: jax.Array
    frame_temperature: jax.Array
