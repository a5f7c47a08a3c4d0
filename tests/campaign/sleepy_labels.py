"""A label source that takes its time, which is no part of its labels: springs between all atoms."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from ase import Atoms

SLEEP, CALLS = "SLEEPY_LABELS_SECONDS", "SLEEPY_LABELS_CALLS"
"""Variables of the environment: longest time of a label, and a file that gets a line for each call."""


def energy_and_forces(atoms: Atoms) -> tuple[float, np.ndarray]:
    """Springs of 1.2 Angstrom between all pairs of atoms."""
    vectors = atoms.positions[None] - atoms.positions[:, None]
    lengths = np.linalg.norm(vectors, axis=-1) + np.eye(len(atoms))
    stretch = np.where(np.eye(len(atoms)), 0, lengths - 1.2)
    return float(np.sum(stretch**2)), 4 * np.sum((stretch / lengths)[..., None] * vectors, axis=1)


def make(least: float = 0.0) -> Callable[[Atoms], tuple[float, np.ndarray]]:
    """The label source; a label takes at least some seconds."""

    def label(atoms: Atoms) -> tuple[float, np.ndarray]:
        time.sleep(least + float(os.environ.get(SLEEP, "0")) * random.random())
        if CALLS in os.environ:
            with Path(os.environ[CALLS]).open("a") as file:
                file.write(f"{float(atoms.positions.sum())!r}\n")
        return energy_and_forces(atoms)

    return label


def in_second_round(history: list) -> str | None:
    """A stopping rule that holds as soon as the second round has been trained."""
    return "that is enough." if history[-1].round >= 1 else None


def make_rule() -> Callable[[list], str | None]:
    """The rule."""
    return in_second_round
