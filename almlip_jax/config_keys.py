"""Every key of the configs: what it may hold, its default, unit and meaning, as the settings themselves say it.

`almlip explain` prints them, and the reference page of the documentation is made from them.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from almlip_jax.errors import InputError, meant
from almlip_jax.settings import Settings, settings_in
from almlip_jax.yaml_text import yaml_text

_BOUNDS = (("exclusiveMinimum", ">"), ("minimum", ">="), ("exclusiveMaximum", "<"), ("maximum", "<="))
_PLAIN = {"number": "number", "integer": "integer", "string": "text", "boolean": "true or false", "null": "null"}


@dataclass(frozen=True)
class Key:
    """A key of a section.

    Attributes:
        name: the key.
        values: what it may hold, with bounds.
        default: as YAML; ``required`` where there is none.
        unit: of its numbers, or empty.
        meaning: one or more sentences, or empty.
        sections: models of the sections that it may hold.
    """

    name: str
    values: str
    default: str
    unit: str
    meaning: str
    sections: tuple[type[Settings], ...]


@dataclass(frozen=True)
class Section:
    """A section of a config, of one kind.

    Attributes:
        path: dotted keys that lead to it; empty for the whole config.  Items of lists and names of maps do not count.
        kind: its kind, or None where there is only one.
        model: what validates it.
    """

    path: str
    kind: str | None
    model: type[Settings]

    @property
    def title(self) -> str:
        """Path and kind."""
        return " ".join(part for part in (self.path, f"(kind: {self.kind})" if self.kind else "") if part)

    @property
    def meaning(self) -> str:
        """What the section is for."""
        return " ".join(inspect.getdoc(self.model).split()) if self.model.__doc__ else ""  # type: ignore[union-attr]

    @property
    def keys(self) -> tuple[Key, ...]:
        """The keys in the order in which they are defined."""
        schema = self.model.model_json_schema(ref_template="{model}")
        properties, shared = schema["properties"], schema.get("$defs", {})
        meanings = self.model.meanings()
        return tuple(
            Key(
                name,
                _values(properties[name], shared),
                _default(field),
                properties[name].get("unit", ""),
                " ".join(meanings.get(name, "").split()),
                tuple(dict.fromkeys(settings_in(field.annotation))),
            )
            for name, field in self.model.known_fields().items()
        )

    def below(self) -> Iterator[Section]:
        """The sections that its keys may hold, in every kind."""
        for name, field in self.model.model_fields.items():
            for model in dict.fromkeys(settings_in(field.annotation)):
                yield Section(f"{self.path}.{name}".lstrip("."), kind_of(model), model)


def kind_of(model: type[Settings]) -> str | None:
    """The kind that a model of a section stands for; None where it stands for no kind, or for several."""
    field = model.model_fields.get("kind")
    if field is None or get_origin(field.annotation) is not Literal:
        return None
    names = get_args(field.annotation)
    return str(names[0]) if len(names) == 1 else None


def sections(root: type[Settings]) -> list[Section]:
    """All sections of a config, each model at the shortest path that leads to it."""
    found = {root: Section("", None, root)}
    waiting = [found[root]]
    for section in waiting:
        for below in section.below():
            if below.model not in found:
                found[below.model] = below
                waiting.append(below)
    return list(found.values())


def find_sections(root: type[Settings], path: str) -> list[Section]:
    """The sections at a dotted path, in every kind; a kind's name after a key keeps that kind only.

    Raises:
        InputError: the path leads nowhere; the nearest name is suggested.
    """
    here = [Section("", None, root)]
    parts = [part for part in path.split(".") if part]
    for position, name in enumerate(parts):
        below = list(dict.fromkeys(one for section in here for one in section.below()))
        at_key = [one for one in below if one.path.rpartition(".")[2] == name]
        of_kind = [section for section in here if section.kind == name]
        last_key = [section for section in here if name in section.model.known_fields()]
        if not (at_key or of_kind or last_key):
            raise InputError(_nowhere(parts[:position], name, here))
        if not (at_key or of_kind):
            if position + 1 < len(parts):
                raise InputError(f"'{'.'.join(parts[: position + 1])}' holds a value, not a section.")
            return last_key
        here = at_key or of_kind
    return here


def explain(root: type[Settings], path: str) -> str:
    """The sections at a dotted path, or the key, as YAML with a comment above each key.

    Raises:
        InputError: as for `find_sections`.
    """
    name = path.rpartition(".")[2]
    found = find_sections(root, path)
    alone = [section for section in found if section.path.rpartition(".")[2] != name and section.kind != name]
    if name and alone:
        return "\n\n".join("\n".join(_commented(key)) for section in alone for key in section.keys if key.name == name)
    return "\n\n".join("\n".join(_section_text(section)) for section in found)


def _section_text(section: Section) -> Iterator[str]:
    yield from _comment(f"{section.title or 'The whole config'}: {section.meaning}")
    for key in sorted(section.keys, key=lambda key: key.name != "kind"):
        yield from ["", *_commented(key)] if key.name != "kind" else [f"kind: {key.default}"]


def _commented(key: Key) -> Iterator[str]:
    yield from _comment(key.meaning)
    unit = f", {key.unit}" if key.unit else ""
    yield from _comment(f"Values: {key.values.replace('`', '')}{unit}.")
    yield f"{key.name}:  # required" if key.default == "required" else f"{key.name}: {key.default}"


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(text, 100, break_long_words=False)]


def _nowhere(above: list[str], name: str, here: list[Section]) -> str:
    names = sorted({key for section in here for key in section.model.known_fields()} | {s.kind for s in here if s.kind})
    where = f"'{'.'.join(above)}'" if above else "the config"
    return f"{where} has no key '{name}'; " + (meant(name, names) or f"it has {', '.join(names)}.")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    return yaml_text(_plain(value), flow=True).strip()


def _plain(value: Any) -> Any:
    """A default as YAML holds it: of a section what was said about it, and its kind."""
    if isinstance(value, Settings):
        said = {name: _plain(getattr(value, name)) for name in sorted(value.model_fields_set)}
        kind = kind_of(type(value))
        return {"kind": kind} | said if kind else said
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def _values(schema: Mapping[str, Any], shared: Mapping[str, Any]) -> str:
    """What a piece of a JSON schema allows, in words."""
    return _either(list(dict.fromkeys(_alternatives(schema, shared))))


def _alternatives(schema: Mapping[str, Any], shared: Mapping[str, Any]) -> Iterator[str]:
    if "$ref" in schema:
        yield from _alternatives(shared[schema["$ref"]], shared)
    elif "discriminator" in schema:
        yield "section of kind " + _either([f"`{kind}`" for kind in schema["discriminator"]["mapping"]])
    elif several := schema.get("anyOf") or schema.get("oneOf"):
        for one in several:
            yield from _alternatives(one, shared)
    elif "const" in schema or "enum" in schema:
        yield from (f"`{one}`" for one in schema.get("enum", [schema.get("const")]))
    elif schema.get("type") == "array":
        yield _list(schema, shared)
    elif schema.get("type") == "object":
        inner = schema.get("additionalProperties")
        yield f"map of names to {_values(inner, shared)}" if isinstance(inner, Mapping) and inner else "section"
    elif "type" in schema:
        limits = " and ".join(f"{sign} {_number(schema[key])}" for key, sign in _BOUNDS if key in schema)
        name = "path" if schema.get("format") == "path" else _PLAIN[schema["type"]]
        yield f"{name} {limits}".strip()
    else:
        yield "anything"


def _list(schema: Mapping[str, Any], shared: Mapping[str, Any]) -> str:
    if "prefixItems" in schema:
        parts = [_values(one, shared) for one in schema["prefixItems"]]
        return f"list of {len(parts)}: {parts[0]}" if len(set(parts)) == 1 else f"[{', '.join(parts)}]"
    least, most = schema.get("minItems"), schema.get("maxItems")
    inner = _values(schema.get("items", {}), shared)
    if least is None and most is None:
        return f"list of {inner}"
    count = f"{least}" if least == most else f"{least} or more" if most is None else f"{least or 0} to {most}"
    return f"list of {count}: {inner}"


def _number(bound: float) -> str:
    return f"{int(bound):,}" if float(bound).is_integer() and abs(bound) < 1e10 else f"{bound:g}"


def _either(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
