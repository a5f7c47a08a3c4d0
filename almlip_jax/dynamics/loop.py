"""The compiled loop: walkers, ensemble, bias, gate and recorder, step after step, without a look at the host.

Each step evaluates the ensemble once, at the new positions; its mean forces (and the bias, made of the same evaluation)
drive the second half of the step, and its spread goes to the gate.  A walker that ended stays where it is under a mask
while the others go on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import struct

from almlip_jax.dynamics.admission import Admission, Offer
from almlip_jax.dynamics.biases import Bias, BiasForce, BiasInput
from almlip_jax.dynamics.gates import Decision, Gate, Observables, scaled_by_species
from almlip_jax.dynamics.integrators import Integrator
from almlip_jax.dynamics.motion import (
    Evaluation,
    Moment,
    Motion,
    heated,
    kinetic_energy,
    kinetic_temperature,
    maxwell_boltzmann,
    pressure_tensor,
    supply,
    without_drift,
)
from almlip_jax.dynamics.recorder import Frames, Recorder, written
from almlip_jax.dynamics.sanity import Cause, closest_contact, parts_of_tree, spanning_tree, spanning_tree_of_edges
from almlip_jax.dynamics.state import Ends, Setup, Snapshots, State, Status, Traces
from almlip_jax.dynamics.verdicts import Judged, judge
from almlip_jax.ensembles import Committee, Prediction, committee_statistics
from almlip_jax.features import last_layer_gradient
from almlip_jax.keys import named_stream
from almlip_jax.models import Params
from almlip_jax.structures.graph import Graph
from almlip_jax.structures.walkers import WalkerNeighbors
from almlip_jax.units import KB

Evaluate: TypeAlias = Callable[[Params, Graph], Prediction]
"""The ensemble: parameters and a graph in, what every member says out."""


@dataclass(frozen=True)
class _Shown:
    """What a step shows to the traces; ``judged`` [W] are those ``running`` [W] whose evaluation is that of a frame."""

    running: jax.Array
    judged: jax.Array
    observables: Observables
    committee: Committee
    frames: Frames
    motion: Motion
    bias: BiasForce
    bias_state: Any
    look: BiasInput


@struct.dataclass
class Moved:
    """A step of the mechanics, not judged yet.

    Attributes:
        motion: after the step.
        offered: [W, N, 3] Angstrom, positions of the evaluation; a Monte Carlo trial may have been refused since.
        neighbors: the list at these positions.
        graph: of these positions.
        prediction: of every member.
        bias: what the biases did.
        look: what the biases looked at; they learn from it once it is known who stays there.
    """

    motion: Motion
    offered: jax.Array
    neighbors: WalkerNeighbors
    graph: Graph
    prediction: Prediction
    bias: BiasForce
    look: BiasInput


@dataclass(frozen=True)
class Loop:
    """The static part of the loop.

    Attributes:
        evaluate: the ensemble.
        integrator: moves.
        bias: acts beside the ensemble.
        gate: decides.
        admission: keeps.
        gate_score: name of the gate's score.
        by_species: whether thresholds differ between species.
        novelty: names of the novelty scores.
        scores: names of all scores that are computed and traced.
        chunk: steps of a chunk.
        trace_every: steps between trace entries.
        trajectory_every: steps between frames.
        find_fragments: whether dissociation is looked for.
        among_edges: whether it is looked for among the edges of the graph, or among all pairs of atoms.
        remove_drift: whether the centre of mass is brought to rest at each step.
        virial: whether virial and pressure are computed.
        rewinds: endings that are undone, as `Decision`.
        when_full: ``end_walker``, ``end_all`` or ``go_on``.
    """

    evaluate: Evaluate
    integrator: Integrator
    bias: Bias
    gate: Gate
    admission: Admission
    gate_score: str
    by_species: bool
    novelty: tuple[str, ...]
    scores: tuple[str, ...]
    chunk: int
    trace_every: int
    trajectory_every: int
    find_fragments: bool
    among_edges: bool
    remove_drift: bool
    virial: bool
    rewinds: tuple[Decision, ...]
    when_full: str

    # -- the chunk ----------------------------------------------------------------------------------------------------

    def begin(self, params: Params, state: State, setup: Setup) -> State:
        """Forces at the start, so that the first step can begin; and a member that gives none, if others do."""
        motion = state.motion
        at = setup.drive.at(jnp.zeros((), motion.position.dtype))
        neighbors = self._listed(state.neighbors, motion)
        prediction = self.evaluate(params, _graph(neighbors, motion, setup))
        bias, _ = self.bias.apply(state.bias, _look(state, motion, prediction, setup, at, state.step))
        motion = self.integrator.from_start(motion, _evaluation(prediction, bias, at, self.virial), at)
        snapshots = state.snapshots
        if snapshots is not None:
            snapshots = _kept(snapshots, motion, jnp.ones_like(state.running))
        ends = replace(state.ends, member=_broken(prediction))
        return replace(state, motion=motion, neighbors=neighbors, ends=ends, snapshots=snapshots)

    def run_chunk(self, params: Params, state: State, setup: Setup) -> tuple[State, Traces]:
        """Up to ``chunk`` steps; ends early where no walker runs, the list overflows or all steps are done."""
        traces = self._empty_traces(state)
        first = state.step

        def go_on(carry: tuple[State, Traces]) -> jax.Array:
            current, _ = carry
            more = (current.step < setup.steps) & (current.step - first < self.chunk)
            return jnp.any(current.running) & more & ~current.neighbors.overflow

        def body(carry: tuple[State, Traces]) -> tuple[State, Traces]:
            current, kept = carry
            return self._step(params, current, setup, kept, first)

        state, traces = jax.lax.while_loop(go_on, body, (state, traces))
        done = state.running & (state.step >= setup.steps)
        status = jnp.where(done, int(Status.COMPLETED), state.ends.status)
        return replace(state, ends=replace(state.ends, status=status)), traces

    def _step(
        self, params: Params, state: State, setup: Setup, traces: Traces, first: jax.Array
    ) -> tuple[State, Traces]:
        at = setup.drive.at(state.step.astype(state.motion.position.dtype) / setup.steps)
        done = self.moved(params, state, setup, at)
        moved, graph, prediction = done.motion, done.graph, done.prediction
        committee = committee_statistics(prediction, graph)
        visited = state.running & self.integrator.visited(moved)
        parts, tree = self._new_parts(state, setup, done.offered, graph, visited)
        observables = self._observe(moved, done.offered, graph, prediction, committee, parts, setup, at)
        observables = observables.replace(begun_again=state.ends.origin == state.step)  # type: ignore[attr-defined]
        frames = Frames(
            positions=done.offered,
            cells=moved.cell,
            force_std=committee.atom_scores["force_std"].reshape(setup.atom_mask.shape),
            scores=observables.scores,
            energy=observables.energy,
            temperature=observables.temperature,
        )
        seen = observables
        if self.by_species:
            seen = scaled_by_species(observables, self.gate_score, setup.gate_factors)
        judged = judge(self.gate, state.gate, self.gate_score, seen, setup.limits, setup.thresholds, visited)
        recorder, admission, kept, full = self._record(state, setup, judged, prediction, graph, frames)
        ends, again = self._ended(state, setup, observables, judged, full, frames.force_std, prediction, moved, at)
        stays = self._stays(judged)
        motion = _choose(state.running & ~stays, moved, state.motion)
        motion, snapshots = self._rewound(state, setup, motion, judged, again, at)
        bias, gate = self._learnt(state, done, seen, visited & ~stays, kept)
        motion = self._charged(motion, done, bias, state.step + 1, setup, visited & ~stays & ~again)
        new = State(
            motion=motion,
            neighbors=done.neighbors,
            bias=bias,
            gate=gate,
            admission=admission,
            recorder=recorder,
            ends=ends,
            tree=tree,
            snapshots=snapshots,
            step=state.step + 1,
        )
        # a refused Monte Carlo trial is where it was, and what was evaluated does not belong to it
        shown = _Shown(state.running, visited, observables, committee, frames, moved, done.bias, bias, done.look)
        return new, self._trace(traces, new.step - first, shown)

    def _stays(self, judged: Judged) -> jax.Array:
        """Which walkers [W] stay at their last good frame: unphysical ones, and relaxations that the gate ends."""
        if self.integrator.retreats:
            return judged.says(Decision.UNPHYSICAL, Decision.STOP, Decision.LEAVE)
        return judged.says(Decision.UNPHYSICAL)

    def _learnt(
        self, state: State, done: Moved, seen: Observables, stayed: jax.Array, kept: jax.Array
    ) -> tuple[Any, Any]:
        """States of biases and gate after the step: walkers learn from frames that they ``stayed`` [W] at alone.

        Which of those went into the buffer, ``kept`` [W], is told to the gate.
        """
        look = done.look.replace(visited=stayed)  # type: ignore[attr-defined]
        _, gate = self.gate.decide(seen.replace(kept=kept), state.gate)  # type: ignore[attr-defined]
        return self.bias.apply(state.bias, look)[1], _choose(stayed, gate, state.gate)

    def _charged(
        self, motion: Motion, done: Moved, bias: Any, step: jax.Array, setup: Setup, stayed: jax.Array
    ) -> Motion:
        """The state, with the work counted that biases do on walkers [W] by becoming those of the next step."""
        if motion.supplied is None:
            return motion
        progress = step.astype(motion.position.dtype) / setup.steps
        following = done.look.replace(step=step, progress=progress)  # type: ignore[attr-defined]
        work = self.bias.apply(bias, following)[0].energy - done.bias.energy
        return supply(motion, jnp.where(stayed, work, 0))

    def moved(self, params: Params, state: State, setup: Setup, at: Moment, *, relist: bool = True) -> Moved:
        """The mechanical part of a step, with its one evaluation.

        Args:
            params: of the ensemble.
            state: before the step.
            setup: of the run.
            at: what drives the walkers at this step.
            relist: whether the neighbour list is kept up to date; without, it is taken as it is.
        """
        motion = self.integrator.to_force(state.motion, at, state.step)
        neighbors = self._listed(state.neighbors, motion) if relist else state.neighbors
        graph = _graph(neighbors, motion, setup)
        prediction = self.evaluate(params, graph)
        trial = self.integrator.trial(motion)
        # nothing that moves with the progress of the run moves during a trial: both its ends have one energy function
        look = _look(state, motion, prediction, setup, at, jnp.where(trial, jnp.maximum(state.step - 1, 0), state.step))
        bias, _ = self.bias.apply(state.bias, look)
        evaluation = _evaluation(prediction, bias, at, self.virial)
        evaluation = evaluation.replace(energy_before=self._energy_before(state, trial, look))  # type: ignore[attr-defined]
        offered = motion.position
        motion = self.integrator.from_force(motion, evaluation, at)
        if self.remove_drift:
            motion = heated(motion, motion.set(momentum=without_drift(motion.momentum, motion.mass, at.mobile)))
        return Moved(motion, offered, neighbors, graph, prediction, bias, look)

    def _energy_before(self, state: State, trial: jax.Array, look: BiasInput) -> jax.Array | None:
        """Energy with today's biases of where the walkers were before a trial, [W] eV; None where nobody compares."""
        held = self.integrator.member_energies(state.motion)
        if held is None:
            return None
        before = look.replace(  # type: ignore[attr-defined]
            positions=state.motion.position,
            cells=state.motion.cell,
            member_energy=held,
            member_forces=jnp.zeros_like(look.member_forces),
            member_virial=jnp.zeros_like(look.member_virial),
        )

        def energy() -> jax.Array:
            return jnp.mean(held, axis=0) + self.bias.apply(state.bias, before)[0].energy

        return jax.lax.cond(trial, energy, lambda: jnp.zeros_like(held[0]))

    def _listed(self, neighbors: WalkerNeighbors, motion: Motion) -> WalkerNeighbors:
        return neighbors.update(motion.position, motion.cell if self.integrator.changes_cell else None)

    # -- what the gate sees and says ----------------------------------------------------------------------------------

    def _observe(
        self,
        motion: Motion,
        positions: jax.Array,
        graph: Graph,
        prediction: Prediction,
        committee: Committee,
        new_parts: jax.Array,
        setup: Setup,
        at: Moment,
    ) -> Observables:
        walkers, atoms, _ = positions.shape
        largest = jnp.max(jnp.sum(committee.forces**2, axis=-1).reshape(walkers, atoms), axis=1)
        of_atoms = dict(committee.atom_scores)
        of_atoms |= {name: setup.novelty[name].of_atoms(prediction, graph) for name in self.novelty}
        atom_scores = {name: values.reshape(walkers, atoms) for name, values in of_atoms.items()}
        scores = dict(committee.scores) | {name: jnp.max(atom_scores[name], axis=1) for name in self.novelty}
        scores = {name: scores[name] for name in self.scores}
        spread = scores["force_std_max"]
        finite = jnp.isfinite(committee.energy + largest + jnp.sum(positions, axis=(1, 2)) + spread)
        finite = finite & ~jnp.isnan(scores[self.gate_score])  # it may be infinite, for an element never seen
        if self.virial:
            finite = finite & jnp.all(jnp.isfinite(motion.virial), axis=(1, 2))
        cold = jnp.zeros_like(committee.energy)
        return Observables(
            scores=scores,
            atom_scores=atom_scores,
            energy=committee.energy,
            max_force=jnp.sqrt(largest),
            closest_contact=closest_contact(graph, setup.radii, walkers),
            temperature=kinetic_temperature(motion, at.freedom) if self.integrator.thermal else cold,
            bath_temperature=at.kt / KB,
            new_fragments=new_parts,
            finite=finite,
        )

    def _new_parts(
        self, state: State, setup: Setup, positions: jax.Array, graph: Graph, visited: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Parts more than at the start [W], and trees that show them.

        As long as enough edges of a tree of some step before are bonds, nothing has come apart; else it is made anew.
        """
        if not self.find_fragments:
            return jnp.zeros(positions.shape[0], jnp.int32), state.tree
        bonds = setup.species, setup.atom_mask, setup.radii, setup.limits.bond_factor
        most = parts_of_tree(state.tree, positions, *bonds)
        doubtful = visited & (most > setup.first_fragments)

        def anew() -> tuple[jax.Array, jax.Array]:
            if self.among_edges:
                tree = spanning_tree_of_edges(graph, len(positions), setup.radii)
            else:
                tree = spanning_tree(positions, setup.species, setup.atom_mask, setup.radii)
            tree = _choose(doubtful, tree, state.tree)
            return parts_of_tree(tree, positions, *bonds), tree

        parts, tree = jax.lax.cond(jnp.any(doubtful), anew, lambda: (most, state.tree))
        return parts - setup.first_fragments, tree

    def _record(
        self, state: State, setup: Setup, judged: Judged, prediction: Prediction, graph: Graph, frames: Frames
    ) -> tuple[Recorder, Any, jax.Array, jax.Array]:
        """Recorder and admission after this step, whose frame was kept, and who had no room for one, [W] each."""
        step, recorder = state.step + 1, state.recorder
        spaced = step - recorder.last >= setup.record_every
        stop = judged.says(Decision.STOP)
        wanted = (judged.says(Decision.RECORD) & spaced) | stop
        full = wanted & ~stop & self.admission.full(state.admission)

        def take() -> tuple[Recorder, Any, jax.Array]:
            offer = Offer(
                wanted=wanted,
                score=frames.scores[self.gate_score],
                features=self._features(prediction, graph, setup),
                key=jax.random.fold_in(setup.key, step),
                offered=recorder.offered,
            )
            slot, admission = self.admission.place(state.admission, offer, setup.context)
            held = replace(recorder, last=jnp.where(wanted, step, recorder.last), offered=recorder.offered + wanted)
            kept = wanted if self.admission.by_chance else wanted & (slot < recorder.room)
            return written(held, slot, step, frames), admission, kept

        # most steps record nothing, and then no buffer is touched
        nothing = recorder, state.admission, jnp.zeros_like(wanted)
        recorder, admission, kept = jax.lax.cond(jnp.any(wanted), take, lambda: nothing)
        return recorder, admission, kept, full

    def _features(self, prediction: Prediction, graph: Graph, setup: Setup) -> jax.Array:
        if not self.admission.looks_at_features:
            return jnp.zeros((graph.num_structures, 0), graph.vectors.dtype)
        return last_layer_gradient(prediction, graph, setup.radii.shape[0]) @ setup.context.map

    def _ended(
        self,
        state: State,
        setup: Setup,
        observables: Observables,
        judged: Judged,
        full: jax.Array,
        force_std: jax.Array,
        prediction: Prediction,
        motion: Motion,
        at: Moment,
    ) -> tuple[Ends, jax.Array]:
        """How walkers fare after this step, and which of them begin again [W]."""
        ends, running, step = state.ends, state.running, state.step + 1
        codes = {
            Decision.UNPHYSICAL: Status.UNPHYSICAL,
            Decision.STOP: Status.STOPPED,
            Decision.LEAVE: Status.BEYOND_TRUST,
        }
        status = jnp.where(running & self.integrator.converged(motion, at), int(Status.CONVERGED), ends.status)
        if self.when_full != "go_on":
            over = running & jnp.any(full) if self.when_full == "end_all" else full
            status = jnp.where(over, int(Status.BUFFER_FULL), status)
        again = jnp.zeros_like(running)
        for what, code in reversed(codes.items()):
            hit = judged.says(what)
            if what in self.rewinds:
                spared = hit & (ends.restarts < setup.restarts)
                again = again | spared
                hit = hit & ~spared
            status = jnp.where(hit, int(code), status)
        ended = running & (status != int(Status.RUNNING))
        unphysical = ended & (status == int(Status.UNPHYSICAL))
        broken = _broken(prediction)
        broken = jnp.where(broken < 0, ends.member, broken)  # of the start, after which every member has no number
        departed = self._departed(ends, judged.visited, observables, setup, step)
        return replace(
            departed,
            status=status,
            cause=jnp.where(unphysical, judged.cause, ends.cause),
            member=jnp.where(unphysical & (judged.cause == int(Cause.NOT_FINITE)), broken, ends.member),
            step=jnp.where(ended, step, ends.step),
            atom=jnp.where(ended, jnp.argmax(force_std, axis=1).astype(jnp.int32), ends.atom),
            visited=ends.visited + judged.visited,
            below=ends.below + judged.below,
            restarts=ends.restarts + again,
            origin=jnp.where(again, step, ends.origin),
        ), again

    def _departed(
        self, ends: Ends, visited: jax.Array, observables: Observables, setup: Setup, step: jax.Array
    ) -> Ends:
        """Which atom of which walker left the training distribution, when, and how far."""
        if "latent_distance" not in self.novelty:
            return ends
        distance = observables.atom_scores["latent_distance"]
        farthest = jnp.where(visited, jnp.max(distance, axis=1), 0)
        first = (farthest > setup.departure) & (ends.departed_step < 0)
        return replace(
            ends,
            departed_step=jnp.where(first, step, ends.departed_step),
            departed_atom=jnp.where(first, jnp.argmax(distance, axis=1).astype(jnp.int32), ends.departed_atom),
            departure=jnp.maximum(ends.departure, farthest),
        )

    # -- beginning again ----------------------------------------------------------------------------------------------

    def _rewound(
        self, state: State, setup: Setup, motion: Motion, judged: Judged, again: jax.Array, at: Moment
    ) -> tuple[Motion, Snapshots | None]:
        """Walkers that begin again from a safe frame of their own; and the safe frames, with those of this step."""
        if state.snapshots is None:
            return motion, None
        before = state.snapshots
        due = (state.step + 1 - state.ends.origin) % setup.snapshot_every == 0
        safe = judged.safe & due
        snapshots = jax.lax.cond(jnp.any(safe), lambda: _kept(before, motion, safe), lambda: before)
        moved = jax.lax.cond(jnp.any(again), lambda: self._begun_again(motion, snapshots, again, at), lambda: motion)
        return moved, snapshots

    def _begun_again(self, motion: Motion, snapshots: Snapshots, again: jax.Array, at: Moment) -> Motion:
        # of an unphysical step, which is as if it had not been, the stream itself has been used
        both = jax.vmap(lambda key: jax.random.split(named_stream(key, "restart"), 3))(motion.rng)
        held = jnp.minimum(snapshots.count, snapshots.force.shape[1])
        draw = jax.vmap(lambda key: jax.random.uniform(key))(both[:, 1])
        slot = jnp.minimum((draw * held).astype(jnp.int32), held - 1)
        rows = jnp.arange(slot.shape[0])
        momentum = without_drift(maxwell_boltzmann(both[:, 2], motion.mass, at.mobile, at.kt), motion.mass, at.mobile)
        fresh = motion.set(
            position=snapshots.position[rows, slot],
            cell=snapshots.cell[rows, slot],
            force=snapshots.force[rows, slot],
            virial=snapshots.virial[rows, slot],
            momentum=momentum if self.integrator.thermal else jnp.zeros_like(momentum),
            rng=both[:, 0],
        )
        return self.integrator.restart(_choose(again, fresh, motion), again, at)

    # -- traces -------------------------------------------------------------------------------------------------------

    def _empty_traces(self, state: State) -> Traces:
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

    def _trace(self, traces: Traces, done: jax.Array, shown: _Shown) -> Traces:
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
            return _mapped(masked, evaluated, shown.judged) | _mapped(masked, moving, shown.running)

        def when_due(every: int, values: Callable[[], dict[str, Any]], old: dict[str, Any]) -> dict[str, Any]:
            def put(buffer: jax.Array, value: jax.Array) -> jax.Array:
                return buffer.at[done // every - 1].set(value, mode="drop")

            return jax.lax.cond(done % every == 0, lambda: jax.tree.map(put, old, values()), lambda: old)

        held = {name: getattr(traces, name) for name in traces.__dataclass_fields__}
        new = when_due(self.trace_every, lines, {name: held[name] for name in _LINES})
        new |= when_due(self.trajectory_every, snapshots, {name: held[name] for name in _FRAMES})
        return Traces(**new)


_LINES = ("scores", "temperature", "energy", "bias", "kinetic", "supplied", "watched", "pressure", "volume")
_FRAMES = ("positions", "momenta", "cells", "force_std", "forces", "frame_energy", "frame_temperature")


def _graph(neighbors: WalkerNeighbors, motion: Motion, setup: Setup) -> Graph:
    return neighbors.graph(motion.position, setup.species, setup.charge, setup.spin)


def _look(
    state: State, motion: Motion, prediction: Prediction, setup: Setup, at: Moment, clock: jax.Array
) -> BiasInput:
    """What biases look at in a step; ``clock`` is the step by which they move on."""
    walkers, atoms, _ = motion.position.shape
    return BiasInput(
        positions=motion.position,
        cells=motion.cell,
        pbc=setup.pbc,
        atom_mask=setup.atom_mask,
        masses=motion.mass[..., 0],
        kt=at.kt,
        step=state.step,
        progress=clock.astype(motion.position.dtype) / setup.steps,
        strength=jnp.where(state.running, setup.strength, 0),
        member_energy=prediction.energy,
        member_forces=prediction.forces.reshape(-1, walkers, atoms, 3),
        member_virial=prediction.virial,
    )


def _broken(prediction: Prediction) -> jax.Array:
    """The first member whose energy or forces of a walker are not finite while others' are, [W] int; else -1."""
    members, walkers = prediction.energy.shape
    size = jnp.sum(jnp.abs(prediction.forces.reshape(members, walkers, -1)), axis=2)
    wrong = ~jnp.isfinite(prediction.energy + size)
    return jnp.where(jnp.all(wrong, axis=0) | ~jnp.any(wrong, axis=0), -1, jnp.argmax(wrong, axis=0)).astype(jnp.int32)


def _mapped(function: Callable[[jax.Array, jax.Array], jax.Array], tree: dict[str, Any], mask: jax.Array) -> Any:
    """A function of arrays and a mask, on every leaf."""
    return jax.tree.map(lambda x: function(x, mask), tree)


def _evaluation(prediction: Prediction, bias: BiasForce, at: Moment, virial: bool) -> Evaluation:
    """What the integrator is told: means of the members with the bias, nothing on atoms that are held fixed.

    A virial that nobody asks for is zero, so that the compiler leaves its computation out.
    """
    pull = jnp.mean(prediction.virial, axis=0) + bias.virial
    member_forces = prediction.forces.reshape(-1, *bias.forces.shape)
    forces = jnp.mean(member_forces, axis=0) + bias.forces
    return Evaluation(
        energy=jnp.mean(prediction.energy, axis=0) + bias.energy,
        forces=jnp.where(at.mobile[..., None], forces, 0),
        virial=pull if virial else jnp.zeros_like(pull),
        member_energy=prediction.energy,
        member_forces=member_forces,
    )


def _kept(snapshots: Snapshots, motion: Motion, safe: jax.Array) -> Snapshots:
    """Puts the frames of some walkers [W] bool into the oldest slot but the first, which holds the start."""
    room = snapshots.force.shape[1]
    later = 1 + (snapshots.count - 1) % max(room - 1, 1)
    slot = jnp.where(snapshots.count == 0, 0, later)
    slot = jnp.where(safe, slot, room)
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


def _choose(mask: jax.Array, new: Any, old: Any) -> Any:
    """Leaves of ``new`` for the walkers of a mask [W], those of ``old`` for the others; scalars are taken as new."""

    def leaf(a: jax.Array, b: jax.Array) -> jax.Array:
        return a if a.ndim == 0 else jnp.where(mask.reshape((-1,) + (1,) * (a.ndim - 1)), a, b)

    return jax.tree.map(leaf, new, old)
