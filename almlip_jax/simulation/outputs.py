"""Outputs that grow while walkers run, and can go back to what they were at a state that was kept.

An output is flushed before the state is written, and its position goes into the state: whatever a killed run wrote
after that is cut off when the run goes on.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from ase import Atoms

from almlip_jax.dynamics import ExplorationSettings
from almlip_jax.dynamics.biases import build_bias
from almlip_jax.dynamics.results import trajectory
from almlip_jax.dynamics.state import Traces
from almlip_jax.errors import InputError
from almlip_jax.files import flush_to_disk, read_npz, understood
from almlip_jax.simulation.quantities import Quantities
from almlip_jax.structures.extxyz import write_frame

LINES = ("temperature", "energy", "bias", "kinetic", "pressure", "volume")
"""Traces of a walker besides its scores and what biases show."""


class Output(Protocol):
    """What is written chunk by chunk."""

    @property
    def name(self) -> str:
        """Under which its position is kept."""
        ...

    def open(self, position: np.ndarray | None) -> None:
        """Begins anew, or goes back to a position that `flush` gave.

        Raises:
            InputError: there is less than at that position.
        """
        ...

    def write(self, part: Traces, begin: int, end: int) -> None:
        """Adds the traces of a chunk, on the host, that went from one step to another."""
        ...

    def flush(self) -> np.ndarray:
        """Makes everything durable, and gives the position: integers [any]."""
        ...

    def close(self) -> None:
        """Lets go of the files."""
        ...


class GrowingFile:
    """A file that is only added to, open while it is.

    Attributes:
        path: of the file.
        size: bytes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0

    def cut(self, size: int) -> None:
        """Takes away everything behind ``size`` bytes; makes an empty file where there is none.

        Raises:
            InputError: the file is shorter.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            if file.tell() < size:
                raise shorter(self.path)
            file.truncate(size)
        self.size = size

    def append(self, content: bytes) -> None:
        """Adds some bytes."""
        if not content:
            return
        with self.path.open("ab") as file:
            file.write(content)
        self.size += len(content)

    def flush(self) -> None:
        """Forces the file to the disk."""
        flush_to_disk(self.path)


def shorter(path: Path) -> InputError:
    """The message about an output that lacks something that the state knows of."""
    return InputError(f"{path} lacks what its run had written; begin the run again in another folder.")


class ExtxyzTrajectories:
    """A thinned trajectory for each walker, as extended XYZ.

    Args:
        folder: of the files.
        settings: of the exploration.
        starts: start structure of each walker.
        references: reference energy of each, eV; where given, frames have energies and forces.
        forces: whether they have forces, then.
        momenta: whether they have momenta.
    """

    name = "trajectories"

    def __init__(
        self,
        folder: Path,
        settings: ExplorationSettings,
        starts: Sequence[Atoms],
        references: Sequence[float] | None = None,
        *,
        forces: bool = True,
        momenta: bool = True,
    ) -> None:
        self.settings, self.starts, self.references = settings, starts, references
        self.forces, self.momenta = forces, momenta
        self.files = [GrowingFile(folder / f"{w:03d}.extxyz") for w in range(len(starts))]

    def open(self, position: np.ndarray | None) -> None:
        """Position: bytes of each file."""
        for w, file in enumerate(self.files):
            file.cut(0 if position is None else int(position[w]))

    def write(self, part: Traces, begin: int, end: int) -> None:
        """Adds the frames of each walker."""
        first = begin // self.settings.trajectory_every
        for w, (start, file) in enumerate(zip(self.starts, self.files, strict=True)):
            reference = None if self.references is None else self.references[w]
            text = io.StringIO()
            for frame in trajectory(self.settings, w, start, [part], first, reference):
                if not self.momenta:
                    del frame.arrays["momenta"]
                if not self.forces and frame.calc is not None:
                    frame.calc.results.pop("forces")
                write_frame(text, frame, str(file.path))
            file.append(text.getvalue().encode())

    def flush(self) -> np.ndarray:
        """To the disk."""
        for file in self.files:
            file.flush()
        return np.array([file.size for file in self.files], np.int64)

    def close(self) -> None:
        """Nothing is open."""

    def discard_empty(self) -> None:
        """Removes the files of walkers that left no frame."""
        for file in self.files:
            if file.size == 0:
                file.path.unlink(missing_ok=True)


class Thermo:
    """A CSV table with a row at every stride, and columns ``<quantity>_<walker>``; see `Quantities`.

    Args:
        path: of the file.
        quantities: of the run; ``trace_every`` of its settings is the stride.
    """

    name = "thermo"

    def __init__(self, path: Path, quantities: Quantities) -> None:
        self.quantities, self.settings = quantities, quantities.settings
        self.file = GrowingFile(path)

    @property
    def _places(self) -> list[tuple[str, int]]:
        """Quantity and walker of each column."""
        return [(name, w) for w in range(len(self.quantities.starts)) for name in self.quantities.units]

    def open(self, position: np.ndarray | None) -> None:
        """Position: bytes."""
        self.file.cut(0 if position is None else int(position[0]))
        if position is None:
            columns = [f"{name}_{w}" for name, w in self._places]
            self.file.append((",".join(["step", "time_ps", *columns]) + "\n").encode())

    def write(self, part: Traces, begin: int, end: int) -> None:
        """Adds the rows of a chunk; fields of a walker that has ended stay empty."""
        every = self.settings.trace_every
        values = self.quantities.values(part)
        lines = []
        for row in range((end - begin) // every):
            step = begin + (row + 1) * every
            fields = [str(step), repr(round(step * self.settings.timestep / 1000, 9))]
            fields += [_field(name, values[name][row, w]) for name, w in self._places]
            lines.append(",".join(fields) + "\n")
        self.file.append("".join(lines).encode())

    def flush(self) -> np.ndarray:
        """To the disk."""
        self.file.flush()
        return np.array([self.file.size], np.int64)

    def close(self) -> None:
        """Nothing is open."""


def _field(name: str, value: float) -> str:
    if not np.isfinite(value):
        return ""
    return f"{value:.12g}" if name in _LARGE else f"{value:.9g}"


_LARGE = ("potential_energy", "total_energy", "conserved_energy")  # what holds reference energies


class TraceLog:
    """Every trace of every walker as raw numbers, to be read when the run is over.

    Args:
        path: of the file.
        settings: of the exploration.
        scores: names of the scores that are traced.
        walkers: number of walkers.
        dtype: of the run.
        before: npz file with what `read` gave when the run was over, for one that goes on to more steps.
    """

    name = "traces"

    def __init__(
        self,
        path: Path,
        settings: ExplorationSettings,
        scores: Sequence[str],
        walkers: int,
        dtype: np.dtype,
        before: Path | None = None,
    ) -> None:
        self.settings, self.scores, self.walkers, self.dtype = settings, tuple(scores), walkers, dtype
        self.watched = tuple(build_bias(settings.biases).quantities)
        self.before = before
        self.file = GrowingFile(path)

    @property
    def names(self) -> tuple[str, ...]:
        """Of all traces."""
        return self.scores + self._lines + self.watched

    @property
    def _lines(self) -> tuple[str, ...]:
        return (*LINES, "supplied") if self.settings.counts_supplied else LINES

    def open(self, position: np.ndarray | None) -> None:
        """Position: bytes."""
        if position is not None and self.before is not None and not self.file.path.exists():
            held = read_npz(self.before)
            with understood(self.before):
                self._append([held[name] for name in self.names])
        self.file.cut(0 if position is None else int(position[0]))

    def write(self, part: Traces, begin: int, end: int) -> None:
        """Adds the entries of a chunk."""
        entries = (end - begin) // self.settings.trace_every
        columns = [part.scores[name] for name in self.scores] + [getattr(part, name) for name in self._lines]
        columns += [part.watched[name] for name in self.watched]
        self._append([np.asarray(column)[:entries] for column in columns])

    def _append(self, columns: Sequence[np.ndarray]) -> None:
        self.file.append(np.stack(columns, axis=1).astype(self.dtype).tobytes())

    def flush(self) -> np.ndarray:
        """To the disk."""
        self.file.flush()
        return np.array([self.file.size], np.int64)

    def close(self) -> None:
        """Nothing is open."""

    def read(self) -> dict[str, np.ndarray]:
        """Name -> [T, W]."""
        rows = np.fromfile(self.file.path, self.dtype).reshape(-1, len(self.names), self.walkers)
        return {name: rows[:, n] for n, name in enumerate(self.names)}
