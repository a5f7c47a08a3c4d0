"""Settings with a key for each further target: packages and scripts add keys with the targets that they declare."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from pydantic import ConfigDict, GetJsonSchemaHandler, ValidationInfo, create_model, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import core_schema

from almlip_jax.settings import Settings
from almlip_jax.targets import Target, further_targets

_SHAPES = 64  # sets of declared targets whose keys are remembered, for each class


class ByTarget(Settings):
    """Settings some keys of which are named after the further `targets` that there are.

    They stand beside the others in files and are looked up by `said`.  One that has its default is left out: settings
    are the same whether or not a package is installed that declares targets of which they say nothing.
    """

    model_config = ConfigDict(extra="allow")

    @classmethod
    @abstractmethod
    def keys_of(cls, target: Target) -> Iterator[tuple[str, Any, Any]]:
        """Name, type and field of each key that a target has here."""

    @classmethod
    def known_fields(cls) -> Mapping[str, FieldInfo]:
        """The fields by key, those of the targets that are declared now too."""
        own = cls.model_fields
        return dict(own) | {name: field for name, field in _further(cls).model_fields.items() if name not in own}

    def said(self, key: str, default: Any = None) -> Any:
        """The value of a key of a target, or a default where nothing is said."""
        return getattr(self, key) if key in type(self).model_fields else (self.model_extra or {}).get(key, default)

    @model_validator(mode="before")
    @classmethod
    def _check_further(cls, data: Any, info: ValidationInfo) -> Any:
        if not isinstance(data, dict) or data.keys() <= cls.model_fields.keys():
            return data  # defaults are made while modules are loaded, before there are packages to ask
        fields = _further(cls).model_fields
        given = {name: value for name, value in data.items() if name in fields}
        found = _further(cls).model_validate(given, context=info.context)
        said = {name: value for name, value in found if value != fields[name].default}
        return {name: value for name, value in data.items() if name not in fields} | said

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: core_schema.CoreSchema, handler: GetJsonSchemaHandler) -> Any:
        found = super().__get_pydantic_json_schema__(schema, handler)
        inner = handler.resolve_ref_schema(found)
        if "properties" not in inner:  # of a family, whose kinds have them
            return found
        inner["properties"] = inner["properties"] | _further(cls).model_json_schema().get("properties", {})
        inner["additionalProperties"] = False
        return found


def _further(settings: type[ByTarget]) -> type[Settings]:
    return _model(settings, further_targets())


@lru_cache(maxsize=_SHAPES)
def _model(settings: type[ByTarget], declared: tuple[Target, ...]) -> type[Settings]:
    """The keys of some targets as settings of their own."""
    keys = {name: (kind, field) for target in declared for name, kind, field in settings.keys_of(target)}
    return create_model(settings.__name__, __base__=Settings, **keys)  # type: ignore[call-overload,no-any-return]
