"""YAML as configs are written in it: plain values, names as keys, merge keys, and an error with line and reason.

What a plain word means follows YAML 1.2, not 1.1: ``on`` and ``no`` are words, ``01:00:00`` and ``2026-11-25`` are
text, ``010`` is ten, and ``1e-3`` is a number.  Aliases are copies of what they stand for.
"""

from __future__ import annotations

import codecs
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from almlip_jax.errors import InputError

Location = tuple[str | int, ...]
"""Keys and indices that lead to a value."""

_MOST_BYTES = 1 << 20
_MOST_VALUES = 100_000  # with what aliases stand for written out
_DEEPEST = 50

_PREFIX = "tag:yaml.org,2002:"
_PATTERNS = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("merge", r"<<", "<"),
)


class _Loader(yaml.SafeLoader):
    """YAML's safe loader with the plain words of YAML 1.2."""

    yaml_implicit_resolvers: dict[str, Any] = {}


class _Dumper(yaml.SafeDumper):
    """YAML's safe dumper, which puts into quotes what `_Loader` would read as something else than text."""

    yaml_implicit_resolvers: dict[str, Any] = {}


_Dumper.add_multi_representer(str, lambda dumper, text: dumper.represent_str(str(text)))

for _tag, _pattern, _first in _PATTERNS:
    for _one in (_Loader, _Dumper):
        _one.add_implicit_resolver(_PREFIX + _tag, re.compile(rf"(?:{_pattern})\Z"), list(_first))


@dataclass(frozen=True)
class YamlDocument:
    """What a YAML text holds.

    Attributes:
        value: made of dicts with text as keys, lists, text, numbers, booleans and None.
        lines: line of every key and list item, by its location.
    """

    value: Any
    lines: dict[Location, int]


def read_yaml(path: Path) -> YamlDocument:
    """The content of a YAML file in UTF-8 or, with a byte order mark, UTF-16.

    Raises:
        InputError: it cannot be read, or as `parse_yaml`.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}).") from error
    if len(content) > _MOST_BYTES:
        raise InputError(f"{path} is not a config: it has more than {_MOST_BYTES >> 20} MiB.")
    return parse_yaml(_decoded(content, path), str(path))


def parse_yaml(text: str, source: str) -> YamlDocument:
    """The content of a YAML text.

    Args:
        text: one document.
        source: what it is called in errors.

    Raises:
        InputError: it is not valid YAML, is nested too deeply, becomes too large through its aliases, gives a key
            twice, has a key that is not a name, or a value of a kind that configs cannot hold.
    """
    try:
        _check_depth(text)
        node = yaml.compose(text, _Loader)
        builder = _Builder()
        value = None if node is None else builder.build(node, (), ())
    except yaml.YAMLError as error:
        raise InputError(f"{source} is not valid YAML: {_reason(error)}.") from error
    return YamlDocument(value, builder.lines)


def yaml_text(value: Any, *, flow: bool = False) -> str:
    """Plain data as YAML that `parse_yaml` reads back as the same.

    Args:
        value: dicts, lists, text, numbers, booleans, None.
        flow: in one line, with brackets.
    """
    if not flow:
        return yaml.dump(value, Dumper=_Dumper, sort_keys=False)
    text = yaml.dump(value, Dumper=_Dumper, sort_keys=False, default_flow_style=True, width=10_000)
    return text.removesuffix("...\n").strip()


def _decoded(content: bytes, path: Path) -> str:
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return content.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        if b"\0" in content:
            raise InputError(f"{path} is not text, so it is not a config.") from error
        line = content.count(b"\n", 0, error.start) + 1
        name = "UTF-16" if wide else "UTF-8"
        raise InputError(f"{path} is not in {name} (line {line}); save it as UTF-8.") from error


def _check_depth(text: str) -> None:
    """Counts brackets and indents before anything follows them with a call for each."""
    depth = 0
    for event in yaml.parse(text, _Loader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > _DEEPEST:
            raise _problem(f"it is nested more than {_DEEPEST} levels deep", event)


class _Builder:
    """Plain data from the nodes of a document, which aliases share; counts values, and notes lines."""

    def __init__(self) -> None:
        self.lines: dict[Location, int] = {}
        self._number = 0

    def build(self, node: yaml.Node, at: Location, above: tuple[yaml.Node, ...]) -> Any:
        """The value of a node at a location below others."""
        above = self._counted(node, above)
        tag = node.tag.removeprefix(_PREFIX)
        if isinstance(node, yaml.MappingNode) and tag == "map":
            return self._mapping(node, at, above)
        if isinstance(node, yaml.SequenceNode) and tag == "seq":
            return [self._item(item, (*at, n), above) for n, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode) and tag in ("str", "merge"):
            if "\0" in node.value:
                raise _problem("a text holds the character #x0000, which no file or name may have", node)
            return node.value
        if isinstance(node, yaml.ScalarNode) and tag in ("bool", "null", "int", "float"):
            try:
                return _plain(tag, node.value)
            except ValueError as error:
                raise _problem(f"'{node.value[:40]}' is not of type {tag}", node) from error
        raise _problem(f"the tag {tag if tag.startswith('!') else '!!' + tag} cannot be used in a config", node)

    def _counted(self, node: yaml.Node, above: tuple[yaml.Node, ...]) -> tuple[yaml.Node, ...]:
        self._number += 1
        if self._number > _MOST_VALUES:
            raise _problem(f"with its aliases written out it has more than {_MOST_VALUES:,} values", node)
        if any(node is other for other in above):
            raise _problem("an alias stands for something that contains it", node)
        if len(above) > _DEEPEST:
            raise _problem(f"it is nested more than {_DEEPEST} levels deep", node)
        return (*above, node)

    def _item(self, node: yaml.Node, at: Location, above: tuple[yaml.Node, ...]) -> Any:
        self.lines[at] = node.start_mark.line + 1
        return self.build(node, at, above)

    def _mapping(self, node: yaml.MappingNode, at: Location, above: tuple[yaml.Node, ...]) -> dict[str, Any]:
        result = {}
        for name, (key, value) in self._pairs(node, above).items():
            self.lines[(*at, name)] = key.start_mark.line + 1
            result[name] = self.build(value, (*at, name), above)
        return result

    def _pairs(self, node: yaml.MappingNode, above: tuple[yaml.Node, ...]) -> dict[str, tuple[yaml.Node, yaml.Node]]:
        """Keys and values by name, those that ``<<`` takes over first."""
        own: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        merged: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        for key, value in node.value:
            if key.tag == f"{_PREFIX}merge":
                merged = self._taken_over(value, above) | merged
                continue
            name = _name(key)
            if name in own:
                raise _problem(f"key '{name}' is given twice", key)
            own[name] = (key, value)
        return merged | own

    def _taken_over(self, node: yaml.Node, above: tuple[yaml.Node, ...]) -> dict[str, tuple[yaml.Node, yaml.Node]]:
        """What ``<<: *alias`` or ``<<: [*first, *second]`` takes over; of a list, the first that has a key."""
        above = self._counted(node, above)
        if isinstance(node, yaml.MappingNode):
            return self._pairs(node, above)
        if not isinstance(node, yaml.SequenceNode) or not all(isinstance(one, yaml.MappingNode) for one in node.value):
            raise _problem("'<<' takes over keys and values, or a list of them", node)
        found: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        for item in node.value:
            found = self._taken_over(item, above) | found
        return found


def _name(key: yaml.Node) -> str:
    if not isinstance(key, yaml.ScalarNode):
        raise _problem("a key should be a name, not a list or keys and values", key)
    return str(key.value)


def _plain(tag: str, text: str) -> Any:
    if tag == "null":
        return None
    if tag == "bool":
        if text.lower() not in ("true", "false"):
            raise ValueError(text)
        return text.lower() == "true"
    if tag == "float":
        return float(re.sub(r"_|\.(?=[a-zA-Z])(?![eE][-+0-9])", "", text))
    base = {"0o": 8, "0x": 16}.get(text[:2].lower(), 10)
    return int(text, base)


def _problem(problem: str, at: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=at.start_mark)


def _reason(error: yaml.YAMLError) -> str:
    """What is wrong with a text, and in which line."""
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        parts = [part for part in (error.problem, error.context) if part]
        where = f"line {mark.line + 1}, " if mark else ""
        return where + " ".join(" ".join(parts).split())
    if isinstance(error, yaml.reader.ReaderError):
        code = error.character if isinstance(error.character, int) else ord(error.character[:1])
        return f"it holds the character #x{code:04x}, which is none of a text"
    return " ".join(str(error).split())
