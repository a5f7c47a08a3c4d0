"""Trainers of any ensemble: of one architecture, or of a committee of them, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import jax
import numpy as np
from ase import Atoms
from pydantic import ValidationError

from almlip_jax.ensembles import Ensemble, EnsembleSettings, MixedEnsemble, build_ensemble, member_models
from almlip_jax.errors import InputError
from almlip_jax.kinds import check_user_code
from almlip_jax.models import ModelSettings, Params
from almlip_jax.structures.species import SpeciesTable
from almlip_jax.targets import targets
from almlip_jax.training.dataset import Capacity
from almlip_jax.training.idle import refuse_idle
from almlip_jax.training.projection.trainer import ProjectionTrainer
from almlip_jax.training.settings import TrainingSettings, check_losses, check_plain, check_projection, check_targets
from almlip_jax.training.trainer import (
    Again,
    EpochReport,
    Trainer,
    TrainingResult,
    named,
    require_enough,
    weights_key_of,
)


class CommitteeTrainer:
    """Trains a committee of architectures: those of equal architecture in one program, one architecture after another.

    Args:
        ensemble: the committee.
        trainers: one for each of its groups.
        capacity: static sizes, the same for all of them.
    """

    def __init__(self, ensemble: MixedEnsemble, trainers: Sequence[Trainer], capacity: Capacity) -> None:
        self.ensemble = ensemble
        self.trainers = tuple(trainers)
        self.capacity = capacity

    def train(
        self,
        dataset: Sequence[Atoms],
        params: Params | None,
        key: jax.Array,
        *,
        reference_energies: dict[int, float],
        on_epoch: Callable[[EpochReport], None] | None = None,
        steps: int | None = None,
        validation: Sequence[Atoms] = (),
        weights_key: jax.Array | None = None,
        say: Callable[[str], None] | None = None,
        checkpoint: Path | None = None,
        checkpoint_every: int = 10,
        again: Again | None = None,
    ) -> TrainingResult:
        """Trains all members; see `Trainer.train`.  Reports speak of all models, NaN for those that wait.

        Args:
            params: to start from, an entry for each architecture; None for one begins it anew.

        Other arguments are those of `Trainer.train`.  Where models are left out, the parameters have an entry for each
        of the others, as `TrainingResult.members` describes them.
        """
        results: list[TrainingResult] = []
        history: list[EpochReport] = []
        begun = (None,) * len(self.trainers) if params is None else params
        second = 0 if again is None else len(again.structures)
        totals = [
            steps or trainer.total_steps(dataset, warm=one is not None, all_train=bool(validation), second=second)
            for trainer, one in zip(self.trainers, begun, strict=True)
        ]
        for n, (trainer, one_key) in enumerate(zip(self.trainers, jax.random.split(key, len(totals)), strict=True)):
            before = len(history)

            def report(own: EpochReport, n: int = n) -> None:
                history.append(self._widened(own, n, history, totals))
                if on_epoch is not None:
                    on_epoch(history[-1])

            results.append(
                trainer.train(
                    dataset,
                    begun[n],
                    one_key,
                    reference_energies=reference_energies,
                    on_epoch=report,
                    steps=totals[n],
                    validation=validation,
                    say=say,
                    weights_key=weights_key_of(key) if weights_key is None else weights_key,
                    checkpoint=None if checkpoint is None else checkpoint / f"group_{n}",
                    checkpoint_every=checkpoint_every,
                    again=_of_group(again, n),
                )
            )
            del history[before:]  # what was reported before an interruption belongs to it too
            for own in results[-1].history:
                history.append(self._widened(own, n, history, totals))
        return self._joined(results, history)

    def _joined(self, results: Sequence[TrainingResult], history: Sequence[EpochReport]) -> TrainingResult:
        """The parts as one training; raises InputError where fewer than two models are left."""
        parts = zip(self.trainers, results, strict=True)
        gone = np.concatenate([np.isin(np.arange(t.ensemble.size), result.left_out) for t, result in parts])
        require_enough(gone, named(gone))
        params = tuple(result.params for result in results)
        if gone.any():
            params = tuple(one for group in params for one in _one_by_one(group))
        return TrainingResult(params, tuple(history), tuple(int(n) for n in np.flatnonzero(gone)))

    def _widened(self, own: EpochReport, n: int, history: Sequence[EpochReport], totals: Sequence[int]) -> EpochReport:
        """A report of one group as one of all models."""
        sizes = [trainer.ensemble.size for trainer in self.trainers]
        mine = slice(sum(sizes[:n]), sum(sizes[: n + 1]))
        before = history[-1] if history else None

        def wide(values: np.ndarray, whole: np.ndarray | None) -> np.ndarray:
            if whole is None:
                whole = np.full(sum(sizes), False if values.dtype == bool else np.nan, values.dtype)
            return np.concatenate([whole[: mine.start], values, whole[mine.stop :]])

        others = {} if before is None else before.models
        return own.with_models(
            {name: wide(values, others.get(name)) for name, values in own.models.items()},
            step=sum(totals[:n]) + own.step,
            steps=sum(totals),
            stopped=wide(own.stopped, None if before is None else before.stopped),
            kept=wide(own.kept, None),
        )


def _of_group(again: Again | None, n: int) -> Again | None:
    """What the models of one architecture begin with."""
    if again is None or again.params is None:
        return again
    return replace(again, params=again.params[n])


def _one_by_one(params: Params) -> list[Params]:
    """Parameters of each model of a group, as a group of its own."""
    models = jax.tree.leaves(params)[0].shape[0]
    return [jax.tree.map(lambda leaf, n=n: leaf[n : n + 1], params) for n in range(models)]


def params_for(wanted: EnsembleSettings, there: EnsembleSettings, params: Params) -> Params:
    """Parameters to train an ensemble from, out of those of one that lost models of it.

    Args:
        wanted: settings of the ensemble to train.
        there: of the ensemble that the parameters belong to.
        params: its parameters.

    Returns:
        as `CommitteeTrainer.train` takes them: an entry for each architecture, None where no model of it is left.
    """
    if wanted == there or len(wanted.variants) < 2:
        return params  # models that one architecture lacks are added at the end
    left = list(zip(there.variants, params, strict=True))
    begun: list[Params | None] = []
    for n, variant in enumerate(wanted.variants):
        room = len(range(n, wanted.size, len(wanted.variants)))
        mine = [one for its, one in left if its == variant][:room]
        left = [pair for pair in left if not any(pair[1] is one for one in mine)]
        begun.append(jax.tree.map(lambda *x: np.concatenate(x), *mine) if mine else None)
    return tuple(begun)


AnyTrainer: TypeAlias = Trainer | CommitteeTrainer
"""A trainer of any ensemble."""


def build_trainer(
    model: ModelSettings,
    ensemble: EnsembleSettings,
    species: SpeciesTable,
    capacity: Capacity,
    training: TrainingSettings,
    dtype: np.dtype | type = np.float32,
    isolated: Collection[int] = (),
    share: float | None = None,
) -> AnyTrainer:
    """The trainer that some settings describe.

    Args:
        model: settings of the architecture, which the ensemble's variants change.
        ensemble: settings of the members.
        species: the species table.
        capacity: static sizes, for the longest cutoff.
        training: of the training, which the variants change too.
        dtype: float32 or float64.
        isolated: elements whose reference energies are those of isolated atoms, which the potential gives exactly.
        share: of structures of a second label source, as `Trainer` takes it.

    Raises:
        InputError: as for `check_training`, `kinds.check_user_code` and `Trainer`.
    """
    check_training(model, ensemble, training)
    check_user_code(ensemble, "ensemble.")
    if share is not None:
        check_plain(ensemble.heads, ensemble.likelihood)
    members = build_ensemble(model, ensemble, species, isolated)
    groups = members.groups if isinstance(members, MixedEnsemble) else (members,)
    trainers: list[Trainer] = []
    first = 0
    for n, (group, (_, variant, _)) in enumerate(zip(groups, member_models(model, ensemble), strict=True)):
        settings = _changed(training, variant.training, n)
        check_user_code(settings, "training.")
        if settings.projection is None:
            own = Trainer(group, species, capacity, settings, ensemble, dtype, first, share=share)
        elif share is None:
            own = ProjectionTrainer(group, species, capacity, settings, ensemble, dtype, first)
        else:
            raise InputError(
                "training.projection finds one set of linear parameters, but a teacher's frames need a last layer of "
                "their own; leave projection out, or replay at 0."
            )
        trainers.append(own)
        first += group.size
    if isinstance(members, Ensemble):
        return trainers[0]
    return CommitteeTrainer(members, trainers, capacity)


def check_training(model: ModelSettings, ensemble: EnsembleSettings, training: TrainingSettings) -> None:
    """Whether some settings go together, before anything is built.

    Raises:
        InputError: a variant is not valid, the loss does not go with the members, or nothing would look at a key.
    """
    models = member_models(model, ensemble)
    trainings = [_changed(training, variant.training, n) for n, (_, variant, _) in enumerate(models)]
    for (one, _, count), changed in zip(models, trainings, strict=True):
        check_losses(changed, ensemble.heads, ensemble.likelihood)
        check_targets(changed, one.further, ensemble.heads)
        check_projection(changed, one, ensemble, count)
    refuse_idle(trainings, ensemble.likelihood)
    for target in targets({name for one, _, _ in models for name in one.further}):
        if not all(target.name in one.further for one, _, _ in models):
            raise InputError(
                f"some of ensemble.variants give {target.one} and others do not; set it for all of them, or none."
            )


_SHARED = frozenset({"reference_energies", "validation_fraction", "warm_start", "final_steps", "replay", "batch_size"})
"""Keys of a training that no member has for itself."""


def _changed(training: TrainingSettings, changes: dict, position: int) -> TrainingSettings:
    """A training with other values; nested settings are changed key by key."""
    if not changes:
        return training
    shared = sorted(_SHARED & set(changes))
    if shared:
        raise InputError(
            f"ensemble.variants, entry {position}, training.{shared[0]}: all members share it; set it in training "
            "instead."
        )
    given = training.model_dump(exclude_unset=True)
    for key, value in changes.items():
        given[key] = {**given[key], **value} if isinstance(value, dict) and isinstance(given.get(key), dict) else value
    try:
        changed = TrainingSettings.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(f"ensemble.variants, entry {position}, training.{where}: {first['msg']}.") from error
    if changed.validate_every > training.validate_every:
        raise InputError(
            f"ensemble.variants, entry {position}, training.validate_every: {changed.validate_every} steps are more "
            f"than the {training.validate_every} that plans of batches are made for; give the most in "
            "training.validate_every, and fewer in variants."
        )
    return changed
