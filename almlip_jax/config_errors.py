"""Problems that pydantic finds in a config, as sentences: key and line, value, unit and bound, and what was meant."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import takewhile
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from almlip_jax.errors import meant, nearest
from almlip_jax.settings import Settings, settings_in
from almlip_jax.yaml_text import Location, yaml_text

_BOUNDS = {
    "greater_than": ("gt", "more than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}
_SHAPES = {"float_type", "int_type", "tuple_type", "list_type", "dict_type", "string_type", "path_type", "bool_type"}
_LONGEST = 60  # characters of a value that a sentence repeats


def sentences(kind: type[Settings], error: ValidationError, lines: Mapping[Location, int]) -> list[str]:
    """Every problem of a config, each as a sentence.

    Args:
        kind: what the config was checked against.
        error: what pydantic says.
        lines: of its keys in the file.
    """
    groups: dict[Location, list[ErrorDetails]] = {}
    for problem in error.errors():
        groups.setdefault(_location(kind, problem["loc"]), []).append(problem)
    found = []
    for location, problems in groups.items():
        # where an item of a list is refused, the list is also too short, and no number either
        if any(len(other) > len(location) and other[: len(location)] == location for other in groups):
            problems = [one for one in problems if one["type"] not in _SHAPES | {"too_short"}]
        # where a value may have several shapes, the one that it has is judged
        telling = [one for one in problems if one["type"] not in _SHAPES] or problems[:1]
        found += [_sentence(kind, location, problem, lines) for problem in telling]
    return list(dict.fromkeys(found))


def _location(kind: type[Settings], parts: tuple[str | int, ...]) -> Location:
    """Keys and indices alone; pydantic also names the kinds of sections and the types that a value may have."""
    location: Location = ()
    here = [kind]
    inside: Any = None  # type of the value that the location leads to, unless it is just a section
    for part in parts:
        fields = [known[part] for one in here if part in (known := one.known_fields())] if isinstance(part, str) else []
        kinds = [one for one in here if _kind(one) == part]
        if kinds and not fields:
            here = kinds
        elif fields:
            location = (*location, part)
            inside = [field.annotation for field in fields]
            here = list(settings_in(tuple[tuple(inside)]))  # type: ignore[misc]
        elif isinstance(part, int) or _has_names(inside):
            location = (*location, part)
            inside = None if isinstance(part, str) else inside
    return location


def _has_names(annotations: Any) -> bool:
    return annotations is not None and any("dict[" in str(annotation) for annotation in annotations)


def _kind(model: type[Settings]) -> object:
    return model.model_fields["kind"].default if "kind" in model.model_fields else None


def _fields(kind: type[Settings], location: Location) -> tuple[list[FieldInfo], list[type[Settings]]]:
    """The fields that a location may lead to, and the models that a value of them is made of."""
    here, fields = [kind], []
    for part in location:
        found = [known[part] for one in here if isinstance(part, str) and part in (known := one.known_fields())]
        if found:
            fields = found
            here = [model for field in fields for model in settings_in(field.annotation)]
    return fields, here


def _sentence(kind: type[Settings], location: Location, problem: ErrorDetails, lines: Mapping[Location, int]) -> str:
    """One problem as a sentence with key and line."""
    message = str(problem["msg"]).removeprefix("Value error, ")
    unknown = re.match(r"unknown key '([^']+)'", message)
    if unknown:
        location = (*location, unknown.group(1))
    line = next((lines[location[:n]] for n in range(len(location), 0, -1) if location[:n] in lines), None)
    where = ".".join(str(part) for part in location) or "the config"
    text = _told(kind, location, problem) or message[0].lower() + message[1:]
    if unknown:
        text = _elsewhere(kind, location) or text
    return f"{f'line {line}, ' if line else ''}{where}: {text}{'' if text.endswith(('.', '?')) else '.'}"


def _told(kind: type[Settings], location: Location, problem: ErrorDetails) -> str | None:
    """A problem in words of our own, None where pydantic's are good."""
    fields, models = _fields(kind, location)
    context = problem.get("ctx", {})
    given = problem["input"]
    match problem["type"]:
        case "missing":
            return "the key is missing"
        case "union_tag_invalid":
            tag = given.get("kind", context["tag"]) if isinstance(given, Mapping) else context["tag"]
            here = re.findall(r"'([^']*)'", str(context.get("expected_tags", ""))) or _kinds(models)
            if str(tag) in _kinds(models):  # a kind of the family, in a place that is for some of them
                return f"kind '{tag}' cannot stand here; kinds that can: {', '.join(sorted(here))}"
            return f"'{tag}' is not a valid kind{nearest(str(tag), here)}"
        case "union_tag_not_found":
            if isinstance(given, Mapping):
                return f"the key 'kind' is missing{nearest('', _kinds(models))}"
            return f"it should be keys and values, not {_shown(given)}{_as_kind(given, models)}"
        case "model_type" | "model_attributes_type" | "dict_type":
            return f"it should be keys and values, not {_shown(given)}{_as_kind(given, models)}"
        case "finite_number":
            return f"it should be a finite number, not {_shown(given)}"
        case "string_pattern_mismatch":
            shown = [example for field in fields for example in field.examples or ()]
            return f"{_shown(given)} has not the form of {_shown(shown[0])}" if shown else None
        case "string_type":
            number = isinstance(given, int | float)
            return f"it should be text, not {_shown(given)}{'; put it into quotes' if number else ''}"
        case "tuple_type":
            return f"it should be a list, not {_shown(given)}"
        case "literal_error":
            return f"{_shown(given)} is not valid; it should be {context['expected']}"
        case name if name in _BOUNDS:
            key, words = _BOUNDS[str(name)]
            units = {unit for field in fields if (unit := _unit(field))}
            unit = f" {units.pop()}" if len(units) == 1 else ""
            return f"{_shown(given)}{unit} is out of bounds; it should be {words} {context[key]:.10g}{unit}"
    return None


def _unit(field: FieldInfo) -> str | None:
    extra = field.json_schema_extra
    return str(extra["unit"]) if isinstance(extra, dict) and "unit" in extra else None


def _shown(value: Any) -> str:
    text = yaml_text(value, flow=True) if isinstance(value, str | int | float | list | dict | None) else str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _kinds(models: Iterable[type[Settings]]) -> list[str]:
    return [kind for model in models if isinstance(kind := _kind(model), str)]


def _as_kind(given: object, models: Iterable[type[Settings]]) -> str:
    """How a kind is written, where its name stands alone."""
    return f"; write {{kind: {given}}}" if given in _kinds(models) else ""


def _elsewhere(kind: type[Settings], location: Location) -> str | None:
    """Where a key that its section does not have belongs, None where that is nowhere or a slip is likelier."""
    *above, key = map(str, location)
    section = tuple(part for part in above if not part.isdecimal())
    homes = list(dict.fromkeys(_homes(kind, key, ())))
    siblings = [name for place, name in homes if place == section and name]
    if siblings:
        return f"unknown key '{key}' of this kind; kinds that have it: {', '.join(siblings)}"
    _, models = _fields(kind, location[:-1])
    is_slip = meant(key, {name for model in models for name in model.known_fields()}, cutoff=0.75)
    if is_slip or not homes:
        return None
    if all(not place for place, _ in homes):
        return f"unknown key '{key}' here; it is a section of its own, at the top of the config"
    place, name = max(homes, key=lambda home: (_common(home[0], section), -len(home[0])))
    return f"unknown key '{key}'; did you mean {'.'.join((*place, key))}{f' (of kind {name})' if name else ''}?"


def _common(first: tuple[str, ...], second: tuple[str, ...]) -> int:
    """How many keys two sections have in common before they part."""
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))))


def _homes(kind: type[Settings], key: str, above: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Sections that have a key, and of which kind they then are."""
    if key in kind.known_fields():
        yield above, str(_kind(kind) or "")
    if len(above) < 4:
        for name, field in kind.model_fields.items():
            for model in settings_in(field.annotation):
                yield from _homes(model, key, (*above, name))
