"""Sparse bilinear maps between irreps: Clebsch-Gordan products written out, component by component.

Irreps are held component-major: a list with one array ``[2l+1, ..., channels]`` for each degree l.  A product then is a
sum of a few elementwise products of contiguous arrays, one for each coefficient that is not zero, which compilers fuse
and vectorise over atoms and channels.  Its derivatives are maps of the same kind with the roles exchanged, so that
forces, and the gradients of forces that training needs, cost no scatter, no padding and no dense coefficient matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from importlib import import_module
from types import ModuleType
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from almlip_jax.partial_import import import_part


def _with_coefficients() -> ModuleType:
    """What has e3nn-jax's ``clebsch_gordan``: the part that holds it, or the package where it has moved in there."""
    try:
        return import_part("e3nn_jax", "_src.so3")[0]
    except ImportError:
        return import_module("e3nn_jax")


_E3NN = _with_coefficients()

Irreps: TypeAlias = tuple[jax.Array, ...]
"""Components of several true tensors: for each, [2l+1, ..., C]."""

Term: TypeAlias = tuple[int, int, int, int, float]
"""Block and component of the left factor, block and component of the right one, coefficient."""

_WIDE = 16
"""Channels from which on components are taken where they are used: on a CPU trainings of models with 16 or more then
take 3 to 7 % less time than with components that are taken once, and those of models with 12 take 3 % more."""

Table: TypeAlias = tuple[tuple[tuple[Term, ...], ...], ...]
"""For each output block and each of its components, the terms to sum."""


def bilinear(table: Table, left: Sequence[jax.Array], right: Sequence[jax.Array]) -> Irreps:
    """The sums ``z[o][k] = sum c x[a][i] y[b][j]`` over the terms (a, i, b, j, c) of ``table[o][k]``.

    Args:
        table: which products to sum, with which coefficients.
        left: blocks x[a], each [n_a, ...].
        right: blocks y[b], each [n_b, ...]; all trailing shapes are equal, or broadcast against each other.

    Returns:
        Blocks z[o], each [n_o, ...].
    """
    shapes = tuple(len(block) for block in left), tuple(len(block) for block in right)
    return _bilinear(table, shapes, tuple(left), tuple(right))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _bilinear(table: Table, shapes: tuple, left: Irreps, right: Irreps) -> Irreps:
    return _sums(table, left, right)


@partial(jax.jit, static_argnums=0)  # traced once, where a program has the same map of the same shapes many times
def _sums(table: Table, left: Irreps, right: Irreps) -> Irreps:
    ours: Sequence[Any] = left
    others: Sequence[Any] = right
    if left[0].shape[-1] < _WIDE:
        ours, others = (tuple(tuple(jnp.unstack(block)) for block in factor) for factor in (left, right))
    return tuple(jnp.stack([_sum(terms, ours, others) for terms in block]) for block in table)


def _forward(table: Table, shapes: tuple, left: Irreps, right: Irreps) -> tuple[Irreps, tuple[Irreps, Irreps]]:
    return _bilinear(table, shapes, left, right), (left, right)


def _backward(table: Table, shapes: tuple, factors: tuple[Irreps, Irreps], cotangent: Irreps) -> tuple[Irreps, Irreps]:
    left, right = factors
    to_left = bilinear(_transposed(table, shapes, 0), cotangent, right)
    to_right = bilinear(_transposed(table, shapes, 1), cotangent, left)
    return (
        tuple(_like(found, block) for found, block in zip(to_left, left, strict=True)),
        tuple(_like(found, block) for found, block in zip(to_right, right, strict=True)),
    )


_bilinear.defvjp(_forward, _backward)


def _like(found: jax.Array, wanted: jax.Array) -> jax.Array:
    """Sums over the axes along which a factor was broadcast."""
    axes = tuple(n for n in range(wanted.ndim) if wanted.shape[n] == 1 and found.shape[n] > 1)
    return jnp.sum(found, axis=axes, keepdims=True) if axes else found


def _sum(terms: tuple[Term, ...], left: Sequence[Any], right: Sequence[Any]) -> jax.Array:
    """One component; terms that share the left factor are summed before they are multiplied by it."""
    if not terms:
        return jnp.zeros(jnp.broadcast_shapes(left[0][0].shape, right[0][0].shape), left[0][0].dtype)
    by_left: dict[tuple[int, int], list[jax.Array]] = {}
    for a, i, b, j, c in terms:
        factor = right[b][j]
        by_left.setdefault((a, i), []).append(factor if c == 1 else np.asarray(c, factor.dtype) * factor)
    return sum(left[a][i] * sum(factors[1:], factors[0]) for (a, i), factors in by_left.items())  # type: ignore[return-value]


@cache
def _transposed(table: Table, shapes: tuple, side: int) -> Table:
    """The table that maps a cotangent and the other factor to the cotangent of one factor."""
    found: list[list[list[Term]]] = [[[] for _ in range(size)] for size in shapes[side]]
    for o, block in enumerate(table):
        for k, terms in enumerate(block):
            for a, i, b, j, c in terms:
                if side == 0:
                    found[a][i].append((o, k, b, j, c))
                else:
                    found[b][j].append((o, k, a, i, c))
    return tuple(tuple(tuple(terms) for terms in block) for block in found)


@cache
def clebsch_gordan(l1: int, l2: int, l3: int) -> np.ndarray:
    """Coefficients [2 l1 + 1, 2 l2 + 1, 2 l3 + 1] of e3nn's real basis, in float64."""
    return np.asarray(_E3NN.clebsch_gordan(l1, l2, l3), np.float64)


def terms_of(coefficients: np.ndarray, a: int, b: int) -> tuple[tuple[Term, ...], ...]:
    """The rows of a `Table` block, one for each last index, from coefficients [n_a, n_b, n_o] of blocks a and b."""
    rows: list[list[Term]] = [[] for _ in range(coefficients.shape[2])]
    for i, j, k in np.argwhere(np.abs(coefficients) > 1e-12).tolist():
        rows[k].append((a, i, b, j, float(coefficients[i, j, k])))
    return tuple(tuple(row) for row in rows)


@cache
def couplings(left: int, right: int, highest: int, equal: bool) -> tuple[Table, tuple[int, ...]]:
    """Products of 0 + ... + left with 0 + ... + right to degrees up to ``highest`` whose parity is a true tensor's.

    Args:
        left: highest degree of the left factor.
        right: highest degree of the right factor.
        highest: highest degree of the result.
        equal: whether both factors are the same tensor, whose pairs of degrees then count once.

    Returns:
        the table, and the degree of each of its blocks.  Coefficients are scaled to unit variance of a tensor's
        components where those of the factors are independent normal numbers.
    """
    blocks, degrees = [], []
    for degree in range(highest + 1):
        for l1 in range(left + 1):
            for l2 in range(l1 if equal else 0, right + 1):
                if not abs(l1 - l2) <= degree <= l1 + l2 or (l1 + l2 + degree) % 2:
                    continue
                coefficients = clebsch_gordan(l1, l2, degree)
                # equal factors: the products of different components come twice, which doubles their variance
                doubled = 2 if equal and l1 == l2 else 1
                scale = np.sqrt((2 * degree + 1) / (doubled * np.sum(coefficients**2)))
                blocks.append(terms_of(coefficients * scale, l1, l2))
                degrees.append(degree)
    return tuple(blocks), tuple(degrees)


@cache
def inner_products(l_max: int) -> Table:
    """Scalar products of degrees 0 to ``l_max`` divided by their dimension; one block, a row for each degree."""
    return (tuple(tuple((d, m, d, m, 1.0 / (2 * d + 1)) for m in range(2 * d + 1)) for d in range(l_max + 1)),)


def spherical_harmonics(direction: Sequence[jax.Array], l_max: int) -> tuple[jax.Array, ...]:
    """Real spherical harmonics of unit vectors by recursion, in e3nn's basis and "component" normalisation.

    ``Y_l`` is proportional to the coupling of ``Y_(l-1)`` with ``Y_1`` to degree l; its squares sum to 2l+1.

    Args:
        direction: components x, y, z of unit vectors, three arrays of one shape.
        l_max: highest degree.

    Returns:
        (l_max + 1)^2 arrays of that shape, degree by degree.
    """
    first = tuple(jnp.asarray(np.sqrt(3.0), x.dtype) * x for x in direction)
    found: list[tuple[jax.Array, ...]] = [(jnp.ones_like(direction[0]),), first]
    for degree in range(2, l_max + 1):
        # each component is an array of its own, so that plain differentiation meets neither slices nor stacks
        found.append(tuple(_sum(terms, (found[-1],), (first,)) for terms in harmonic_recursion(degree)[0]))
    return tuple(component for block in found[: l_max + 1] for component in block)


@cache
def harmonic_recursion(degree: int) -> Table:
    """Couples degree - 1 with 1 to a degree of 2 or more; of unit vectors, the squares then sum to 2 degree + 1."""
    coefficients = clebsch_gordan(degree - 1, 1, degree)
    lower, first = np.zeros(2 * degree - 1), np.array([0.0, np.sqrt(3.0), 0.0])
    lower[degree - 1] = np.sqrt(2 * degree - 1)  # along e3nn's polar axis y, only the middle component is not zero
    along = np.einsum("ijk,i,j->k", coefficients, lower, first)
    return (terms_of(coefficients * np.sqrt(2 * degree + 1) / np.linalg.norm(along), 0, 0),)
