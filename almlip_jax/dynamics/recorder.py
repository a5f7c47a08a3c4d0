"""The candidate buffer on the device: each walker writes the frames its gate asks for into a region of its own."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct


@struct.dataclass
class Recorder:
    """Recorded frames of W walkers with room for C each.

    Attributes:
        positions: [W, C, N, 3] Angstrom.
        force_std: [W, C, N] eV/Angstrom.
        scores: name -> [W, C].
        energy: [W, C] eV, relative to the reference energies.
        step: [W, C] int, at which a frame was recorded.
        count: [W] int, frames recorded.
        last: [W] int, step of the last recorded frame; far in the past where there is none.
    """

    positions: jax.Array
    force_std: jax.Array
    scores: dict[str, jax.Array]
    energy: jax.Array
    step: jax.Array
    count: jax.Array
    last: jax.Array

    @property
    def full(self) -> jax.Array:
        """[W] bool, walkers without room for another frame."""
        return self.count >= self.step.shape[1]


def empty_recorder(walkers: int, room: int, atoms: int, scores: tuple[str, ...], dtype: jnp.dtype) -> Recorder:
    """A recorder without frames."""
    # made on the host: one program for each shape would take longer
    return Recorder(
        positions=jnp.asarray(np.zeros((walkers, room, atoms, 3), dtype)),
        force_std=jnp.asarray(np.zeros((walkers, room, atoms), dtype)),
        scores={name: jnp.asarray(np.zeros((walkers, room), dtype)) for name in scores},
        energy=jnp.asarray(np.zeros((walkers, room), dtype)),
        step=jnp.asarray(np.zeros((walkers, room), np.int32)),
        count=jnp.asarray(np.zeros((walkers,), np.int32)),
        last=jnp.asarray(np.full((walkers,), -(2**30), np.int32)),
    )


def admit(
    recorder: Recorder,
    wanted: jax.Array,
    step: jax.Array,
    positions: jax.Array,
    force_std: jax.Array,
    scores: dict[str, jax.Array],
    energy: jax.Array,
) -> Recorder:
    """Takes in one frame of each walker that wants it and has room.

    Args:
        recorder: so far.
        wanted: [W] bool.
        step: scalar int.
        positions: [W, N, 3].
        force_std: [W, N].
        scores: name -> [W].
        energy: [W].
    """
    taken = wanted & ~recorder.full
    rows = jnp.arange(taken.shape[0])
    # a frame that is not taken is written to a slot that does not exist, and dropped
    slot = jnp.where(taken, recorder.count, recorder.step.shape[1])

    def put(buffer: jax.Array, value: jax.Array) -> jax.Array:
        return buffer.at[rows, slot].set(value, mode="drop")

    def write() -> Recorder:
        return Recorder(
            positions=put(recorder.positions, positions),
            force_std=put(recorder.force_std, force_std),
            scores={name: put(recorder.scores[name], scores[name]) for name in recorder.scores},
            energy=put(recorder.energy, energy),
            step=put(recorder.step, jnp.broadcast_to(step, taken.shape)),
            count=recorder.count + taken,
            last=jnp.where(taken, step, recorder.last),
        )

    # most steps record nothing, and then no buffer is touched
    return jax.lax.cond(jnp.any(taken), write, lambda: recorder)
