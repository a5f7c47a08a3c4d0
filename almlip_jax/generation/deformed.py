"""Start geometries deformed: atoms displaced, cells strained."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import numpy as np
from ase import Atoms
from pydantic import Field

from almlip_jax.generation.base import GenerationInputs, GeneratorSettings
from almlip_jax.settings import unit


def displaced(frame: Atoms, stdev: float, generator: np.random.Generator) -> Atoms:
    """The structure with normally distributed displacements (Angstrom), as far as its constraints let them."""
    frame.set_positions(frame.positions + generator.normal(scale=stdev, size=(len(frame), 3)))
    return frame


class RattledSettings(GeneratorSettings):
    """Start geometries with every atom displaced at random."""

    kind: Literal["rattled"] = "rattled"
    stdev: float = Field(default=0.05, gt=0, le=2.0, json_schema_extra=unit("Angstrom"))
    """Standard deviation of each Cartesian displacement, Angstrom."""

    def generate(self, given: GenerationInputs) -> Iterable[Atoms]:
        """Displaced start geometries."""
        return self.changed(given, lambda frame, draw, _: displaced(frame, self.stdev, draw))


class StrainedSettings(GeneratorSettings):
    """Start geometries with strained cells, atoms carried along and displaced at random."""

    kind: Literal["strained"] = "strained"
    strain: float = Field(default=0.05, gt=0, le=0.5)
    """Largest component of the strain; each is drawn uniformly between minus this and this."""
    shape: Literal["full", "isotropic"] = "full"
    """Whether all components are drawn, or one that all directions share."""
    stdev: float = Field(default=0.0, ge=0, le=2.0, json_schema_extra=unit("Angstrom"))
    """Standard deviation of each Cartesian displacement afterwards, Angstrom."""

    def unsuited(self, start: Atoms) -> str | None:
        """It has to be periodic in three directions."""
        return None if start.pbc.all() else "is not periodic in three directions (take 'rattled' for it)"

    def generate(self, given: GenerationInputs) -> Iterable[Atoms]:
        """Strained start geometries."""
        return self.changed(given, self._strained)

    def _strained(self, frame: Atoms, generator: np.random.Generator, turn: int) -> Atoms:
        drawn = generator.uniform(-self.strain, self.strain, size=(3, 3))
        strain = np.triu(drawn) + np.triu(drawn, 1).T if self.shape == "full" else drawn[0, 0] * np.eye(3)
        held = frame.constraints
        frame.set_constraint()  # everything is carried along
        frame.set_cell(frame.cell.array @ (np.eye(3) + strain), scale_atoms=True)
        frame.set_constraint(held)
        return displaced(frame, self.stdev, generator) if self.stdev else frame
