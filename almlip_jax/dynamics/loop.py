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
from almlip_jax.dynamics.biases import Bias, BiasForce
from almlip_jax.dynamics.endings import Endings, first_broken
from almlip_jax.dynamics.gates import Decision, Gate
from almlip_jax.dynamics.integrators import Integrator
from almlip_jax.dynamics.motion import (
    Evaluation,
    Moment,
    Motion,
    chosen,
    heated,
    kinetic_temperature,
    supply,
    without_drift,
)
from almlip_jax.dynamics.recorder import Frames, Recorder, written
from almlip_jax.dynamics.rewinding import begun_again, with_safe, with_start
from almlip_jax.dynamics.sanity import closest_contact, parts_of_tree, spanning_tree, spanning_tree_of_edges
from almlip_jax.dynamics.seen import Observables, Seen, scaled_by_species
from almlip_jax.dynamics.state import Setup, Snapshots, State, Status, Traces
from almlip_jax.dynamics.traces import Shown, Tracing
from almlip_jax.dynamics.verdicts import Judged, judge
from almlip_jax.ensembles import Committee, Prediction, committee_statistics
from almlip_jax.errors import InputError
from almlip_jax.features import last_layer_gradient
from almlip_jax.models import Params
from almlip_jax.scores import largest_of
from almlip_jax.structures.graph import Graph
from almlip_jax.structures.walkers import WalkerNeighbors
from almlip_jax.units import KB

Evaluate: TypeAlias = Callable[[Params, Graph], Prediction]
"""The ensemble: parameters and a graph in, what every member says out."""


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
    look: Seen


@dataclass(frozen=True)
class Loop:
    """The static part of the loop.

    Attributes:
        evaluate: the ensemble.
        integrator: moves.
        bias: acts in addition to the ensemble.
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
        to_starts: whether walkers then begin again at further starts, instead of safe frames.
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
    to_starts: bool
    when_full: str

    @property
    def tracing(self) -> Tracing:
        """Writes the traces."""
        return Tracing(self.scores, self.bias, self.virial, self.chunk, self.trace_every, self.trajectory_every)

    @property
    def endings(self) -> Endings:
        """Decides on how walkers fare."""
        return Endings(self.rewinds, self.when_full, "latent_distance" in self.novelty)

    # -- the chunk ----------------------------------------------------------------------------------------------------

    def begin(self, params: Params, state: State, setup: Setup) -> State:
        """Forces at the start, so that the first step can begin; and a member that gives none, if others do."""
        at = setup.drive.at(jnp.zeros((), state.motion.position.dtype))
        if self.to_starts:
            state = self._with_further_starts(params, state, setup, at)
        neighbors, prediction, motion = self._at_start(params, state, setup, at)
        snapshots = state.snapshots
        if snapshots is not None:
            snapshots = with_start(snapshots, motion)
        ends = replace(state.ends, member=first_broken(prediction))
        return replace(state, motion=motion, neighbors=neighbors, ends=ends, snapshots=snapshots)

    def _at_start(
        self, params: Params, state: State, setup: Setup, at: Moment
    ) -> tuple[WalkerNeighbors, Prediction, Motion]:
        """The list and the prediction where the walkers are before the first step, and their state with its forces."""
        neighbors = self._listed(state.neighbors, state.motion)
        prediction = self.evaluate(params, _graph(neighbors, state.motion, setup))
        bias, _ = self.bias.apply(state.bias, _look(state, state.motion, prediction, setup, at, state.step))
        evaluation = _evaluation(prediction, bias, at, self.virial)
        return neighbors, prediction, self.integrator.from_start(state.motion, evaluation, at)

    def _with_further_starts(self, params: Params, state: State, setup: Setup, at: Moment) -> State:
        """The state, in which the forces at every further start are known."""
        held = state.snapshots
        assert held is not None

        def one(neighbors: WalkerNeighbors, place: tuple[jax.Array, jax.Array]) -> tuple[Any, tuple[Any, Any]]:
            motion = state.motion.set(position=place[0], cell=place[1])
            neighbors, _, motion = self._at_start(params, replace(state, motion=motion, neighbors=neighbors), setup, at)
            return neighbors, (motion.force, motion.virial)

        places = jnp.moveaxis(held.position[:, 1:], 1, 0), jnp.moveaxis(held.cell[:, 1:], 1, 0)
        neighbors, (force, virial) = jax.lax.scan(one, state.neighbors, places)
        found = replace(
            held,
            force=held.force.at[:, 1:].set(jnp.moveaxis(force, 0, 1)),
            virial=held.virial.at[:, 1:].set(jnp.moveaxis(virial, 0, 1)),
        )
        return replace(state, neighbors=neighbors, snapshots=found)

    def run_chunk(self, params: Params, state: State, setup: Setup) -> tuple[State, Traces]:
        """Up to ``chunk`` steps; ends early where no walker runs, the list overflows or all steps are done."""
        traces = self.tracing.empty(state)
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
        observables = self._observe(done, committee, parts, setup, at)
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
        converged = self.integrator.converged(moved, at)
        ends, again = self.endings.after(
            state, setup, observables, judged, full, converged, frames.force_std, prediction
        )
        stays = self._stays(judged)
        motion = chosen(state.running & ~stays, moved, state.motion)
        motion, snapshots = self._rewound(state, setup, motion, judged, again, at)
        told = {"visited": visited & ~stays, "kept": kept}
        bias, gate = self._learnt(state, done.look.replace(**told), seen.replace(**told))  # type: ignore[attr-defined]
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
        unphysical = judged.says(Decision.UNPHYSICAL)
        shown = Shown(
            state.running, visited, unphysical, observables, committee, frames, moved, done.bias, bias, done.look
        )
        return new, self.tracing.with_step(traces, new.step - first, shown)

    def _stays(self, judged: Judged) -> jax.Array:
        """Which walkers [W] stay at their last good frame: unphysical ones, and relaxations that the gate ends."""
        if self.integrator.retreats:
            return judged.says(Decision.UNPHYSICAL, Decision.STOP, Decision.LEAVE)
        return judged.says(Decision.UNPHYSICAL)

    def _learnt(self, state: State, look: Seen, seen: Observables) -> tuple[Any, Any]:
        """States of biases and gate after the step, once it is known what was visited and kept."""
        _, bias = self.bias.apply(state.bias, look)
        _, gate = self.gate.apply(state.gate, seen)
        return bias, chosen(jnp.asarray(seen.visited), gate, state.gate)

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
            relist: whether the neighbour list is kept up to date; without, its edges are taken as they are.
        """
        motion = self.integrator.to_force(state.motion, at, state.step)
        neighbors = self._listed(state.neighbors, motion) if relist else self._as_listed(state.neighbors, motion)
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
            rest = without_drift(motion.momentum, motion.mass, at.mobile, at.free)
            motion = heated(motion, motion.set(momentum=rest))
        return Moved(motion, offered, neighbors, graph, prediction, bias, look)

    def _energy_before(self, state: State, trial: jax.Array, look: Seen) -> jax.Array | None:
        """Energy of where the walkers were before a trial, with the present biases, [W] eV; None where not compared."""
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

    def cells_of(self, motion: Motion) -> jax.Array | None:
        """Cells that the list must follow, [W, 3, 3] Angstrom; None where they stay those it was made for."""
        return motion.cell if self.integrator.changes_cell or self.to_starts else None

    def _listed(self, neighbors: WalkerNeighbors, motion: Motion) -> WalkerNeighbors:
        return neighbors.update(motion.position, self.cells_of(motion))

    def _as_listed(self, neighbors: WalkerNeighbors, motion: Motion) -> WalkerNeighbors:
        cells = self.cells_of(motion)
        return neighbors if cells is None else replace(neighbors, cells=cells)

    # -- what the gate sees and says ----------------------------------------------------------------------------------

    def _observe(
        self, done: Moved, committee: Committee, new_parts: jax.Array, setup: Setup, at: Moment
    ) -> Observables:
        motion, positions, graph = done.motion, done.offered, done.graph
        walkers, atoms, _ = positions.shape
        largest = jnp.max(jnp.sum(committee.forces**2, axis=-1).reshape(walkers, atoms), axis=1)
        of_atoms = dict(committee.atom_scores)
        fitted = {name: setup.novelty[name].of(done.prediction, graph) for name in self.novelty}
        of_atoms |= {name: values for name, values in fitted.items() if largest_of(name) is not None}
        atom_scores = {name: values.reshape(walkers, atoms) for name, values in of_atoms.items()}
        scores = dict(committee.scores) | fitted
        scores |= {name: jnp.max(atom_scores[name], axis=1) for name in fitted if name in atom_scores}
        missing = [name for name in self.scores if name not in scores]
        if missing:
            raise InputError(f"the exploration looks at {missing[0]}, which the model does not give.")
        scores = {name: scores[name] for name in self.scores}
        spread = scores["force_std_max"]
        finite = jnp.isfinite(committee.energy + largest + jnp.sum(positions, axis=(1, 2)) + spread)
        finite = finite & ~jnp.isnan(scores[self.gate_score])  # it may be infinite, for an element never seen
        if self.virial:
            finite = finite & jnp.all(jnp.isfinite(motion.virial), axis=(1, 2))
        cold = jnp.zeros_like(committee.energy)
        return Observables(
            **{name: getattr(done.look, name) for name in Seen.__dataclass_fields__},
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
            tree = chosen(doubtful, tree, state.tree)
            return parts_of_tree(tree, positions, *bonds), tree

        parts, tree = jax.lax.cond(jnp.any(doubtful), anew, lambda: (most, state.tree))
        return parts - setup.first_fragments, tree

    def _record(
        self, state: State, setup: Setup, judged: Judged, prediction: Prediction, graph: Graph, frames: Frames
    ) -> tuple[Recorder, Any, jax.Array, jax.Array]:
        """Recorder and admission after this step, whose frame was kept, and who had no room for one, [W] each."""
        step, recorder = state.step + 1, state.recorder
        spaced = (recorder.last < 0) | (step - recorder.last >= setup.record_every)
        stop = judged.says(Decision.STOP)
        wanted = (judged.says(Decision.RECORD) & spaced) | stop
        full = wanted & ~stop & self.admission.full(state.admission)

        def take() -> tuple[Recorder, Any, jax.Array]:
            """Offers the frames to the admission, and puts down what it takes."""
            offer = Offer(
                wanted=wanted,
                score=frames.scores[self.gate_score],
                features=self._features(prediction, graph, setup),
                known=setup.context.known,
                frames=frames,
                key=jax.random.fold_in(setup.key, step),
                offered=recorder.offered,
            )
            slot, admission = self.admission.apply(state.admission, offer)
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

    # -- beginning again ----------------------------------------------------------------------------------------------

    def _rewound(
        self, state: State, setup: Setup, motion: Motion, judged: Judged, again: jax.Array, at: Moment
    ) -> tuple[Motion, Snapshots | None]:
        """Walkers that begin again; and where they can, with the safe frames of this step if it is at these."""
        if state.snapshots is None:
            return motion, None
        before = state.snapshots
        if self.to_starts:
            turn = (state.ends.restarts + 1) % before.count
            moved = jax.lax.cond(
                jnp.any(again),
                lambda: begun_again(self.integrator, motion, before, again, at, turn),
                lambda: motion,
            )
            return moved, before
        due = (state.step + 1 - state.ends.origin) % setup.snapshot_every == 0
        safe = judged.safe & due
        snapshots = jax.lax.cond(jnp.any(safe), lambda: with_safe(before, motion, safe), lambda: before)
        moved = jax.lax.cond(
            jnp.any(again), lambda: begun_again(self.integrator, motion, snapshots, again, at), lambda: motion
        )
        return moved, snapshots


def _graph(neighbors: WalkerNeighbors, motion: Motion, setup: Setup) -> Graph:
    return neighbors.graph(motion.position, setup.species, setup.charge, setup.spin)


def _look(state: State, motion: Motion, prediction: Prediction, setup: Setup, at: Moment, clock: jax.Array) -> Seen:
    """What biases look at in a step; ``clock`` is the step by which they move on."""
    walkers, atoms, _ = motion.position.shape
    return Seen(
        positions=motion.position,
        cells=motion.cell,
        pbc=setup.pbc,
        atom_mask=setup.atom_mask,
        masses=motion.mass[..., 0],
        kt=at.kt,
        step=state.step,
        progress=jnp.minimum(clock.astype(motion.position.dtype) / setup.steps, 1),  # a rollout may be longer
        strength=jnp.where(state.running, setup.strength, 0),
        member_energy=prediction.energy,
        member_forces=prediction.forces.reshape(-1, walkers, atoms, 3),
        member_virial=prediction.virial,
    )


def _evaluation(prediction: Prediction, bias: BiasForce, at: Moment, virial: bool) -> Evaluation:
    """What the integrator is told: means of the members with the bias, nothing on atoms that are held fixed.

    A virial that is not asked for is zero, so that the compiler leaves its computation out.
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
