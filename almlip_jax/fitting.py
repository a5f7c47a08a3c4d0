"""Fitting: one training outside of a campaign, from labelled structures to a `Potential`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from ase import Atoms

from almlip_jax.ensembles import Ensemble
from almlip_jax.keys import named_key
from almlip_jax.models import ModelSettings, build_model
from almlip_jax.potential import Potential
from almlip_jax.structures.species import SpeciesTable
from almlip_jax.training import (
    EnsembleSettings,
    EpochReport,
    Trainer,
    TrainingResult,
    TrainingSettings,
    plan_capacity,
    reference_energies,
)


def fit_potential(
    structures: Sequence[Atoms],
    model: ModelSettings,
    ensemble: EnsembleSettings,
    training: TrainingSettings,
    seed: int,
    on_epoch: Callable[[EpochReport], None] | None = None,
    checkpoint: Path | None = None,
) -> tuple[Potential, TrainingResult]:
    """Trains an ensemble on labelled structures; its species are those that occur in them.

    Args:
        structures: labelled.
        model: settings of the architecture.
        ensemble: settings of the members.
        training: settings of the training.
        seed: decides the first parameters and the order of batches.
        on_epoch: called after each validation.
        checkpoint: folder that keeps the state of the training; the same training goes on there after an interruption.

    Returns:
        the potential, in float64 where jax is set to it, and the history of its training.

    Raises:
        InputError: nothing is labelled, or the loss is not finite.
    """
    species = SpeciesTable.of(structures)
    members = Ensemble(build_model(model, species), ensemble.size)
    dtype = np.float64 if jax.dtypes.canonicalize_dtype(np.float64) == np.float64 else np.float32
    capacity = plan_capacity(structures, model.cutoff, training)
    trainer = Trainer(members, species, capacity, training, ensemble, dtype)
    references = reference_energies(structures, species)
    key = named_key(seed, "train")
    result = trainer.train(
        structures, None, key, reference_energies=references, on_epoch=on_epoch, checkpoint=checkpoint
    )
    metadata = {"dataset_size": len(structures), "seed": seed}
    return Potential(model, species, result.params, references, metadata=metadata), result
