"""Walkers that begin again, and the places where they can: safe frames of their own, or further starts."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from almlip_jax.dynamics.integrators import Integrator
from almlip_jax.dynamics.motion import Moment, Motion, chosen, maxwell_boltzmann, without_drift
from almlip_jax.dynamics.state import Snapshots
from almlip_jax.keys import named_stream


def with_start(snapshots: Snapshots, motion: Motion) -> Snapshots:
    """Puts the start of each walker into the first slot."""
    return Snapshots(
        position=snapshots.position.at[:, 0].set(motion.position),
        cell=snapshots.cell.at[:, 0].set(motion.cell),
        force=snapshots.force.at[:, 0].set(motion.force),
        virial=snapshots.virial.at[:, 0].set(motion.virial),
        count=snapshots.count,
    )


def with_safe(snapshots: Snapshots, motion: Motion, safe: jax.Array) -> Snapshots:
    """Puts the frames of some walkers [W] bool into the oldest slot but the first, which holds the start."""
    room = snapshots.force.shape[1]
    later = 1 + (snapshots.count - 1) % max(room - 1, 1)
    slot = jnp.where(safe, later, room)
    rows = jnp.arange(slot.shape[0])

    def put(buffer: jax.Array, value: jax.Array) -> jax.Array:
        return buffer.at[rows, slot].set(value, mode="drop")

    return Snapshots(
        position=put(snapshots.position, motion.position),
        cell=put(snapshots.cell, motion.cell),
        force=put(snapshots.force, motion.force),
        virial=put(snapshots.virial, motion.virial),
        count=snapshots.count + safe,
    )


def begun_again(
    integrator: Integrator,
    motion: Motion,
    snapshots: Snapshots,
    again: jax.Array,
    at: Moment,
    turn: jax.Array | None = None,
) -> Motion:
    """The state, in which some walkers have begun again, with fresh momenta.

    Args:
        integrator: of the run.
        motion: after the step.
        snapshots: where they can.
        again: [W] bool, which walkers.
        at: what drives the walkers at this step.
        turn: [W] int, the place that is each walker's turn; without it, one is drawn at random.
    """
    # of an unphysical step, which is as if it had not been, the stream itself has been used
    both = jax.vmap(lambda key: jax.random.split(named_stream(key, "restart"), 3))(motion.rng)
    held = jnp.minimum(snapshots.count, snapshots.force.shape[1])
    draw = jax.vmap(lambda key: jax.random.uniform(key))(both[:, 1])
    slot = jnp.minimum((draw * held).astype(jnp.int32), held - 1) if turn is None else turn
    rows = jnp.arange(slot.shape[0])
    momentum = maxwell_boltzmann(both[:, 2], motion.mass, at.mobile, at.kt)
    momentum = without_drift(momentum, motion.mass, at.mobile, at.free)
    fresh = motion.set(
        position=snapshots.position[rows, slot],
        cell=snapshots.cell[rows, slot],
        force=snapshots.force[rows, slot],
        virial=snapshots.virial[rows, slot],
        momentum=momentum if integrator.thermal else jnp.zeros_like(momentum),
        rng=both[:, 0],
    )
    return integrator.restart(chosen(again, fresh, motion), again, at)
