"""Structures to begin with: thermal rattling, and molecular dynamics with the label source itself.

Every label that dynamics pay for ends in the store, with two exceptions that are stated: of test sets and of teachers
only the frames that are kept do (their rows count the calls of the steps before them), and nothing of dynamics that are
still running does (it waits in the spool meanwhile).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from ase import Atoms
from ase.data import covalent_radii

from almlip_jax.errors import InputError, LabelError
from almlip_jax.given import given_number
from almlip_jax.oracles.base import Label, bare
from almlip_jax.oracles.executor import Labeller
from almlip_jax.oracles.md import (
    Call,
    Dynamics,
    DynamicsTask,
    Steps,
    create_stream,
    is_free,
    is_spent,
    put_aside_if_damaged,
    read_stream,
    thinned,
)
from almlip_jax.oracles.store import LabelStore, StoredLabel, storage_error
from almlip_jax.oracles.worker import Failure, NoSpace
from almlip_jax.structures.carried import BATH_TEMPERATURE, carried
from almlip_jax.units import KB

_THINNED = ("test", "teacher")  # purposes of which only frames that are kept are stored
_MAX_DRAWS = 1000  # of one rattled structure, before the displacements are declared too large


@dataclass(frozen=True)
class MDRun:
    """Molecular dynamics with the label source.

    Attributes:
        temperature: K.
        steps: whose frames may be kept, after the equilibration.
        timestep: fs.
        friction: 1/fs, of the Langevin thermostat; 0 for dynamics at constant energy.
        every: n-th step is kept as a frame.
        equilibration: steps before those.
        name: makes the random numbers of this run its own; by default its temperature.
        seconds: of the label source after which it ends, wherever it is; a run that was cut off counts those that were
            written down.
    """

    temperature: float
    steps: int
    timestep: float = 0.5
    friction: float = 0.01
    every: int = 1
    equilibration: int = 0
    name: str = ""
    seconds: float = math.inf

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.friction < 0 or self.timestep <= 0:
            raise InputError(f"dynamics need temperature >= 0, friction >= 0 and timestep > 0, not {self}.")
        if self.steps < 1 or self.every < 1 or self.equilibration < 0:
            raise InputError(f"dynamics need steps >= 1, every >= 1 and equilibration >= 0, not {self}.")
        if self.every > self.steps:
            raise InputError(
                f"dynamics need every <= steps to keep a frame, not every {self.every} with steps {self.steps}."
            )

    @property
    def total_steps(self) -> int:
        """Steps with the equilibration, up to the last that is kept; later ones would serve no purpose."""
        return self.equilibration + self.steps // self.every * self.every


@dataclass(frozen=True)
class Trajectory:
    """The frames of dynamics with the label source.

    Attributes:
        frames: every n-th structure with its label; ``info["step"]`` counts from the start, equilibration included.
        error: the reason why a label failed and the dynamics ended early, or None.
        calls: of the label source that were made for it, and not for another.
        seconds: that these have taken.
    """

    frames: list[Atoms]
    error: str | None
    calls: int
    seconds: float = 0.0


def label_md(
    start: Atoms,
    labeller: Labeller,
    *,
    temperature: float,
    steps: int,
    timestep: float = 0.5,
    friction: float = 0.01,
    every: int = 1,
    equilibration: int = 0,
    seed: int,
    purpose: str,
    provenance: Mapping[str, Any] | None = None,
) -> list[Atoms]:
    """Labelled frames of one run of molecular dynamics; see `MDRun` for the units and `run_label_md` for the rest.

    Raises:
        LabelError: a label failed, so that the dynamics ended early.
        InputError, StorageError: as `run_label_md`.
    """
    run = MDRun(temperature, steps, timestep, friction, every, equilibration)
    (trajectory,) = run_label_md(start, labeller, [run], seed=seed, purpose=purpose, provenance=provenance)
    if trajectory.error is not None:
        raise LabelError(f"dynamics at {temperature:g} K ended early: {trajectory.error}")
    return trajectory.frames


def run_label_md(
    start: Atoms,
    labeller: Labeller,
    runs: Sequence[MDRun],
    *,
    seed: int,
    purpose: str,
    provenance: Mapping[str, Any] | None = None,
    on_run: Callable[[MDRun], object] | None = None,
    dynamics: Sequence[tuple[Atoms, Sequence[MDRun]]] = (),
) -> list[Trajectory]:
    """Runs molecular dynamics with the label source, several at a time in its workers.

    The start is labelled once.  A run that was cut off goes on from the labels it paid for and ends with the same bits
    as one that was not; a run that is in the store is not repeated.  For the purposes ``test`` and ``teacher`` only the
    start and the frames that are kept are stored; each of their rows counts the calls that led to it.

    Args:
        start: structure at step 0; its masses and constraints hold.
        labeller: the label source and the store.
        runs: which dynamics; the labels are stored in this order.
        seed: of the campaign; momenta and noise are drawn from streams named by purpose and run.
        purpose: of the labels (initial, train, test, ...).
        provenance: what else to store with the labels.
        on_run: called for each run whose labels have been stored.
        dynamics: starts and runs of other calls with this seed and purpose, where there are several starts: what one of
            them that was cut off has paid for waits for its call.

    Returns:
        one trajectory for each run, in order.

    Raises:
        InputError: the label source cannot drive dynamics, or cannot be used.
        StorageError: labels cannot be stored.
    """
    if not labeller.oracle.drives_dynamics:
        raise InputError("this label source cannot drive molecular dynamics, since it only labels known structures.")
    given = {**(provenance or {}), "purpose": purpose}
    labeller.label([start], given)
    identity = labeller.identity(start)
    first = labeller.store.get(identity)
    if first is not None and first.error is not None:
        return [Trajectory([], f"step 0: {first.error}", 0) for _ in runs]
    plans = [_Plan.make(identity, start, run, seed, given) for run in runs]
    if len({plan.key for plan in plans}) < len(plans):
        raise InputError("two runs of dynamics are the same; give each a name of its own.")
    pairs = [(other, run) for other, own in dynamics for run in own]
    elsewhere = [_Plan.make(labeller.identity(other), other, run, seed, given) for other, run in pairs]
    _take_in_abandoned(labeller.store, {plan.key for plan in (*plans, *elsewhere)})
    lost = _fill_store(labeller, plans, carried(start), on_run)
    return [plan.trajectory(labeller.store, start, lost.get(plan.key)) for plan in plans]


@dataclass(frozen=True)
class _Plan:
    """One run with the name it has in the store and what its rows are given."""

    run: MDRun
    key: str
    given: dict[str, Any]
    seed: int

    @classmethod
    def make(cls, identity: str, start: Atoms, run: MDRun, seed: int, given: Mapping[str, Any]) -> _Plan:
        """The key names the trajectory: a longer run of the same dynamics continues a shorter one."""
        parts = {"start": identity, "seed": seed, "purpose": given["purpose"], **asdict(run)}
        # What most structures do not have adds nothing, so that their trajectories stay those of earlier versions.
        if start.has("masses"):
            parts["masses"] = start.get_masses().tolist()
        if start.constraints:
            parts["constraints"] = repr([constraint.todict() for constraint in start.constraints])
        if math.isinf(run.seconds):
            del parts["seconds"]
        if given["purpose"] not in _THINNED:
            for thinning in ("steps", "every", "equilibration"):
                del parts[thinning]
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
        return cls(run, f"md-{digest[:16]}", {**given, "trajectory": f"md-{digest[:16]}"}, seed)

    @property
    def stored_steps(self) -> Steps:
        """Steps whose labels are stored."""
        return self.kept_steps if self.given["purpose"] in _THINNED else Steps(0, 0)

    @property
    def kept_steps(self) -> Steps:
        """Steps that become frames."""
        return Steps(self.run.equilibration, self.run.every)

    def rows(self, store: LabelStore) -> dict[int, StoredLabel]:
        """The rows of this run in the store, by their steps."""
        return {int(row.provenance["step"]): row for row in store.select(trajectory=self.key)}

    def is_complete(self, store: LabelStore) -> bool:
        """Whether the store holds all there will be of this run."""
        rows = self.rows(store)
        if is_spent(sum(row.label.seconds for row in rows.values()), self.run.seconds):
            return True
        wanted = [step for step in range(1, self.run.total_steps + 1) if self.stored_steps(step)]
        failed = [step for step, row in rows.items() if row.label.error is not None]
        return all(step in rows or any(step > end for end in failed) for step in wanted)

    def task(self, labeller: Labeller, start: Atoms) -> DynamicsTask:
        """The run as a task, with what is paid for already."""
        from almlip_jax.keys import numpy_generator  # imports jax, which workers do without

        folder = labeller.store.spool.resolve() / "md"
        stream = folder / f"{self.key}.jsonl"
        try:
            folder.mkdir(exist_ok=True)
            put_aside_if_damaged(stream)
            create_stream(stream, bare(start), {"provenance": json.loads(json.dumps(self.given, default=str))})
        except OSError as error:
            raise storage_error(labeller.store.path, error) from error
        run = self.run
        known = [row.label for row in self.rows(labeller.store).values()]
        first = labeller.store.get(labeller.identity(start))
        if first is not None:
            known.append(first)
        return DynamicsTask(
            start=start,
            dynamics=Dynamics(run.temperature, run.timestep, run.friction),
            steps=run.total_steps,
            generator=numpy_generator(
                self.seed, "label_md", self.given["purpose"], run.name or f"{run.temperature:g}K"
            ),
            keep=self.stored_steps,
            known={label.identity: label for label in known},
            stream=stream,
            seconds=run.seconds,
        )

    def trajectory(self, store: LabelStore, start: Atoms, error: str | None) -> Trajectory:
        """The frames of this run from the store; an error is known where the run was lost without one."""
        rows = sorted(self.rows(store).items())
        frames = []
        for step, stored in rows:
            if step > self.run.total_steps:
                break
            if stored.label.error is not None:
                error = f"step {step}: {stored.label.error}"
                break
            if self.kept_steps(step):
                atoms = start.copy()
                atoms.positions = stored.atoms.positions
                atoms.info |= {"step": step, BATH_TEMPERATURE: self.run.temperature}
                frames.append(stored.label.attach(atoms))
        labels = [stored.label for _, stored in rows]
        return Trajectory(frames, error, sum(one.calls for one in labels), sum(one.seconds for one in labels))


def _fill_store(
    labeller: Labeller, plans: Sequence[_Plan], start: Atoms, on_run: Callable[[MDRun], object] | None
) -> dict[str, str]:
    """Runs what the store does not hold; labels are stored in the order of the plans, not of the arrivals.

    Returns:
        the reason of runs that ended early without a label that failed, by key.
    """
    todo = [plan for plan in plans if not plan.is_complete(labeller.store)]
    arrived: dict[int, list[Call]] = {}
    lost: dict[str, str] = {}
    following = 0
    tasks = [plan.task(labeller, start) for plan in todo]
    for n, outcome in labeller.backend.run(tasks) if tasks else ():
        if isinstance(outcome, NoSpace):
            raise storage_error(labeller.store.path, outcome.error)
        if isinstance(outcome, Failure):
            calls = _after_crash(tasks[n], outcome, labeller)
            if not calls or calls[-1].label is None or calls[-1].label.error is None:
                lost[todo[n].key] = outcome.reason
            outcome = calls
        arrived[n] = outcome
        while following in arrived:
            plan = todo[following]
            _store(labeller.store, arrived.pop(following), plan)
            tasks[following].stream.unlink(missing_ok=True)
            following += 1
            if on_run is not None:
                on_run(plan.run)
    return lost


def _store(store: LabelStore, calls: Sequence[Call], plan: _Plan) -> None:
    store.record(
        [(call.atoms, {**plan.given, "step": call.step}, call.label) for call in calls if call.label is not None]
    )


def _after_crash(task: DynamicsTask, failure: Failure, labeller: Labeller) -> list[Call]:
    """The calls of a run whose worker died, that are kept; where that was in a label, it has failed.

    What was paid for after the last of them is kept with the last call there was.
    """
    _, calls, _ = read_stream(task.stream)
    if calls and calls[-1].label is None:
        last = calls.pop()
        identity = labeller.identity(last.atoms)
        calls.append(Call(last.step, last.atoms, Label(identity, error=failure.reason, calls=failure.calls)))
    end = calls[-1].step if calls else 0
    return thinned(calls, lambda step: task.keep(step) or step == end, task.known)


def _take_in_abandoned(store: LabelStore, wanted: Container[str]) -> None:
    """Stores the labels of cut-off runs that nobody asks for any more, by their keys: they are paid for."""
    for path in sorted((store.spool / "md").glob("*.jsonl")):
        if path.stem in wanted or put_aside_if_damaged(path):
            continue
        with path.open("ab") as file:
            if not is_free(file):  # a worker of a killed program is at it; the next time will do
                continue
        header, calls, _ = read_stream(path)
        given = header.get("provenance", {})
        paid = [call for call in calls if call.label is not None]
        if given.get("purpose") in _THINNED and paid:
            paid = thinned(paid, paid[-1].step.__eq__)
        store.record(
            [(call.atoms, {**given, "step": call.step}, call.label) for call in paid if call.label is not None]
        )
        path.unlink()


def rattle(
    start: Atoms,
    count: int,
    generator: np.random.Generator,
    *,
    stdev: float | None = None,
    temperature: float | None = None,
    stiffness: float = 5.0,
    min_distance: float = 0.6,
) -> list[Atoms]:
    """Copies of a structure with normally distributed displacements of the atoms, as far as its constraints let them.

    Args:
        start: the structure.
        count: how many copies.
        generator: source of the displacements.
        stdev: standard deviation of each coordinate in Angstrom; or else
        temperature: K, of independent harmonic oscillators: ``stdev = sqrt(kB T / stiffness)``.
        stiffness: of those oscillators in eV/Angstrom^2.
        min_distance: no two atoms come closer than this times the sum of their covalent radii; draws in which they
            would are drawn again.

    Raises:
        InputError: neither or both of `stdev` and `temperature` are given, a number is less than 0, what is given is no
            structure or no generator, or the displacements are so large that atoms nearly always come too close.
    """
    if not isinstance(start, Atoms):
        raise InputError(f"rattling displaces one structure (ase.Atoms), not a {type(start).__name__}.")
    if not isinstance(generator, np.random.Generator):
        raise InputError(
            f"rattling draws from a generator such as numpy.random.default_rng(0), not a {type(generator).__name__}."
        )
    count = given_number(count, "count", 0)
    if (stdev is None) == (temperature is None):
        raise InputError("rattling needs either stdev or temperature, not both.")
    if not (stdev or 0) >= 0 or not (temperature or 0) >= 0 or not stiffness > 0:
        raise InputError("rattling needs stdev >= 0, temperature >= 0 and stiffness > 0.")
    scale = stdev if stdev is not None else float(np.sqrt(KB * (temperature or 0.0) / stiffness))
    radii = covalent_radii[start.numbers]
    pairs = np.triu_indices(len(start), 1)
    closest = min_distance * (radii[pairs[0]] + radii[pairs[1]])
    frames: list[Atoms] = []
    for _ in range(count):
        for _ in range(_MAX_DRAWS):
            frame = start.copy()
            frame.calc = None
            # What constraints hold stays where it is.
            frame.set_positions(frame.positions + generator.normal(scale=scale, size=(len(start), 3)))
            distances = frame.get_all_distances(mic=bool(frame.pbc.any()))[pairs]
            if np.all(distances >= closest):
                frames.append(frame)
                break
        else:
            raise InputError(
                f"rattling by {scale:.3g} Angstrom nearly always brings atoms closer than {min_distance:g} of their "
                "covalent distance; rattle less or lower min_distance."
            )
    return frames
