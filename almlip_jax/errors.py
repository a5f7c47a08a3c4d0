"""Errors a user can act on: each message is one sentence that names the file, key or atom, and what to do."""

from __future__ import annotations


class InputError(ValueError):
    """Input that cannot be used: a file, a config key, a structure."""


class LabelError(RuntimeError):
    """A label calculation that failed: the message is the reason that goes into the label store."""


class CapacityError(RuntimeError):
    """A static capacity (atoms, neighbours, steps) was too small; the message names it and the size needed."""
