"""Exploration: what walkers are given before they run in compiled chunks, and all that is compiled for them.

An `Explorer` compiles for a number of walkers and atoms once and serves every round of a campaign: parameters, start
structures, temperatures, thresholds, limits and what is known of the training set are inputs.  A `session.Session` is
one run of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ase import Atoms
from ase.constraints import FixAtoms
from numpy.typing import ArrayLike

from almlip_jax.dynamics.biases import build_bias
from almlip_jax.dynamics.further import check_further
from almlip_jax.dynamics.gates import Decision
from almlip_jax.dynamics.integrators.base import normals
from almlip_jax.dynamics.judging import (
    check_biased_atoms,
    check_cells,
    check_drift,
    check_exploration,
    check_fixed_atoms,
    check_swaps,
    speaks_as,
)
from almlip_jax.dynamics.knowledge import Knowledge
from almlip_jax.dynamics.loop import Evaluate, Loop
from almlip_jax.dynamics.motion import Drive, Motion, maxwell_boltzmann, without_drift
from almlip_jax.dynamics.programs import programs, traced_once
from almlip_jax.dynamics.recorder import empty_recorder
from almlip_jax.dynamics.results import Exploration
from almlip_jax.dynamics.sanity import (
    SanityLimits,
    looks_for_fragments,
    parts_of_tree,
    spanning_tree,
    spanning_tree_of_edges,
    species_radii,
)
from almlip_jax.dynamics.seen import RunContext, Thresholds
from almlip_jax.dynamics.session import Session
from almlip_jax.dynamics.settings import ExplorationSettings
from almlip_jax.dynamics.state import Ends, Setup, Snapshots, State
from almlip_jax.ensembles import Prediction, spread_members, walkers_to_share
from almlip_jax.errors import CapacityError, InputError
from almlip_jax.keys import named_stream
from almlip_jax.models import Params
from almlip_jax.potential import FittedScore
from almlip_jax.precision import full_precision
from almlip_jax.scores import score_of
from almlip_jax.structures.carried import BATH_TEMPERATURE, named
from almlip_jax.structures.electronic_state import electronic_state
from almlip_jax.structures.species import SpeciesTable
from almlip_jax.structures.walkers import Room, WalkerNeighbors, searches_bins, walker_neighbors
from almlip_jax.units import FEMTOSECOND, GPA, KB

_DEPARTURE = 2.0  # latent distance, in units of the training set's 99 % quantile, that counts as having left it


class Explorer:
    """Runs walkers with one ensemble architecture.

    Args:
        evaluate: the ensemble, ``(params, graph) -> Prediction``.
        species: its species table.
        cutoff: Angstrom.
        settings: of the exploration.
        room: of the neighbour list that an earlier run came to, so that this one computes with the same shapes.
        atoms: least room for the atoms of a walker, so that smaller structures need no other program.
        dtype: float32 or float64.
    """

    def __init__(
        self,
        evaluate: Evaluate,
        species: SpeciesTable,
        cutoff: float,
        settings: ExplorationSettings,
        *,
        room: Room | None = None,
        atoms: int = 0,
        dtype: np.dtype | type = np.float32,
    ) -> None:
        self.species = species
        self.cutoff = cutoff
        self.settings = settings
        self.room = room
        self.atoms = atoms
        self.dtype = np.dtype(dtype)
        self._evaluate = traced_once(evaluate)
        self._loops: dict[tuple[bool, bool, bool], Loop] = {}
        self._predicted: tuple[Any, Prediction] | None = None

    def run(
        self,
        params: Params,
        starts: Sequence[Atoms],
        thresholds: Thresholds | tuple[float, float],
        key: jax.Array,
        on_chunk: Callable[[int, int], None] | None = None,
        knowledge: Knowledge | None = None,
        numbers: Sequence[int] | None = None,
        further: Sequence[Sequence[Atoms]] = (),
    ) -> Exploration:
        """Runs every walker until it ends or its steps are done.

        Args:
            params: of the ensemble.
            starts: start structure of each walker, in the order of ``settings.temperatures``; they may differ in size.
                Atoms under an ase ``FixAtoms`` constraint do not move.
            thresholds: record and stop threshold of the gate, of each walker or the same for all.
            key: random key of the run.
            on_chunk: called after each chunk with steps done and number of walkers that still run.
            knowledge: of the training set, where settings ask for novelty scores or an admission by features.
            numbers: of the walkers among those of several runs side by side, so that each has the random numbers it
                would have if all ran in one; from 0 by default.  Where they are given, it may be that cells move in
                other runs alone.
            further: ``rewind.keep`` further starts of each walker where ``rewind.to`` is ``starts``, of the atoms of
                its first one.

        Raises:
            InputError: not one start structure for each walker, or not as many further ones as settings say, or of
                other atoms; an element that the ensemble does not know, a structure that does not suit the integrator,
                knowledge that is missing, or one member whose spread is judged.
        """
        session = self.begin(params, starts, thresholds, key, knowledge, numbers, further)
        traces = []
        for part in session.chunks():
            traces.append(part)
            if on_chunk is not None:
                on_chunk(session.step, session.running)
        return session.result(traces)

    def begin(
        self,
        params: Params,
        starts: Sequence[Atoms],
        thresholds: Thresholds | tuple[float, float],
        key: jax.Array,
        knowledge: Knowledge | None = None,
        numbers: Sequence[int] | None = None,
        further: Sequence[Sequence[Atoms]] = (),
    ) -> Session:
        """A run that has not done a step yet; arguments and errors as for `run`."""
        self._check(starts)
        if numbers is None:
            check_cells(self.settings.integrator, starts)
            check_swaps(self.settings, starts)
            check_drift(self.settings, starts)
        check_further(self.settings.further_starts, starts, further)
        atoms = len(starts) * max(self.atoms, *map(len, starts))  # as `_Layout` has them
        params = spread_members(params, walkers=walkers_to_share(len(starts), atoms))
        limits = self._thresholds(thresholds)
        state, setup, loop = self._prepare(starts, limits, key, self._known(knowledge), numbers, further)
        self._check_members(params, state, setup)
        begin, run_chunk = programs(loop)
        return Session(self, params, starts, limits, setup, run_chunk, begin(params, state, setup))

    # -- before -------------------------------------------------------------------------------------------------------

    def _check(self, starts: Sequence[Atoms]) -> None:
        s = self.settings
        if len(starts) != len(s.temperatures):
            raise InputError(f"{len(s.temperatures)} walkers need as many start structures, not {len(starts)}.")
        factors = [group.bias for group in s.walkers for _ in range(group.count)]
        check_biased_atoms(s.biases, {f"walker {w}": start for w, start in enumerate(starts) if factors[w]})
        check_fixed_atoms(s.integrator, {f"walker {w}": start for w, start in enumerate(starts)})
        about = {score: score_of(score) for score in s.scores}
        of_molecules = [name for name, one in about.items() if one is not None and one.target is not None]
        for w, start in enumerate(starts):
            if of_molecules and start.pbc.any():
                raise InputError(f"the start structure of walker {w} is periodic, and has no {of_molecules[0]}.")
            if self.settings.momenta == "start" and not start.has("momenta"):
                raise InputError(
                    f"the start structure of walker {w} has no momenta, which 'momenta: start' asks for; "
                    "give 'momenta: draw'."
                )
            for constraint in start.constraints:
                if not isinstance(constraint, FixAtoms):
                    raise InputError(
                        f"walker {w} has the constraint {type(constraint).__name__}; only FixAtoms is known, use a "
                        "restraint among the biases for others."
                    )

    def _check_members(self, params: Params, state: State, setup: Setup) -> None:
        """Refuses a gate, a bias or an ascent that would see no uncertainty anywhere."""
        prediction = self._shapes(params, state, setup)
        if prediction.energy.shape[0] == 1:
            gated = any(np.isfinite(jax.device_get(limit)).any() for limit in jax.tree.leaves(setup.thresholds))
            try:
                check_exploration(self.settings, speaks_as(prediction), gated=gated, further=tuple(prediction.further))
            except ValueError as error:
                raise InputError(f"{error} Infinite thresholds judge nothing." if gated else str(error)) from error

    def _shapes(self, params: Params, state: State, setup: Setup) -> Prediction:
        """What an evaluation gives, as shapes: the same from run to run, so that it is traced once."""
        leaves, tree = jax.tree.flatten((params, state, setup))
        of = tree, [jnp.shape(leaf) for leaf in leaves]
        if self._predicted is None or self._predicted[0] != of:

            def evaluated(params: Params, state: State, setup: Setup) -> Prediction:
                return self._evaluate(
                    params, state.neighbors.graph(state.motion.position, setup.species, setup.charge, setup.spin)
                )

            self._predicted = of, jax.eval_shape(evaluated, params, state, setup)
        return self._predicted[1]

    def _known(self, knowledge: Knowledge | None) -> Knowledge:
        known = knowledge or Knowledge()
        for name in self.settings.novelty:
            if name not in known.novelty:
                raise InputError(f"the score {name} needs the training set that it is measured from.")
        if self.settings.admission.looks_at_features and known.context is None:
            raise InputError(f"admission '{self.settings.admission.kind}' needs the training set it compares with.")
        novelty: dict[str, FittedScore] = {name: self._cast(known.novelty[name]) for name in self.settings.novelty}
        context = known.context or self.settings.admission.context(None, 0)
        return Knowledge(novelty, self._cast(context), known.relative)

    def _cast(self, tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.device_put(np.array(x, self.dtype)), tree)

    def _thresholds(self, given: Thresholds | tuple[float, float]) -> Thresholds:
        if isinstance(given, Thresholds):
            return self._cast(given)  # type: ignore[no-any-return]
        record, stop = (self._real(np.full(len(self.settings.temperatures), value)) for value in given)
        return Thresholds(record=record, stop=stop)

    def _real(self, values: ArrayLike) -> jax.Array:
        return jax.device_put(np.array(values, self.dtype))  # a copy, whose memory nobody writes into later

    def _prepare(
        self,
        starts: Sequence[Atoms],
        thresholds: Thresholds,
        key: jax.Array,
        known: Knowledge,
        numbers: Sequence[int] | None = None,
        further: Sequence[Sequence[Atoms]] = (),
    ) -> tuple[State, Setup, Loop]:
        s = self.settings
        layout = _Layout.of(starts, self.species, self.atoms)
        walkers, atoms = layout.mask.shape
        find = looks_for_fragments(s.sanity, layout.pbc, atoms)
        among_edges = find and searches_bins(atoms) and self._longest_bond <= self.cutoff
        loop = self.loop(find, by_species=known.relative is not None, among_edges=among_edges)
        drive = self._drive(starts, layout, loop)
        numbers = range(len(starts)) if numbers is None else numbers
        motion = self._first_motion(layout, drive, loop, key, numbers)
        setup = self._setup(layout, drive, motion, thresholds, known, key)
        snapshots = self._snapshots(motion, drive, key, numbers, further)
        places = [(motion.position, layout.cells)]
        if snapshots is not None and further:
            cells = np.asarray(snapshots.cell)
            places += [(snapshots.position[:, n], cells[:, n]) for n in range(1, cells.shape[1])]
        tree, parts = jnp.zeros((walkers, 0, 2), jnp.int32), []
        for positions, cells in reversed(places):  # a list that is made has room for all that were made before
            neighbors = self._neighbors(positions, cells, layout)
            if find:
                tree, counted = _first_tree(positions, setup, neighbors if among_edges else None)
                parts.append(counted)
        if find:
            setup = replace(setup, first_fragments=functools.reduce(jnp.maximum, parts))
        room = s.buffer * walkers
        regions = s.admission.regions(self._carried(starts, numbers), room)
        context = RunContext(walkers, atoms, self.dtype, thresholds, room, setup.context.map.shape[1], regions)
        state = State(
            motion=motion,
            neighbors=neighbors,
            bias=_concrete(loop.bias.init(context)),
            gate=_concrete(loop.gate.init(context)),
            admission=_concrete(loop.admission.init(context)),
            recorder=empty_recorder(walkers, room, atoms, loop.scores, self.dtype),
            ends=_nobody_ended(walkers, self.dtype),
            tree=tree,
            snapshots=snapshots,
            step=jax.device_put(np.int32(0)),
        )
        return state, setup, loop

    def _carried(self, starts: Sequence[Atoms], numbers: Sequence[int]) -> list[dict[str, Any]]:
        """What the frames of each walker say of it from its first step on."""
        s = self.settings
        bath = [{BATH_TEMPERATURE: s.bath_temperature(w, 0)} if s.thermal else {} for w in range(len(starts))]
        return [{"walker": n, **named(start), **at} for n, start, at in zip(numbers, starts, bath, strict=True)]

    @property
    def _longest_bond(self) -> float:
        """Angstrom, of the elements it knows."""
        return float(2 * self.settings.sanity.bond_factor * species_radii(self.species.numbers).max())

    def loop(self, find_fragments: bool, by_species: bool = False, among_edges: bool = False) -> Loop:
        """The static part of a run, made once: what users' functions return stays the same from run to run.

        Args:
            find_fragments: whether dissociation is looked for.
            by_species: whether elements have thresholds of their own, even where the gate's settings give none.
            among_edges: whether dissociation is looked for among edges rather than all pairs of atoms.
        """
        chosen = (find_fragments, by_species or bool(self.settings.gate.species), among_edges)
        if chosen not in self._loops:
            self._loops[chosen] = self._loop(*chosen)
        return self._loops[chosen]

    def _loop(self, find_fragments: bool, by_species: bool, among_edges: bool) -> Loop:
        s = self.settings
        rewinds = () if s.rewind is None else tuple(Decision[name.upper()] for name in s.rewind.on)
        return Loop(
            evaluate=self._evaluate,
            integrator=s.moves(),
            bias=build_bias(s.biases),
            gate=s.gate.build(),
            admission=s.admission.build(),
            gate_score=s.gate.score,
            by_species=by_species,
            novelty=s.novelty,
            scores=s.scores,
            chunk=s.chunk,
            trace_every=s.trace_every,
            trajectory_every=s.trajectory_every,
            find_fragments=find_fragments,
            among_edges=among_edges,
            remove_drift=s.remove_drift,
            virial=s.pressure or s.integrator.moves_cell,
            rewinds=rewinds,
            to_starts=s.further_starts > 0,
            when_full=s.when_full,
        )

    def _drive(self, starts: Sequence[Atoms], layout: _Layout, loop: Loop) -> Drive:
        s = self.settings
        groups = [group for group in s.walkers for _ in range(group.count)]
        mobile = layout.mask.copy()
        for w, start in enumerate(starts):
            for constraint in start.constraints:
                mobile[w, : len(start)][constraint.get_indices()] = False  # some count from the end
        moving, free = mobile.sum(axis=1), (mobile == layout.mask).all(axis=1)
        # the centre of mass of a free structure rests, unless a bath acts on every atom by itself
        rests = (moving > 1) & free & (not loop.integrator.drifts or s.remove_drift)
        return Drive(
            kt=self._real(KB * np.array([group.temperatures for group in groups])),
            pressure=self._real(GPA * np.array([group.pressures for group in groups])),
            timestep=self._real(s.timestep * FEMTOSECOND),
            mobile=jax.device_put(mobile),
            free=jax.device_put(free),
            freedom=self._real(np.maximum(3 * moving - 3 * rests, 1)),
            elastic=jax.device_put(layout.pbc.all(axis=1)),
            numbers={name: self._real(value) for name, value in s.numbers().items()},
        )

    def _first_motion(
        self, layout: _Layout, drive: Drive, loop: Loop, key: jax.Array, numbers: Sequence[int]
    ) -> Motion:
        s = self.settings
        walkers = len(layout.mask)
        momentum = _first_momenta(
            _streams(key, "momenta", numbers), self._real(layout.masses), drive.mobile, drive.free, drive.kt[:, 0]
        )
        position = self._real(layout.positions)
        if s.integrator.first_displacement > 0:
            drawn = _displacements(_streams(key, "displacements", numbers), drive.mobile, position)
            position = position + drawn * s.integrator.first_displacement
        if s.momenta == "start":
            rests = drive.free & (s.remove_drift or not loop.integrator.drifts)
            momentum = _given_momenta(self._real(layout.momenta), self._real(layout.masses), drive.mobile, rests)
        if not loop.integrator.thermal:
            momentum = jnp.zeros_like(momentum)
        motion = Motion(
            position=position,
            momentum=momentum,
            force=jnp.zeros_like(position),
            mass=self._real(layout.masses)[..., None],
            rng=_streams(key, "motion", numbers),
            cell=self._real(layout.cells),
            virial=self._real(np.zeros_like(layout.cells)),
        )
        if s.counts_supplied:
            motion = motion.set(supplied=jnp.zeros((walkers, 2), position.dtype))
        motion = motion.set(extra=loop.integrator.init(motion, drive.at(self._real(0.0))))
        if s.swaps is None:
            return motion
        chosen = drive.mobile
        if s.swaps.elements:
            named = np.isin(layout.numbers, [_number(symbol) for symbol in s.swaps.elements])
            chosen = chosen & jax.device_put(named)
        return motion.set(extra=motion.extra.replace(species=jax.device_put(layout.species), swappable=chosen))

    def _setup(
        self,
        layout: _Layout,
        drive: Drive,
        motion: Motion,
        thresholds: Thresholds,
        known: Knowledge,
        key: jax.Array,
    ) -> Setup:
        s = self.settings
        walkers, atoms = layout.mask.shape
        given = known.relative or {}
        of_walkers = [given] * walkers if isinstance(given, Mapping) else given
        relative = np.ones((walkers, len(self.species)))
        for w, own in enumerate(of_walkers):
            for by_element in (s.gate.species, own):
                for symbol, factor in by_element.items():
                    relative[w, self.species.index(np.array([_number(symbol)]))] /= factor
        strength = [group.bias for group in s.walkers for _ in range(group.count)]
        rewind = s.rewind
        assert known.context is not None
        return Setup(
            species=jax.device_put(layout.species),
            atom_mask=jax.device_put(layout.mask),
            pbc=jax.device_put(layout.pbc),
            charge=self._real(layout.charges),
            spin=self._real(layout.spins),
            radii=self._real(species_radii(self.species.numbers)),
            drive=drive,
            limits=SanityLimits.of(s.sanity, drive.freedom),
            first_fragments=jax.device_put(np.full(walkers, atoms, np.int32)),
            thresholds=thresholds,
            strength=self._real(strength),
            gate_factors=self._real(np.take_along_axis(relative, layout.species, axis=1)),
            novelty=known.novelty,
            departure=self._real(_DEPARTURE),
            context=known.context,
            key=named_stream(key, "admission"),
            steps=jax.device_put(np.int32(s.steps)),
            record_every=jax.device_put(np.int32(s.record_every)),
            snapshot_every=jax.device_put(np.int32(1 if rewind is None else rewind.every)),
            restarts=jax.device_put(np.int32(0 if rewind is None else rewind.limit)),
        )

    def _snapshots(
        self, motion: Motion, drive: Drive, key: jax.Array, numbers: Sequence[int], further: Sequence[Sequence[Atoms]]
    ) -> Snapshots | None:
        """Where walkers can begin again: room for safe frames, or further starts, whose forces are not known yet."""
        rewind = self.settings.rewind
        if rewind is None:
            return None
        walkers, atoms, _ = motion.position.shape
        positions, cells = np.zeros((walkers, 1 + rewind.keep, atoms, 3)), np.zeros((walkers, 1 + rewind.keep, 3, 3))
        for w, own in enumerate(further):
            for n, start in enumerate(own, start=1):
                positions[w, n, : len(start)], cells[w, n] = start.positions, start.cell.array
        position = self._real(positions)
        if further and self.settings.integrator.first_displacement > 0:
            for n in range(1, 1 + rewind.keep):
                drawn = _displacements(_streams(key, f"displacements/{n}", numbers), drive.mobile, motion.position)
                position = position.at[:, n].add(drawn * self.settings.integrator.first_displacement)
        return Snapshots(
            position=position,
            cell=self._real(cells),
            force=self._real(np.zeros_like(positions)),
            virial=self._real(np.zeros_like(cells)),
            count=jax.device_put(np.full(walkers, 1 + rewind.further, np.int32)),
        )

    def _neighbors(self, positions: jax.Array, cells: np.ndarray, layout: _Layout) -> WalkerNeighbors:
        found = walker_neighbors(
            positions,
            cells,
            layout.pbc,
            layout.mask,
            self.cutoff,
            self.settings.skin,
            self.room,
        )
        if bool(found.overflow):
            found = found.grown(positions)
        self.room = found.room
        return found

    def grown(self, before: State, overflowed: State) -> State:
        """The state at the beginning of a chunk, with room for what overflowed during it."""
        neighbors = overflowed.neighbors.grown(overflowed.motion.position)
        if neighbors.room == before.neighbors.room:
            raise CapacityError(f"the neighbour list did not grow beyond {neighbors.room}; this is a bug.")
        return self.relisted(before, neighbors.room)

    def relisted(self, state: State, room: Room) -> State:
        """A state with another room for neighbours, which further runs of the explorer have as well."""
        held = state.neighbors
        neighbors = walker_neighbors(
            held.built_at,
            np.asarray(held.built_cells),
            np.asarray(held.pbc),
            np.asarray(held.atom_mask),
            self.cutoff,
            self.settings.skin,
            room,
        )
        self.room = neighbors.room
        return replace(state, neighbors=replace(neighbors, cells=held.cells))


@dataclass(frozen=True)
class _Layout:
    """Start structures side by side, padded to the largest, or to more."""

    numbers: np.ndarray
    species: np.ndarray
    mask: np.ndarray
    masses: np.ndarray
    positions: np.ndarray
    momenta: np.ndarray
    cells: np.ndarray
    pbc: np.ndarray
    charges: np.ndarray
    spins: np.ndarray

    @classmethod
    def of(cls, starts: Sequence[Atoms], table: SpeciesTable, room: int) -> _Layout:
        """Structures side by side, with room for as many atoms as the largest has, or ``room``."""
        walkers, atoms = len(starts), max(room, *(len(a) for a in starts))
        numbers, species = np.zeros((walkers, atoms), np.int32), np.zeros((walkers, atoms), np.int32)
        mask, masses = np.zeros((walkers, atoms), bool), np.ones((walkers, atoms))
        positions, momenta = np.zeros((walkers, atoms, 3)), np.zeros((walkers, atoms, 3))
        for w, start in enumerate(starts):
            rows = slice(0, len(start))
            numbers[w, rows], species[w, rows], mask[w, rows] = start.numbers, table.index(start.numbers), True
            masses[w, rows], positions[w, rows] = start.get_masses(), start.positions
            momenta[w, rows] = start.get_momenta()  # integrators and ase share the unit
        cells, pbc = np.array([a.cell.array for a in starts]), np.array([a.pbc for a in starts])
        charges, spins = np.array([electronic_state(a) for a in starts]).T
        return cls(numbers, species, mask, masses, positions, momenta, cells, pbc, charges, spins)


def _nobody_ended(walkers: int, dtype: np.dtype) -> Ends:
    def count(value: int) -> jax.Array:
        return jax.device_put(np.full(walkers, value, np.int32))

    return Ends(
        status=count(0),
        cause=count(0),
        step=count(-1),
        atom=count(-1),
        member=count(-1),
        visited=count(0),
        below=count(0),
        restarts=count(0),
        origin=count(0),
        departed_step=count(-1),
        departed_atom=count(-1),
        departure=jax.device_put(np.zeros(walkers, dtype)),
    )


def _number(symbol: str) -> int:
    from ase.data import atomic_numbers

    if symbol not in atomic_numbers:
        raise InputError(f"'{symbol}' is not an element.")
    return int(atomic_numbers[symbol])


def _concrete(tree: Any) -> Any:
    """Arrays in place of Python numbers and weak types, so that a state has one type before and after a step."""
    return jax.tree.map(lambda x: jax.device_put(np.array(x)), tree)


def _streams(key: jax.Array, name: str, numbers: Sequence[int]) -> jax.Array:
    """A random stream of a name for each walker, by its number, [W]."""
    return jax.random.split(named_stream(key, name), max(numbers) + 1)[np.asarray(numbers)]


@jax.jit
@full_precision
def _first_momenta(keys: jax.Array, masses: jax.Array, mobile: jax.Array, free: jax.Array, kt: jax.Array) -> jax.Array:
    """Maxwell-Boltzmann momenta without the drift of structures in which no atom is held fixed, [W, N, 3]."""
    return without_drift(maxwell_boltzmann(keys, masses[..., None], mobile, kt), masses[..., None], mobile, free)


@jax.jit
@full_precision
def _given_momenta(momenta: jax.Array, masses: jax.Array, mobile: jax.Array, rests: jax.Array) -> jax.Array:
    """Momenta of start structures, [W, N, 3], without the drift of those [W] whose centre of mass is to rest."""
    return without_drift(jnp.where(mobile[..., None], momenta, 0), masses[..., None], mobile, rests)


@jax.jit
@full_precision
def _first_tree(positions: jax.Array, setup: Setup, neighbors: WalkerNeighbors | None) -> tuple[jax.Array, jax.Array]:
    """The spanning tree of each start structure, and the number of its parts, or as many as there can be, [W].

    It is made of the edges of a list where one is given.
    """
    if neighbors is None:
        tree = spanning_tree(positions, setup.species, setup.atom_mask, setup.radii)
    else:
        graph = neighbors.graph(positions, setup.species, setup.charge, setup.spin)
        tree = spanning_tree_of_edges(graph, len(positions), setup.radii)
    bonds = setup.species, setup.atom_mask, setup.radii, setup.limits.bond_factor
    parts = parts_of_tree(tree, positions, *bonds)
    open_ones = ~jnp.any(setup.pbc, axis=1)
    return tree, jnp.where(open_ones, parts, setup.first_fragments)


@jax.jit
@full_precision
def _displacements(keys: jax.Array, mobile: jax.Array, like: jax.Array) -> jax.Array:
    """Standard normal displacements of the mobile atoms, [W, N, 3]."""
    return jnp.where(mobile[..., None], normals(keys, like), 0)
