"""Fitting: one training outside of a campaign, from labelled structures to a `Potential`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from ase import Atoms

from almlip_jax.ensembles import EnsembleSettings, build_ensemble
from almlip_jax.errors import InputError
from almlip_jax.keys import named_key
from almlip_jax.models import ModelSettings, Params
from almlip_jax.potential import Potential
from almlip_jax.structures.species import SpeciesTable
from almlip_jax.training import (
    EpochReport,
    TrainingResult,
    TrainingSettings,
    build_trainer,
    plan_capacity,
    reference_energies,
    validation_part,
)


def fit_potential(
    structures: Sequence[Atoms],
    model: ModelSettings,
    ensemble: EnsembleSettings,
    training: TrainingSettings,
    seed: int,
    on_epoch: Callable[[EpochReport], None] | None = None,
    checkpoint: Path | None = None,
    start: Potential | None = None,
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
        start: potential to begin from, of the same architecture.  Elements that it does not know are added, without
            changing what it says of the others; elements that do not occur in the structures are kept, with their
            reference energies.

    Returns:
        the potential, in float64 where jax is set to it and calibrated on its validation structures, and the history
        of its training.

    Raises:
        InputError: nothing is labelled, the loss is not finite, or ``start`` is of another architecture.
    """
    occurring = SpeciesTable.of(structures)
    known = () if start is None else start.species.numbers
    species = SpeciesTable(tuple(sorted({*occurring.numbers, *known})))
    dtype = np.float64 if jax.dtypes.canonicalize_dtype(np.float64) == np.float64 else np.float32
    cutoff = build_ensemble(model, ensemble, species).cutoff
    trainer = build_trainer(model, ensemble, species, plan_capacity(structures, cutoff, training), training, dtype)
    references = reference_energies(structures, occurring)
    params = None
    if start is not None:
        references = {**start.reference_energies, **references}
        params = _with_species(start, model, ensemble, species, named_key(seed, "species"))
    result = trainer.train(
        structures,
        params,
        named_key(seed, "train"),
        reference_energies=references,
        on_epoch=on_epoch,
        checkpoint=checkpoint,
    )
    metadata = {"dataset_size": len(structures), "seed": seed}
    potential = Potential(model, species, result.params, references, metadata=metadata, members=ensemble)
    return potential.calibrated(validation_part(structures, training.validation_fraction)), result


def _with_species(
    start: Potential, model: ModelSettings, ensemble: EnsembleSettings, species: SpeciesTable, key: jax.Array
) -> Params:
    """Parameters of a potential for a species table that holds its own."""
    wanted = build_ensemble(model, ensemble, species)
    if build_ensemble(model, ensemble, start.species) != start.ensemble:
        raise InputError(
            "the potential to start from has another architecture than model and ensemble of the config; its own are "
            "in its potential.json."
        )
    if start.species == species:
        return start.params
    return start.ensemble.with_species(start.params, wanted.init(key), species)
