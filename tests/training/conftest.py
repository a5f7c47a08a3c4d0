"""What the tests of training share: datasets, and the path to the small trainers."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from ase import Atoms

# Tests import `small_training`, whatever way pytest imports the tests.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def waters() -> list[Atoms]:
    """Sixteen distorted water molecules with labels."""
    from small_training import water

    return [water(seed) for seed in range(16)]
