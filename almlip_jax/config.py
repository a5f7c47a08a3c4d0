"""The config of an experiment: the settings of every room put together, read from YAML, with errors one can act on."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import yaml
from pydantic import Field, ValidationError, model_validator

from almlip_jax.campaign.consistency import check_judges, check_plateau, check_target
from almlip_jax.campaign.settings import (
    ExplorationChoice,
    InitialSettings,
    MdExploration,
    SelectionSettings,
    StoppingSettings,
    SystemSettings,
    TestSettings,
)
from almlip_jax.errors import InputError
from almlip_jax.models import ModelSettings, SharedDensitySettings
from almlip_jax.oracles import ExecutorSettings, LocalSettings, OracleSettings
from almlip_jax.settings import Settings
from almlip_jax.training import EnsembleSettings, TrainingSettings, check_training


class ExperimentConfig(Settings):
    """A whole campaign, or the part of it that a command needs."""

    name: str = "campaign"
    """Goes into the provenance of every label."""
    seed: int = Field(default=0, ge=0)
    """All random numbers follow from it."""
    precision: Literal["float32", "float64"] = "float32"
    """Of models, training and dynamics; energies are relative to reference energies, and labels always float64."""
    system: SystemSettings
    """What the potential is for."""
    oracle: OracleSettings
    """Where labels come from."""
    executor: ExecutorSettings = LocalSettings(kind="local")
    """Where label calculations run."""
    initial: InitialSettings
    """The first labelled set."""
    test: TestSettings = TestSettings()
    """The test set."""
    model: ModelSettings = SharedDensitySettings()
    """The architecture of the members."""
    ensemble: EnsembleSettings = EnsembleSettings()
    """How many members there are, and what makes them differ."""
    training: TrainingSettings = TrainingSettings()
    """How they are trained."""
    exploration: ExplorationChoice = MdExploration()
    """Where candidates come from."""
    selection: SelectionSettings = SelectionSettings()
    """Which candidates are labelled."""
    stopping: StoppingSettings = StoppingSettings()
    """When the campaign ends."""

    @model_validator(mode="after")
    def _members_can_be_trained(self) -> Self:
        check_training(self.model, self.ensemble, self.training)
        return self

    @model_validator(mode="after")
    def _sections_serve_each_other(self) -> Self:
        check_judges(self.exploration, self.selection, self.stopping, self.ensemble)
        check_plateau(self.stopping, self.selection)
        check_target(self.stopping, self.test)
        return self


Config = TypeVar("Config", bound=Settings)


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Reads the config of a campaign; arguments and errors as for `load_settings`."""
    return load_settings(ExperimentConfig, path, overrides)


def load_settings(kind: type[Config], path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Reads a config of some kind and checks it.

    Args:
        kind: the model that it follows.
        path: a YAML file; relative paths inside it are meant from its folder.
        overrides: ``dotted.key=value`` each, the value in YAML; relative paths in them are meant from the working
            directory.

    Raises:
        InputError: the file cannot be read, is not YAML, or holds a key or value that is not valid; every problem is
            named with its key and line.
    """
    source = Path(path)
    try:
        text = source.read_text()
    except OSError as error:
        raise InputError(f"{source} cannot be read ({error.strerror}).") from error
    try:
        data = yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise InputError(f"{source} is not valid YAML: {_one_line(error)}") from error
    if not isinstance(data, dict):
        raise InputError(f"{source} is not a config; it must hold keys and values.")
    lines = _key_lines(text)
    _rebase(data, source.resolve().parent)
    for override in overrides:
        _apply(data, override)
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        problems = [_sentence(problem, lines) for problem in error.errors()]
        raise InputError(f"{source}: " + "\n".join(problems)) from error


def config_text(config: Settings) -> str:
    """A config as YAML that reads back as the same config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


class _StrictLoader(yaml.SafeLoader):
    """YAML's safe loader, but a key given twice is an error, and ``1e-3`` is a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            name = self.construct_object(key, deep=True)
            if name in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{name}' is given twice", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def _path_keys() -> frozenset[str]:
    """Names of the settings that hold paths."""
    of_campaigns = {"structures", "dataset", "path", "files", "folder"}
    return frozenset(of_campaigns | {"potential", "training_set", "calibration_set", "out"})


def _rebase(data: Any, folder: Path) -> None:
    """Makes relative paths in a config absolute, as meant from its folder."""
    if isinstance(data, list):
        for item in data:
            _rebase(item, folder)
    if not isinstance(data, dict):
        return
    for key, value in data.items():
        if key in _path_keys() and isinstance(value, str):
            data[key] = str(folder / value)
        elif key in _path_keys() and isinstance(value, list) and all(isinstance(item, str) for item in value):
            data[key] = [str(folder / item) for item in value]
        elif key != "parameters":  # those belong to the user's own function
            _rebase(value, folder)


def _apply(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"'{override}' is not of the form key=value.")
    *parents, last = key.split(".")
    place = data
    for parent in parents:
        place = place.setdefault(parent, {})
        if not isinstance(place, dict):
            raise InputError(f"'{key}' cannot be set: '{parent}' holds a value, not keys.")
    try:
        value = yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise InputError(f"'{override}' has no valid value: {_one_line(error)}") from error
    if last in _path_keys() and isinstance(value, str):
        value = str(Path(value).resolve())
    place[last] = value


def _key_lines(text: str) -> dict[tuple[str | int, ...], int]:
    """Line of every key of a YAML text, by its path."""
    lines: dict[tuple[str | int, ...], int] = {}

    def walk(node: yaml.Node | None, path: tuple[str | int, ...]) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                inner = (*path, key.value)
                lines[inner] = key.start_mark.line + 1
                walk(value, inner)
        elif isinstance(node, yaml.SequenceNode):
            for n, item in enumerate(node.value):
                lines[(*path, n)] = item.start_mark.line + 1
                walk(item, (*path, n))

    walk(yaml.compose(text), ())
    return lines


def _sentence(problem: Mapping[str, Any], lines: Mapping[tuple[str | int, ...], int]) -> str:
    """One problem of pydantic's as a sentence with key and line."""
    # a choice by `kind` puts the chosen name into the path, which is no key of the file
    location: tuple[str | int, ...] = ()
    for part in problem["loc"]:
        if (*location, part) in lines or part == problem["loc"][-1]:
            location = (*location, part)
    unknown = re.match(r"Value error, unknown key '([^']+)'", str(problem["msg"]))
    if unknown:
        location = (*location, unknown.group(1))
    line = next((lines[location[:n]] for n in range(len(location), 0, -1) if location[:n] in lines), None)
    where = ".".join(str(part) for part in location) or "the config"
    where = f"line {line}, {where}" if line else where
    message = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "union_tag_invalid":
        context = problem["ctx"]
        known = [name.strip(" '") for name in str(context["expected_tags"]).split(",")]
        return f"{where}: '{context['tag']}' is no valid kind{_nearest(str(context['tag']), known)}"
    if problem["type"] == "missing":
        return f"{where}: the key is missing."
    return f"{where}: {message[0].lower() + message[1:]}{'' if message.endswith('.') or message.endswith('?') else '.'}"


def _nearest(name: str, known: Iterable[str]) -> str:
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"; did you mean '{near[0]}'?" if near else f"; valid are {', '.join(known)}."


def _one_line(error: yaml.YAMLError) -> str:
    return " ".join(str(error).split())
