"""Keys of a config that are set on the command line, before it is checked."""

from __future__ import annotations

import re
from typing import Any

from almlip_jax.errors import InputError
from almlip_jax.settings import FromHere
from almlip_jax.yaml_text import Location, parse_yaml

_PART = re.compile(r"""\s*(?:"([^"]*)"|'([^']*)'|([^."']*?))\s*(\.|$)""")


def apply_override(data: dict[str, Any], override: str) -> Location:
    """Sets a key of a config.

    Args:
        data: the config, which is changed; sections that it does not have are made.
        override: ``dotted.key=value``, the value in YAML; items of a list by their number from 0, one more than there
            are to append; a key with a dot in it in quotes.  Relative paths are meant from the working directory.

    Returns:
        where it is set.

    Raises:
        InputError: it does not have this form, or leads into something that has no keys.
    """
    key, equals, text = override.partition("=")
    parts = _parts(key)
    if not equals or not parts:
        raise InputError(f"--set {override}: this is not of the form key=value.")
    value = parse_yaml(text, f"the value of --set {override}").value
    if "parameters" not in parts:
        value = _typed_here(value)
    place: Any = data
    location: Location = ()
    for depth, part in enumerate(parts[:-1]):
        location = (*location, int(part) if isinstance(place, list) and part.isdecimal() else part)
        place = _inside(place, part, ".".join(parts[:depth]), override, make=True)
    _inside(place, parts[-1], ".".join(parts[:-1]), override, make=False)
    if isinstance(place, list):
        index = int(parts[-1])
        place[index : index + 1] = [value]
        return (*location, index)
    place[parts[-1]] = value
    return (*location, parts[-1])


def _typed_here(value: Any) -> Any:
    """A value with its texts as `FromHere`, but for those that belong to the user's own function."""
    if isinstance(value, dict):
        return {key: one if key == "parameters" else _typed_here(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_typed_here(one) for one in value]
    return FromHere(value) if isinstance(value, str) else value


def _parts(key: str) -> list[str]:
    """Keys and indices of a dotted key; none where it has no such form."""
    parts, at = [], 0
    while found := _PART.match(key, at):
        part = next((text for text in found.groups()[:3] if text is not None), "")
        if not part:
            return []
        parts.append(part)
        at = found.end()
        if not found.group(4):
            return parts
    return []


def _inside(place: Any, part: str, where: str, override: str, *, make: bool) -> Any:
    """What lies under a key or index, made where there is nothing yet."""
    if isinstance(place, list):
        if not part.isdecimal() or int(part) > len(place) - make:
            there = f"items 0 to {len(place) - 1}" if place else "no items"
            raise InputError(f"--set {override}: '{part}' is not an item of {where}, which has {there}.")
        if int(part) == len(place):
            return None
        if place[int(part)] is None and make:
            place[int(part)] = {}
        return place[int(part)]
    if not isinstance(place, dict):
        raise InputError(f"--set {override}: '{where}' holds a value, not keys; set it as a whole.")
    if part.isdecimal() and not place and where:
        raise InputError(f"--set {override}: the config gives no list {where}; set it as a whole, as {where}=[...].")
    if make and place.get(part) is None:
        place[part] = {}
    return place.get(part)
