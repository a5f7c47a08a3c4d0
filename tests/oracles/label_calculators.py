"""ASE calculators that log every call, and misbehave for structures of certain charges; and what reads their log."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.emt import EMT

HANG, ABORT, NAN, RAISE, SHAPE, HUGE, SLOW, SPAWN, KILLED = 2, 3, 4, 5, 6, 7, 8, 9, 10


class Springs(Calculator):
    """Every coordinate on a spring of 1 eV/A^2 to the origin; the charge of a structure decides what goes wrong."""

    implemented_properties = ["energy", "forces"]

    def __init__(self, log: str, delay: float = 0.0, patience: int = 3) -> None:
        super().__init__()
        self._log, self._delay, self._patience = Path(log), delay, patience
        with self._log.with_name("made.log").open("a") as file:
            file.write(f"{os.getpid()}\n")

    def calculate(self, atoms: Atoms | None = None, properties: Any = None, system_changes: Any = all_changes) -> None:
        super().calculate(atoms, properties, system_changes)
        with self._log.open("a") as file:
            file.write(f"{float(self.atoms.positions[0, 0])!r}\n")
        charge = self.atoms.info["charge"]
        time.sleep(self._delay + (0.3 if charge == SLOW else 0.0))
        if charge == HANG:
            time.sleep(600)
        if charge == SPAWN:
            # a program that makes a session of its own, as launchers of parallel programs do
            child = subprocess.Popen(["sleep", "600"], start_new_session=True)
            self._log.with_name("children.log").open("a").write(f"{os.getpid()} {child.pid} ")
            time.sleep(600)
        if charge == KILLED and len(self._log.read_text().splitlines()) < self._patience:
            os.kill(os.getpid(), signal.SIGKILL)
        if charge == ABORT:
            print("about to abort", flush=True)
            os.abort()
        if charge == RAISE:
            raise RuntimeError("no\nconvergence")
        forces = -self.atoms.positions
        if charge == NAN:
            forces = forces * np.nan
        if charge == SHAPE:
            forces = forces[:-1]
        if charge == HUGE:
            forces = forces + 1e6
        self.results = {"energy": float(np.sum(self.atoms.positions**2) / 2), "forces": forces}


class Doubled(Springs):
    """Springs whose forces are twice the derivatives of their energy."""

    def calculate(self, atoms: Atoms | None = None, properties: Any = None, system_changes: Any = all_changes) -> None:
        super().calculate(atoms, properties, system_changes)
        self.results["forces"] = 2 * self.results["forces"]


class Mistaken(EMT):
    """EMT whose stress has yz in the place of xy, as of another order than Voigt's."""

    def calculate(self, atoms: Atoms | None = None, properties: Any = None, system_changes: Any = all_changes) -> None:
        super().calculate(atoms, ["stress"], system_changes)
        self.results["stress"] = self.results["stress"][[0, 1, 2, 5, 4, 3]]


class Writer(Calculator):
    """Writes a file into its folder; a structure of charge `KILLED` is the end of its process."""

    implemented_properties = ["energy", "forces"]

    def calculate(self, atoms: Atoms | None = None, properties: Any = None, system_changes: Any = all_changes) -> None:
        super().calculate(atoms, properties, system_changes)
        (Path(self.directory) / "written").write_text("x")
        if self.atoms.info["charge"] == KILLED:
            os.kill(os.getpid(), signal.SIGKILL)
        self.results = {"energy": 0.0, "forces": np.zeros((len(self.atoms), 3))}


class Unimportable:
    """A calculator whose package is broken."""

    def __init__(self) -> None:
        raise OSError("licence server not found")


def children(tmp_path: Path) -> list[int]:
    """Workers and the programs that they started."""
    log = tmp_path / "children.log"
    return [int(pid) for pid in log.read_text().split()] if log.exists() else []


def calls(tmp_path: Path) -> list[float]:
    """The first x coordinate of every structure the label source was called for."""
    log = tmp_path / "calls.log"
    return [float(line) for line in log.read_text().splitlines()] if log.exists() else []


def made(tmp_path: Path) -> list[int]:
    """The process of every calculator that was made."""
    return [int(pid) for pid in (tmp_path / "made.log").read_text().split()]


def assert_same_labels(left: Atoms, right: Atoms) -> None:
    """Two labelled structures agree in every bit."""
    np.testing.assert_array_equal(left.positions, right.positions)
    np.testing.assert_array_equal(left.calc.results["forces"], right.calc.results["forces"])
    assert left.calc.results["energy"] == right.calc.results["energy"]


class Told(Calculator):
    """A calculator whose energy says what it was told; it may not converge, and may have a free energy.

    Args:
        charge: -100 times this goes into the energy.
        multiplicity: 10 times this, too.
        converged: what it says afterwards; ``inner`` for a False of a calculator within.
        free: its free energy above its energy, or None.
    """

    implemented_properties = ["energy", "forces", "free_energy"]

    def __init__(
        self, charge: int = 0, multiplicity: int = 1, converged: Any = None, free: float | None = None, **_: Any
    ) -> None:
        super().__init__()
        self._state, self._free = (charge, multiplicity), free
        self.converged = None if converged == "inner" else converged
        self.calcs = [Told(converged=False)] if converged == "inner" else []

    def calculate(self, atoms: Atoms | None = None, properties: Any = None, system_changes: Any = all_changes) -> None:
        super().calculate(atoms, properties, system_changes)
        charge, multiplicity = self._state
        energy = -10.0 - float(np.sum(self.atoms.get_initial_magnetic_moments()))
        energy += -100.0 * charge + 10.0 * (multiplicity - 1) - 1000.0 * float(self.atoms.get_initial_charges().sum())
        self.results = {"energy": energy, "forces": np.zeros((len(self.atoms), 3))}
        if self._free is not None:
            self.results["free_energy"] = energy + self._free


class ORCA(Told):
    """Has the name of a calculator that takes charge and multiplicity as ``charge`` and ``mult``."""

    def __init__(self, mult: int = 1, **parameters: Any) -> None:
        super().__init__(multiplicity=mult, **parameters)


class XTB(Told):
    """Has the name of one that adds up initial charges and moments."""
