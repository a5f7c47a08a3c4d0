"""The base of every config model: strict keys, finite numbers, an error that names the nearest valid key."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic.fields import FieldInfo


def unit(name: str) -> dict[str, Any]:
    """What says in which unit a field is: ``Field(default=0.5, gt=0, le=20, json_schema_extra=unit("fs"))``."""
    return {"unit": name}


class Settings(BaseModel):
    """A frozen pydantic model that refuses unknown keys and says which one was probably meant.

    Each room keeps its own settings next to what they configure; `campaign.config` composes them.  Numbers must be
    finite, ``true`` is not a number, and a section that may be of several kinds is of the default one unless it says
    so.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )

    def __hash__(self) -> int:
        return hash((type(self), *(_hashable(value) for value in self.__dict__.values())))

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        known = cls.model_fields if data.keys() <= cls.model_fields.keys() else cls.known_fields()
        for key in data:
            if key not in known:
                raise ValueError(f"unknown key '{key}'; {cls._hint(str(key))}")
            if isinstance(data[key], bool) and _is_number(known[key].annotation):
                raise ValueError(f"{key} should be a number, not {str(data[key]).lower()}.")
        return {key: _of_kind(value, known[key]) for key, value in data.items()}

    @classmethod
    def known_fields(cls) -> Mapping[str, FieldInfo]:
        """The fields by key."""
        return cls.model_fields

    @classmethod
    def alternatives(cls) -> Iterator[type[Settings]]:
        """The config models that a field of this type may hold: itself, or the kinds of a family."""
        yield cls

    @classmethod
    def _hint(cls, key: str) -> str:
        known = sorted(cls.known_fields())
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        kind = cls.model_fields["kind"].default if "kind" in cls.model_fields else None
        return f"did you mean '{near[0]}'?" if near else f"{valid_keys(kind)}: {', '.join(known)}."


def _hashable(value: Any) -> Any:
    return frozenset((key, _hashable(of)) for key, of in value.items()) if isinstance(value, Mapping) else value


class Findings(Settings):
    """The same for what was measured, not chosen: its numbers may be anything."""

    model_config = ConfigDict(allow_inf_nan=True)


def valid_keys(kind: object) -> str:
    """How the list of a section's keys begins."""
    return f"valid keys of kind '{kind}'" if isinstance(kind, str) else "valid keys"


def settings_in(annotation: Any) -> Iterator[type[Settings]]:
    """The config models that values of a type are made of: of unions, lists and dicts all that occur in it."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        yield from annotation.alternatives()
    for part in get_args(annotation):
        yield from settings_in(part)


def _of_kind(value: Any, field: FieldInfo) -> Any:
    """A value, with the default kind where it is a section that has none."""
    kind = getattr(field.default, "kind", None)
    if kind is None or not isinstance(value, Mapping) or "kind" in value:
        return value
    return {"kind": kind} | dict(value)


def _is_number(annotation: Any) -> bool:
    types = {annotation, *get_args(annotation)}
    return bool(types & {int, float}) and bool not in types
