"""Keys that are given and that nothing would look at: refused, since their value would be believed to act."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from almlip_jax.ensembles.bootstrap import BootstrapSettings
from almlip_jax.ensembles.likelihoods import LikelihoodSettings
from almlip_jax.ensembles.settings import EnsembleSettings
from almlip_jax.errors import InputError, any_of
from almlip_jax.settings import Settings
from almlip_jax.training.optimisers import OptimiserSettings
from almlip_jax.training.schedules import ScheduleSettings
from almlip_jax.training.settings import TrainingSettings


def refuse_idle(trainings: Sequence[TrainingSettings], likelihood: LikelihoodSettings) -> None:
    """Refuses keys with another value than by default that no model of an ensemble looks at.

    Args:
        trainings: of the models, which differ where the ensemble has variants.
        likelihood: what the models say about their errors.

    Raises:
        InputError: names the first of them, and what would look at it.
    """
    first, *others = [dict(_idle(training, likelihood)) for training in trainings]
    for name, needed in first.items():
        if all(name in one for one in others):
            raise InputError(f"training.{name} counts with {needed} only; leave it out, or take that.")


def refuse_idle_members(ensemble: EnsembleSettings) -> None:
    """The same for what makes members differ.

    Raises:
        InputError: a variance of weights that are not drawn with it.
    """
    for name, needed in _not_looked_at(ensemble.bootstrap, BootstrapSettings, "bootstrap"):
        if _given(ensemble, name):
            raise InputError(f"ensemble.{name} counts with {needed} only; leave it out, or take that.")


def refuse_idle_warmth(training: TrainingSettings, where: str = "training.", switch: str = "warm_start: true") -> None:
    """Refuses a length of trainings that start warm where none does.

    Args:
        training: that begins with fresh parameters, unless ``warm_start`` is set.
        where: what the key begins with.
        switch: what would have trainings start warm.

    Raises:
        InputError: there is one.
    """
    if training.warm_steps is not None and not training.warm_start:
        raise InputError(f"{where}warm_steps counts with {switch} only; leave it out, or give that.")


def refuse_idle_judgement(training: TrainingSettings) -> None:
    """Refuses keys that follow errors of validation structures where none are kept.

    Args:
        training: whose share of structures that validate is the only source of them.

    Raises:
        InputError: the learning rate would never fall, or nothing would end a training early.
    """
    if training.validation_fraction > 0:
        return
    short = training.patience < TrainingSettings.model_fields["patience"].default  # a longer one says: never
    for name, value, given in (
        ("schedule", training.schedule.kind, training.schedule.follows_validation),
        ("patience", training.patience, short),
    ):
        if given:
            raise InputError(
                f"training.{name} {value} follows errors on structures kept for validation, but "
                f"validation_fraction is 0; raise it, or leave {name} out."
            )


_OF_GRADIENTS = (
    *("batch_size", "max_epochs", "max_steps", "learning_rate", "optimiser", "weight_decay", "schedule", "warm_up"),
    *(
        "final_learning_rate",
        "plateau_factor",
        "plateau_patience",
        "ema",
        "clip_norm",
        "second_stage",
        "validate_every",
    ),
)
"""Keys that a training by projection does not look at."""


def _idle(training: TrainingSettings, likelihood: LikelihoodSettings) -> Iterator[tuple[str, str]]:
    """Such keys of one training, and what would look at them."""
    if training.projection is not None:
        yield from ((name, "a training by gradients") for name in _OF_GRADIENTS if _given(training, name))
    chosen: _Chooses
    for chosen, family, key in (
        (training.optimiser, OptimiserSettings, "optimiser"),
        (training.schedule, ScheduleSettings, "schedule"),
    ):
        yield from ((name, what) for name, what in _not_looked_at(chosen, family, key) if _given(training, name))
    for name, what in _not_looked_at(likelihood, LikelihoodSettings, "ensemble.likelihood"):
        if any(name in type(loss).model_fields and _given(loss, name) for loss in training.losses):
            yield f"loss.{name}", what


_Chooses = OptimiserSettings | ScheduleSettings | BootstrapSettings | LikelihoodSettings
"""Kinds that say which keys elsewhere they look at."""


def _not_looked_at(chosen: _Chooses, family: type[_Chooses], key: str) -> Iterator[tuple[str, str]]:
    """Names of keys that only other kinds of a family look at, and these kinds, as values of a key."""
    kinds = family.kinds()
    for name in sorted(frozenset().union(*(kind.looks_at for kind in kinds.values())) - chosen.looks_at):
        yield name, f"{key} {any_of(kind for kind, one in kinds.items() if name in one.looks_at)}"


def _given(settings: Settings, name: str) -> bool:
    """Whether a key has another value than by default: configs of run directories hold every key."""
    return bool(getattr(settings, name) != type(settings).model_fields[name].default)
