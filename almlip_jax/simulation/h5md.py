"""Trajectories as one HDF5 file that follows H5MD 1.1 (de Buyl, Colberg and Hofling, Comput. Phys. Commun. 2014).

Each walker is a group of particles with its own steps, since walkers may end early, and a group of observables.  The
file is written in the single-writer mode of HDF5, whose order of writes keeps it readable at every moment, also for
programs that look at it while the run is under way.  A file that a kill has left open is copied, up to what the state
of the run knows of.
"""

from __future__ import annotations

import contextlib
import getpass
import os
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import h5py
import numpy as np
from ase import Atoms

from almlip_jax.dynamics.state import Traces
from almlip_jax.errors import InputError
from almlip_jax.files import flush_to_disk, understood
from almlip_jax.simulation.outputs import shorter
from almlip_jax.simulation.quantities import Quantities
from almlip_jax.units import FEMTOSECOND

_BLOCK = 2**16  # bytes of a chunk of a dataset
_FRAMES_AT_ONCE = 256


class H5mdTrajectory:
    """All walkers in one file; the groups are ``particles/walker000`` and ``observables/walker000``.

    Args:
        path: of the file.
        quantities: of the run.
        moving_cells: whether cells change.
        forces: whether frames have forces.
        momenta: whether frames have velocities.
        dtype: of the run.
    """

    name = "trajectory"

    def __init__(
        self,
        path: Path,
        quantities: Quantities,
        *,
        moving_cells: bool,
        forces: bool,
        momenta: bool,
        dtype: np.dtype,
    ) -> None:
        self.path, self.quantities = path, quantities
        self.settings, self.starts = quantities.settings, quantities.starts
        self.moving_cells, self.forces, self.momenta, self.dtype = moving_cells, forces, momenta, dtype
        self._file: h5py.File | None = None
        self._counts = np.zeros((len(self.starts), 2), np.int64)  # frames and rows of each walker

    # -- the life of the file -----------------------------------------------------------------------------------------

    def open(self, position: np.ndarray | None) -> None:
        """Position: frames of each walker, then rows of each walker."""
        if position is None:
            self._file = self._created(self.path)
        else:
            self._counts = position.reshape(2, -1).T.copy()
            with understood(self.path):
                self._file = self._reopened()
        self._file.swmr_mode = True

    def _reopened(self) -> h5py.File:
        """The file with what the state knows of, and nothing else."""
        if not self.path.exists():
            raise shorter(self.path)
        try:
            file = h5py.File(self.path, "r+", libver="latest", locking=False)
        except OSError:  # a writer that was killed has left it open
            return self._copied()
        try:
            self._each(file, self._shrink)
        except BaseException:
            file.close()
            raise
        return file

    def _copied(self) -> h5py.File:
        building = self.path.with_name(f".{self.path.name}.writing")
        if self.path.stat().st_size < _written(self.path):
            raise shorter(self.path)  # HDF5 would wait for ever for the writer to bring what is not there
        try:
            before = h5py.File(self.path, "r", libver="latest", swmr=True, locking=False)
        except OSError as error:
            raise InputError(f"{self.path} cannot be read; begin the run again in another folder.") from error
        with before, self._created(building) as after:

            def copy(place: str, count: int) -> None:
                if place not in before or len(before[place]) < count:
                    raise shorter(self.path)
                after[place].resize(count, axis=0)
                for row in range(0, count, _FRAMES_AT_ONCE):
                    rows = slice(row, min(row + _FRAMES_AT_ONCE, count))
                    after[place][rows] = before[place][rows]

            self._each(after, lambda dataset, count: copy(dataset.name, count))
        flush_to_disk(building)
        os.replace(building, self.path)
        flush_to_disk(self.path.parent)
        return h5py.File(self.path, "r+", libver="latest", locking=False)

    def _shrink(self, dataset: h5py.Dataset, count: int) -> None:
        if len(dataset) < count:
            raise shorter(self.path)
        dataset.resize(count, axis=0)

    def _each(self, file: h5py.File, do: Callable[[h5py.Dataset, int], None]) -> None:
        """Does something with every dataset that grows, and the number of its rows."""
        for w, (frames, rows) in enumerate(self._counts):
            for group, count in ((f"particles/walker{w:03d}", frames), (f"observables/walker{w:03d}", rows)):
                elements = self._elements(file[group])
                for element in elements:
                    do(element["value"], int(count))
                for name in ("step", "time"):  # all elements share them
                    do(elements[0][name], int(count))

    def _elements(self, group: h5py.Group) -> list[h5py.Group]:
        """Groups with step, time and value."""
        found = [group[name] for name in group if isinstance(group[name], h5py.Group) and "value" in group[name]]
        if "box" in group and "edges" in group["box"] and isinstance(group["box/edges"], h5py.Group):
            found.append(group["box/edges"])
        return found

    def write(self, part: Traces, begin: int, end: int) -> None:
        """Adds frames and observables; rows of a walker that has ended are left out."""
        values = self.quantities.values(part)
        for w, start in enumerate(self.starts):
            self._write_frames(part, w, start, begin)
            running = np.isfinite(values["temperature"][:, w])
            rows = {name: column[running, w] for name, column in values.items()}
            steps = begin + self.settings.trace_every * (1 + np.flatnonzero(running))
            self._append(f"observables/walker{w:03d}", w, 1, steps, rows)

    def _write_frames(self, part: Traces, w: int, start: Atoms, begin: int) -> None:
        atoms = len(start)
        positions = np.asarray(part.positions[:, w, :atoms])
        there = np.isfinite(positions).all(axis=(1, 2))
        frames = {"position": positions, "force_std": np.asarray(part.force_std[:, w, :atoms])}
        if self.momenta:
            frames["velocity"] = np.asarray(part.momenta[:, w, :atoms]) * FEMTOSECOND / start.get_masses()[:, None]
        if self.forces:
            frames["force"] = np.asarray(part.forces[:, w, :atoms])
        if self._cell_moves(start):
            frames["box/edges"] = np.asarray(part.cells[:, w])
        steps = begin + self.settings.trajectory_every * (1 + np.flatnonzero(there))
        self._append(f"particles/walker{w:03d}", w, 0, steps, {name: x[there] for name, x in frames.items()})

    def _append(self, group: str, w: int, kind: int, steps: np.ndarray, values: dict[str, np.ndarray]) -> None:
        assert self._file is not None
        count = int(self._counts[w, kind])
        total = count + len(steps)
        place = self._file[group]
        first = next(iter(values))
        columns = {f"{name}/value": value for name, value in values.items()}
        columns |= {f"{first}/step": steps, f"{first}/time": steps * self.settings.timestep}
        for name, column in columns.items():
            place[name].resize(total, axis=0)
            place[name][count:] = column
        self._counts[w, kind] = total

    def flush(self) -> np.ndarray:
        """To the disk."""
        assert self._file is not None
        self._file.flush()
        flush_to_disk(self.path)
        return self._counts.T.ravel().copy()

    def close(self) -> None:
        """Closes the file, which other programs then open like any other."""
        if self._file is not None:
            self._file.close()
            self._file = None

    # -- the structure of the file ------------------------------------------------------------------------------------

    def _cell_moves(self, start: Atoms) -> bool:
        return self.moving_cells and bool(start.pbc.all())

    def _created(self, path: Path) -> h5py.File:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = h5py.File(path, "w", libver="latest", locking=False)
        about = file.create_group("h5md")
        about.attrs["version"] = np.array([1, 1], np.int32)
        about.create_group("author").attrs["name"] = _text(_user())
        creator = about.create_group("creator")
        creator.attrs["name"], creator.attrs["version"] = _text("almlip-jax"), _text(version("almlip-jax"))
        about.create_group("modules").create_group("units").attrs["version"] = np.array([1, 0], np.int32)
        for w, start in enumerate(self.starts):
            self._create_particles(file.create_group(f"particles/walker{w:03d}"), start)
            observables = file.create_group(f"observables/walker{w:03d}")
            clock = None
            for name, unit in self.quantities.units.items():
                clock = _create_element(observables, name, (), unit, np.dtype(np.float64), clock)
        return file

    def _create_particles(self, group: h5py.Group, start: Atoms) -> None:
        atoms = len(start)
        clock = _create_element(group, "position", (atoms, 3), "Angstrom", self.dtype)
        if self.momenta:
            _create_element(group, "velocity", (atoms, 3), "Angstrom fs-1", self.dtype, clock)
        if self.forces:
            _create_element(group, "force", (atoms, 3), "eV Angstrom-1", self.dtype, clock)
        _create_element(group, "force_std", (atoms,), "eV Angstrom-1", self.dtype, clock)
        group["species"] = start.numbers.astype(np.int32)
        group["mass"] = start.get_masses()
        group["mass"].attrs["unit"] = _text("u")
        box = group.create_group("box")
        box.attrs["dimension"] = np.int32(3)
        box.attrs["boundary"] = np.array([b"periodic" if flag else b"none" for flag in start.pbc], "S8")
        if self._cell_moves(start):
            _create_element(box, "edges", (3, 3), "Angstrom", self.dtype, clock)
        elif start.pbc.any():
            box["edges"] = start.cell.array
            box["edges"].attrs["unit"] = _text("Angstrom")


def _written(path: Path) -> int:
    """Bytes that the superblock of an HDF5 file (version 3) says there are; 0 where there is no such superblock."""
    with path.open("rb") as file:
        head = file.read(36)
    return int.from_bytes(head[28:36], "little") if head[:9] == b"\x89HDF\r\n\x1a\n\x03" and len(head) == 36 else 0


def _create_element(
    group: h5py.Group,
    name: str,
    shape: tuple[int, ...],
    unit: str,
    dtype: np.dtype,
    clock: h5py.Group | None = None,
) -> h5py.Group:
    """An element that depends on time.

    Args:
        group: where it goes.
        name: of the element.
        shape: of one value.
        unit: of the values.
        dtype: of the values.
        clock: an element whose steps and times it shares; without one it has its own.

    Returns:
        the element whose steps and times these are.
    """
    element = group.create_group(name)

    def growing(name: str, shape: tuple[int, ...], dtype: np.dtype, unit: str | None) -> None:
        rows = max(1, _BLOCK // (int(np.prod(shape)) * dtype.itemsize))
        made = element.create_dataset(name, (0, *shape), dtype, maxshape=(None, *shape), chunks=(rows, *shape))
        if unit is not None:
            made.attrs["unit"] = _text(unit)

    growing("value", shape, dtype, unit)
    if clock is None:
        growing("step", (), np.dtype(np.int64), None)
        growing("time", (), np.dtype(np.float64), "fs")
        return element
    element["step"], element["time"] = clock["step"], clock["time"]  # hard links
    return clock


def _text(text: str) -> np.bytes_:
    """A string of fixed length in ASCII, as the specification asks for."""
    return np.bytes_(text.encode("ascii", "replace"))


def _user() -> str:
    with contextlib.suppress(KeyError, OSError, ImportError):
        return getpass.getuser()
    return "unknown"
