"""What a config takes from the potential that its trainings begin with, where it does not say otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from almlip_jax.campaign.config import ExperimentConfig, PotentialConfig, check_sections
from almlip_jax.ensembles import EnsembleSettings
from almlip_jax.errors import InputError
from almlip_jax.fitting import check_start
from almlip_jax.models import ModelSettings
from almlip_jax.potential import Potential
from almlip_jax.saved_potential import SavedPotential
from almlip_jax.training import check_training

Config = TypeVar("Config", bound=PotentialConfig)


def as_of(saved: SavedPotential, config: Config) -> Config:
    """The config, with model, ensemble and precision of a potential where it gives none.

    Raises:
        InputError: these do not go with the rest of it.
    """
    its: dict[str, Callable[[], Any]] = {
        "model": lambda: saved.model,
        "ensemble": lambda: saved.ensemble,
        "precision": lambda: saved.precision,
    }
    taken = {name: value() for name, value in its.items() if name not in config.model_fields_set}
    if not taken:
        return config
    read: dict[str, Callable[[Any], Any]] = {
        "model": ModelSettings.parse,
        "ensemble": EnsembleSettings.model_validate,
        "precision": str,
    }
    config = config.model_copy(update={name: read[name](value) for name, value in taken.items()})
    try:
        check_training(config.model, config.ensemble, config.training)
        if isinstance(config, ExperimentConfig):
            check_sections(config)
    except ValueError as error:
        raise InputError(
            f"{' and '.join(taken)} of the potential {saved.folder} do not fit the config: {error}"
        ) from error
    return config


def with_beginning(config: ExperimentConfig) -> ExperimentConfig:
    """The config of a campaign, with what it takes from ``initial.potential``."""
    saved = config.beginning
    return config if saved is None else as_of(saved, config)


def check_beginning(config: ExperimentConfig, start: Potential | None) -> None:
    """Refuses a potential to begin with that the trainings of a campaign cannot.

    Raises:
        InputError: it is of another architecture than the config.
    """
    if start is not None:
        try:
            check_start(start, config.model, config.ensemble)
        except InputError as error:
            raise InputError(f"initial.potential: {error}") from error
