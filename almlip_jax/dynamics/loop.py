"""The compiled loop: walkers, ensemble, gate and recorder, step after step, without a look at the host.

Each step evaluates the ensemble once, at the new positions; its mean forces drive the second half of the step, and its
spread goes to the gate.  A walker that ended stays where it is under a mask while the others go on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import struct

from almlip_jax.dynamics.gates import Decision, Gate, Observables, unphysical_cause
from almlip_jax.dynamics.integrators import Bath, baoab_from_force, baoab_to_force, kinetic_temperature
from almlip_jax.dynamics.operators import simulate
from almlip_jax.dynamics.recorder import Recorder, admit
from almlip_jax.dynamics.sanity import SanityLimits, closest_contact, fragments
from almlip_jax.ensembles import SCORES, Committee
from almlip_jax.models import Params
from almlip_jax.structures.graph import Graph
from almlip_jax.structures.walkers import WalkerNeighbors
from almlip_jax.units import KB

Evaluate: TypeAlias = Callable[[Params, Graph], Committee]
"""The ensemble: parameters and a graph in, the committee out."""


class Status(IntEnum):
    """How a walker fares."""

    RUNNING = 0
    COMPLETED = 1
    STOPPED = 2
    UNPHYSICAL = 3
    BUFFER_FULL = 4


@struct.dataclass
class Setup:
    """What stays the same during a run; arrays, so that the next run needs no other program.

    Attributes:
        species: [W, N] int.
        atom_mask: [W, N] bool.
        radii: [number of species] covalent radii, Angstrom.
        bath: temperatures, friction, timestep.
        limits: of sanity.
        first_fragments: [W] int, parts of each structure at the start.
        steps: scalar int, steps of each walker.
        record_every: scalar int.
    """

    species: jax.Array
    atom_mask: jax.Array
    radii: jax.Array
    bath: Bath
    limits: SanityLimits
    first_fragments: jax.Array
    steps: jax.Array
    record_every: jax.Array


@struct.dataclass
class State:
    """Everything that changes; a pytree that can be kept and gone on from, bit for bit.

    Attributes:
        motion: positions [W, N, 3], momenta, forces, masses, random streams.
        neighbors: neighbour list of all walkers.
        gate: state of the gate.
        recorder: recorded frames.
        status: [W] int of `Status`.
        cause: [W] int of `sanity.Cause`.
        end_step: [W] int, step at which a walker ended; -1 while it runs.
        end_atom: [W] int, atom with the largest spread at that step.
        below: [W] int, steps that lay below the record threshold.
        step: scalar int, steps done.
    """

    motion: simulate.NVTLangevinState
    neighbors: WalkerNeighbors
    gate: Any
    recorder: Recorder
    status: jax.Array
    cause: jax.Array
    end_step: jax.Array
    end_atom: jax.Array
    below: jax.Array
    step: jax.Array


@struct.dataclass
class Traces:
    """What is kept of the steps of a chunk, thinned; NaN where a walker had ended.

    Attributes:
        scores: name -> [T, W], every committee score.
        temperature: [T, W] K.
        positions: [F, W, N, 3] Angstrom.
        force_std: [F, W, N] eV/Angstrom.
    """

    scores: dict[str, jax.Array]
    temperature: jax.Array
    positions: jax.Array
    force_std: jax.Array


@dataclass(frozen=True)
class Loop:
    """The static part of the loop.

    Attributes:
        evaluate: the ensemble.
        gate: decides.
        chunk: steps of a chunk.
        trace_every: steps between trace entries.
        trajectory_every: steps between frames.
        stochastic: whether there is a thermostat.
        find_fragments: whether dissociation is looked for.
    """

    evaluate: Evaluate
    gate: Gate
    chunk: int
    trace_every: int
    trajectory_every: int
    stochastic: bool
    find_fragments: bool

    def begin(self, params: Params, state: State, setup: Setup) -> State:
        """Forces at the start, so that the first step can begin."""
        neighbors = state.neighbors.update(state.motion.position)
        committee = self.evaluate(params, neighbors.graph(state.motion.position, setup.species))
        forces = committee.forces.reshape(state.motion.position.shape)
        return replace(state, motion=state.motion.set(force=forces), neighbors=neighbors)

    def run_chunk(self, params: Params, state: State, setup: Setup) -> tuple[State, Traces]:
        """Up to ``chunk`` steps; ends early where no walker runs, the list overflows or all steps are done."""
        traces = self._empty_traces(state)
        first = state.step

        def go_on(carry: tuple[State, Traces]) -> jax.Array:
            current, _ = carry
            running = jnp.any(current.status == int(Status.RUNNING))
            more = (current.step < setup.steps) & (current.step - first < self.chunk)
            return running & more & ~current.neighbors.overflow

        def body(carry: tuple[State, Traces]) -> tuple[State, Traces]:
            current, kept = carry
            return self._step(params, current, setup, kept, first)

        state, traces = jax.lax.while_loop(go_on, body, (state, traces))
        done = (state.status == int(Status.RUNNING)) & (state.step >= setup.steps)
        return replace(state, status=jnp.where(done, int(Status.COMPLETED), state.status)), traces

    def _step(
        self, params: Params, state: State, setup: Setup, traces: Traces, first: jax.Array
    ) -> tuple[State, Traces]:
        moved = baoab_to_force(state.motion, setup.bath, setup.atom_mask, self.stochastic)
        neighbors = state.neighbors.update(moved.position)
        graph = neighbors.graph(moved.position, setup.species)
        committee = self.evaluate(params, graph)
        moved = baoab_from_force(moved, committee.forces.reshape(moved.position.shape), setup.bath)
        observables = self._observe(moved, graph, committee, setup)
        force_std = committee.force_std.reshape(setup.atom_mask.shape)
        atom = jnp.argmax(force_std, axis=1).astype(jnp.int32)
        judged, record = self._judge(state, setup, observables, atom)
        running = state.status == int(Status.RUNNING)
        # an unphysical walker stays at its last good frame
        kept = running & (judged.status != int(Status.UNPHYSICAL))
        new = replace(
            judged,
            motion=_choose(kept, moved, state.motion),
            neighbors=neighbors,
            recorder=admit(
                state.recorder,
                record,
                judged.step,
                moved.position,
                force_std,
                observables.scores,
                observables.energy,
            ),
        )
        traces = self._trace(traces, new.step - first, running, observables, moved.position, force_std)
        return new, traces

    def _observe(
        self, motion: simulate.NVTLangevinState, graph: Graph, committee: Committee, setup: Setup
    ) -> Observables:
        walkers, atoms, _ = motion.position.shape
        largest = jnp.max(jnp.sum(committee.forces**2, axis=-1).reshape(walkers, atoms), axis=1)
        position_sum = jnp.sum(motion.position, axis=(1, 2))
        scores = {name: getattr(committee, name) for name in SCORES}
        finite = jnp.isfinite(committee.energy + largest + position_sum + committee.force_std_max)
        if self.find_fragments:
            parts = fragments(motion.position, setup.species, setup.atom_mask, setup.radii, setup.limits.bond_factor)
            parts = parts - setup.first_fragments
        else:
            parts = jnp.zeros((walkers,), jnp.int32)
        return Observables(
            scores=scores,
            energy=committee.energy,
            max_force=jnp.sqrt(largest),
            closest_contact=closest_contact(graph, setup.radii, walkers),
            temperature=kinetic_temperature(motion, setup.atom_mask, self.stochastic),
            bath_temperature=setup.bath.kt / KB,
            new_fragments=parts,
            finite=finite,
        )

    def _judge(self, state: State, setup: Setup, observables: Observables, atom: jax.Array) -> tuple[State, jax.Array]:
        """Decisions on the new frames: the state with its counters moved on, and which frames to record [W]."""
        running = state.status == int(Status.RUNNING)
        step = state.step + 1
        cause = unphysical_cause(observables, setup.limits)
        decision, gate = self.gate.decide(observables, state.gate)
        decision = jnp.where(cause > 0, int(Decision.UNPHYSICAL), decision)
        stop = running & (decision == int(Decision.STOP))
        spaced = step - state.recorder.last >= setup.record_every
        record = (running & (decision == int(Decision.RECORD)) & spaced) | stop
        full = record & state.recorder.full & ~stop
        unphysical = running & (cause > 0)
        status = jnp.where(unphysical, int(Status.UNPHYSICAL), state.status)
        status = jnp.where(stop, int(Status.STOPPED), status)
        status = jnp.where(full, int(Status.BUFFER_FULL), status)
        ended = unphysical | stop | full
        below = running & (decision == int(Decision.GO_ON))
        return replace(
            state,
            gate=_choose(running, gate, state.gate),
            status=status,
            cause=jnp.where(unphysical, cause, state.cause),
            end_step=jnp.where(ended, step, state.end_step),
            end_atom=jnp.where(ended, atom, state.end_atom),
            below=state.below + below,
            step=step,
        ), record

    def _empty_traces(self, state: State) -> Traces:
        walkers, atoms, _ = state.motion.position.shape
        dtype = state.motion.position.dtype
        entries, frames = self.chunk // self.trace_every, self.chunk // self.trajectory_every
        return Traces(
            scores={name: jnp.full((entries, walkers), jnp.nan, dtype) for name in SCORES},
            temperature=jnp.full((entries, walkers), jnp.nan, dtype),
            positions=jnp.full((frames, walkers, atoms, 3), jnp.nan, dtype),
            force_std=jnp.full((frames, walkers, atoms), jnp.nan, dtype),
        )

    def _trace(
        self,
        traces: Traces,
        done: jax.Array,
        running: jax.Array,
        observables: Observables,
        positions: jax.Array,
        force_std: jax.Array,
    ) -> Traces:
        """Writes a step into the traces where its turn has come; ``done`` counts the steps of this chunk from 1."""

        def put(buffer: jax.Array, value: jax.Array, every: int) -> jax.Array:
            mask = running.reshape((-1,) + (1,) * (value.ndim - 1))
            return buffer.at[done // every - 1].set(jnp.where(mask, value, jnp.nan), mode="drop")

        def when_due(every: int, buffers: Any, values: Any) -> Any:
            def write() -> Any:
                return jax.tree.map(lambda buffer, value: put(buffer, value, every), buffers, values)

            return jax.lax.cond(done % every == 0, write, lambda: buffers)

        scores, temperature = when_due(
            self.trace_every,
            (traces.scores, traces.temperature),
            ({name: observables.scores[name] for name in SCORES}, observables.temperature),
        )
        frames, spreads = when_due(self.trajectory_every, (traces.positions, traces.force_std), (positions, force_std))
        return Traces(scores=scores, temperature=temperature, positions=frames, force_std=spreads)


def _choose(mask: jax.Array, new: Any, old: Any) -> Any:
    """Leaves of ``new`` for the walkers of a mask [W], those of ``old`` for the others."""

    def leaf(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(mask.reshape((-1,) + (1,) * (a.ndim - 1)), a, b)

    return jax.tree.map(leaf, new, old)
