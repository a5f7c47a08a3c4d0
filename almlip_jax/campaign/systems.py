"""The systems of a campaign: what they are called, which of them a structure belongs to, and what each is owed.

A campaign whose start geometries have no names is one system without a name, and nothing of this is looked at.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from ase import Atoms

from almlip_jax.errors import InputError
from almlip_jax.structures.carried import SYSTEM, system_of

_NOT_TEXT = ("t", "f", "true", "false", "nan", "inf", "infinity", "none")
"""What files would read back as something else than a name."""


def check_name(name: str) -> str:
    """A name that files, columns and groups can hold; raises ValueError for others."""
    if not name or not name[0].isalpha() or not all(sign.isalnum() or sign in "_-+." for sign in name):
        raise ValueError(f"'{name}' cannot name a system; take letters, digits and _-+., beginning with a letter.")
    if name.lower() in _NOT_TEXT:
        raise ValueError(f"files would not read '{name}' back as a name; call the system otherwise.")
    return name


def check_known(named: Iterable[str], systems: Collection[str], where: str) -> None:
    """Refuses names of systems, under some key, that there are not; raises ValueError."""
    strange = [name for name in named if name not in systems]
    if strange and not systems:
        raise ValueError(
            f"{where} names '{strange[0]}', but the systems have no names; give system.structures as {{name: file}}, "
            "or name none."
        )
    if strange:
        raise ValueError(f"{where} names '{strange[0]}'; the systems are: {', '.join(systems)}.")


def quoted(names: Iterable[str]) -> str:
    """Names of systems for a sentence.

    >>> quoted(["water", "slab"])
    "'water' and 'slab'"
    """
    return " and ".join(f"'{name}'" for name in names)


def concerns(systems: Collection[str], system: str | None) -> bool:
    """Whether what is for some named systems, or for all where none is named, is for one."""
    return not systems or system in systems


def names_of(geometries: Iterable[Atoms]) -> tuple[str, ...]:
    """Names of the systems that start geometries belong to, in their order; none where they have no names."""
    return tuple(dict.fromkeys(name for frame in geometries if (name := system_of(frame)) is not None))


def name_systems(frames: Sequence[Atoms], geometries: Sequence[Atoms], where: str) -> list[Atoms]:
    """The structures, each with the name of its system in ``info["system"]``, if it has one.

    A structure belongs to the system that it names, else to the only one that has a start geometry of its composition
    and periodicity, else to none.

    Args:
        frames: are changed.
        geometries: start geometries, with names; without them none are given, and what is stated is taken away.
        where: the structures are from, for messages.

    Raises:
        InputError: a structure names a system that there is not.
    """
    known, alike = names_of(geometries), _systems_alike(geometries)
    for number, frame in enumerate(frames):
        stated = system_of(frame)
        if not known:
            frame.info.pop(SYSTEM, None)
        elif stated is None:
            if len(names := alike.get(_composition(frame), ())) == 1:
                frame.info[SYSTEM] = names[0]
        elif stated not in known:
            raise InputError(
                f"{where}, frame {number} belongs to system '{stated}', but the systems are: {', '.join(known)}; name "
                "one of them in its info, or none."
            )
    return list(frames)


def _systems_alike(geometries: Sequence[Atoms]) -> dict[tuple[Any, ...], tuple[str, ...]]:
    """Names of the systems by composition and periodicity of their start geometries."""
    found: dict[tuple[Any, ...], tuple[str, ...]] = {}
    for frame in geometries:
        name, kind = system_of(frame), _composition(frame)
        if name is not None and name not in found.get(kind, ()):
            found[kind] = (*found.get(kind, ()), name)
    return found


def _composition(frame: Atoms) -> tuple[Any, ...]:
    return (*sorted(frame.numbers.tolist()), *frame.pbc.tolist())


def by_system(frames: Iterable[Atoms], names: Sequence[str]) -> dict[str | None, list[Atoms]]:
    """The structures of each system, in the order of their names, those of none last; without empty ones."""
    found: dict[str | None, list[Atoms]] = {name: [] for name in (*names, None)}
    for frame in frames:
        found[system_of(frame)].append(frame)
    return {name: some for name, some in found.items() if some}


def group_of(system: str | None, group: str) -> str:
    """The name of a group of the test set, of one system.

    >>> group_of("water", "300K"), group_of(None, "300K")
    ('water 300K', '300K')
    """
    return group if system is None else f"{system} {group}"


def systems_of_walkers(shares: Mapping[str, float], walkers: Sequence[Collection[str]]) -> list[str | None]:
    """The system of each walker, by the shares of named systems; none where there are no names.

    Walkers that may be of the same systems are dealt out among these, whatever others there are.

    Args:
        shares: of the systems.
        walkers: the systems that each may be of; of all where none is named.

    >>> systems_of_walkers({"water": 1, "slab": 1}, [(), (), ["slab"], ["slab"], ()])
    ['water', 'slab', 'slab', 'slab', 'water']
    """
    if not shares:
        return [None] * len(walkers)
    allowed = [tuple(name for name in shares if name in (some or shares)) for some in walkers]
    turns = {some: iter(deal({name: shares[name] for name in some}, allowed.count(some))) for some in set(allowed)}
    return [next(turns[some]) for some in allowed]


def deal(shares: Mapping[str, float], total: int, room: Mapping[str, int] | None = None) -> list[str]:
    """The systems that the units of a total go to, one after the other.

    Each unit goes to the system that is furthest behind its share (Sainte-Lague), of several to the first; what a
    system cannot use goes to the others.

    Args:
        shares: of the systems.
        total: units to be given out; fewer are where there is no room for all.
        room: what each can use; as much as it gets by default.

    >>> deal({"water": 1, "slab": 2}, 6)
    ['slab', 'water', 'slab', 'slab', 'water', 'slab']
    >>> deal({"water": 1, "slab": 2}, 6, {"water": 9, "slab": 1})
    ['slab', 'water', 'water', 'water', 'water', 'water']
    """
    given, order = dict.fromkeys(shares, 0), []
    for _ in range(total):
        open_ones = [name for name in shares if room is None or given[name] < room.get(name, 0)]
        if not open_ones:
            break
        order.append(min(open_ones, key=lambda name: (given[name] + 0.5) / shares[name]))
        given[order[-1]] += 1
    return order


def dealt_in_batches(shares: Mapping[str, float], batch: int, total: int) -> Counter[str]:
    """What systems get of a total that comes in batches, each of which they share anew; see `deal`.

    >>> sorted(dealt_in_batches({"water": 1, "slab": 1}, 3, 10).items())
    [('slab', 3), ('water', 7)]
    """
    batches, rest = divmod(total, batch)
    found = Counter({name: batches * number for name, number in Counter(deal(shares, batch)).items()})
    return found + Counter(deal(shares, rest))


def short_of_shares(shares: Mapping[str, float], total: int, room: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Systems that cannot use their share of a total: how much of it they can, and how much it is.

    >>> short_of_shares({"water": 1, "slab": 2}, 6, {"water": 9, "slab": 1})
    {'slab': (1, 4)}
    """
    owed = Counter(deal(shares, total))
    return {name: (room.get(name, 0), owed[name]) for name in shares if room.get(name, 0) < owed[name]}
