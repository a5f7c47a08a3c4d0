"""Sums of products of rows of arrays, by tables of row numbers: few operations for any number of products.

Arrays are component-major, [rows, atoms].  A bilinear map sums ``factor * x[i] * y[j]`` for each row of its result; its
derivatives by either argument are bilinear maps with other tables, so that forces and the gradients of forces that
training needs cost no scatter.  Rows of about equally many terms are computed together, term by term, in operations
that a compiler fuses into one and vectorises over the atoms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

Term: TypeAlias = tuple[int, int, float]
"""Row of the left argument, row of the right one, factor."""

_SHORT = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16)  # terms that are written out
_LONG = _SHORT[-1]  # rows with more are summed in pieces of this length


@dataclass(frozen=True, eq=False)
class Group:
    """Rows with equally many terms, in q pieces of T: left and right rows and factors, each [n, q, T]."""

    left: np.ndarray
    right: np.ndarray
    factors: np.ndarray


@dataclass(frozen=True, eq=False)
class Table:
    """A bilinear map: which terms each row of the result sums.

    Attributes:
        terms: of each row of the result.
        left_rows: number of rows of the left argument.
        right_rows: number of rows of the right argument.
    """

    terms: tuple[tuple[Term, ...], ...]
    left_rows: int
    right_rows: int
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
    def groups(self) -> tuple[Group, ...]:
        """How it is computed: the rows of the groups, one after the other, are those of the result in `order`."""
        found: dict[tuple[int, int], list[int]] = {}
        for row in self.order:
            found.setdefault(_shape(len(self.terms[row])), []).append(row)
        return tuple(self._group(rows, pieces, length) for (pieces, length), rows in found.items())

    def _group(self, rows: Sequence[int], pieces: int, length: int) -> Group:
        nothing: Term = (0, 0, 0.0)
        filled = [(*self.terms[row], *(nothing,) * (pieces * length - len(self.terms[row]))) for row in rows]
        left, right, factors = np.moveaxis(np.array(filled, np.float64).reshape(len(rows), pieces, length, 3), -1, 0)
        return Group(left.astype(np.int32), right.astype(np.int32), factors)

    @cached_property
    def order(self) -> np.ndarray:
        """Rows of the result by their number of terms, [n]."""
        return np.array(sorted(range(len(self.terms)), key=lambda row: _shape(len(self.terms[row]))), np.int32)

    @cached_property
    def places(self) -> np.ndarray | None:
        """Where each row of the result is in `order`, [n]; None where the rows are in this order."""
        return None if np.array_equal(self.order, np.arange(len(self.order))) else np.argsort(self.order)


def _shape(terms: int) -> tuple[int, int]:
    """Pieces and length of each in which so many terms are summed."""
    if terms <= _LONG:
        return 1, min(length for length in _SHORT if length >= terms)
    pieces = -(-terms // _LONG)
    step = 1 << max(pieces.bit_length() - 3, 0)  # a few sizes, at most a quarter too large
    return -(-pieces // step) * step, _LONG


def by_terms(terms: Sequence[tuple[Term, ...]]) -> list[int]:
    """An order of rows in which those of equally many terms, as `Table` counts them, are together."""
    return sorted(range(len(terms)), key=lambda row: _shape(len(terms[row])))


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
    parts = []
    for group in table.groups:
        terms = [
            _rows(x, group.left[..., t]) * _rows(y, group.right[..., t]) * _column(group.factors[..., t], x)
            for t in range(group.left.shape[-1])
        ]
        total = sum(terms[1:], terms[0])
        parts.append(jnp.sum(total, axis=1) if group.left.shape[1] > 1 else total[:, 0])
    found = jnp.concatenate(parts) if len(parts) > 1 else parts[0]
    return found if table.places is None else _rows(found, table.places)


def _column(values: np.ndarray, like: jax.Array) -> np.ndarray | float:
    return (
        1.0 if np.all(values == 1) else np.asarray(values.reshape(*values.shape, *(1,) * (like.ndim - 1)), like.dtype)
    )


def _rows(x: jax.Array, index: np.ndarray) -> jax.Array:
    return jnp.asarray(x).at[index].get(mode="promise_in_bounds", wrap_negative_indices=False)
