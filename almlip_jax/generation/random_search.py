"""Random structure search: random cells and positions, relaxed with the ensemble once there is one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Annotated, ClassVar, Literal, Self

import numpy as np
from ase import Atoms
from ase.data import covalent_radii
from pydantic import Field, model_validator

from almlip_jax.dynamics import RelaxationSettings
from almlip_jax.errors import InputError
from almlip_jax.generation.base import (
    DRAWS,
    GenerationInputs,
    GeneratorSettings,
    apart,
    charged,
    numbers_of,
    refuse_disorder,
)
from almlip_jax.settings import unit

Count = Annotated[int, Field(ge=1, le=1000)]
Volume = Annotated[float, Field(ge=1, le=1000)]
_ANGLES = (60.0, 120.0)  # degrees
_ELONGATION = 2.0  # longest cell vector over the shortest, at most
_DENSEST = math.pi / math.sqrt(18)  # share of space that equal balls can fill
_TRIES = 50  # places for an atom, before another cell is drawn


class RandomSearchSettings(GeneratorSettings):
    """Crystals with random cells and positions (Pickard and Needs, J. Phys.: Condens. Matter 23, 053201 (2011)).

    In an exploration they are relaxed with the ensemble, without any label; in an initial set they are as drawn.
    """

    needs_starts: ClassVar[bool] = False

    kind: Literal["random_search"] = "random_search"
    composition: dict[str, Count] | None = None
    """Atoms of each element in a formula unit, as ``{Si: 1, O: 2}``; those of the start geometries, in turn, where none
    is given."""
    units: tuple[Count, Count] = (1, 1)
    """Fewest and most formula units in a cell."""
    volume: tuple[Volume, Volume] | None = Field(default=None, json_schema_extra=unit("Angstrom^3"))
    """Smallest and largest volume for each atom, Angstrom^3; 0.8 to 1.3 times that of the start geometries, in turn,
    where none is given."""
    closest: float = Field(default=0.8, ge=0, le=2)
    """Least distance of two atoms, over the sum of their covalent radii; what is closer is drawn again."""
    relax: RelaxationSettings | None = RelaxationSettings(cell="full", steps=300)
    """How they are relaxed with the ensemble; null leaves them as they are."""

    @model_validator(mode="after")
    def _can_be_drawn(self) -> Self:
        if self.composition is not None:
            numbers_of(tuple(self.composition), "composition")
        refuse_disorder(units=self.units, volume=self.volume)
        return self

    @property
    def elements(self) -> frozenset[int]:
        """Those of the composition."""
        return frozenset(numbers_of(tuple(self.composition or ()), "composition"))

    @property
    def relaxation(self) -> RelaxationSettings | None:
        """As given."""
        return self.relax

    def unsuited(self, start: Atoms) -> str | None:
        """It has to be neutral where its composition is taken, a crystal where its volume is, with room for atoms."""
        if self.composition is not None and self.volume is not None:
            return None
        if self.volume is None and not start.pbc.all():
            return "is not periodic in three directions, so that it says no volume (give a volume)"
        numbers = start.numbers.tolist() if self.composition is None else self._formula()
        return self._crowded(numbers, self._volumes(start)[1]) or (charged(start) if self.composition is None else None)

    def check(self, starts: Sequence[Atoms]) -> None:
        """There have to be some where composition or volume follow from them; else there has to be room."""
        if self.composition is not None and self.volume is not None:
            if crowded := self._crowded(self._formula(), self.volume[1]):
                raise InputError(f"'random_search' {crowded}.")
        elif not starts:
            raise InputError("'random_search' takes composition and volume from start geometries; give both, or these.")

    def _crowded(self, numbers: Sequence[int], largest: float) -> str | None:
        """What is to be said of a volume for each atom that separate balls cannot be packed into; None of others."""
        needed = float(np.mean((self.closest * covalent_radii[numbers]) ** 3)) * 4 / 3 * math.pi / _DENSEST
        if needed <= largest:
            return None
        return (
            f"has at most {largest:.3g} Angstrom^3 for each atom, which is too little for "
            f"{Atoms(numbers).get_chemical_formula()} with atoms {self.closest:g} of their covalent distance apart "
            "(give a larger volume, or lower closest)"
        )

    def _volumes(self, start: Atoms) -> tuple[float, float]:
        """Smallest and largest volume for each atom, Angstrom^3."""
        if self.volume is not None:
            return self.volume
        own = start.get_volume() / len(start)
        return 0.8 * own, 1.3 * own

    def generate(self, given: GenerationInputs) -> Iterable[Atoms]:
        """Random crystals."""
        return [self._one(given, number) for number in range(self.count)]

    def _one(self, given: GenerationInputs, number: int) -> Atoms:
        draw, start = given.generator, given.starts[number % len(given.starts)] if given.starts else Atoms()
        formula = start.numbers.tolist() if self.composition is None else self._formula()
        low, high = self._volumes(start)
        for _ in range(DRAWS):
            numbers = sorted(formula * int(draw.integers(self.units[0], self.units[1] + 1)))
            cell = _random_cell(float(draw.uniform(low, high)) * len(numbers), draw)
            frame = _filled(numbers, cell, self.closest, draw)
            if frame is not None:
                if self.composition is None:
                    frame.info = dict(start.info)
                return frame
        raise InputError(
            f"'random_search' finds no places for {len(formula)} atoms or more in {low:.3g} to {high:.3g} Angstrom^3 "
            f"each that are {self.closest:g} of their covalent distance apart; give a larger volume, or lower closest."
        )

    def _formula(self) -> list[int]:
        composition = self.composition or {}
        return [
            z
            for z, count in zip(numbers_of(tuple(composition), ""), composition.values(), strict=True)
            for _ in range(count)
        ]


def _random_cell(volume: float, draw: np.random.Generator) -> np.ndarray:
    """Cell vectors [3, 3] of a volume (Angstrom^3), neither flat nor long."""
    while True:
        lengths, angles = draw.uniform(1, _ELONGATION, size=3), np.radians(draw.uniform(*_ANGLES, size=3))
        a, b, c = np.cos(angles)
        square = 1 + 2 * a * b * c - a**2 - b**2 - c**2
        if square > 0.1:
            break
    first, second = np.array([1.0, 0, 0]), np.array([c, math.sqrt(1 - c**2), 0])
    third = np.array([b, (a - b * c) / math.sqrt(1 - c**2), 0])
    third[2] = math.sqrt(1 - third[0] ** 2 - third[1] ** 2)
    cell = lengths[:, None] * np.stack([first, second, third])
    return cell * (volume / abs(np.linalg.det(cell))) ** (1 / 3)


def _filled(numbers: Sequence[int], cell: np.ndarray, closest: float, draw: np.random.Generator) -> Atoms | None:
    """Atoms at random places of a cell, one after the other; None where one finds no place."""
    images = np.array(np.meshgrid(*[[-1, 0, 1]] * 3)).reshape(3, -1).T @ cell
    least = closest * (covalent_radii[numbers][:, None] + covalent_radii[numbers][None])
    places = np.zeros((0, 3))
    for n in range(len(numbers)):
        tried = draw.uniform(size=(_TRIES, 3)) @ cell
        apart_from = tried[:, None, None] - places[:, None] - images  # [tries, n, images, 3]
        free = np.all(np.linalg.norm(apart_from, axis=-1).min(axis=-1, initial=np.inf) >= least[n, :n], axis=1)
        if not free.any():
            return None
        places = np.vstack([places, tried[np.argmax(free)]])
    frame = Atoms(numbers, positions=places, cell=cell, pbc=True)
    return frame if apart(frame, closest) else None
