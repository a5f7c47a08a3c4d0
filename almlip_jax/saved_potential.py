"""What the folder of a potential says without loading it: elements, electronic states, and a digest of what it is.

Needs no jax, so that label sources and campaigns can ask before anything is computed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ase.data import atomic_numbers

from almlip_jax.errors import InputError

DESCRIPTION = "potential.json"
"""The file of a potential that is there to be read."""
PARAMS = "params"
"""Key of the folder that holds the parameters; a hash of them is part of its name."""
REMEMBERED = "remembered"
"""Key of the file that holds remembered structures; a hash of its content is part of its name."""

_PREDICTS = ("model", "species", "ensemble", "dtype", "reference_energies", "isolated_atoms", PARAMS)
"""Keys of a description that decide what a potential predicts."""


@dataclass(frozen=True)
class SavedPotential:
    """The description of a potential.

    Attributes:
        folder: where it is.
        content: what `Potential.save` wrote.
    """

    folder: Path
    content: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path | str) -> SavedPotential:
        """The description in a folder.

        Raises:
            InputError: there is none, or it is damaged.
        """
        place = Path(folder)
        try:
            return _read(place, (place / DESCRIPTION).stat().st_mtime_ns)
        except OSError as error:
            raise InputError(f"{place} is not a potential: it has no {DESCRIPTION}.") from error

    @property
    def numbers(self) -> frozenset[int]:
        """Atomic numbers of the elements that it knows."""
        return frozenset(atomic_numbers[symbol] for symbol in self.content["species"])

    @property
    def precision(self) -> str:
        """``float32`` or ``float64``."""
        return str(self.content["dtype"])

    @property
    def remembered(self) -> Path | None:
        """The file of the structures that it remembers; None where there is none."""
        name = self.content.get(REMEMBERED)
        place = None if name is None else self.folder / Path(name).name
        return place if place is not None and place.exists() else None

    @property
    def states(self) -> frozenset[tuple[int, int]] | None:
        """Charges and multiplicities that it tells apart and has learned of; None where it tells none apart."""
        noted = self.content["metadata"].get("states")
        return None if noted is None else frozenset((int(charge), int(spin)) for charge, spin in noted)

    def digest(self, *, training: bool = False) -> str:
        """SHA-256 of all that its predictions depend on.

        Args:
            training: of all that a training which begins with it depends on, its remembered structures too.
        """
        said: dict[str, Any] = {key: self.content[key] for key in _PREDICTS}
        if training:
            kept = self.remembered
            said |= {REMEMBERED: None if kept is None else kept.name, "states": self.content["metadata"].get("states")}
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


@lru_cache(maxsize=16)
def _read(folder: Path, written: int) -> SavedPotential:
    """Reads a description once for each time that it was written."""
    try:
        content = json.loads((folder / DESCRIPTION).read_text())
        missing = [key for key in (*_PREDICTS, "metadata") if key not in content]
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{folder / DESCRIPTION} cannot be read ({error}); restore a copy or train again.") from error
    if missing:
        raise InputError(f"{folder / DESCRIPTION} has no '{missing[0]}'; restore a copy or train again.")
    return SavedPotential(folder, content)
