"""A label source that fails when it is told to: springs between all atoms, and a file that names what fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from ase.calculators.calculator import Calculator, all_changes


class Moody(Calculator):
    """Energy of springs between all pairs of atoms.

    Args:
        mood: a file; while it holds ``all`` every label fails, while it holds ``stretched`` those of molecules that
            reach further than their start.  Without one none fails.
        length: of the springs at rest, Angstrom; each has 4 eV/Angstrom^2.
    """

    implemented_properties = ["energy", "forces"]

    def __init__(self, mood: str | None = None, length: float = 1.2) -> None:
        super().__init__()
        self.mood, self.length = None if mood is None else Path(mood), length

    def calculate(
        self, atoms: Any = None, properties: Any = ("energy",), system_changes: Any = tuple(all_changes)
    ) -> None:
        super().calculate(atoms, properties, system_changes)
        vectors = self.atoms.positions[None] - self.atoms.positions[:, None]
        lengths = np.linalg.norm(vectors, axis=-1) + np.eye(len(self.atoms))
        stretch = np.where(np.eye(len(self.atoms)), 0, lengths - self.length)
        mood = self.mood.read_text() if self.mood is not None and self.mood.exists() else ""
        if mood == "all" or (mood == "stretched" and lengths.max() > 1.6):
            raise RuntimeError("not in the mood")
        self.results["energy"] = float(np.sum(stretch**2))
        self.results["forces"] = 4 * np.sum((stretch / lengths)[..., None] * vectors, axis=1)
