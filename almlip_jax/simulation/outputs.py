"""Outputs that grow while walkers run, and can go back to what they were at a state that was kept.

An output is flushed before the state is written, and its position goes into the state: whatever a killed run wrote
after that is cut off when the run goes on.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from ase import Atoms

from almlip_jax.dynamics import ExplorationSettings
from almlip_jax.dynamics.results import trajectory
from almlip_jax.dynamics.state import Traces
from almlip_jax.errors import InputError
from almlip_jax.files import flush_to_disk
from almlip_jax.structures.extxyz import write_frame
from almlip_jax.units import GPA

LINES = ("temperature", "energy", "bias", "pressure", "volume")
"""Traces of a walker beside its scores."""


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
    """What to say of an output that lacks something that the state knows of."""
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
    """A CSV table with a row for every so many steps; see `thermo_rows`.

    Args:
        path: of the file.
        settings: of the exploration; ``trace_every`` is the stride.
        starts: start structure of each walker.
        references: reference energy of each, eV.
    """

    name = "thermo"

    def __init__(
        self, path: Path, settings: ExplorationSettings, starts: Sequence[Atoms], references: Sequence[float]
    ) -> None:
        self.settings, self.starts, self.references = settings, starts, references
        self.file = GrowingFile(path)

    def open(self, position: np.ndarray | None) -> None:
        """Position: bytes."""
        self.file.cut(0 if position is None else int(position[0]))
        if position is None:
            columns = [f"{name}_{w}" for w in range(len(self.starts)) for name in THERMO]
            self.file.append((",".join(["step", "time_ps", *columns]) + "\n").encode())

    def write(self, part: Traces, begin: int, end: int) -> None:
        """Adds the rows of a chunk; fields of a walker that has ended stay empty."""
        every = self.settings.trace_every
        values = thermo_values(part, self.starts, self.references)
        lines = []
        for row in range((end - begin) // every):
            step = begin + (row + 1) * every
            fields = [str(step), repr(round(step * self.settings.timestep / 1000, 9))]
            fields += [_field(name, values[name][row, w]) for w in range(len(self.starts)) for name in THERMO]
            lines.append(",".join(fields) + "\n")
        self.file.append("".join(lines).encode())

    def flush(self) -> np.ndarray:
        """To the disk."""
        self.file.flush()
        return np.array([self.file.size], np.int64)

    def close(self) -> None:
        """Nothing is open."""


THERMO: Mapping[str, str] = {
    "potential_energy": "eV",
    "temperature": "K",
    "pressure": "GPa",
    "volume": "Angstrom+3",
    "force_std_max": "eV Angstrom-1",
    "bias": "eV",
}
"""What the table says of each walker, and the unit."""


def thermo_values(part: Traces, starts: Sequence[Atoms], references: Sequence[float]) -> dict[str, np.ndarray]:
    """The columns of `THERMO` from the traces of a chunk, [T, W] float64.

    Energies hold the reference energies; pressure and volume are not a number where a walker is not periodic in three
    directions, and all are where it has ended.
    """
    cells = np.array([start.pbc.all() for start in starts])
    return {
        "potential_energy": np.asarray(part.energy, np.float64) + np.asarray(references),
        "temperature": np.asarray(part.temperature, np.float64),
        "pressure": np.where(cells, np.asarray(part.pressure, np.float64) / GPA, np.nan),
        "volume": np.where(cells, np.asarray(part.volume, np.float64), np.nan),
        "force_std_max": np.asarray(part.scores["force_std_max"], np.float64),
        "bias": np.asarray(part.bias, np.float64),
    }


def _field(name: str, value: float) -> str:
    if not np.isfinite(value):
        return ""
    return f"{value:.12g}" if name == "potential_energy" else f"{value:.9g}"


class TraceLog:
    """Every trace of every walker as raw numbers, to be read when the run is over.

    Args:
        path: of the file.
        settings: of the exploration.
        scores: names of the scores that are traced.
        walkers: number of walkers.
        dtype: of the run.
    """

    name = "traces"

    def __init__(
        self, path: Path, settings: ExplorationSettings, scores: Sequence[str], walkers: int, dtype: np.dtype
    ) -> None:
        self.settings, self.scores, self.walkers, self.dtype = settings, tuple(scores), walkers, dtype
        self.file = GrowingFile(path)

    def open(self, position: np.ndarray | None) -> None:
        """Position: bytes."""
        self.file.cut(0 if position is None else int(position[0]))

    def write(self, part: Traces, begin: int, end: int) -> None:
        """Adds the entries of a chunk."""
        entries = (end - begin) // self.settings.trace_every
        columns = [part.scores[name] for name in self.scores] + [getattr(part, name) for name in LINES]
        rows = np.stack([np.asarray(column)[:entries] for column in columns], axis=1)
        self.file.append(rows.astype(self.dtype).tobytes())

    def flush(self) -> np.ndarray:
        """To the disk."""
        self.file.flush()
        return np.array([self.file.size], np.int64)

    def close(self) -> None:
        """Nothing is open."""

    def read(self) -> dict[str, np.ndarray]:
        """Name -> [T, W]."""
        names = [*self.scores, *LINES]
        rows = np.fromfile(self.file.path, self.dtype).reshape(-1, len(names), self.walkers)
        return {name: rows[:, n] for n, name in enumerate(names)}
