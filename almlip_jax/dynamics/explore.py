"""Exploration: walkers run in compiled chunks, and what they found comes back to the host as structures and traces.

An `Explorer` compiles for a number of walkers and atoms once and serves every round of a campaign: parameters, start
structures, temperatures, thresholds and limits are inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ase import Atoms
from numpy.typing import ArrayLike

from almlip_jax.dynamics.gates import Thresholds, build_gate
from almlip_jax.dynamics.integrators import Bath, initial_state
from almlip_jax.dynamics.loop import Evaluate, Loop, Setup, State, Status, Traces
from almlip_jax.dynamics.recorder import empty_recorder
from almlip_jax.dynamics.sanity import Cause, SanityLimits, fragments, looks_for_fragments, species_radii
from almlip_jax.dynamics.settings import ExplorationSettings, LangevinSettings
from almlip_jax.ensembles import SCORES, spread_members
from almlip_jax.errors import CapacityError, InputError
from almlip_jax.models import Params
from almlip_jax.structures.species import SpeciesTable
from almlip_jax.structures.walkers import WalkerNeighbors, walker_neighbors
from almlip_jax.units import FEMTOSECOND, KB


@dataclass(frozen=True)
class Exploration:
    """What a run found; W walkers, T trace entries.

    Attributes:
        step: [T] int.
        time_fs: [T].
        scores: name -> [T, W], NaN once a walker ended.
        temperature: [T, W] K, NaN once a walker ended.
        walker_temperature: [W] K, of the bath.
        status: [W] `Status`.
        cause: [W] which sanity check ended a walker.
        end_step: [W] int, step at which a walker ended early; -1 for one that did not.
        end_atom: [W] int, atom with the largest spread at that step.
        recorded: candidate frames by walker and step; ``info``: walker, step, time_fs, temperature and every score,
            ``arrays["force_std"]``.
        trajectories: thinned trajectory of each walker, with the same ``info`` but for the scores.
        final: last good frame of each walker, without labels.
        share_below: share of all planned frames that lay below the record threshold; frames that were lost because a
            walker ended early count as above.
        thresholds: record and stop threshold of each walker.
        steps: planned for each walker.
        timestep: fs.
    """

    step: np.ndarray
    time_fs: np.ndarray
    scores: dict[str, np.ndarray]
    temperature: np.ndarray
    walker_temperature: np.ndarray
    status: tuple[Status, ...]
    cause: tuple[Cause, ...]
    end_step: np.ndarray
    end_atom: np.ndarray
    recorded: list[Atoms]
    trajectories: list[list[Atoms]]
    final: list[Atoms]
    share_below: float
    thresholds: Thresholds
    steps: int
    timestep: float


class Explorer:
    """Runs walkers with one ensemble architecture.

    Args:
        evaluate: the ensemble, ``(params, graph) -> Committee``.
        species: its species table.
        cutoff: Angstrom.
        settings: of the exploration.
        capacity: neighbour slots that an earlier run found necessary, so that this one computes with the same shapes.
        images: cell images searched, likewise.
        dtype: float32 or float64.
    """

    def __init__(
        self,
        evaluate: Evaluate,
        species: SpeciesTable,
        cutoff: float,
        settings: ExplorationSettings,
        *,
        capacity: int | None = None,
        images: tuple[int, int, int] | None = None,
        dtype: np.dtype | type = np.float32,
    ) -> None:
        self.species = species
        self.cutoff = cutoff
        self.settings = settings
        self.capacity = capacity
        self.images = images
        self.dtype = dtype
        # traced once for the first evaluation and the loop
        self._evaluate: Evaluate = jax.jit(evaluate)
        self._programs: dict[bool, tuple[Callable[..., State], Callable[..., tuple[State, Traces]]]] = {}

    def run(
        self,
        params: Params,
        starts: Sequence[Atoms],
        thresholds: Thresholds | tuple[float, float],
        key: jax.Array,
        on_chunk: Callable[[int, int], None] | None = None,
    ) -> Exploration:
        """Runs every walker until it ends or its steps are done.

        Args:
            params: of the ensemble.
            starts: start structure of each walker, in the order of ``settings.temperatures``; they may differ in size.
            thresholds: record and stop threshold of the gate, of each walker or the same for all.
            key: random key of the run.
            on_chunk: called after each chunk with steps done and number of walkers that still run.

        Raises:
            InputError: not one start structure for each walker, or an element that the ensemble does not know.
        """
        s = self.settings
        if len(starts) != len(s.temperatures):
            raise InputError(f"{len(s.temperatures)} walkers need as many start structures, not {len(starts)}.")
        params = spread_members(params)
        state, setup, loop = self._prepare(starts, self._thresholds(thresholds), key)
        begin, run_chunk = self._compiled(loop)
        state = begin(params, state, setup)
        kept: list[Traces] = []
        while int(state.step) < s.steps and _running(state) > 0:
            before = state
            state, traces = run_chunk(params, before, setup)
            if bool(state.neighbors.overflow):
                # the chunk is done again from its beginning with more room: as if nothing had happened
                state = replace(before, neighbors=self._grown(before.neighbors, state))
                continue
            kept.append(jax.device_get(traces))
            if on_chunk is not None:
                on_chunk(int(state.step), _running(state))
        return self._collect(starts, jax.device_get(replace(state, motion=_without_key(state))), kept, thresholds)

    # -- before -------------------------------------------------------------------------------------------------------

    def _thresholds(self, given: Thresholds | tuple[float, float]) -> Thresholds:
        if isinstance(given, Thresholds):
            return jax.tree.map(self._real, given)
        record, stop = (self._real(np.full(len(self.settings.temperatures), value)) for value in given)
        return Thresholds(record=record, stop=stop)

    def _real(self, values: ArrayLike) -> jax.Array:
        return jnp.asarray(np.asarray(values, self.dtype))

    def _prepare(self, starts: Sequence[Atoms], thresholds: Thresholds, key: jax.Array) -> tuple[State, Setup, Loop]:
        s = self.settings
        walkers, atoms = len(starts), max(len(a) for a in starts)
        species, mask = np.zeros((walkers, atoms), np.int32), np.zeros((walkers, atoms), bool)
        masses, positions = np.ones((walkers, atoms)), np.zeros((walkers, atoms, 3))
        for w, start in enumerate(starts):
            rows = slice(0, len(start))
            species[w, rows], mask[w, rows] = self.species.index(start.numbers), True
            masses[w, rows], positions[w, rows] = start.get_masses(), start.positions
        temperatures = np.asarray(s.temperatures)
        pbc = np.array([start.pbc for start in starts])
        bath = Bath(
            kt=self._real(KB * temperatures),
            friction=self._real(np.full(walkers, self._friction / FEMTOSECOND)),
            timestep=self._real(s.timestep * FEMTOSECOND),
        )
        motion = initial_state(
            self._real(positions),
            self._real(masses),
            jnp.asarray(mask),
            bath.kt,
            jax.random.split(key, walkers),
        )
        radii = self._real(species_radii(self.species.numbers))
        find = looks_for_fragments(s.sanity, pbc, atoms)
        limits = SanityLimits.of(s.sanity)
        setup = Setup(
            species=jnp.asarray(species),
            atom_mask=jnp.asarray(mask),
            radii=radii,
            bath=bath,
            limits=limits,
            first_fragments=_fragments(
                motion.position, jnp.asarray(species), jnp.asarray(mask), radii, limits.bond_factor
            )
            if find
            else jnp.asarray(np.ones(walkers, np.int32)),
            steps=jnp.asarray(np.int32(s.steps)),
            record_every=jnp.asarray(np.int32(s.record_every)),
        )
        loop = Loop(
            evaluate=self._evaluate,
            gate=build_gate(s.gate),
            chunk=s.chunk,
            trace_every=s.trace_every,
            trajectory_every=s.trajectory_every,
            stochastic=self._friction > 0,
            find_fragments=find,
        )

        def count(value: int) -> jax.Array:
            return jnp.asarray(np.full(walkers, value, np.int32))

        state = State(
            motion=motion,
            neighbors=self._neighbors(motion.position, np.array([a.cell.array for a in starts]), pbc, mask),
            gate=loop.gate.init(thresholds),
            recorder=empty_recorder(walkers, s.buffer, atoms, SCORES, jnp.dtype(self.dtype)),
            status=count(0),
            cause=count(0),
            end_step=count(-1),
            end_atom=count(-1),
            below=count(0),
            step=jnp.asarray(np.int32(0)),
        )
        return state, setup, loop

    @property
    def _friction(self) -> float:
        integrator = self.settings.integrator
        return integrator.friction if isinstance(integrator, LangevinSettings) else 0.0

    def _neighbors(self, positions: jax.Array, cells: np.ndarray, pbc: np.ndarray, mask: np.ndarray) -> WalkerNeighbors:
        found = walker_neighbors(
            positions, cells, pbc, mask, self.cutoff, self.settings.skin, capacity=self.capacity, images=self.images
        )
        if bool(found.overflow):
            found = found.grown(positions)
        self.capacity, self.images = found.capacity, found.images
        return found

    def _grown(self, before: WalkerNeighbors, overflowed: State) -> WalkerNeighbors:
        grown = overflowed.neighbors.grown(overflowed.motion.position)
        if grown.capacity <= before.capacity:
            raise CapacityError(f"the neighbour list did not grow beyond {before.capacity} slots; this is a bug.")
        self.capacity = grown.capacity
        return walker_neighbors(
            before.built_at,
            np.asarray(before.cells),
            np.asarray(before.pbc),
            np.asarray(before.atom_mask),
            self.cutoff,
            self.settings.skin,
            capacity=grown.capacity,
            images=grown.images,
        )

    def _compiled(self, loop: Loop) -> tuple[Callable[..., State], Callable[..., tuple[State, Traces]]]:
        """The compiled functions; one pair for structures whose fragments are counted, one for others."""
        if loop.find_fragments not in self._programs:
            self._programs[loop.find_fragments] = (jax.jit(loop.begin), jax.jit(loop.run_chunk))
        return self._programs[loop.find_fragments]

    # -- after --------------------------------------------------------------------------------------------------------

    def _collect(
        self,
        starts: Sequence[Atoms],
        state: State,
        traces: list[Traces],
        thresholds: Thresholds | tuple[float, float],
    ) -> Exploration:
        s = self.settings
        entries = int(state.step) // s.trace_every
        step = s.trace_every * np.arange(1, entries + 1)

        def joined(parts: Sequence[jax.Array]) -> np.ndarray:
            return np.concatenate([np.asarray(p) for p in parts])[:entries] if parts else np.zeros((0, len(starts)))

        return Exploration(
            step=step,
            time_fs=step * s.timestep,
            scores={name: joined([t.scores[name] for t in traces]) for name in SCORES},
            temperature=joined([t.temperature for t in traces]),
            walker_temperature=np.asarray(s.temperatures),
            status=tuple(Status(int(code)) for code in state.status),
            cause=tuple(Cause(int(code)) for code in state.cause),
            end_step=np.asarray(state.end_step),
            end_atom=np.asarray(state.end_atom),
            recorded=self._recorded(starts, state),
            trajectories=[self._trajectory(w, start, traces) for w, start in enumerate(starts)],
            final=[_moved(start, state.motion.position[w]) for w, start in enumerate(starts)],
            share_below=float(np.sum(state.below)) / (s.steps * len(starts)),
            thresholds=jax.device_get(self._thresholds(thresholds)),
            steps=s.steps,
            timestep=s.timestep,
        )

    def _recorded(self, starts: Sequence[Atoms], state: State) -> list[Atoms]:
        recorder, frames = state.recorder, []
        for w, start in enumerate(starts):
            for slot in range(int(recorder.count[w])):
                frame = self._frame(w, start, int(recorder.step[w, slot]), recorder.positions[w, slot])
                frame.info.update({name: float(recorder.scores[name][w, slot]) for name in SCORES})
                frame.arrays["force_std"] = np.asarray(recorder.force_std[w, slot, : len(start)], np.float64)
                frames.append(frame)
        return frames

    def _trajectory(self, w: int, start: Atoms, traces: list[Traces]) -> list[Atoms]:
        every, frames = self.settings.trajectory_every, []
        positions = [row for t in traces for row in np.asarray(t.positions)[:, w]]
        spreads = [row for t in traces for row in np.asarray(t.force_std)[:, w]]
        for n, (position, force_std) in enumerate(zip(positions, spreads, strict=True)):
            if np.isfinite(position[: len(start)]).all():
                frame = self._frame(w, start, (n + 1) * every, position)
                frame.arrays["force_std"] = force_std[: len(start)].astype(np.float64)
                frame.info["force_std_max"] = float(force_std[: len(start)].max())
                frame.info["force_std_mean"] = float(force_std[: len(start)].mean())
                frames.append(frame)
        return frames

    def _frame(self, w: int, start: Atoms, step: int, positions: ArrayLike) -> Atoms:
        frame = _moved(start, positions)
        temperature = self.settings.temperatures[w]
        frame.info.update(walker=w, step=step, time_fs=step * self.settings.timestep, temperature=temperature)
        return frame


_fragments = jax.jit(fragments)


def _running(state: State) -> int:
    """Number of walkers that have not ended."""
    return int(np.sum(np.asarray(state.status) == int(Status.RUNNING)))


def _moved(start: Atoms, positions: ArrayLike) -> Atoms:
    """The start structure with other positions, and only its charge and spin kept."""
    frame = Atoms(
        numbers=start.numbers, positions=np.asarray(positions, np.float64)[: len(start)], cell=start.cell, pbc=start.pbc
    )
    frame.info = {name: start.info[name] for name in ("charge", "spin") if name in start.info}
    return frame


def _without_key(state: State) -> Any:
    """Motion without the random streams, which do not go to the host as arrays."""
    return state.motion.set(rng=jax.random.key_data(state.motion.rng))
