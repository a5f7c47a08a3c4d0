"""Surroundings of atoms as points: in order of their structures' ids, their distances in blocks, scales from the data.

Atoms of unlike elements are never compared.  Memory is in proportion to the atoms: distances are looked at in blocks of
`ENTRIES`, and forgotten.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import struct

from almlip_jax.errors import InputError
from almlip_jax.kernels import wide
from almlip_jax.selection.base import Candidates
from almlip_jax.selection.scores import column

ENTRIES = 2**22  # of a block of distances
ELEMENTS = 128  # more than there are; arrays of elements are indexed by atomic number
_TOGETHER = 64  # structures whose atoms are compared with each other at a time
_REFERENCE = 8  # least number of structures of a pool that scales are taken from

State = TypeVar("State")


class Points(NamedTuple):
    """Surroundings of atoms as points.

    Attributes:
        x: [A, d], seen from the mean of the candidates' atoms of the same element; 0 where there is no atom.
        norms: [A] square norms of x.
        species: [A] atomic numbers.
        owner: [A] int, which structure it belongs to; those of candidates and of the labelled set differ.
        there: [A] bool, which of them count.
    """

    x: jax.Array
    norms: jax.Array
    species: jax.Array
    owner: jax.Array
    there: jax.Array

    def of(self, rows: jax.Array) -> Points:
        """Those at some rows, -1 standing for none."""
        found = Points(*(values[rows] for values in self))
        return found._replace(there=found.there & (rows >= 0))


@struct.dataclass
class Sites:
    """The atoms of a pool, its structures in order of id, and those of its context.

    Attributes:
        points: of the candidates, their atoms one after the other in the order of the structures.
        members: [n, N] int, rows of the atoms of each structure; -1 where it has fewer.
        usable: [n] bool, which structures are candidates; they come first.
        cost: [n] price of their labels.
        known: atoms of the labelled set.
    """

    points: Points
    members: jax.Array
    usable: jax.Array
    cost: jax.Array
    known: Points

    def over_members(self, values: jax.Array, reduce: Callable[..., jax.Array] = jnp.sum) -> jax.Array:
        """Values [A] of the atoms reduced over those of each structure, [n]; none count as 0."""
        return reduce(jnp.where(self.members >= 0, values[self.members], 0), axis=1)

    def chosen(self, row: jax.Array) -> Points:
        """The atoms of a structure, as nobody's: they are compared with its own, too."""
        atoms = self.points.of(self.members[row])
        return atoms._replace(owner=jnp.full_like(atoms.owner, -1))


def arrange_sites(pool: Candidates, labelled: Candidates, features: str) -> tuple[jax.Array, Sites]:
    """The atoms of a pool with the candidates first and by id, and the order [n] that structures were taken in.

    In that order rounding is the same however the pool was ordered.  A structure that has rows that are not finite
    cannot be judged, and is not a candidate.

    Raises:
        InputError: there are no rows of atoms of that name.
    """
    finite = _finite(pool, features)
    usable = pool.valid & finite
    order = jnp.lexsort((pool.id, ~usable)).astype(jnp.int32)
    points, members = _compacted(pool, features, usable, order)
    counts = labelled.valid & _finite(labelled, features)
    known, _ = _compacted(labelled, features, counts, jnp.arange(counts.shape[0], dtype=jnp.int32))
    totals = jax.ops.segment_sum(points.x, points.species, ELEMENTS)
    numbers = counts_of(points)
    mean = totals / jnp.maximum(numbers, 1)[:, None].astype(totals.dtype)
    known = known._replace(owner=-2 - known.owner)  # never one of the candidates
    sites = Sites(_centred(points, mean), members, usable[order], pool.cost[order], _centred(known, mean))
    return order, sites


def keep(pool: Candidates, order: jax.Array, which: jax.Array) -> Candidates:
    """The pool with those of its candidates alone that are wanted; ``which`` [n] bool is in the order of the sites."""
    return replace(pool, valid=pool.valid & jnp.zeros_like(pool.valid).at[order].set(which))


def counts_of(points: Points) -> jax.Array:
    """Atoms of each element, [elements]."""
    return jax.ops.segment_sum(points.there.astype(wide()), points.species, ELEMENTS)


def sums_of(values: jax.Array, points: Points) -> jax.Array:
    """Sums of values [A] over the atoms of each element, [elements]."""
    return jax.ops.segment_sum(jnp.where(points.there, values, 0), points.species, ELEMENTS)


def folded(
    points: Points,
    others: Points,
    start: State,
    fold: Callable[[State, jax.Array, Any], State],
    given: Any = None,
    *,
    apart: bool = False,
) -> State:
    """Folds the square distances [A, B] from points to blocks of B others into a state.

    Distances to what cannot be compared, atoms of another element and such as are not there, are infinite.

    Args:
        points: [A].
        others: in any number.
        start: the state.
        fold: ``(state, squares, given) -> state``, of each block.
        given: arrays that lead with the others, of which each block is given its own.
        apart: whether atoms of the same structure are not compared either.
    """
    a, t = points.there.shape[0], others.there.shape[0]
    if not (a and t):
        return start
    size = max(min(ENTRIES // a, t), 1)
    blocks = -(-t // size)

    def parts(values: jax.Array) -> jax.Array:
        padded = jnp.pad(values, [(0, blocks * size - t)] + [(0, 0)] * (values.ndim - 1))
        return padded.reshape(blocks, size, *values.shape[1:])

    def look(state: State, block: tuple[Points, Any]) -> tuple[State, None]:
        return fold(state, squares(points, block[0], apart=apart), block[1]), None

    return jax.lax.scan(look, start, jax.tree.map(parts, (others, given)))[0]


def squares(points: Points, others: Points, *, apart: bool = False) -> jax.Array:
    """Square distances [A, B]; 0 where they are no more than rounding, infinite where atoms cannot be compared."""
    reach = points.norms[:, None] + others.norms[None]
    square = reach - 2 * points.x @ others.x.T
    square = jnp.where(square > 16 * jnp.finfo(square.dtype).eps * reach, square, 0)
    alike = points.there[:, None] & others.there[None] & (points.species[:, None] == others.species[None])
    if apart:
        alike = alike & (points.owner[:, None] != others.owner[None])
    return jnp.where(alike, square, jnp.inf)


def nearest(points: Points, others: Points, so_far: jax.Array | None = None, *, apart: bool = False) -> jax.Array:
    """Square distance [A] to the nearest of some others; infinite where there is none of that element."""
    start = jnp.full(points.norms.shape, jnp.inf, points.x.dtype) if so_far is None else so_far
    return folded(points, others, start, lambda least, square, _: jnp.minimum(least, jnp.min(square, 1)), apart=apart)


def within(sites: Sites, value: Callable[[jax.Array], jax.Array], scale: jax.Array) -> jax.Array:
    """Sums over the atoms of an atom's own structure, itself among them, [A].

    Args:
        sites: of a pool.
        value: of square distances over the squares of a scale; those that cannot be compared are infinite.
        scale: [A]; where it is 0, only what is equal is near.
    """
    smallest = jnp.sqrt(jnp.finfo(scale.dtype).tiny)

    def of_one(rows: jax.Array) -> jax.Array:
        own = sites.points.of(rows)
        return jnp.sum(value(squares(own, own) / jnp.maximum(scale[rows], smallest)[:, None] ** 2), axis=1)

    found = jax.lax.map(of_one, sites.members, batch_size=_TOGETHER)
    number = sites.points.norms.shape[0]
    places = jnp.where(sites.members >= 0, sites.members, number)
    return jnp.zeros((number,), found.dtype).at[places].set(found, mode="drop")


def scale_of(sites: Sites, given: float | None, quantile: float, batch: int) -> jax.Array:
    """How far surroundings of each element lie apart in what is labelled, [elements]; the same for all where given.

    A quantile of the distances from the atoms of each labelled structure to the nearest atom of the same element in
    another one.  Of an element that two labelled structures do not have, the same of candidates, as many of them as a
    batch has but at least 8, taken in even steps of their ids: as if such a sample were labelled.  0 where the pool
    does not tell either.

    Args:
        sites: a pool and its context.
        given: the scale, where it does not follow from the data.
        quantile: between 0 and 1.
        batch: structures of a batch.
    """
    if given is not None:
        return jnp.full((ELEMENTS,), given, sites.points.x.dtype)
    n = sites.usable.shape[0]
    number = min(max(batch, _REFERENCE), n)
    steps = (jnp.arange(number) + 0.5) * jnp.sum(sites.usable) / number
    sample = sites.points.of(sites.members[steps.astype(jnp.int32)].reshape(-1))
    drawn, labelled = (_quantiles(one, nearest(one, one, apart=True), quantile) for one in (sample, sites.known))
    return jnp.nan_to_num(jnp.where(jnp.isnan(labelled), drawn, labelled))


def _quantiles(points: Points, square: jax.Array, quantile: float) -> jax.Array:
    """Quantile of distances over the atoms of each element, [elements]; NaN where there are none."""
    there = points.there & jnp.isfinite(square)
    element = jnp.where(there, points.species, ELEMENTS)
    counts = jnp.zeros((ELEMENTS + 1,), jnp.int32).at[element].add(1)
    first = jnp.cumsum(counts) - counts
    ordered = jnp.sqrt(square)[jnp.lexsort((square, element))]
    if not ordered.shape[0]:
        return jnp.full((ELEMENTS,), jnp.nan, square.dtype)
    place = quantile * jnp.maximum(counts - 1, 0)
    low = jnp.floor(place).astype(jnp.int32)
    share = (place - low).astype(ordered.dtype)
    high = jnp.minimum(low + 1, jnp.maximum(counts - 1, 0))
    last = ordered.shape[0] - 1
    found = (1 - share) * ordered[jnp.minimum(first + low, last)] + share * ordered[jnp.minimum(first + high, last)]
    return jnp.where(counts > 0, found, jnp.nan)[:ELEMENTS]


def _finite(candidates: Candidates, features: str) -> jax.Array:
    """Which structures have rows of atoms that are all finite, [n]."""
    if candidates.environments is None:
        raise InputError(f"candidates have no rows of atoms '{features}': they were made without environments.")
    rows, members = column(candidates.environments.rows, features, "rows of atoms"), candidates.environments.members
    finite = jnp.all(jnp.isfinite(rows), axis=1)
    return jnp.all(jnp.where(members >= 0, finite[members], True), axis=1)


def _compacted(candidates: Candidates, features: str, use: jax.Array, order: jax.Array) -> tuple[Points, jax.Array]:
    """The atoms of structures that are used, in their order, and which atoms each structure has then [n, N]."""
    environments = candidates.environments
    assert environments is not None
    members = environments.members[order]
    there = (members >= 0) & use[order][:, None]
    row = (jnp.cumsum(there.reshape(-1)) - 1).astype(jnp.int32).reshape(there.shape)
    number = environments.species.shape[0]
    place = jnp.where(there, row, number)
    source = jnp.zeros((number,), jnp.int32).at[place].set(members, mode="drop")
    owner = jnp.broadcast_to(jnp.arange(members.shape[0], dtype=jnp.int32)[:, None], members.shape)
    counts = jnp.arange(number) < jnp.sum(there)
    points = Points(
        x=jnp.where(counts[:, None], environments.rows[features][source], 0),
        norms=jnp.zeros((number,), environments.rows[features].dtype),
        species=jnp.where(counts, environments.species[source], 0).astype(jnp.int32),
        owner=jnp.zeros((number,), jnp.int32).at[place].set(owner, mode="drop"),
        there=counts,
    )
    return points, jnp.where(there, row, -1)


def _centred(points: Points, mean: jax.Array) -> Points:
    x = jnp.where(points.there[:, None], points.x - mean[points.species], 0)
    return points._replace(x=x, norms=jnp.sum(x**2, axis=1))
