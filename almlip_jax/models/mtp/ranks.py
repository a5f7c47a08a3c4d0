"""Which sums over neighbours are formed, and how moments of all ranks follow from them.

Directions have length one, x^2 + y^2 + z^2 = 1, so that a moment of a rank is the trace of that of two ranks more:

    M[mu, nu] = M[mu, nu + 2]_xx + M[mu, nu + 2]_yy + M[mu, nu + 2]_zz.

Of each radial function the components of the two highest ranks alone are summed over neighbours, (nu + 1)^2 of them
(49 of 84 up to rank 6, 81 of 165 up to rank 8), and those of lower ranks are sums of these, in which no digits are
lost.  Up to rank 2, where one component would be saved, all are summed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import NamedTuple, TypeAlias

import jax

from almlip_jax.materialise import materialised
from almlip_jax.models.layout import join, split
from almlip_jax.models.mtp.basis import Basis, directions
from almlip_jax.models.mtp.tables import LinearTable, chosen_rows, linear_rows

Power: TypeAlias = tuple[int, int, int]
Moment: TypeAlias = tuple[int, int, int, int]


_SHORT = 2  # highest rank up to which components of all ranks are summed over neighbours


@lru_cache(maxsize=64)
def summed_powers(rank: int) -> tuple[Power, ...]:
    """Exponents (a, b, c) of the components of u that are summed where a rank is the highest, from that rank down."""
    lowest = 0 if rank <= _SHORT else rank - 1
    return tuple(along for nu in range(rank, lowest - 1, -1) for along, _ in directions(nu))


def _raised_twice(power: Sequence[int]) -> list[Power]:
    """The products of a power with x^2, y^2 and z^2."""
    a, b, c = power
    return [(a + 2, b, c), (a, b + 2, c), (a, b, c + 2)]


class Part(NamedTuple):
    """Radial functions from one to before another, whose moments have the same highest rank."""

    first: int
    last: int
    rank: int

    @property
    def functions(self) -> int:
        """Number of radial functions m."""
        return self.last - self.first

    @property
    def powers(self) -> int:
        """Number of powers n."""
        return len(summed_powers(self.rank))

    @property
    def short(self) -> bool:
        """Whether all ranks are summed over neighbours."""
        return self.rank <= _SHORT

    def turned(self, cotangent: jax.Array) -> jax.Array:
        """From cotangents of the sums [m * n, A] to what powers are multiplied by, [m * 4 * n, A].

        For each radial function that gives, first, its cotangent, and then those of directions along x, y and z.
        """
        return linear_rows(_turning(self), cotangent)

    def turned_back(self, cotangent: jax.Array) -> jax.Array:
        """The transposed map."""
        return linear_rows(_turning(self).turned, cotangent)


@lru_cache(maxsize=256)
def _turning(part: Part) -> LinearTable:
    """See `Part.turned`: the derivative of a power is one of the rank below, or the sum of three of two ranks more."""
    powers = summed_powers(part.rank)
    place = {along: n for n, along in enumerate(powers)}
    rows: list[tuple[tuple[int, float], ...]] = []
    for start in range(0, part.powers * part.functions, part.powers):
        rows += [((start + n, 1.0),) for n in range(part.powers)]
        for axis in range(3):
            slopes: list[list[tuple[int, float]]] = [[] for _ in powers]
            for n, power in enumerate(powers):
                if power[axis]:
                    a, b, c = (x - (i == axis) for i, x in enumerate(power))
                    for one in [(a, b, c)] if (a, b, c) in place else _raised_twice((a, b, c)):
                        slopes[place[one]].append((start + n, float(power[axis])))
            rows += map(tuple, slopes)
    return LinearTable(tuple(rows), part.powers * part.functions)


@dataclass(frozen=True)
class Shape:
    """Which moments are formed: for mu = 0, 1, ... all components of the ranks 0 to ``ranks[mu]``.

    Attributes:
        ranks: highest rank for each mu.
        wanted: (mu, a, b, c) of the basic moments of a basis.
    """

    ranks: tuple[int, ...]
    wanted: tuple[Moment, ...]

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """Neighbouring radial functions of the same highest rank together."""
        found: list[Part] = []
        for mu, rank in enumerate(self.ranks):
            first = found.pop().first if found and found[-1].rank == rank else mu
            found.append(Part(first, mu + 1, rank))
        return tuple(found)

    @cached_property
    def tops(self) -> tuple[int, ...]:
        """The highest ranks, each once, but for 0, whose one component is 1."""
        return tuple(sorted(set(self.ranks) - {0}))

    @property
    def short(self) -> bool:
        """Whether all moments are summed over neighbours."""
        return not self._traces

    @cached_property
    def _levels(self) -> tuple[tuple[Moment, ...], ...]:
        """(mu, a, b, c) of the sums over neighbours, part by part, and of the moments of two ranks less each time."""
        found = [tuple((mu, *along) for mu, rank in enumerate(self.ranks) for along in summed_powers(rank))]
        for less in range(2, max(self.ranks) + 1, 2):
            lower = [(mu, nu) for mu, rank in enumerate(self.ranks) if rank > _SHORT for nu in (rank, rank - 1)]
            found.append(tuple((mu, *along) for mu, nu in lower if nu >= less for along, _ in directions(nu - less)))
        return tuple(level for level in found if level)

    @cached_property
    def _traces(self) -> tuple[LinearTable, ...]:
        """From each of the levels to the next one."""
        found = []
        for above, below in zip(self._levels, self._levels[1:], strict=False):
            place = {row: n for n, row in enumerate(above)}
            terms = (tuple((place[mu, *one], 1.0) for one in _raised_twice(along)) for mu, *along in below)
            found.append(LinearTable(tuple(terms), len(above)))
        return tuple(found)

    @cached_property
    def _places(self) -> tuple[int, ...]:
        """Where the basic moments are among those of all levels."""
        place = {row: n for n, row in enumerate(row for level in self._levels for row in level)}
        return tuple(place[moment] for moment in self.wanted)

    @cached_property
    def _sizes(self) -> tuple[int, ...]:
        return tuple(map(len, self._levels))

    def expanded(self, sums: jax.Array) -> jax.Array:
        """The basic moments [n, A] from the sums over neighbours, [rows, A]."""
        found = [sums]
        for table in self._traces:
            found.append(linear_rows(table, found[-1]))
        return chosen_rows(self._places, sum(self._sizes), join(tuple(found), self._sizes, 0))

    def collected(self, cotangent: jax.Array) -> jax.Array:
        """The transposed map: cotangents of the sums from those of the basic moments."""
        back = [-1] * sum(self._sizes)
        for n, place in enumerate(self._places):
            back[place] = n
        *above, found = split(chosen_rows(tuple(back), len(self.wanted), cotangent), self._sizes, 0)
        for level, table in zip(reversed(above), reversed(self._traces), strict=True):
            found = level + linear_rows(table.turned, found)
        return found


@lru_cache(maxsize=64)
def shape_of(basis: Basis) -> Shape:
    """The moments of a basis."""
    ranks = [0] * basis.radial_functions
    for mu, *along in basis.moments:
        ranks[mu] = max(ranks[mu], sum(along))
    return Shape(tuple(ranks), basis.moments)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def linearly(
    function: Callable[[jax.Array], jax.Array],
    transposed: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    condition: jax.Array | None,
) -> jax.Array:
    """A linear function of an array, as an array of its own where it has a condition; see `materialised`.

    Args:
        function: hashable.
        transposed: the function back from its cotangents.
        x: what it is of.
        condition: bool scalar that the compiler cannot know.  Where it is false the result is zero.
    """
    found: jax.Array = function(x) if condition is None else materialised(function, condition, x)
    return found


linearly.defvjp(
    lambda function, transposed, x, condition: (linearly(function, transposed, x, condition), condition),
    lambda function, transposed, condition, cotangent: (linearly(transposed, function, cotangent, condition), None),
)
