"""The points of a sweep: which there are, which train side by side, and which of them are asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Protocol, Self

from almlip_jax.errors import InputError, meant

if TYPE_CHECKING:
    from almlip_jax.sweep.settings import SweepConfig


@dataclass(frozen=True)
class Point:
    """One learning curve.

    Attributes:
        system: name of the pool.
        selector: name of the selector.
        seed: of all that is random.
        batch_size: structures of a round.
        ensemble_size: models.
    """

    system: str
    selector: str
    seed: int
    batch_size: int
    ensemble_size: int

    @property
    def name(self) -> str:
        """Path of its folder, and what it is called."""
        return f"{self.system}/{self.selector}/seed{self.seed}-batch{self.batch_size}-ensemble{self.ensemble_size}"


@dataclass(frozen=True)
class First:
    """What all points of a system, a seed and an ensemble size begin with: the potential of round 0."""

    system: str
    seed: int
    ensemble_size: int

    @property
    def name(self) -> str:
        """Path of its folder, and what it is called."""
        return f"{self.system}/seed{self.seed}-ensemble{self.ensemble_size}"


@dataclass(frozen=True)
class Group:
    """Trainings of one shape that share a program, each on a lane of its own; the config alone decides who they are.

    Attributes:
        members: lane by lane; all `First` or all `Point`, of one system and ensemble size.
        wanted: lanes that are asked for; the others are filled up with copies of these.
    """

    members: tuple[First, ...] | tuple[Point, ...]
    wanted: tuple[int, ...]

    @property
    def width(self) -> int:
        """Number of lanes."""
        return len(self.members)


class Workers(Protocol):
    """Who work on groups; a context manager that ends them."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def work(self, groups: Sequence[Group], on_rounds: Callable[[int], None]) -> None:
        """Works on all groups; comes back when every one is done.

        Args:
            groups: in the order in which they begin.
            on_rounds: told how many rounds of groups have become complete.

        Raises:
            InputError: what a group met, or workers that cannot be had or go away.
        """
        ...


Only = dict[str, set[str]]
"""Which points are asked for: name of a field -> values, as text."""


def all_points(config: SweepConfig) -> list[Point]:
    """Every point of a sweep, in the order of the table."""
    return [
        Point(system, selector, seed, batch, size)
        for system in config.systems
        for size in config.ensemble_sizes
        for batch in config.batch_sizes
        for selector in config.selectors
        for seed in config.seed_list
    ]


def parse_only(texts: Sequence[str], config: SweepConfig) -> Only:
    """Reads ``system=a,seed=3``; several values of one field are alternatives.

    Raises:
        InputError: a field or a value that the sweep does not have.
    """
    points = all_points(config)
    names = [field.name for field in fields(Point)]
    only: Only = {}
    for part in (part.strip() for text in texts for part in text.split(",")):
        name, equals, value = part.partition("=")
        if not equals or name not in names:
            raise InputError(f"'{part}' does not name points; give {', '.join(names)} as name=value.")
        known = sorted({str(getattr(point, name)) for point in points})
        if value not in known:
            hint = meant(value, known) or f"it has {', '.join(known)}."
            raise InputError(f"the sweep has no {name} '{value}'; {hint}")
        only.setdefault(name, set()).add(value)
    return only


def is_wanted(point: Point, only: Only) -> bool:
    """Whether a point is asked for."""
    return all(str(getattr(point, name)) in values for name, values in only.items())


def first_groups(config: SweepConfig, wanted: Sequence[Point]) -> list[Group]:
    """First potentials that some points need, by the seeds that train side by side."""
    needed = {first_of(point) for point in wanted}
    groups = []
    for system in config.systems:
        for size in config.ensemble_sizes:
            firsts = [First(system, seed, size) for seed in config.seed_list]
            groups += _grouped(firsts, needed, config.side_by_side)
    return groups


def point_groups(config: SweepConfig, wanted: Sequence[Point]) -> list[Group]:
    """Points that are asked for, by those that train side by side."""
    shapes: dict[tuple[str, int, int], list[Point]] = {}
    for point in all_points(config):
        shapes.setdefault((point.system, point.ensemble_size, point.batch_size), []).append(point)
    needed = set(wanted)
    return [group for points in shapes.values() for group in _grouped(points, needed, config.side_by_side)]


def first_of(point: Point) -> First:
    """What a point begins with."""
    return First(point.system, point.seed, point.ensemble_size)


def _grouped(members: Sequence[First] | Sequence[Point], needed: set, width: int) -> list[Group]:
    groups = []
    for begin in range(0, len(members), width):
        chunk = tuple(members[begin : begin + width])
        lanes = tuple(lane for lane, member in enumerate(chunk) if member in needed)
        if lanes:
            groups.append(Group(chunk, lanes))  # type: ignore[arg-type]
    return groups
