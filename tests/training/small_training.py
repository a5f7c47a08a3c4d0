"""What the tests of training share: labelled water molecules, a tiny model, and trainers of it."""

from __future__ import annotations

from typing import Any

import numpy as np
from ase import Atoms
from ase.build import molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator

from almlip_jax.ensembles import Ensemble
from almlip_jax.models import SharedDensitySettings, build_model
from almlip_jax.structures.species import SpeciesTable
from almlip_jax.training import EnsembleSettings, Trainer, TrainingSettings, plan_capacity

MODEL = SharedDensitySettings(cutoff=4.0, radial=4, l_max=1, channels=4, hidden=(8,))
PLAIN = MODEL.model_copy(update={"products": 0})  # compiled in seven tenths of the time
SPECIES = SpeciesTable((1, 8))


def water(seed: int) -> Atoms:
    """A distorted molecule with energy and forces."""
    atoms = molecule("H2O")
    atoms.rattle(0.08, seed=seed)
    return labelled(atoms)


def labelled(atoms: Atoms) -> Atoms:
    """The structure itself with energy, forces and, where periodic, stress of a cheap calculator."""
    atoms.calc = EMT()
    results = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces()}
    if atoms.pbc.all():
        results["stress"] = atoms.get_stress()
    atoms.calc = SinglePointCalculator(atoms, **results)
    return atoms


def settings_of(**changes: Any) -> TrainingSettings:
    """A short training, with changes that are validated."""
    return TrainingSettings(
        **{"max_steps": 60, "validate_every": 20, "validation_fraction": 0.2, "batch_size": 2, **changes}
    )


def trainer_of(
    dataset: list[Atoms], settings: TrainingSettings, members: int = 2, model: SharedDensitySettings = MODEL
) -> Trainer:
    """A trainer of the tiny model, or of another one, sized for the dataset."""
    capacity = plan_capacity(dataset, model.cutoff, settings)
    ensemble = Ensemble(build_model(model, SPECIES), members)
    return Trainer(ensemble, SPECIES, capacity, settings, EnsembleSettings(size=members))


def same_bits(a: Any, b: Any) -> bool:
    """Whether two pytrees hold the same numbers (NaN equals NaN)."""
    import jax

    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(np.asarray(x), np.asarray(y), equal_nan=True) for x, y in pairs)
