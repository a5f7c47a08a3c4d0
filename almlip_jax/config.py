"""The config of an experiment: the settings of every room put together, read from YAML, with errors one can act on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import Field, ValidationError, model_validator

from almlip_jax.campaign.consistency import check_adaptive, check_judges, check_plateau, check_target
from almlip_jax.campaign.continuity import with_earlier_defaults
from almlip_jax.campaign.settings import (
    ExplorationChoice,
    InitialSettings,
    MdExploration,
    SelectionSettings,
    StoppingSettings,
    SystemSettings,
    TestSettings,
)
from almlip_jax.config_errors import sentences
from almlip_jax.errors import InputError
from almlip_jax.models import ModelSettings, SharedDensitySettings
from almlip_jax.oracles import ExecutorSettings, LocalSettings, SourceSettings
from almlip_jax.overrides import apply_override, make_absolute
from almlip_jax.settings import Settings
from almlip_jax.structures.labels import FileReading
from almlip_jax.training import EnsembleSettings, TrainingSettings, check_training
from almlip_jax.yaml_text import read_yaml, yaml_text


class PotentialConfig(Settings):
    """What a potential is made with."""

    seed: int = Field(default=0, ge=0, le=2**32 - 1)
    """All random numbers follow from it."""
    precision: Literal["float32", "float64"] = "float32"
    """Of models, training and dynamics; energies are relative to reference energies, and labels always float64."""
    model: ModelSettings = SharedDensitySettings()
    """The architecture of the members."""
    ensemble: EnsembleSettings = EnsembleSettings()
    """How many members there are, and what makes them differ."""
    training: TrainingSettings = TrainingSettings()
    """How they are trained."""
    know_training_set: bool = False
    """Whether potentials keep what comparisons with their training set need: novelty scores (among them the
    extrapolation grade) fitted to it, its scores and last-layer features.  What they say of structures then holds
    novelty scores, and simulations need no `training_set`."""

    @model_validator(mode="after")
    def _members_can_be_trained(self) -> Self:
        check_training(self.model, self.ensemble, self.training)
        return self


class ExperimentConfig(PotentialConfig):
    """A whole campaign, or the part of it that a command needs."""

    name: str = "campaign"
    """Goes into the provenance of every label."""
    system: SystemSettings
    """What the potential is for."""
    oracle: SourceSettings
    """Where labels come from."""
    executor: ExecutorSettings = LocalSettings()
    """Where label calculations run."""
    initial: InitialSettings
    """The first labelled set."""
    test: TestSettings = TestSettings()
    """The test set."""
    exploration: ExplorationChoice = MdExploration()
    """Where candidates come from."""
    selection: SelectionSettings = SelectionSettings()
    """Which candidates are labelled."""
    stopping: StoppingSettings = StoppingSettings()
    """When the campaign ends."""

    @model_validator(mode="after")
    def _sections_serve_each_other(self) -> Self:
        check_judges(self.exploration, self.selection, self.stopping, self.ensemble)
        check_adaptive(self.selection.selector, self.training, "selection.selector")
        check_plateau(self.stopping, self.selection)
        check_target(self.stopping, self.test)
        return self


_OF_CAMPAIGNS = frozenset(SystemSettings.model_fields) - frozenset(FileReading.model_fields)


class TrainConfig(PotentialConfig):
    """Config of `almlip train`; the other sections of a campaign may be there too, and are not looked at."""

    system: FileReading = FileReading()
    """How files are read; of the section of a campaign nothing else counts."""

    @model_validator(mode="before")
    @classmethod
    def _leave_what_campaigns_need(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        others = set(ExperimentConfig.model_fields) - set(cls.model_fields)
        left = {key: value for key, value in given.items() if key not in others}
        if isinstance(left.get("system"), dict):
            left["system"] = {k: v for k, v in left["system"].items() if k not in _OF_CAMPAIGNS}
        return left


Config = TypeVar("Config", bound=Settings)


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Reads the config of a campaign; arguments and errors as for `load_settings`."""
    return load_settings(ExperimentConfig, path, overrides)


def load_run_config(run_dir: Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Reads the config in a run directory, where keys of later versions mean what held when the run began."""
    return load_settings(ExperimentConfig, run_dir / "config.yaml", overrides, prepare=with_earlier_defaults)


def load_settings(
    kind: type[Config],
    path: Path | str,
    overrides: Sequence[str] = (),
    *,
    prepare: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> Config:
    """Reads a config of some kind and checks it.

    Args:
        kind: the model that it follows.
        path: a YAML file; relative paths inside it are meant from its folder.
        overrides: ``dotted.key=value`` each, as `overrides.apply_override` takes them; relative paths in them are meant
            from the working directory.
        prepare: changes what the file says before the overrides do.

    Raises:
        InputError: the file cannot be read, is not YAML, or holds a key or value that is not valid; every problem is
            named with its key and line.
    """
    source = Path(path)
    document = read_yaml(source)
    data = {} if document.value is None else document.value
    if not isinstance(data, dict):
        raise InputError(f"{source} is not a config; it must hold keys and values.")
    data = prepare(data)
    make_absolute(data, source.resolve().parent)
    lines = document.lines
    for override in overrides:
        changed = apply_override(data, override)
        lines = {at: line for at, line in lines.items() if at[: len(changed)] != changed}
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise InputError(f"{source}: " + "\n".join(sentences(kind, error, lines))) from error


def config_text(config: Settings) -> str:
    """A config as YAML that reads back as the same config."""
    return yaml_text(config.model_dump(mode="json"))
