"""The candidate buffer on the device: frames of all walkers, in slots that an admission rule hands out."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct


@struct.dataclass
class Frames:
    """One frame of each walker, as offered to the buffer.

    Attributes:
        positions: [W, N, 3] Angstrom.
        cells: [W, 3, 3] Angstrom.
        force_std: [W, N] eV/Angstrom.
        scores: name -> [W].
        energy: [W] eV, relative to the reference energies.
        temperature: [W] K, kinetic; 0 where nothing has momenta.
    """

    positions: jax.Array
    cells: jax.Array
    force_std: jax.Array
    scores: Mapping[str, jax.Array]
    energy: jax.Array
    temperature: jax.Array


@struct.dataclass
class Recorder:
    """Recorded frames, with room for B.

    Attributes:
        frames: `Frames` with leading axis B.
        walker: [B] int, whose frame it is; -1 where the slot is empty.
        step: [B] int, at which a frame was recorded.
        last: [W] int, step at which each walker last offered a frame; far in the past where it never did.
        offered: [W] int, frames offered.
    """

    frames: Frames
    walker: jax.Array
    step: jax.Array
    last: jax.Array
    offered: jax.Array

    @property
    def room(self) -> int:
        """Slots B (static)."""
        return self.walker.shape[0]


def empty_recorder(walkers: int, room: int, atoms: int, scores: tuple[str, ...], dtype: np.dtype) -> Recorder:
    """A recorder without frames."""

    # made on the host: one program for each shape would take longer
    def zeros(*shape: int) -> jax.Array:
        return jax.device_put(np.zeros(shape, dtype))

    return Recorder(
        frames=Frames(
            positions=zeros(room, atoms, 3),
            cells=zeros(room, 3, 3),
            force_std=zeros(room, atoms),
            scores={name: zeros(room) for name in scores},
            energy=zeros(room),
            temperature=zeros(room),
        ),
        walker=jax.device_put(np.full((room,), -1, np.int32)),
        step=jax.device_put(np.zeros((room,), np.int32)),
        last=jax.device_put(np.full((walkers,), -(2**30), np.int32)),
        offered=jax.device_put(np.zeros((walkers,), np.int32)),
    )


def written(recorder: Recorder, slot: jax.Array, step: jax.Array, frames: Frames) -> Recorder:
    """Puts one frame of each walker into its slot [W]; a slot that does not exist (B) takes nothing."""
    walkers = jnp.arange(slot.shape[0], dtype=jnp.int32)

    def put(buffer: jax.Array, value: jax.Array) -> jax.Array:
        return buffer.at[slot].set(value, mode="drop")

    return recorder.replace(  # type: ignore[attr-defined, no-any-return]
        frames=jax.tree.map(put, recorder.frames, frames),
        walker=put(recorder.walker, walkers),
        step=put(recorder.step, jnp.broadcast_to(step, slot.shape)),
    )
