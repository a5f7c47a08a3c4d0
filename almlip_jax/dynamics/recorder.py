"""The candidate buffer on the device: frames of all walkers, in slots that an admission rule hands out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from almlip_jax.compilation import backend


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
        last: [W] int, step at which each walker last offered a frame; -1 where it never did.
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
        last=jax.device_put(np.full((walkers,), -1, np.int32)),
        offered=jax.device_put(np.zeros((walkers,), np.int32)),
    )


def written(recorder: Recorder, slot: jax.Array, step: jax.Array, frames: Frames) -> Recorder:
    """Puts one frame of each walker into its slot [W]; a slot that does not exist (B) takes nothing."""
    walkers = jnp.arange(slot.shape[0], dtype=jnp.int32)
    held = recorder.frames, recorder.walker, recorder.step
    put = _one_by_one if backend() == "cpu" else _at_once
    kept, walker, steps = put(held, slot, (frames, walkers, jnp.broadcast_to(step, slot.shape)))
    return recorder.replace(frames=kept, walker=walker, step=steps)  # type: ignore[attr-defined, no-any-return]


def _at_once(buffers: Any, slot: jax.Array, values: Any) -> Any:
    """Buffers [B, ...] with the rows of values [W, ...] in their slots."""
    return jax.tree.map(lambda buffer, value: buffer.at[slot].set(value, mode="drop"), buffers, values)


def _one_by_one(buffers: Any, slot: jax.Array, values: Any) -> Any:
    """The same in one loop over walkers: on a CPU every scatter is a loop of its own, which takes long to compile."""
    room = jax.tree.leaves(buffers)[0].shape[0]

    def one(w: jax.Array, buffers: Any) -> Any:
        def put(buffer: jax.Array, value: jax.Array) -> jax.Array:
            row = jax.lax.dynamic_index_in_dim(value.astype(buffer.dtype), w)
            return jax.lax.dynamic_update_index_in_dim(buffer, row, slot[w], 0, allow_negative_indices=False)

        return jax.lax.cond(slot[w] < room, lambda: jax.tree.map(put, buffers, values), lambda: buffers)

    return jax.lax.fori_loop(0, slot.shape[0], one, buffers)
