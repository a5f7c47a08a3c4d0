"""The family of generators: structures made from start geometries without any dynamics.

Packages whose kinds are below it import this module while ours are still being imported, so it imports none of them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from ase import Atoms
from ase.data import atomic_numbers, covalent_radii
from ase.geometry import get_distances, minkowski_reduce
from pydantic import Field

from almlip_jax.errors import InputError
from almlip_jax.kinds import Spec, UserCode
from almlip_jax.structures.carried import carried, system_of
from almlip_jax.structures.electronic_state import electronic_state

if TYPE_CHECKING:
    from almlip_jax.dynamics import RelaxationSettings

_TOLD = 5  # reasons against start geometries
DRAWS = 200
"""Draws of one structure, before what is asked for is declared impossible."""


@dataclass(frozen=True)
class GenerationInputs:
    """What a generator is given.

    Attributes:
        starts: start geometries, with charge and spin.
        generator: source of all that is drawn at random.
        numbers: what messages call the start geometries; counted from 0 where not given.
    """

    starts: Sequence[Atoms]
    generator: np.random.Generator
    numbers: Sequence[int] = ()

    def called(self, place: int) -> str:
        """What messages call the start geometry at a place."""
        return called(self.numbers[place] if self.numbers else place, self.starts[place])


@dataclass(frozen=True)
class Taken:
    """The start geometries that a generator takes.

    Attributes:
        starts: those.
        numbers: their places among all that there are.
        left_out: a sentence on others of its systems, of which it can make nothing; None where there are none.
    """

    starts: list[Atoms]
    numbers: list[int]
    left_out: str | None


class GeneratorSettings(Spec):
    """Structures that are made, rather than found by dynamics."""

    needs_starts: ClassVar[bool] = True
    """Whether it changes start geometries."""

    count: int = Field(default=20, ge=1, le=10**6)
    """Number of structures; of kinds that change start geometries, these take turns."""
    closest: float = Field(default=0.6, ge=0, le=2)
    """Least distance of two atoms, over the sum of their covalent radii; what is closer is drawn again."""
    systems: tuple[str, ...] = ()
    """Names of the systems (`system.structures`) whose start geometries it takes, and, if it is one, of what is made of
    none; those of all systems where none is named.  Start geometries of which it can make nothing are left out."""

    @property
    def elements(self) -> frozenset[int]:
        """Atomic numbers that it brings in, whatever the start geometries hold."""
        return frozenset()

    @property
    def relaxation(self) -> RelaxationSettings | None:
        """How structures are relaxed with the ensemble, once there is one; None where they are not."""
        return None

    def unsuited(self, start: Atoms) -> str | None:
        """Why nothing can be made of a start geometry, as what is to be said of it ("is not periodic"); None where
        something can.
        """
        return None

    def check(self, starts: Sequence[Atoms]) -> None:
        """Refuses start geometries, each of which suits, of which together nothing can be made, or that are missing.

        Raises:
            InputError: says why.
        """

    def take(self, starts: Sequence[Atoms]) -> Taken:
        """The start geometries of its systems that suit.

        Raises:
            InputError: nothing can be made of any, or of any of a system that is named; says why.
        """
        asked = {n: start for n, start in enumerate(starts) if not self.systems or system_of(start) in self.systems}
        reasons = {n: why for n, start in asked.items() if (why := self.unsuited(start)) is not None}
        for name in self.systems or (None,):
            own = [n for n, start in asked.items() if name in (None, system_of(start))]
            if name is not None and not own:
                raise InputError(f"'{self.kind}' is to take start geometries of system '{name}', which has none.")
            if own and all(n in reasons for n in own):
                what = "the start geometries" if name is None else f"system '{name}'"
                refused = _told({n: reasons[n] for n in own}, asked)
                raise InputError(f"'{self.kind}' can make nothing of {what}: {refused}.")
        numbers = [n for n in asked if n not in reasons]
        taken = [asked[n] for n in numbers]
        self.check(taken)
        left_out = f"'{self.kind}' leaves out {len(reasons)} of {len(asked)} start geometries: {_told(reasons, asked)}."
        return Taken(taken, numbers, left_out if reasons else None)

    @abstractmethod
    def generate(self, given: GenerationInputs) -> Iterable[Atoms]:
        """The structures, as many as asked for.

        Raises:
            InputError: there are no such structures.
        """

    def changed(
        self, given: GenerationInputs, change: Callable[[Atoms, np.random.Generator, int], Atoms]
    ) -> list[Atoms]:
        """Start geometries in turn, each changed at random until its atoms are apart as they should be.

        Args:
            given: start geometries and random numbers.
            change: gives another structure for a copy of a start geometry, the random numbers, and how often that
                start geometry had its turn before.

        Raises:
            InputError: atoms come too close in nearly all draws.
        """
        found: list[Atoms] = []
        for number in range(self.count):
            start = given.starts[number % len(given.starts)]
            for _ in range(DRAWS):
                frame = change(carried(start), given.generator, number // len(given.starts))
                if apart(frame, self.closest):
                    found.append(frame)
                    break
            else:
                raise InputError(
                    f"'{self.kind}' nearly always brings atoms of {given.called(number % len(given.starts))} closer "
                    f"than {self.closest:g} of their covalent distance; change less, or lower closest."
                )
        return found


class UserGenerator(UserCode, GeneratorSettings):
    """A user's own factory ``(**parameters)`` of a function of `GenerationInputs`, which gives structures.

    What it draws at random follows from ``given.generator``.
    """

    needs_starts: ClassVar[bool] = False

    kind: Literal["user"] = "user"

    def check_code(self) -> None:
        """Makes the function."""
        self.call_for_function("given")

    def generate(self, given: GenerationInputs) -> Iterable[Atoms]:
        """What the function gives; ``count`` bounds it."""
        found: Iterable[Atoms] = self.call_for_function("given")(given)
        if not isinstance(found, Iterable) or isinstance(found, Atoms):
            raise InputError(f"'{self.function}' must give a list of structures, but gives a {type(found).__name__}.")
        frames = list(found)
        if len(frames) > self.count:
            raise InputError(f"'{self.function}' gives {len(frames)} structures, more than its count {self.count}.")
        for number, frame in enumerate(frames):
            if not isinstance(frame, Atoms):
                raise InputError(f"structure {number} of '{self.function}' is no ase.Atoms.")
            if not apart(frame, self.closest):
                raise InputError(
                    f"structure {number} of '{self.function}' has atoms closer than {self.closest:g} of their covalent "
                    "distance; leave it out, or lower closest."
                )
        return frames


def apart(frame: Atoms, closest: float) -> bool:
    """Whether no two atoms, images of one included, are closer than a share of the sum of their covalent radii."""
    if not closest or not len(frame):
        return True
    radii = covalent_radii[frame.numbers]
    least = closest * (radii[:, None] + radii[None])
    _, distances = get_distances(frame.positions, cell=frame.cell, pbc=frame.pbc)
    np.fill_diagonal(distances, np.inf)
    if np.any(distances < least):
        return False
    shortest = _shortest_translation(frame)
    return bool(np.all(shortest >= closest * 2 * radii))


def _shortest_translation(frame: Atoms) -> float:
    """Distance of an atom to its nearest image, Angstrom; infinite without any."""
    reduced, _ = minkowski_reduce(frame.cell, frame.pbc)  # whose shortest vector is the shortest of the lattice
    return float(np.linalg.norm(reduced, axis=1)[frame.pbc].min(initial=np.inf))


def numbers_of(symbols: Sequence[str], where: str) -> list[int]:
    """Atomic numbers of elements.

    Raises:
        ValueError: one is none.
    """
    unknown = [one for one in symbols if one not in atomic_numbers or one == "X"]
    if unknown:
        raise ValueError(f"{where}: '{unknown[0]}' is not a chemical element.")
    return [atomic_numbers[one] for one in symbols]


def refuse_disorder(**bounds: tuple[float, float] | None) -> None:
    """Refuses pairs of bounds whose smaller one does not come first.

    Raises:
        ValueError: names the first.
    """
    for name, pair in bounds.items():
        if pair is not None and pair[0] > pair[1]:
            raise ValueError(f"{name} {list(pair)} are no bounds; the smaller one comes first.")


def charged(start: Atoms) -> str | None:
    """What is to be said of a start geometry with a charge; None of one without."""
    charge = electronic_state(start)[0]
    return f"has charge {charge:+d}, and it is not known which atoms have it" if charge else None


def called(number: int, start: Atoms) -> str:
    """What messages call a start geometry.

    >>> called(2, Atoms(info={"system": "slab"}))
    'start geometry 2 (slab)'
    """
    return f"start geometry {_number(number, start)}"


def _number(number: int, start: Atoms) -> str:
    name = system_of(start)
    return f"{number}" if name is None else f"{number} ({name})"


def _told(reasons: Mapping[int, str], starts: Mapping[int, Atoms]) -> str:
    """Reasons against start geometries by number: each with the first of every system, and how many more there are."""
    told = []
    for why in dict.fromkeys(reasons.values()):
        numbers = [number for number, other in reasons.items() if other == why]
        shown = list({system_of(starts[number]): number for number in reversed(numbers)}.values())[::-1]
        others = [_number(number, starts[number]) for number in shown[1:]]
        if more := len(numbers) - len(shown):
            others.append(f"{more} more")
        likewise = f", likewise {', '.join(others)}" if others else ""
        told.append(f"{called(shown[0], starts[shown[0]])} {why}{likewise}")
    return "; ".join(told[:_TOLD]) + (f"; and {len(told) - _TOLD} more" if len(told) > _TOLD else "")
