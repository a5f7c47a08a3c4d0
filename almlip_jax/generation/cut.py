"""Crystals with atoms missing, and crystals cut: vacancies and surfaces."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal, Self

import numpy as np
from ase import Atoms
from ase.build import surface
from pydantic import Field, model_validator

from almlip_jax.generation.base import GenerationInputs, GeneratorSettings, charged, numbers_of
from almlip_jax.generation.deformed import displaced
from almlip_jax.settings import unit

Times = Annotated[int, Field(ge=1, le=20)]
Miller = Annotated[int, Field(ge=-9, le=9)]


class VacanciesSettings(GeneratorSettings):
    """Start geometries, repeated, without some of their atoms."""

    kind: Literal["vacancies"] = "vacancies"
    repeat: tuple[Times, Times, Times] = (1, 1, 1)
    """Repetitions of the cell along its vectors before atoms are taken out."""
    missing: int = Field(default=1, ge=1, le=1000)
    """Most atoms taken out of a structure; each number from 1 on is as likely."""
    species: tuple[str, ...] = ()
    """Elements that are taken out; all where none is named."""
    stdev: float = Field(default=0.0, ge=0, le=2.0, json_schema_extra=unit("Angstrom"))
    """Standard deviation of each Cartesian displacement of the atoms that are left, Angstrom."""

    @model_validator(mode="after")
    def _elements_exist(self) -> Self:
        numbers_of(self.species, "species")
        return self

    def unsuited(self, start: Atoms) -> str | None:
        """It has to be periodic and neutral, and to keep atoms."""
        if not start.pbc.any():
            return "is not periodic"
        times = int(np.prod(self.repeat))
        there = len(self._removable(start)) * times
        if there < self.missing or len(start) * times <= self.missing:
            return (
                f"has, when repeated, {there} atoms that may be missing, too few for missing {self.missing} (lower it, "
                "or raise repeat)"
            )
        return charged(start)

    def generate(self, given: GenerationInputs) -> Iterable[Atoms]:
        """Repeated start geometries without some atoms."""
        return self.changed(given, self._without)

    def _without(self, frame: Atoms, generator: np.random.Generator, turn: int) -> Atoms:
        larger = frame.repeat(self.repeat)
        removed = generator.choice(
            self._removable(larger), size=int(generator.integers(1, self.missing + 1)), replace=False
        )
        del larger[sorted(removed.tolist())]
        return displaced(larger, self.stdev, generator) if self.stdev else larger

    def _removable(self, frame: Atoms) -> np.ndarray:
        if not self.species:
            return np.arange(len(frame))
        return np.flatnonzero(np.isin(frame.numbers, numbers_of(self.species, "species")))


class SurfacesSettings(GeneratorSettings):
    """Slabs cut from start geometries at random heights, with a vacuum above and below."""

    kind: Literal["surfaces"] = "surfaces"
    indices: tuple[tuple[Miller, Miller, Miller], ...] = Field(
        default=((1, 0, 0), (1, 1, 0), (1, 1, 1)), min_length=1, max_length=1000
    )
    """Miller indices of the surfaces, which take turns."""
    layers: int = Field(default=3, ge=1, le=100)
    """Repetitions of the cut cell along the surface normal."""
    repeat: tuple[Times, Times] = (1, 1)
    """Repetitions along the surface."""
    vacuum: float = Field(default=8.0, ge=1, le=100, json_schema_extra=unit("Angstrom"))
    """Empty space on each side of the slab, Angstrom."""
    largest: int = Field(default=200, ge=1, le=10**5)
    """Most atoms of a slab; start geometries with larger ones are left out, and refused where no others are there."""
    periodic_normal: bool = False
    """Whether the direction of the normal is periodic too, as label sources ask that know crystals only."""
    stdev: float = Field(default=0.0, ge=0, le=2.0, json_schema_extra=unit("Angstrom"))
    """Standard deviation of each Cartesian displacement, Angstrom."""

    @model_validator(mode="after")
    def _planes_exist(self) -> Self:
        if any(not any(one) for one in self.indices):
            raise ValueError("indices [0, 0, 0] describe no surface; give at least one that is not 0.")
        return self

    def unsuited(self, start: Atoms) -> str | None:
        """It has to be a neutral crystal, and slabs not too large."""
        if not start.pbc.all():
            return "is not periodic in three directions"
        for one in self.indices:
            atoms = len(self._slab(start, one))
            if atoms > self.largest:
                return (
                    f"has a slab {list(one)} of {atoms} atoms, more than largest {self.largest} (take fewer layers or "
                    "repetitions, a primitive cell, or raise largest)"
                )
        return charged(start)

    def generate(self, given: GenerationInputs) -> Iterable[Atoms]:
        """Slabs: the first surface of every start geometry, then the second of every one, and so on."""
        return self.changed(given, self._cut)

    def _cut(self, frame: Atoms, generator: np.random.Generator, turn: int) -> Atoms:
        frame.set_constraint()
        frame.set_scaled_positions(frame.get_scaled_positions() + generator.uniform(size=3))
        frame.wrap()
        slab = self._slab(frame, self.indices[turn % len(self.indices)])
        return displaced(slab, self.stdev, generator) if self.stdev else slab

    def _slab(self, crystal: Atoms, indices: tuple[int, int, int]) -> Atoms:
        slab = surface(crystal, indices, self.layers, vacuum=self.vacuum, periodic=self.periodic_normal)
        slab = slab.repeat((*self.repeat, 1))
        slab.info = dict(crystal.info)
        return slab
