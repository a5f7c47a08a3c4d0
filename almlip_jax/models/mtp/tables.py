"""Sums of products of rows of arrays, by tables of row numbers: few operations for any number of products.

Arrays are component-major, [rows, atoms].  A bilinear map sums ``factor * x[i] * y[j]`` for each row of its result; its
derivatives by either argument are bilinear maps with other tables, so that forces and the gradients of forces that
training needs cost no scatter.  Rows are summed in pieces of four terms, and these again, each step of all rows in one
operation: what a compiler writes out of it is as long for a hundred products as for ten thousand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

Term: TypeAlias = tuple[int, int, float]
"""Row of the left argument, row of the right one, factor."""


class Pieces(NamedTuple):
    """How a table is computed: rows in pieces of a few terms, then pieces of pieces until each row is one.

    Attributes:
        left: rows of the left argument, [p, T].
        right: rows of the right argument, [p, T].
        factors: [p, T]; 0 for terms that fill up a piece.
        sums: for each further step the pieces of the step before to be added, [p', T]; their number for none.
    """

    left: np.ndarray
    right: np.ndarray
    factors: np.ndarray
    sums: tuple[np.ndarray, ...]


@dataclass(frozen=True, eq=False)
class Table:
    """A bilinear map: which terms each row of the result sums.

    Attributes:
        terms: of each row of the result.
        left_rows: number of rows of the left argument.
        right_rows: number of rows of the right argument.
        together: terms, and then partial sums, that are added in one operation: fewer fill up less, more read more.
    """

    terms: tuple[tuple[Term, ...], ...]
    left_rows: int
    right_rows: int
    together: int = 4
    _turned: dict[str, Table] = field(default_factory=dict, repr=False)

    @property
    def by_left(self) -> Table:
        """Of the derivative by the left argument: maps a cotangent and the right argument."""
        return self._once("left", self.left_rows, self.right_rows, lambda i, j: [(i, j)])

    @property
    def by_right(self) -> Table:
        """Of the derivative by the right argument: maps a cotangent and the left argument."""
        return self._once("right", self.right_rows, self.left_rows, lambda i, j: [(j, i)])

    @property
    def by_both(self) -> Table:
        """Of the derivative by an argument that is on both sides."""
        return self._once("both", self.left_rows, self.right_rows, lambda i, j: [(i, j), (j, i)])

    def _once(self, name: str, rows: int, others: int, ends: Callable[[int, int], list[tuple[int, int]]]) -> Table:
        if name not in self._turned:
            found: list[dict[tuple[int, int], float]] = [{} for _ in range(rows)]
            for k, terms in enumerate(self.terms):
                for i, j, factor in terms:
                    for row, other in ends(i, j):
                        found[row][k, other] = found[row].get((k, other), 0.0) + factor
            turned = tuple(tuple((k, other, factor) for (k, other), factor in one.items()) for one in found)
            self._turned[name] = Table(turned, len(self.terms), others)
        return self._turned[name]

    @cached_property
    def pieces(self) -> Pieces:
        """How it is computed."""
        first, starts = _cut(self.terms, (0, 0, 0.0), self.together)
        left, right, factors = np.moveaxis(np.array(first, np.float64).reshape(-1, self.together, 3), -1, 0)
        sums = []
        while len(starts) - 1 < starts[-1]:
            number = starts[-1]
            further, starts = _cut([list(range(a, b)) for a, b in pairwise(starts)], number, self.together)
            sums.append(np.array(further, np.int32))
        return Pieces(left.astype(np.int32), right.astype(np.int32), factors, tuple(sums))


def _cut(rows: Sequence[Sequence[Any]], nothing: Any, together: int) -> tuple[list[list[Any]], list[int]]:
    """Rows in pieces of equal length, filled up with nothing, and where the pieces of each row begin."""
    pieces: list[list[Any]] = []
    starts = [0]
    for row in rows:
        for at in range(0, max(len(row), 1), together):
            piece = list(row[at : at + together])
            pieces.append(piece + [nothing] * (together - len(piece)))
        starts.append(len(pieces))
    return pieces, starts


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def bilinear_rows(table: Table, x: jax.Array, y: jax.Array) -> jax.Array:
    """The sums ``z[k] = sum factor x[i] y[j]`` over the terms (i, j, factor) of row k.

    Args:
        table: with n rows.
        x: [table.left_rows, A].
        y: [table.right_rows, A].

    Returns:
        [n, A].
    """
    return sums_of_rows(table, x, y)


bilinear_rows.defvjp(
    lambda table, x, y: (sums_of_rows(table, x, y), (x, y)),
    lambda table, kept, cotangent: (
        bilinear_rows(table.by_left, cotangent, kept[1]),
        bilinear_rows(table.by_right, cotangent, kept[0]),
    ),
)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def quadratic_rows(table: Table, x: jax.Array) -> jax.Array:
    """`bilinear_rows` with the same array on both sides."""
    return sums_of_rows(table, x, x)


quadratic_rows.defvjp(
    lambda table, x: (sums_of_rows(table, x, x), x),
    lambda table, x, cotangent: (bilinear_rows(table.by_both, cotangent, x),),
)


@dataclass(frozen=True, eq=False)
class LinearTable:
    """A linear map of rows, of a few terms each: which rows each row of the result sums, and with what factors.

    Attributes:
        terms: of each row of the result, a row and its factor.
        rows: number of rows that it maps.
    """

    terms: tuple[tuple[tuple[int, float], ...], ...]
    rows: int

    @cached_property
    def turned(self) -> LinearTable:
        """The transposed map."""
        found: list[list[tuple[int, float]]] = [[] for _ in range(self.rows)]
        for k, terms in enumerate(self.terms):
            for i, factor in terms:
                found[i].append((k, factor))
        return LinearTable(tuple(map(tuple, found)), len(self.terms))

    @cached_property
    def columns(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows and factors, [T, n]; factors of 0 fill up shorter sums."""
        most = max(1, *map(len, self.terms))
        filled = [[*terms, *[(0, 0.0)] * (most - len(terms))] for terms in self.terms]
        rows, factors = np.moveaxis(np.array(filled, np.float64), (2, 1), (0, 1))
        return rows.astype(np.int32), factors


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def linear_rows(table: LinearTable, x: jax.Array) -> jax.Array:
    """The sums ``z[k] = sum factor x[i]`` over the terms (i, factor) of row k, [n, A], of an array [table.rows, A]."""
    terms = [_rows(x, rows) * _column(factors, x) for rows, factors in zip(*table.columns, strict=True)]
    return sum(terms[1:], terms[0])


linear_rows.defvjp(
    lambda table, x: (linear_rows(table, x), None),
    lambda table, _, cotangent: (linear_rows(table.turned, cotangent),),
)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def chosen_rows(rows: tuple[int, ...], number: int, x: jax.Array) -> jax.Array:
    """Some rows of an array.

    Args:
        rows: which, without repeats; -1 for a row of zeros.
        number: of rows of the array.
        x: [number, A].
    """
    index = np.array(rows, np.int32)
    found = _rows(x, np.maximum(index, 0))
    return found if np.all(index >= 0) else jnp.where((index >= 0)[:, None], found, 0)


def _chosen_backward(rows: tuple[int, ...], number: int, _: None, cotangent: jax.Array) -> tuple[jax.Array]:
    back = np.full(number, -1)
    back[[row for row in rows if row >= 0]] = [place for place, row in enumerate(rows) if row >= 0]
    return (chosen_rows(tuple(back.tolist()), len(rows), cotangent),)


chosen_rows.defvjp(lambda rows, number, x: (chosen_rows(rows, number, x), None), _chosen_backward)


def sums_of_rows(table: Table, x: jax.Array, y: jax.Array) -> jax.Array:
    """`bilinear_rows` that differentiation goes through as it is, also of arrays [rows, ..., A] that broadcast."""
    pieces = table.pieces
    terms = [
        _rows(x, pieces.left[:, t]) * _rows(y, pieces.right[:, t]) * _column(pieces.factors[:, t], x)
        for t in range(table.together)
    ]
    found = jax.lax.optimization_barrier(sum(terms[1:], terms[0]))  # each step is one operation for the compiler
    for step in pieces.sums:
        known = jax.lax.optimization_barrier(jnp.concatenate([found, jnp.zeros_like(found[:1])]))
        partial_sums = [_rows(known, step[:, t]) for t in range(table.together)]
        found = jax.lax.optimization_barrier(sum(partial_sums[1:], partial_sums[0]))
    return found


def _column(values: np.ndarray, like: jax.Array) -> np.ndarray | float:
    if np.all(values == 1):
        return 1.0
    return np.asarray(values.reshape(-1, *(1,) * (like.ndim - 1)), like.dtype)


def _rows(x: jax.Array, index: np.ndarray) -> jax.Array:
    return jnp.asarray(x).at[index].get(mode="promise_in_bounds", wrap_negative_indices=False)
