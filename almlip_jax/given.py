"""What scripts hand over: settings, structures and numbers, checked where they come in.

Whatever is wrong with them is an `InputError`, with the sentences and hints that configs get.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, cast

from ase import Atoms
from pydantic import ValidationError, create_model

from almlip_jax.errors import InputError
from almlip_jax.kinds import Spec
from almlip_jax.settings import AnySettings, Settings


def given_settings(kind: Callable[..., AnySettings], given: Any, name: str) -> AnySettings:
    """Settings that a script gave: an object of them, a dict, or the name of a kind where they come in kinds.

    Args:
        kind: the class that they have to be of; for mypy a callable, since those of families are abstract.
        given: by the script.
        name: of the argument, with which messages begin.

    Raises:
        InputError: each problem is a sentence.

    >>> from almlip_jax.given import given_settings
    >>> from almlip_jax.selection import SelectorSettings
    >>> given_settings(SelectorSettings, "lcmd", "selector").kind
    'lcmd'
    >>> given_settings(SelectorSettings, {"kind": "biat"}, "selector")
    Traceback (most recent call last):
    almlip_jax.errors.InputError: selector: 'biat' is not a valid kind; did you mean 'bait'?
    """
    wanted = cast(type[AnySettings], kind)
    if isinstance(given, wanted):
        return given
    kinds: Mapping[str, Any] = wanted.kinds() if issubclass(wanted, Spec) and wanted.is_open() else {}
    if isinstance(given, Settings) or callable(given):
        ways = "a dict, the name of a kind or an object of it" if kinds else "a dict or an object of it"
        own = "; code of your own comes in as kind 'user'" if callable(given) and "user" in kinds else ""
        raise InputError(f"{name}: {_named(given)} is no {wanted.__name__}; give {ways}{own}.")
    section = _section(wanted, name)
    try:
        held = section.model_validate({name: {"kind": given} if kinds and isinstance(given, str) else given})
    except ValidationError as error:
        from almlip_jax.config_errors import sentences  # workers, which show nobody a sentence, do without

        raise InputError("\n".join(sentences(section, error, {}))) from None
    found: AnySettings = getattr(held, name)
    return found


@cache
def _section(kind: type[Settings], name: str) -> type[Settings]:
    """A config with the settings as its only section, so that what is said of them is what is said of configs."""
    fields: Any = {name: (kind, ...)}
    return create_model(f"{kind.__name__}Given", __base__=Settings, **fields)


def given_structures(given: Any, name: str) -> Sequence[Atoms]:
    """Structures that a script gave, in any number; one alone stands for a list of one.

    Args:
        given: by the script.
        name: of the argument, with which messages begin.

    Raises:
        InputError: something is no structure.

    >>> from ase.build import molecule
    >>> from almlip_jax.given import given_structures
    >>> len(given_structures(molecule("H2O"), "structures"))
    1
    """
    if isinstance(given, Atoms):
        return [given]
    if isinstance(given, str | Path):
        raise InputError(f"{name}: structures are needed, not text; read_structures reads the file '{given}'.")
    try:
        found = given if isinstance(given, Sequence) else list(given)
    except TypeError:
        raise InputError(f"{name}: structures (ase.Atoms) are needed, not {_named(given)}.") from None
    for number, one in enumerate(found):
        if not isinstance(one, Atoms):
            raise InputError(f"{name}: item {number} is {_named(one)}, not a structure (ase.Atoms).")
    return found


def given_number(given: Any, name: str, least: int) -> int:
    """A whole number that a script gave.

    Args:
        given: by the script.
        name: of the argument, with which messages begin.
        least: what it has to be at least.

    Raises:
        InputError: it is none, or less.

    >>> from almlip_jax.given import given_number
    >>> given_number(0, "k", 1)
    Traceback (most recent call last):
    almlip_jax.errors.InputError: k: it should be a whole number of at least 1, not 0.
    """
    try:
        number = least - 1 if isinstance(given, bool) else operator.index(given)
    except TypeError:
        number = least - 1
    if number < least:
        raise InputError(f"{name}: it should be a whole number of at least {least}, not {given!r}.")
    return number


@contextmanager
def refusals() -> Iterator[None]:
    """What is refused inside as configs refuse it, by a ValueError, is an `InputError`."""
    try:
        yield
    except InputError:
        raise
    except ValueError as error:
        raise InputError(str(error)) from error


def _named(given: Any) -> str:
    """A thing by its class, or by its own name where it is one, or a function."""
    if isinstance(given, type) or not hasattr(given, "__name__"):
        kind = given if isinstance(given, type) else type(given)
        which = "the class " if isinstance(given, type) else "an " if kind.__name__[0] in "AEIOaeio" else "a "
        return which + kind.__name__
    return f"the function {given.__name__}"
