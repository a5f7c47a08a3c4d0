"""The basis of moment tensor potentials of any level.

Moments M[mu, nu] = sum over neighbours of f_mu(|r|) u x ... x u (nu factors u = r / |r|) have level 2 + 4 mu + nu.  The
basis functions are the scalars that come of products of moments by contracting every index with one of another moment,
up to a sum of levels (Shapeev, Multiscale Model. Simul. 14, 1153, 2016; Novikov et al., Mach. Learn.: Sci. Technol. 2,
025002, 2021) and of at most four moments, as in published templates.

A contraction is a graph: moments are vertices and pairs of contracted indices edges; equal graphs are equal scalars.
A component of an intermediate tensor is a graph with indices left open and a direction for each; of one moment's open
indices it matters only how many point along x, y and z.  A component that takes several moments is a sum over products
of components of two parts; the cheapest way to part it is taken, and what several scalars need is computed once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import cache
from itertools import combinations, combinations_with_replacement, permutations, product
from math import comb, factorial, prod
from typing import NamedTuple

Along = tuple[int, int, int]  # how many indices point along x, y and z
Part = tuple[int, ...]  # some of the moments
FACTORS = 4  # moments in a product: functions of at most five atoms
LARGEST_MU, LARGEST_NU = 5, 10  # in published tables


class Component(NamedTuple):
    """A component of a contraction of moments: radial functions, open indices [n, 3] and contracted ones [n, n]."""

    mus: tuple[int, ...]
    open: tuple[Along, ...]
    edges: tuple[tuple[int, ...], ...]


class Basis(NamedTuple):
    """A basis as files hold it, in numbers alone.

    Attributes:
        moments: (mu, a, b, c) of each basic moment, the sum over neighbours of f_mu(r) ux^a uy^b uz^c.
        products: (i, j, factor, k) in order: ``m[k] += factor * m[i] * m[j]``, basic moments coming first in m.
        scalars: places in m of the basis functions.
    """

    moments: tuple[tuple[int, int, int, int], ...]
    products: tuple[tuple[int, int, int, int], ...]
    scalars: tuple[int, ...]

    @property
    def radial_functions(self) -> int:
        """Number of radial functions f_mu."""
        return 1 + max(mu for mu, *_ in self.moments)

    @property
    def size(self) -> int:
        """Number of all moments, basic ones and products."""
        return 1 + max([len(self.moments) - 1, *(k for *_, k in self.products)])


Sums = dict[Component, Counter[tuple[Component, Component]]]


@cache
def canonical(component: Component) -> Component:
    """The same with its moments in an order that depends on shapes first and on directions last."""
    same = (rearranged(component, order) for order in permutations(range(len(component.mus))))
    return min(same, key=lambda one: (one.mus, [sum(a) for a in one.open], one.edges, one.open))


def rearranged(component: Component, order: Part) -> Component:
    """The same with its moments in an order, or a part of them."""
    mus, along, edges = component
    matrix = tuple(tuple(edges[i][j] for j in order) for i in order)
    return Component(tuple(mus[i] for i in order), tuple(along[i] for i in order), matrix)


def shape(component: Component) -> Component:
    """All components of a tensor by one of them, that along x only."""
    return canonical(component._replace(open=tuple((sum(along), 0, 0) for along in component.open)))


def scalars(level: int, published: bool = True) -> list[Component]:
    """The different full contractions of at most four moments, the lowest levels first.

    Args:
        level: highest level.
        published: leave out moments with mu > 5 or nu > 10, as published tables do, which have a level from 26 on.
    """
    found: set[Component] = set()
    for n in range(1, min(FACTORS, level // 2) + 1):
        pairs = list(combinations(range(n), 2))
        for mus in combinations_with_replacement(range((level + 2) // 4), n):
            left = (level - sum(2 + 4 * mu for mu in mus)) // 2
            for edges in distributed(left, len(pairs)):
                between = dict(zip(pairs, edges, strict=True))
                matrix = tuple(tuple(between.get((min(i, j), max(i, j)), 0) for j in range(n)) for i in range(n))
                if not published or (max(mus) <= LARGEST_MU and max(map(sum, matrix)) <= LARGEST_NU):
                    found.add(canonical(Component(mus, ((0, 0, 0),) * n, matrix)))
    return sorted(found, key=lambda one: (sum(2 + 4 * mu for mu in one.mus) + sum(map(sum, one.edges)), one))


def distributed(most: int, places: int) -> Iterator[tuple[int, ...]]:
    """Numbers, as many as places, that sum to at most the given one."""
    if places == 0:
        yield from [()] if most >= 0 else []
        return
    for first in range(most + 1):
        yield from ((first, *rest) for rest in distributed(most - first, places - 1))


def directions(indices: int) -> list[tuple[Along, int]]:
    """Ways for a number of indices to point, that along x only first, and how many orders each has."""
    counts = [(x, y, indices - x - y) for x in range(indices, -1, -1) for y in range(indices - x, -1, -1)]
    return [(along, factorial(indices) // prod(map(factorial, along))) for along in counts]


def parts(n: int) -> Iterator[tuple[Part, Part]]:
    """Ways to part n moments in two."""
    for size in range(n - 1):
        for others in combinations(range(1, n), size):
            part = (0, *others)
            yield part, tuple(i for i in range(n) if i not in part)


def terms(component: Component, left: Part, right: Part) -> Iterator[tuple[Component, Component, int]]:
    """Pairs of smaller components and factors whose products sum to the component; indices all along x come first."""
    cut = [(i, j) for i in left for j in right if component.edges[i][j]]
    for chosen in product(*(directions(component.edges[i][j]) for i, j in cut)):
        along = list(component.open)
        for ends, (more, _) in zip(cut, chosen, strict=True):
            for i in ends:
                along[i] = (along[i][0] + more[0], along[i][1] + more[1], along[i][2] + more[2])
        halves = (rearranged(component._replace(open=tuple(along)), part) for part in (left, right))
        first, second = sorted(map(canonical, halves))
        yield first, second, prod(orders for _, orders in chosen)


def cheapest(tensor: Component, known: dict[Component, int]) -> tuple[int, int]:
    """A bound on the products that a tensor takes beyond those known, and the way to part it with the lowest."""
    if len(tensor.mus) == 1 or tensor in known:
        return 0, known.get(tensor, 0)
    components = prod(comb(sum(along) + 2, 2) for along in tensor.open)
    found = []
    for way, (left, right) in enumerate(parts(len(tensor.mus))):
        first, second, _ = next(terms(tensor, left, right))
        cost = components * prod(comb(tensor.edges[i][j] + 2, 2) for i in left for j in right)
        found.append((cost + sum(cheapest(one, known)[0] for one in {first, second}), way))
    return min(found)


def expand(component: Component, sums: Sums, known: dict[Component, int]) -> None:
    """Adds a component of several moments to the sums of products, after those that it needs."""
    if len(component.mus) == 1 or component in sums:
        return
    tensor = shape(component)
    known[tensor] = way = cheapest(tensor, known)[1]
    total: Counter[tuple[Component, Component]] = Counter()
    left, right = list(parts(len(component.mus)))[way]
    for first, second, factor in terms(component, left, right):
        total[first, second] += factor
    for one in dict.fromkeys(one for pair in total for one in pair):
        expand(one, sums, known)
    sums[component] = total


@cache
def basis(level: int, published: bool = True) -> Basis:
    """Moments, products and scalars of a level.

    Args:
        level: highest level of a basis function, at least 2; levels are even.
        published: as for `scalars`.

    Raises:
        ValueError: there is no basis of that level.
    """
    if level < 2:
        raise ValueError(f"the lowest level is 2, not {level}.")
    chosen = scalars(level, published)
    sums: Sums = {}
    known: dict[Component, int] = {}
    for scalar in chosen:
        expand(scalar, sums, known)
    needed = {one for total in sums.values() for pair in total for one in pair} | set(chosen)
    single = [(one.mus[0], one.open[0]) for one in needed if len(one.mus) == 1]
    single.sort(key=lambda one: (one[0], sum(one[1]), [-count for count in one[1]]))
    moments = [Component((mu,), (along,), ((0,),)) for mu, along in single]
    place = {one: i for i, one in enumerate([*moments, *sums])}
    products = [(place[a], place[b], factor, place[one]) for one in sums for (a, b), factor in sums[one].items()]
    return Basis(tuple((mu, *along) for mu, along in single), tuple(products), tuple(place[one] for one in chosen))
