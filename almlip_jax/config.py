"""Configs: read from YAML, checked against the settings that describe them, with errors one can act on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from almlip_jax.config_errors import sentences
from almlip_jax.errors import InputError
from almlip_jax.overrides import apply_override
from almlip_jax.settings import Settings
from almlip_jax.yaml_text import read_yaml, yaml_text

Config = TypeVar("Config", bound=Settings)


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
    lines = document.lines
    for override in overrides:
        changed = apply_override(data, override)
        lines = {at: line for at, line in lines.items() if at[: len(changed)] != changed}
    try:
        return kind.model_validate(data, context={"folder": source.resolve().parent})
    except ValidationError as error:
        raise InputError(f"{source}: " + "\n".join(sentences(kind, error, lines))) from error


def config_text(config: Settings) -> str:
    """A config as YAML that reads back as the same config."""
    return yaml_text(config.model_dump(mode="json"))
