"""Structures and label sources that the tests of this room share."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from ase import Atoms
from ase.build import molecule

from almlip_jax.oracles.sources.calculator import CalculatorSettings

# With more threads than cores are idle, tblite in the process of the tests is slow.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Tests and worker processes import `label_calculators`, whatever way pytest imports the tests.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def zundel() -> Atoms:
    """The cation H5O2+, not quite symmetric."""
    positions = [
        [-1.2, 0.02, 0.0],
        [1.21, 0.0, 0.03],
        [0.05, 0.0, 0.01],
        [-1.7, 0.8, 0.1],
        [-1.7, -0.75, -0.2],
        [1.7, 0.2, 0.8],
        [1.75, -0.1, -0.78],
    ]
    return Atoms("O2H5", positions, info={"charge": 1})


@pytest.fixture
def waters() -> Callable[[int], list[Atoms]]:
    """Different water molecules; the first x coordinate tells them apart."""

    def make(count: int, charge: int = 0) -> list[Atoms]:
        frames = []
        for n in range(count):
            frame = molecule("H2O")
            frame.positions[0, 0] = 0.001 * (n + 1)
            frame.info["charge"] = charge
            frames.append(frame)
        return frames

    return make


@pytest.fixture
def springs(tmp_path: Path) -> CalculatorSettings:
    """A label source that writes a line for each call into ``calls.log``."""
    return CalculatorSettings(
        calculator="label_calculators:Springs",
        parameters={"log": str(tmp_path / "calls.log")},
        charge_key="info",
        timeout=20,
    )
