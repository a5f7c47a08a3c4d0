"""Errors a user can act on: each message is one sentence that names the file, key or atom, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Input that cannot be used: a file, a config key, a structure."""


class LabelError(RuntimeError):
    """A label calculation that failed: the message is the reason that goes into the label store."""


class CapacityError(RuntimeError):
    """A static capacity (atoms, neighbours, steps) was too small; the message names it and the size needed."""


def meant(name: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    """A question for the known name that is likest to a wrong one; empty where none is like it enough (0 to 1)."""
    near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=cutoff)
    return f"did you mean '{near[0]}'?" if near else ""


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a sentence that refuses a name: the nearest of the known ones, or all of them."""
    known = sorted(set(known))
    return "; " + (meant(name, known) or f"valid are {', '.join(known)}.")


def any_of(names: Iterable[str]) -> str:
    """Names in quotation marks, the last after an "or".

    Examples:
        >>> any_of(["cosine", "exponential", "plateau"])
        "'cosine', 'exponential' or 'plateau'"
    """
    *others, last = [f"'{name}'" for name in names]
    return f"{', '.join(others)} or {last}" if others else last
