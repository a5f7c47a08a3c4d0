"""The base of every config model: strict keys, finite numbers, an error that names the nearest valid key."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from itertools import chain, repeat, zip_longest
from pathlib import Path
from types import ModuleType, UnionType
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, cast, get_args, get_origin

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, ValidationInfo, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema

from almlip_jax.errors import meant

LEAN = "almlip_lean"
"""Option -X of interpreters that are handed settings that were validated elsewhere."""

AnySettings = TypeVar("AnySettings", bound="Settings")
T = TypeVar("T")


def unit(name: str) -> dict[str, Any]:
    """What says in which unit a field is: ``Field(default=0.5, gt=0, le=20, json_schema_extra=unit("fs"))``."""
    return {"unit": name}


@cache
def _strings_below(module: ModuleType | None) -> dict[str, dict[str, str | None]]:
    """Class -> its annotated names -> the string below, None where there is none; of all classes of a module."""
    found: dict[str, dict[str, str | None]] = {}

    def visit(node: ast.AST, within: str) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            within = f"{within}{node.name}.<locals>."
        elif isinstance(node, ast.ClassDef):
            found[within + node.name] = dict(_annotated(node.body))
            within = f"{within}{node.name}."
        for inner in ast.iter_child_nodes(node):
            visit(inner, within)

    with suppress(OSError, TypeError, SyntaxError):  # built in, typed at a prompt, or gone
        visit(ast.parse(inspect.getsource(cast(ModuleType, module))), "")
    return found


def _annotated(body: list[ast.stmt]) -> Iterator[tuple[str, str | None]]:
    for statement, following in zip_longest(body, body[1:]):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            value = following.value if isinstance(following, ast.Expr) else None
            text = value.value if isinstance(value, ast.Constant) else None
            yield statement.target.id, inspect.cleandoc(text) if isinstance(text, str) else None


class FromHere(str):
    """Text that was typed where the program runs: a relative path in it is meant from the working directory."""


class Settings(BaseModel):
    """A frozen pydantic model that refuses unknown keys and says which one was probably meant.

    Each room keeps its own settings next to what they configure; `campaign.config` composes them.  Numbers must be
    finite, ``true`` is not a number, and a section that may be of several kinds is of the default one unless it says
    so.  Validated with the context ``{"folder": ...}``, fields that hold paths (`Path`, tuples and dicts of them,
    unions) take relative ones as meant from that folder, and ``~`` as the home of a user.
    """

    keeps_relative_paths: ClassVar[bool] = False
    """Whether relative paths stay as they are, for what reads the files to say where they lie."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        allow_inf_nan=False,
        defer_build=LEAN in sys._xoptions,
    )

    def __hash__(self) -> int:
        return hash((type(self), *(_hashable(value) for value in self.__dict__.values())))

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, data: Any, info: ValidationInfo) -> Any:
        if not isinstance(data, dict):
            return data
        known = cls.model_fields if data.keys() <= cls.model_fields.keys() else cls.known_fields()
        for key in data:
            if key not in known:
                raise ValueError(f"unknown key '{key}'; {cls._hint(str(key))}")
            if isinstance(data[key], bool) and _is_number(known[key].annotation):
                raise ValueError(f"{key} should be a number, not {str(data[key]).lower()}.")
        given = {key: _of_kind(value, known[key]) for key, value in data.items()}
        folder = None if cls.keeps_relative_paths else (info.context or {}).get("folder")
        if folder is None:
            return given
        return {key: located(value, known[key].annotation, folder) for key, value in given.items()}

    @classmethod
    def known_fields(cls) -> Mapping[str, FieldInfo]:
        """The fields by key."""
        return cls.model_fields

    @classmethod
    def meanings(cls) -> dict[str, str]:
        """What the keys mean, of those that say so: in their `Field`, or in the string below them in the source.

        Nothing that runs needs it, and sources are read for whoever asks, not where models are made.
        """
        below = cls._below_keys()
        told = {name: field.description or below.get(name) for name, field in cls.known_fields().items()}
        return {name: text for name, text in told.items() if text}

    @classmethod
    def _below_keys(cls) -> dict[str, str]:
        """The strings below keys, of each key where it was defined last."""
        found: dict[str, str | None] = {}
        for model in reversed(cls.__mro__):
            if issubclass(model, Settings):
                found |= _strings_below(sys.modules.get(model.__module__)).get(model.__qualname__, {})
        return {name: text for name, text in found.items() if text is not None}

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        found = handler(schema)
        properties = handler.resolve_ref_schema(found).get("properties", {})
        for name, text in cls.meanings().items():
            if name in properties:
                properties[name].setdefault("description", text)
        return found

    @classmethod
    def alternatives(cls) -> Iterator[type[Settings]]:
        """The config models that a field of this type may hold: itself, or the kinds of a family."""
        yield cls

    @classmethod
    def _hint(cls, key: str) -> str:
        known = sorted(cls.known_fields())
        kind = cls.model_fields["kind"].default if "kind" in cls.model_fields else None
        return meant(key, known) or f"{valid_keys(kind)}: {', '.join(known)}."


def from_here(settings: AnySettings) -> AnySettings:
    """The same settings, which hold wherever they are read: relative paths are those from the working directory."""
    if settings.keeps_relative_paths:
        return settings
    kinds = {name: field.annotation for name, field in type(settings).known_fields().items()}
    changed = {name: found for name, value in settings if (found := _made_absolute(value, kinds.get(name))) != value}
    return settings.model_copy(update=changed) if changed else settings


def _made_absolute(value: Any, kind: Any = Path) -> Any:
    if isinstance(value, Settings):
        return from_here(value)
    if isinstance(value, tuple):
        return tuple(_made_absolute(one) for one in value)
    if isinstance(value, Mapping) and _speaks_of_paths(kind):  # what is anything, such as parameters, stays as it is
        return {key: _made_absolute(one) for key, one in value.items()}
    return located(value, Path, Path.cwd()) if isinstance(value, Path) else value


def _speaks_of_paths(kind: Any) -> bool:
    return kind is Path or any(_speaks_of_paths(one) for one in get_args(kind))


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


def sections(value: Any, wanted: type[T], where: str = "") -> Iterator[tuple[str, T]]:
    """All sections of some settings that are of a class, wherever they stand, with the dotted keys that lead there."""
    if isinstance(value, wanted):
        yield where, value
    if isinstance(value, Settings):
        parts: Iterable[tuple[Any, Any]] = ((name, getattr(value, name)) for name in type(value).model_fields)
    elif isinstance(value, Mapping):
        parts = value.items()
    elif isinstance(value, tuple | list):
        parts = enumerate(value)
    else:
        return
    for name, part in parts:
        yield from sections(part, wanted, f"{where}.{name}" if where else str(name))


def _of_kind(value: Any, field: FieldInfo) -> Any:
    """A value, with the default kind where it is a section that has none."""
    kind = getattr(field.default, "kind", None)
    if kind is None or not isinstance(value, Mapping) or "kind" in value:
        return value
    return {"kind": kind} | dict(value)


def located(value: Any, kind: Any, folder: Path) -> Any:
    """A value of a type with its relative paths meant from a folder, or from the working directory (`FromHere`)."""
    origin, parts = get_origin(kind), get_args(kind)
    if kind is Path and isinstance(value, str | Path):
        path = Path(value)
        try:
            path = path.expanduser()
        except RuntimeError:  # ~ of an unknown user
            pass
        return (Path.cwd() if isinstance(value, FromHere) else folder) / path
    if origin in (Union, UnionType) and not any(get_origin(one) is Literal and value in get_args(one) for one in parts):
        for one in parts:
            value = located(value, one, folder)
    elif origin is Annotated:
        return located(value, parts[0], folder)
    elif isinstance(value, list | tuple | set) and parts:
        kinds = chain(parts, repeat(None)) if origin is tuple and ... not in parts else repeat(parts[0])
        return [located(item, one, folder) for item, one in zip(value, kinds, strict=False)]
    elif isinstance(value, Mapping) and len(parts) == 2:
        return {key: located(item, parts[1], folder) for key, item in value.items()}
    return value


def _is_number(annotation: Any) -> bool:
    types = {annotation, *get_args(annotation)}
    return bool(types & {int, float}) and bool not in types
