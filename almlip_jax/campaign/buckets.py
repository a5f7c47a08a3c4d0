"""Which walkers of a campaign run side by side in one compiled program, when its systems are of unlike sizes.

All walkers of a program are padded to the most atoms and neighbours among them: a molecule beside a slab would cost as
much as the slab.  A program for each system would compile for minutes.  So systems share programs where that costs
little, and in any case where there would be more than `MOST`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from ase import Atoms

from almlip_jax.dynamics import ExplorationSettings
from almlip_jax.structures.carried import system_of
from almlip_jax.structures.neighbors import largest_neighbor_count

MOST = 4
"""Programs of an exploration at most, however many systems there are."""

_WASTE = 0.25  # of the work of all systems in programs of their own, that padding may add before they share fewer


@dataclass(frozen=True)
class Bucket:
    """Walkers of one program.

    Attributes:
        systems: whose walkers they are; none where systems have no names.
        walkers: their numbers among all walkers.
        atoms: least room for the atoms of each.
    """

    systems: tuple[str, ...]
    walkers: tuple[int, ...]
    atoms: int

    def called(self, name: str) -> str:
        """The name of an explorer of these walkers."""
        return f"{name} of {', '.join(self.systems)}" if self.systems else name

    def of(self, settings: ExplorationSettings) -> ExplorationSettings:
        """The exploration with these walkers alone."""
        if not self.systems:
            return settings
        single = [group.model_copy(update={"count": 1}) for group in settings.walkers for _ in range(group.count)]
        biases = tuple(bias.of_walkers(self.walkers) for bias in settings.biases)
        return settings.model_copy(
            update={"walkers": tuple(single[walker] for walker in self.walkers), "biases": biases}
        )


@dataclass(frozen=True)
class Size:
    """What the walkers of a system need.

    Attributes:
        walkers: how many there are.
        atoms: of each at most.
        neighbors: of an atom at most.
    """

    walkers: int
    atoms: int
    neighbors: int


def buckets(
    systems: Sequence[str | None], geometries: Sequence[Atoms], listed: Sequence[Atoms], reach: float
) -> list[Bucket]:
    """The programs of an exploration; the same from round to round.

    Args:
        systems: of the walkers.
        geometries: start geometries.
        listed: structures of a file that walkers start at.
        reach: Angstrom, within which atoms are neighbours.
    """
    names = [*dict.fromkeys(name for name in systems if name is not None)]
    if not names:
        return [Bucket((), tuple(range(len(systems))), max(map(len, listed), default=0))]
    sizes = {}
    for name in names:
        mine = [frame for frame in [*geometries, *listed] if system_of(frame) == name]
        sizes[name] = Size(systems.count(name), max(map(len, mine)), largest_neighbor_count(mine, reach))
    return [
        Bucket(
            group,
            tuple(walker for walker, name in enumerate(systems) if name in group),
            max(sizes[name].atoms for name in group),
        )
        for group in shared_programs(sizes)
    ]


def shared_programs(sizes: Mapping[str, Size], most: int = MOST) -> list[tuple[str, ...]]:
    """The systems that share each program, in their order.

    Of all pairs of programs that with the least padding become one, until there are few enough and the next pair would
    add too much to the work, which goes with walkers, atoms and neighbours.

    Args:
        sizes: of the systems.
        most: programs at most.

    >>> small, large = Size(2, 3, 2), Size(2, 100, 60)
    >>> shared_programs({"water": small, "slab": large, "ammonia": Size(2, 4, 3)})
    [('water', 'ammonia'), ('slab',)]
    """

    def work(group: Sequence[str]) -> int:
        of_group = [sizes[name] for name in group]
        padded = max(one.atoms for one in of_group) * (1 + max(one.neighbors for one in of_group))
        return sum(one.walkers for one in of_group) * padded

    groups: list[tuple[str, ...]] = [(name,) for name in sizes]
    alone = sum(map(work, groups))
    while len(groups) > 1:
        pair = min(combinations(groups, 2), key=lambda two: work(two[0] + two[1]) - work(two[0]) - work(two[1]))
        others = [group for group in groups if group not in pair]
        joined = tuple(name for name in sizes if name in pair[0] + pair[1])
        if len(groups) <= most and sum(map(work, [*others, joined])) > (1 + _WASTE) * alone:
            break
        groups = sorted([*others, joined], key=lambda group: list(sizes).index(group[0]))
    return groups
