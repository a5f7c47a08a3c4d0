"""Molecular dynamics with a label source, as one task of a worker.

Dynamics are a function of the start, a random generator and the labels.  A run that was cut off therefore repeats
itself from the labels it has paid for, and goes on where they end.  They lie in a *stream*, a file to which the worker
appends each structure before it is labelled and each label after.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import Calculator, all_changes

from almlip_jax.oracles.base import Label, bare
from almlip_jax.oracles.identity import identifier
from almlip_jax.oracles.spool import label_from_json, label_to_json, reserved
from almlip_jax.oracles.worker import Context, NoSpace
from almlip_jax.structures.electronic_state import initial_moments

_LOOK_SECONDS = 0.1  # between tries to write to a stream that another worker writes to


@dataclass(frozen=True)
class Call:
    """One label that dynamics asked for.

    Attributes:
        step: of the dynamics; 0 is the start.
        atoms: the structure.
        label: its label; None where it was asked for and not yet there.
    """

    step: int
    atoms: Atoms
    label: Label | None


@dataclass(frozen=True)
class Dynamics:
    """What the dynamics are.

    Attributes:
        temperature: K, of the Maxwell-Boltzmann momenta at the start and of the thermostat.
        timestep: fs.
        friction: 1/fs, of the Langevin thermostat; 0 gives velocity Verlet (constant energy).
    """

    temperature: float
    timestep: float
    friction: float


@dataclass(frozen=True)
class DynamicsTask:
    """Runs molecular dynamics with the label source of the worker.

    Attributes:
        start: structure at step 0, with its masses and constraints.
        dynamics: which dynamics.
        steps: how many.
        generator: source of momenta and thermostat noise, not used elsewhere.
        keep: whether the call at a step is part of the outcome; a failed one always is, and each says what it and
            those before it that were not kept have cost.
        known: labels that are paid for already.
        stream: file for the labels of an unfinished run; where it is out of reach, none are kept.
        seconds: of the label source that may be spent on labels that are not known; the dynamics end with the call that
            reaches them, which is kept.
    """

    start: Atoms
    dynamics: Dynamics
    steps: int
    generator: np.random.Generator
    keep: Steps
    known: Mapping[str, Label]
    stream: Path
    seconds: float = math.inf

    def run(self, context: Context) -> list[Call] | NoSpace:
        """The calls that are kept, in order; where the last one failed, the dynamics ended there."""
        known = dict(self.known)
        try:
            with Stream.appending(self.stream, context.beat) as stream:
                known |= {call.label.identity: call.label for call in stream.earlier if call.label is not None}
                made, spent = self._integrate(context, known, stream)
                end = made[-1].step if is_spent(spent, self.seconds) else None
                return thinned(made, lambda step: self.keep(step) or step == end, self.known)
        except OSError as error:
            return NoSpace(error)

    def _integrate(self, context: Context, known: Mapping[str, Label], stream: Stream) -> tuple[list[Call], float]:
        """The calls of all steps, and the seconds of the labels that were not known before."""
        identity = identifier(context.settings)
        made: list[Call] = []
        step, spent = 0, 0.0

        def label_of(atoms: Atoms) -> Label:
            """The label at the step that the dynamics stand at, paid for where nobody has."""
            nonlocal spent
            structure = bare(self.start)
            structure.positions = atoms.positions
            name = identity(structure)
            label = known.get(name)
            if label is None:
                stream.append(Call(step, structure, None))
                # The space is held while the label is made, so that there is room for it afterwards.
                with reserved(context.spool, name, len(structure)):
                    label = context.label(structure, name)
                stream.append(Call(step, structure, label))
            made.append(Call(step, structure, label))
            spent += 0.0 if name in self.known else label.seconds  # of an interrupted run as it was written down
            return label

        atoms = self.start.copy()
        atoms.calc = _LabelCalculator(label_of)
        try:
            integrator = _integrator(atoms, self.dynamics, self.generator)
            for step in range(self.steps + 1):
                if is_spent(spent, self.seconds):
                    break
                if step == 0:
                    atoms.get_forces(md=True)
                else:
                    integrator.step()
        except _Stopped:
            pass
        return made, spent


def is_spent(seconds: float, budget: float) -> bool:
    """Whether a budget of seconds is spent, in whatever order they were added up."""
    return seconds >= budget * (1 - 1e-9)


@dataclass(frozen=True)
class Steps:
    """Which steps of dynamics are kept: every n-th after the equilibration; with ``every`` 0 all of them."""

    equilibration: int
    every: int

    def __call__(self, step: int) -> bool:
        """Whether this step is."""
        production = step - self.equilibration
        return self.every == 0 or (production > 0 and production % self.every == 0)


def thinned(calls: Sequence[Call], keep: Callable[[int], bool], known: Container[str] = ()) -> list[Call]:
    """The calls that are kept, failed ones among them, each with the cost of those left out before it.

    Args:
        calls: in order, all with labels but perhaps the last.
        keep: which steps are kept.
        known: identities of labels that are stored already, and are not among those that are kept here.
    """
    kept: list[Call] = []
    number, seconds = 0, 0.0
    for call in calls:
        label = call.label
        if label is None:
            continue
        if label.identity in known:  # stored with its cost; what was paid before it once more goes with the next
            continue
        number, seconds = number + label.calls, seconds + label.seconds
        if label.error is not None or keep(call.step):
            kept.append(Call(call.step, call.atoms, replace(label, calls=number, seconds=seconds)))
            number, seconds = 0, 0.0
    return kept


class _Stopped(Exception):
    """A label failed; the dynamics cannot go on."""


class _LabelCalculator(Calculator):
    """Gives the dynamics energies and forces from labels."""

    implemented_properties = ["energy", "forces"]

    def __init__(self, label_of: Callable[[Atoms], Label]) -> None:
        super().__init__()
        self._label_of = label_of

    def calculate(self, atoms: Atoms | None = None, properties: Any = None, system_changes: Any = all_changes) -> None:
        """Labels the structure, or stops the dynamics."""
        super().calculate(atoms, properties, system_changes)
        label = self._label_of(self.atoms)
        if label.error is not None:
            raise _Stopped
        self.results = {"energy": label.energy, "forces": label.forces}


def _integrator(atoms: Atoms, dynamics: Dynamics, generator: np.random.Generator) -> Any:
    """An ASE integrator with thermal momenta.

    The centre of mass rests, and a molecule does not turn at first, unless constraints hold something of it.  A lone
    atom is its centre of mass, and flies on.
    """
    # these bring half a second of SciPy, for which other labels need not wait
    from ase.constraints import FixCom
    from ase.md.langevin import Langevin
    from ase.md.velocitydistribution import Stationary, ZeroRotation, thermalize_momenta
    from ase.md.verlet import VelocityVerlet

    thermalize_momenta(atoms, dynamics.temperature, rng=generator)
    if not atoms.constraints and len(atoms) > 1:
        Stationary(atoms)
        if not atoms.pbc.any():
            ZeroRotation(atoms)
        atoms.set_constraint(FixCom())
    timestep = dynamics.timestep * units.fs
    if dynamics.friction == 0:
        return VelocityVerlet(atoms, timestep)
    return Langevin(
        atoms,
        timestep,
        temperature_K=dynamics.temperature,
        friction=dynamics.friction / units.fs,
        fixcm=False,
        rng=generator,
    )


class Stream:
    """The file of an unfinished run: one line before each label, one after.

    Each line goes to the operating system at once, so that the end of the process loses none.

    Args:
        file: opened for appending, or None.
        earlier: the calls in it.
    """

    def __init__(self, file: IO[bytes] | None, earlier: list[Call]) -> None:
        self._file = file
        self.earlier = earlier

    @classmethod
    def appending(cls, path: Path, beat: Callable[[], None] = lambda: None) -> Stream:
        """Opens a stream that `create_stream` made; where it is out of reach, one that keeps nothing.

        A worker of a killed program may still be writing to it, and is waited for.

        Args:
            path: of the stream.
            beat: gives a sign of life meanwhile.
        """
        if not path.exists():
            return cls(None, [])
        file = path.open("ab", buffering=0)
        while not is_free(file):
            beat()
            time.sleep(_LOOK_SECONDS)
        _, calls, size = read_stream(path)
        os.truncate(path, size)
        return cls(file, calls)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def append(self, call: Call) -> None:
        """Writes a call down."""
        if self._file is None:
            return
        record: dict[str, Any] = {"step": call.step}
        if call.label is None:
            record["positions"] = call.atoms.positions.tolist()
        else:
            record["label"] = label_to_json(call.label)
        left = memoryview(json.dumps(record).encode() + b"\n")
        while left:  # where the disk is nearly full, as much is written as there is room for
            left = left[self._file.write(left) :]


def is_free(file: IO[bytes]) -> bool:
    """Takes the lock of an open stream where nobody else writes to it; file systems without locks always give it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True


def put_aside_if_damaged(path: Path) -> bool:
    """Renames a stream that cannot be read to ``.damaged``; whether it was one."""
    try:
        header, _, _ = read_stream(path)
        if not header or not isinstance(header.get("provenance"), dict):
            raise ValueError("no header")
    except FileNotFoundError:
        return False
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        path.rename(path.with_suffix(".damaged"))
        return True
    return False


def create_stream(path: Path, start: Atoms, header: Mapping[str, Any]) -> None:
    """Makes an empty stream, if there is none yet.

    Args:
        path: of the stream.
        start: structure at step 0 (see `bare`).
        header: what else to remember, as plain data.
    """
    if path.exists():
        return
    structure = {
        "numbers": start.numbers.tolist(),
        "positions": start.positions.tolist(),
        "cell": start.cell.array.tolist(),
        "pbc": start.pbc.tolist(),
        "magmoms": None if (moments := initial_moments(start)) is None else moments.tolist(),
        "info": start.info,
    }
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps({"start": structure, **header}) + "\n")
    os.replace(temporary, path)


def read_stream(path: Path) -> tuple[dict[str, Any], list[Call], int]:
    """The header of a stream, its calls in order (the last may wait for its label), and the size of what is whole."""
    header: dict[str, Any] = {}
    calls: list[Call] = []
    size = 0
    for line, record in _records(path.read_bytes()):
        if not header:
            header = record
            start = Atoms(**record["start"])
        elif "label" in record:
            calls[-1] = Call(record["step"], calls[-1].atoms, label_from_json(record["label"]))
        else:
            if calls and calls[-1].label is None:
                del calls[-1]  # cut off, and then asked for again
            atoms = start.copy()
            atoms.positions = record["positions"]
            calls.append(Call(record["step"], atoms, None))
        size += len(line)
    return header, calls, size


def _records(content: bytes) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The whole lines of a stream and what they say; the last line may have been cut off."""
    for line in content.splitlines(keepends=True):
        try:
            record = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            record = None
        if record is None:
            return
        yield line, record
