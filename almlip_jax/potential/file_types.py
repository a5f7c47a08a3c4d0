"""What a potential remembers of files of MLIP-2: the order of their types, and what its own files were called.

Such files know numbers where potentials know elements, so that others that go with them (``.cfg``, ``mlip.ini``) fit a
file only in the order that they were made for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ase.data import atomic_numbers, chemical_symbols

_FILES = "mlip_files"
_VERSION = 1


@dataclass(frozen=True)
class FileTypes:
    """What is remembered.

    Attributes:
        numbers: atomic number of each type, from type 0 on; 0 for a type that no atom has; empty where not known.
        names: ``potential_name`` of the file of each member; empty where there were none.
        tags: ``potential_tag`` likewise.
    """

    numbers: tuple[int, ...] = ()
    names: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()

    @property
    def symbols(self) -> tuple[str, ...]:
        """Element of each type, from type 0 on; X for a type that no atom has."""
        return tuple(chemical_symbols[z] for z in self.numbers)

    def note(self) -> dict[str, Any]:
        """The entry of metadata that says so; none where there is nothing to say."""
        if self == FileTypes():
            return {}
        return {_FILES: {"version": _VERSION, "types": [*self.symbols], "names": [*self.names], "tags": [*self.tags]}}

    def order(self, known: Sequence[int]) -> list[int]:
        """Atomic number of each type of a file that is to hold some elements: those that are not remembered come last.

        Args:
            known: atomic numbers, in the order that they have otherwise.
        """
        return [*self.numbers, *(z for z in known if z not in self.numbers)]

    def extended(self, numbers: Sequence[int]) -> FileTypes:
        """The same with the types of a longer order that begins with this one; of any other order, as it was.

        Args:
            numbers: atomic number of each type, from type 0 on.
        """
        given = tuple(numbers)
        return replace(self, numbers=given) if given[: len(self.numbers)] == self.numbers else self

    def name(self, member: int, default: str) -> str:
        """``potential_name`` of a member; that of the first where there were not as many."""
        return _of(self.names, member, default)

    def tag(self, member: int, default: str) -> str:
        """``potential_tag`` likewise."""
        return _of(self.tags, member, default)


def _of(texts: Sequence[str], member: int, default: str) -> str:
    return default if not texts else texts[member if member < len(texts) else 0]


def noted_file_types(metadata: Mapping[str, Any]) -> FileTypes:
    """What metadata hold; nothing where they say nothing, or say it as a later version does."""
    found = metadata.get(_FILES, {})
    if found.get("version") != _VERSION:
        return FileTypes()
    return FileTypes(tuple(atomic_numbers[one] for one in found["types"]), tuple(found["names"]), tuple(found["tags"]))
