"""A set in which nothing has a weight is refused; one label with a weight is enough."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator

from almlip_jax.errors import InputError
from almlip_jax.structures.packing import BatchShape
from almlip_jax.structures.species import SpeciesTable
from almlip_jax.training.dataset import Capacity, TrainingSet, training_set


def packed(*infos: dict[str, Any]) -> TrainingSet:
    structures: list[Atoms] = []
    for n, info in enumerate(infos):
        atoms = molecule("H2O")
        atoms.positions[2, 1] += 0.01 * n
        atoms.info = info
        atoms.calc = SinglePointCalculator(atoms, energy=-14.0, forces=np.ones((3, 3)))
        structures.append(atoms)
    return training_set(
        structures,
        SpeciesTable((1, 8)),
        3.0,
        Capacity(BatchShape(12, 2, 4), 20, 5, 4),
        reference_energies={},
        validation_fraction=0.0,
        dtype=np.float32,
    )


def test_something_must_have_a_weight() -> None:
    for name in ("weight", "config_weight"):
        with pytest.raises(InputError, match="every structure has weight 0, so that there is nothing to learn from"):
            packed({name: 0.0}, {name: 0})
    found = packed({"weight": 0.0}, {"energy_weight": 0.0, "stress_weight": 0.0}).packed.data
    np.testing.assert_array_equal(found.weights["energy"][:2], [0, 0])
    np.testing.assert_array_equal(found.weights["forces"][:2], [0, 1])
