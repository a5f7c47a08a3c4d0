"""Keys that are given and that nothing would look at: refused, since their value would be believed to act."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from almlip_jax.ensembles.settings import EnsembleSettings
from almlip_jax.errors import InputError
from almlip_jax.settings import Settings
from almlip_jax.targets import targets
from almlip_jax.training.settings import SQUARES, TrainingSettings


def refuse_idle(trainings: Sequence[TrainingSettings], likelihood: str) -> None:
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
    if ensemble.bootstrap != "gamma" and _given(ensemble, "bootstrap_variance"):
        raise InputError("ensemble.bootstrap_variance counts with bootstrap 'gamma' only; leave it out, or take that.")


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
    for name, given in (("schedule", training.schedule == "plateau"), ("patience", short)):
        if given:
            raise InputError(
                f"training.{name} {getattr(training, name)} follows errors on structures kept for validation, but "
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


def _idle(training: TrainingSettings, likelihood: str) -> Iterator[tuple[str, str]]:
    """Such keys of one training, and what would look at them."""
    kinds = {loss.kind for loss in training.losses}
    if training.projection is not None:
        yield from ((name, "a training by gradients") for name in _OF_GRADIENTS if _given(training, name))
    needs = {
        "weight_decay": (training.optimiser == "adamw", "optimiser 'adamw'"),
        "plateau_factor": (training.schedule == "plateau", "schedule 'plateau'"),
        "plateau_patience": (training.schedule == "plateau", "schedule 'plateau'"),
        "final_learning_rate": (training.schedule != "constant", "a schedule that falls"),
    }
    yield from ((name, what) for name, (used, what) in needs.items() if not used and _given(training, name))
    loss = training.loss
    if "huber" not in kinds:
        changed = (one.name for one in targets() if loss.delta_of(one) != SQUARES.delta_of(one))
        yield from ((f"loss.{name}_delta", "a loss of kind 'huber'") for name in changed)
    if not kinds & {"nll", "crps"}:
        changed = (one.name for one in targets() if loss.floor_of(one) != SQUARES.floor_of(one))
        yield from ((f"loss.{name}_floor", "a loss of kind 'nll' or 'crps'") for name in changed)
    if ("nll" not in kinds or likelihood != "evidential") and _given(loss, "evidence_penalty"):
        yield "loss.evidence_penalty", "a loss of kind 'nll' and ensemble.likelihood 'evidential'"


def _given(settings: Settings, name: str) -> bool:
    """Whether a key has another value than by default: configs of run directories hold every key."""
    return bool(getattr(settings, name) != type(settings).model_fields[name].default)
