"""The species table: which elements a potential knows, and the index each has inside it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols

from almlip_jax.errors import InputError


@dataclass(frozen=True)
class SpeciesTable:
    """Sorted atomic numbers; a species index is a position in it.

    Attributes:
        numbers: atomic numbers in increasing order, without repeats.
    """

    numbers: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.numbers or list(self.numbers) != sorted(set(self.numbers)):
            raise InputError(f"a species table needs increasing atomic numbers without repeats, not {self.numbers}.")
        if self.numbers[0] < 1 or self.numbers[-1] >= len(chemical_symbols):
            raise InputError(f"no element has an atomic number outside 1..{len(chemical_symbols) - 1}: {self.numbers}.")

    @classmethod
    def of(cls, structures: Iterable[Atoms]) -> SpeciesTable:
        """The table of every element that occurs in some structures."""
        found: set[int] = set()
        for atoms in structures:
            found.update(int(z) for z in atoms.numbers)
        return cls(tuple(sorted(found)))

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def symbols(self) -> tuple[str, ...]:
        """Chemical symbols in the order of the table."""
        return tuple(chemical_symbols[z] for z in self.numbers)

    def index(self, numbers: np.ndarray) -> np.ndarray:
        """Species indices of atomic numbers, same shape.

        Raises:
            InputError: an atomic number is not in the table; the first such atom is named.
        """
        table = np.asarray(self.numbers)
        position = np.searchsorted(table, numbers)
        found = table[np.minimum(position, len(table) - 1)] == numbers
        if not np.all(found):
            atom = int(np.argmin(found))
            raise InputError(
                f"atom {atom} is {chemical_symbols[int(numbers[atom])]}, which is not among the species "
                f"{', '.join(self.symbols)} of this potential; train on structures that contain it."
            )
        return position.astype(np.int32)
