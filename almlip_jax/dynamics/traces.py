"""What is kept of the steps of a chunk: lines of scores and energies, frames of positions and forces, thinned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from almlip_jax.dynamics.biases import Bias, BiasForce
from almlip_jax.dynamics.motion import Motion, kinetic_energy, pressure_tensor
from almlip_jax.dynamics.recorder import Frames
from almlip_jax.dynamics.seen import Observables, Seen
from almlip_jax.dynamics.state import State, Traces
from almlip_jax.ensembles import Committee

_LINES = ("scores", "temperature", "energy", "bias", "kinetic", "supplied", "watched", "pressure", "volume")
_FRAMES = ("positions", "momenta", "cells", "force_std", "forces", "frame_energy", "frame_temperature")


@dataclass(frozen=True)
class Shown:
    """What a step shows to the traces.

    Of the walkers ``running`` [W] the evaluation of those ``judged`` [W] is that of a frame, which belongs into their
    trajectory unless it is ``unphysical`` [W].
    """

    running: jax.Array
    judged: jax.Array
    unphysical: jax.Array
    observables: Observables
    committee: Committee
    frames: Frames
    motion: Motion
    bias: BiasForce
    bias_state: Any
    look: Seen


@dataclass(frozen=True)
class Tracing:
    """Writes steps into the traces of a chunk.

    Attributes:
        scores: names of all scores.
        bias: what it shows of itself is traced.
        virial: whether there is a pressure.
        chunk: steps of a chunk.
        trace_every: steps between lines.
        trajectory_every: steps between frames.
    """

    scores: tuple[str, ...]
    bias: Bias
    virial: bool
    chunk: int
    trace_every: int
    trajectory_every: int

    def empty(self, state: State) -> Traces:
        """Traces of no step."""
        walkers, atoms, _ = state.motion.position.shape
        dtype = state.motion.position.dtype
        entries, frames = self.chunk // self.trace_every, self.chunk // self.trajectory_every

        def blank(*shape: int) -> jax.Array:
            return jnp.full(shape, jnp.nan, dtype)

        return Traces(
            scores={name: blank(entries, walkers) for name in self.scores},
            temperature=blank(entries, walkers),
            energy=blank(entries, walkers),
            bias=blank(entries, walkers),
            kinetic=blank(entries, walkers),
            supplied=blank(entries, walkers),
            watched={name: blank(entries, walkers) for name in self.bias.quantities},
            pressure=blank(entries, walkers),
            volume=blank(entries, walkers),
            positions=blank(frames, walkers, atoms, 3),
            momenta=blank(frames, walkers, atoms, 3),
            cells=blank(frames, walkers, 3, 3),
            force_std=blank(frames, walkers, atoms),
            forces=blank(frames, walkers, atoms, 3),
            frame_energy=blank(frames, walkers),
            frame_temperature=blank(frames, walkers),
        )

    def with_step(self, traces: Traces, done: jax.Array, shown: Shown) -> Traces:
        """Writes a step into the traces where its turn has come; ``done`` counts the steps of this chunk from 1."""
        observables, motion = shown.observables, shown.motion

        def masked(value: jax.Array, mask: jax.Array) -> jax.Array:
            return jnp.where(mask.reshape((-1,) + (1,) * (value.ndim - 1)), value, jnp.nan)

        def lines() -> dict[str, Any]:
            evaluated = {
                "scores": dict(observables.scores),
                "energy": observables.energy,
                "bias": shown.bias.energy,
                "watched": self.bias.look(shown.bias_state, shown.look),
            }
            nothing = jnp.full_like(observables.energy, jnp.nan)
            moving = {
                "temperature": observables.temperature,
                "kinetic": kinetic_energy(motion),
                "supplied": nothing if motion.supplied is None else motion.supplied[:, 0],
                "pressure": jnp.trace(pressure_tensor(motion), axis1=1, axis2=2) / 3 if self.virial else nothing,
                "volume": jnp.abs(jnp.linalg.det(motion.cell)),
            }
            return _mapped(masked, evaluated, shown.judged) | _mapped(masked, moving, shown.running)

        def snapshots() -> dict[str, Any]:
            frames = shown.frames
            evaluated = {
                "force_std": frames.force_std,
                "forces": shown.committee.forces.reshape(motion.position.shape),
                "frame_energy": frames.energy,
            }
            moving = {
                "positions": jnp.where(shown.judged[:, None, None], frames.positions, motion.position),
                "momenta": motion.momentum,
                "cells": frames.cells,
                "frame_temperature": frames.temperature,
            }
            judged, running = shown.judged & ~shown.unphysical, shown.running & ~shown.unphysical
            return _mapped(masked, evaluated, judged) | _mapped(masked, moving, running)

        def when_due(every: int, values: Callable[[], dict[str, Any]], old: dict[str, Any]) -> dict[str, Any]:
            if self.chunk < every:
                return old  # there is no row
            row = done // every - 1  # where a turn has come, one that is there

            def put(buffer: jax.Array, value: jax.Array) -> jax.Array:
                # a scatter would take ten times as long to compile
                return jax.lax.dynamic_update_index_in_dim(buffer, value.astype(buffer.dtype), row, 0)

            return jax.lax.cond(done % every == 0, lambda: jax.tree.map(put, old, values()), lambda: old)

        held = {name: getattr(traces, name) for name in traces.__dataclass_fields__}
        new = when_due(self.trace_every, lines, {name: held[name] for name in _LINES})
        new |= when_due(self.trajectory_every, snapshots, {name: held[name] for name in _FRAMES})
        return Traces(**new)


def _mapped(function: Callable[[jax.Array, jax.Array], jax.Array], tree: dict[str, Any], mask: jax.Array) -> Any:
    """A function of arrays and a mask, on every leaf."""
    return jax.tree.map(lambda x: function(x, mask), tree)
