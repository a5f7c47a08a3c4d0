"""A sweep that is small in every respect: clusters of hydrogen with an analytic label, two selectors, two seeds."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from almlip_jax.files import read_csv
from almlip_jax.progress import Advance, SilentProgress
from almlip_jax.selection import Candidates, Selection, Selector, random
from almlip_jax.structures.io import write_structures
from almlip_jax.sweep import SweepConfig, SweepResult, run_sweep

POOL, REPEATED, LEAKED = 20, 2, 3
"""Structures of the pool, and after them copies of its own first ones and of test structures."""

SECTIONS: dict[str, Any] = {
    "systems": {
        "springs": {
            "pool": "pool.extxyz",
            "tests": {"near": "near.extxyz", "far": {"file": "far.extxyz", "every": 2}},
            "initial": 4,
            "model": {"kind": "shared_density", "cutoff": 3.0, "radial": 4, "l_max": 0, "channels": 2, "hidden": [4]},
            "training": {"batch_size": 2, "max_steps": 12, "validate_every": 6, "validation_fraction": 0.2},
        }
    },
    "selectors": {"random": {"kind": "random"}, "max_det": {"kind": "max_det"}},
    "seeds": 2,
    "batch_sizes": [3],
    "ensemble_sizes": [2],
    "rounds": 2,
    "side_by_side": 2,
}


def springs(rng: np.random.Generator, width: float) -> Atoms:
    """Three or four atoms, every pair of them a spring: E = sum (r - 1)^2 eV."""
    number = int(rng.integers(3, 5))
    corners = np.array([[0, 0, 0], [1, 0, 0], [0.5, 0.87, 0], [0.5, 0.29, 0.82]])[:number]
    atoms = Atoms(f"H{number}", positions=corners + rng.normal(scale=width, size=(number, 3)))
    apart = atoms.positions[:, None] - atoms.positions[None]
    length = np.linalg.norm(apart, axis=-1) + np.eye(number)
    forces = -2 * np.sum(((length - 1) / length)[:, :, None] * apart, axis=1)
    atoms.calc = SinglePointCalculator(atoms, energy=0.5 * float(np.sum((length - 1) ** 2)), forces=forces)
    return atoms


def mortal(k: int, calls: str, dies_at: int) -> Selector:
    """Chooses at random, notes every call in a file, and kills its process in one of them."""

    def note(_: object) -> None:
        with open(calls, "a") as file:
            file.write("x")
        if Path(calls).stat().st_size == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def select(key: jax.Array, pool: Candidates, labelled: Candidates) -> Selection:
        jax.debug.callback(note, pool.id[0])
        return random(k)(key, pool, labelled)

    return select


def write_sets(folder: Path) -> None:
    """The files of the sweep."""
    rng = np.random.default_rng(3)
    pool = [springs(rng, 0.1) for _ in range(POOL)]
    near, far = [springs(rng, 0.1) for _ in range(3)], [springs(rng, 0.2) for _ in range(5)]
    write_structures(folder / "pool.extxyz", [*pool, *pool[:REPEATED], *near[:2], far[2]])
    write_structures(folder / "near.extxyz", near)
    write_structures(folder / "far.extxyz", far)


def config_of(folder: Path, **changes: Any) -> SweepConfig:
    """The config, for files in a folder."""
    return SweepConfig.model_validate(SECTIONS | {"folder": folder} | changes)


def sweep(folder: Path, out: Path, only: dict[str, set[str]] | None = None, **changes: Any) -> SweepResult:
    """Runs the sweep, or goes on with it."""
    progress = changes.pop("progress", None)
    return run_sweep(config_of(folder, **changes), out, only=only, progress=progress)


def timeless(out: Path) -> list[dict[str, Any]]:
    """The table without its times."""
    return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in read_csv(out / "results.csv")]


class Killed(BaseException):
    """The end of a process, as far as a test in the same process can have it."""


class Watching(SilentProgress):
    """Notes every stage with what was compiled in it, and may end the sweep at the end of one.

    Args:
        compiled: grows with everything that is compiled.
        kill: name of a stage, and how many of that name come before it.
    """

    def __init__(self, compiled: list[str] | None = None, kill: tuple[str, int] | None = None) -> None:
        super().__init__()
        self.compiled = [] if compiled is None else compiled
        self.kill = kill
        self.stages: list[tuple[str, int]] = []

    def stage(self, name: str, total: int | None = None, *, unit: str = "") -> AbstractContextManager[Advance]:
        """Hands out a stage that is watched."""
        return self._watched(name, super().stage(name, total, unit=unit))

    @contextmanager
    def _watched(self, name: str, stage: AbstractContextManager[Advance]) -> Iterator[Advance]:
        before = len(self.compiled)
        with stage as advance:
            yield advance
        if self.kill == (name, sum(one == name for one, _ in self.stages)):
            raise Killed
        self.stages.append((name, len(self.compiled) - before))
