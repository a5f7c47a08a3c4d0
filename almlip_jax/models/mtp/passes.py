"""Ways through the tree of contractions: first and second derivatives of basis functions by basic moments.

Derivatives dB_s/dM_b, and second ones of a weighted sum of basis functions, are zero but for few pairs.  They are found
for these alone, layer by layer, by tables of sums of products (`tables`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from almlip_jax.models.mtp.basis import Basis
from almlip_jax.models.mtp.contractions import tree
from almlip_jax.models.mtp.tables import Table, Term, sums_of_rows

_Pair: TypeAlias = tuple[int, int]
_Products: TypeAlias = dict[int, tuple[Term, ...]]
_Uses: TypeAlias = dict[int, list[tuple[int, int, float]]]


@dataclass(frozen=True, eq=False)
class Passes:
    """Tables of sums, one for each layer; moments are numbered as in `contractions.tree`.

    Attributes:
        forward: the moments of each layer from all before.
        back: cotangents of the moments of each layer, the last layer first, from those found before and the moments.
        seeds: [n] for each of these layers, which basis function a moment is; their number where it is none.
        pairs: derivatives of a basis function by a moment, in the order of ``back``: from a row of ones and those found
            before, and the moments with a row of ones behind them.
        places: basis functions and basic moments of the last layer's pairs, [n] each.
        rates: derivatives of a moment by a basic one, in the order of ``forward``: from a row of ones and those found
            before, and the moments.
        curves: derivatives of a cotangent by a basic moment, in the order of ``back``: from all cotangents and those
            found before, and the moments with what ``rates`` gave behind them.
        bends: two basic moments of each of the last layer's pairs, [n] each.
        functions: number of basis functions S.
    """

    forward: tuple[Table, ...]
    back: tuple[Table, ...]
    seeds: tuple[np.ndarray, ...]
    pairs: tuple[Table, ...]
    places: tuple[np.ndarray, np.ndarray]
    rates: tuple[Table, ...]
    curves: tuple[Table, ...]
    bends: tuple[np.ndarray, np.ndarray]
    functions: int


@lru_cache(maxsize=32)
def passes(basis: Basis) -> Passes:
    """Those of a basis."""
    found, functions = tree(basis), len(tree(basis).scalars)
    seeds = tuple(np.array([functions if of < 0 else of for of in chosen]) for _, chosen in found.back)
    pairs, places = _pairs(found.parts, found.products, found.scalars)
    rates, rate_places = _rates(found.parts, found.products)
    curves, bends = _curves(found.parts, _uses(found.products), rate_places)
    back = tuple(table for table, _ in found.back)
    return Passes(found.layers, back, seeds, pairs, places, rates, curves, bends, functions)


def _uses(products: _Products) -> _Uses:
    """The products that each moment is a factor of: place, other factor, number."""
    uses: _Uses = {}
    for moment, terms in products.items():
        for i, j, factor in terms:
            uses.setdefault(i, []).append((moment, j, factor))
            uses.setdefault(j, []).append((moment, i, factor))
    return uses


def _places(order: Iterable[_Pair], first: int = 0) -> dict[_Pair, int]:
    return {pair: first + n for n, pair in enumerate(order)}


def _columns(pairs: Sequence[_Pair]) -> tuple[np.ndarray, np.ndarray]:
    both = np.array(pairs, int).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def _pairs(
    layers: Sequence[range], products: _Products, scalars: Sequence[int]
) -> tuple[tuple[Table, ...], tuple[np.ndarray, np.ndarray]]:
    """`Passes.pairs` and `Passes.places`."""
    one = layers[-1].stop  # place of the row of ones behind the moments
    terms: dict[_Pair, list[tuple[_Pair | None, int, float]]] = {}
    for function, scalar in enumerate(scalars):
        terms.setdefault((function, scalar), []).append((None, one, 1.0))
        open_, met = [scalar], {scalar}
        while open_:
            moment = open_.pop()
            for i, j, factor in products.get(moment, ()):
                terms.setdefault((function, i), []).append(((function, moment), j, factor))
                terms.setdefault((function, j), []).append(((function, moment), i, factor))
                open_ += {i, j} - met
                met |= {i, j}
    place: dict[_Pair | None, int] = {None: 0}
    tables: list[Table] = []
    last: list[_Pair] = []
    for layer in reversed(layers):
        last = [pair for pair in terms if pair[1] in layer]
        rows = tuple(tuple((place[above], other, x) for above, other, x in terms[pair]) for pair in last)
        tables.append(Table(rows, len(place), one + 1))
        place |= {pair: len(place) + n for n, pair in enumerate(last)}
    return tuple(tables), _columns(last)


def _rates(layers: Sequence[range], products: _Products) -> tuple[tuple[Table, ...], dict[_Pair, int]]:
    """`Passes.rates`, and the place of each pair behind the row of ones, which stands for all basic moments."""
    place = {(moment, moment): 0 for moment in layers[0]}
    by = {moment: {moment} for moment in layers[0]}
    tables, count = [], 1
    for layer in layers[1:]:
        terms: dict[_Pair, list[Term]] = {}
        for moment in layer:
            for i, j, factor in products[moment]:
                for rated, other in ((i, j), (j, i)):
                    for basic in sorted(by[rated]):
                        terms.setdefault((moment, basic), []).append((place[rated, basic], other, factor))
            by[moment] = {basic for pair, basic in terms if pair == moment}
        tables.append(Table(tuple(tuple(rows) for rows in terms.values()), count, layers[-1].stop))
        place |= _places(terms, count)
        count += len(terms)
    return tuple(tables), place


def _curves(
    layers: Sequence[range], uses: _Uses, rates: dict[_Pair, int]
) -> tuple[tuple[Table, ...], tuple[np.ndarray, np.ndarray]]:
    """`Passes.curves` and `Passes.bends`."""
    number, by = layers[-1].stop, dict[int, list[int]]()
    for moment, basic in rates:
        by.setdefault(moment, []).append(basic)
    cotangent = {moment: n for n, moment in enumerate(moment for layer in reversed(layers) for moment in layer)}
    place: dict[_Pair, int] = {}
    curved: dict[int, list[int]] = {}
    tables: list[Table] = []
    terms: dict[_Pair, list[Term]] = {}
    for layer in reversed(layers):
        terms = {}
        for moment in layer:
            for k, other, factor in uses.get(moment, ()):
                for basic in curved[k]:
                    terms.setdefault((moment, basic), []).append((number + place[k, basic], other, factor))
                for basic in by[other]:
                    row = (cotangent[k], number + rates[other, basic], factor)
                    terms.setdefault((moment, basic), []).append(row)
        for moment in layer:
            curved[moment] = []
        for moment, basic in terms:
            curved[moment].append(basic)
        tables.append(
            Table(tuple(tuple(rows) for rows in terms.values()), number + len(place), number + 1 + len(rates))
        )
        place |= _places(terms, len(place))
    return tuple(tables), _columns(list(terms))


def all_moments(ways: Passes, basic: jax.Array) -> jax.Array:
    """Basic moments [b, A] and those of all layers."""
    known = basic
    for table in ways.forward:
        known = jnp.concatenate([known, sums_of_rows(table, known, known)])
    return known


def jacobian(ways: Passes, moments: jax.Array) -> jax.Array:
    """Derivatives dB_s/dM_b [n, A] of the pairs of `Passes.places`, from all moments."""
    ones = jnp.ones_like(moments[:1])
    moments, known, found = jnp.concatenate([moments, ones]), ones, ones
    for table in ways.pairs:
        found = sums_of_rows(table, known, moments)
        known = jnp.concatenate([known, found])
    return found


def gradient(ways: Passes, moments: jax.Array, weights: jax.Array) -> jax.Array:
    """Derivatives [moments, A] of ``weights @ B`` by all moments, the last layer first."""
    padded = jnp.concatenate([weights, jnp.zeros_like(weights[:1])])
    known = jnp.zeros((0, moments.shape[1]), moments.dtype)
    for table, seeds in zip(ways.back, ways.seeds, strict=True):
        found = jnp.broadcast_to(padded[seeds][:, None], (len(seeds), moments.shape[1]))
        known = jnp.concatenate([known, found + sums_of_rows(table, known, moments) if len(known) else found])
    return known


def hessian(ways: Passes, moments: jax.Array, slopes: jax.Array) -> jax.Array:
    """Second derivatives [n, A] of ``weights @ B`` by the pairs of basic moments of `Passes.bends`.

    Args:
        ways: through the basis.
        moments: [moments, A], all of them.
        slopes: [moments, A], what `gradient` gave for the weights.
    """
    rates = jnp.ones_like(moments[:1])
    for table in ways.rates:
        rates = jnp.concatenate([rates, sums_of_rows(table, rates, moments)])
    told, known, found = jnp.concatenate([moments, rates]), slopes, slopes[:0]
    for table in ways.curves:
        found = sums_of_rows(table, known, told) if table.terms else slopes[:0]
        known = jnp.concatenate([known, found])
    return found
