"""From edges to basic moments, and back: radial functions, powers of directions, and derivatives that are spelt out.

A basic moment sums f_mu(r; zi, zj) ux^a uy^b uz^c over the neighbours of an atom, u = r / |r|, with

    f_mu(r; zi, zj) = scaling * (max - r)^2 * sum_k c[zi, zj, mu, k] T_k(s),    s = (2 r - (min + max)) / (max - min),

for r < max and 0 beyond: T_k are Chebyshev polynomials, which nothing stops from being evaluated below s = -1.  Source:
Novikov et al., Mach. Learn.: Sci. Technol. 2, 025002 (2021).

The functions of an edge, (max - r)^2 T_k(s) and the powers of u, hold no parameter and are shared by members.  What
members have of their own are the radial functions, the sums over neighbours, and in the backward pass one product of
matrices for each atom: the derivative of a power of u is another one, so that cotangents are rearranged, [A, powers],
instead of derivatives of edges, [A, powers, K].
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from almlip_jax.materialise import materialised
from almlip_jax.models.edges import Vectors
from almlip_jax.models.layout import split, unstack
from almlip_jax.models.mtp.basis import Basis, directions
from almlip_jax.models.mtp.tables import chosen_rows


class RadialBasis(NamedTuple):
    """Chebyshev polynomials times (max - r)^2.

    Attributes:
        size: number of polynomials R.
        min_dist: Angstrom, where the polynomials' interval begins.
        max_dist: Angstrom, where it ends and the functions vanish with their first derivatives.
    """

    size: int
    min_dist: float
    max_dist: float


@dataclass(frozen=True)
class Shape:
    """Which moments are formed: for mu = 0, 1, ... all components of the ranks 0 to ``ranks[mu]``.

    Attributes:
        radial: the radial functions' basis.
        ranks: highest rank for each mu.
    """

    radial: RadialBasis
    ranks: tuple[int, ...]

    @cached_property
    def powers(self) -> tuple[tuple[int, int, int], ...]:
        """Exponents (a, b, c) of the components of u, rank by rank."""
        return tuple(along for nu in range(max(self.ranks) + 1) for along, _ in directions(nu))

    @property
    def mus(self) -> range:
        """Numbers of the radial functions."""
        return range(len(self.ranks))

    def number(self, mu: int) -> int:
        """How many of the powers, from the first on, a mu takes part with."""
        return (self.ranks[mu] + 1) * (self.ranks[mu] + 2) * (self.ranks[mu] + 3) // 6

    @cached_property
    def parts(self) -> tuple[tuple[int, int, int], ...]:
        """Radial functions from one to before another that are summed with the same first powers, (mu, mu', number)."""
        return tuple((mu, mu + 1, self.number(mu)) for mu in range(len(self.ranks)))

    @cached_property
    def rows(self) -> tuple[tuple[int, int, int, int], ...]:
        """(mu, a, b, c) of each sum that is formed, part by part."""
        parts = ((mu, number) for first, last, number in self.parts for mu in range(first, last))
        return tuple((mu, *along) for mu, number in parts for along in self.powers[:number])


@lru_cache(maxsize=64)
def shape_of(basis: Basis, radial: RadialBasis) -> Shape:
    """The moments of a basis."""
    ranks = [0] * basis.radial_functions
    for mu, *along in basis.moments:
        ranks[mu] = max(ranks[mu], sum(along))
    return Shape(radial, tuple(ranks))


@lru_cache(maxsize=64)
def _places(basis: Basis, shape: Shape) -> tuple[int, ...]:
    """Where the basic moments of a basis are among the sums that are formed."""
    place = {row: n for n, row in enumerate(shape.rows)}
    return tuple(place[moment] for moment in basis.moments)


class Edges(NamedTuple):
    """Functions of edges that hold no parameter.

    Attributes:
        radial: [A, R, K] Chebyshev polynomials times (max - r)^2; 0 in padding slots.
        slopes: [A, R, K] their derivatives by the distance.
        powers: [A, n, K] products of components of the directions, in the order of `Shape.powers`.
        direction: components x, y, z of u, [A, K] each.
        inverse: [A, K] of the distance.
    """

    radial: jax.Array
    slopes: jax.Array
    powers: jax.Array
    direction: Vectors
    inverse: jax.Array


def edge_functions(shape: Shape, mask: jax.Array, vectors: Vectors) -> Edges:
    """Functions of edges that hold no parameter; differentiable in the vectors.

    Args:
        shape: which functions.
        mask: [A, K] bool; the radial functions of other slots are 0.
        vectors: components x, y, z, [A, K] Angstrom, of lengths greater than 0.
    """
    distance, inverse, direction = _directions(vectors)
    functions = partial(_functions, shape)
    radial, slopes, powers = materialised(functions, jnp.any(mask), mask, distance, direction)
    return Edges(radial, slopes, powers, direction, inverse)


class RadialFunctions(NamedTuple):
    """Functions of the lengths of edges, and their directions; see `Edges`."""

    radial: jax.Array
    slopes: jax.Array
    direction: Vectors
    inverse: jax.Array


def radial_functions(basis: RadialBasis, mask: jax.Array, vectors: Vectors) -> RadialFunctions:
    """`edge_functions` but for the powers."""
    distance, inverse, direction = _directions(vectors)
    return RadialFunctions(*_radial(basis, mask, distance), direction, inverse)


def _directions(vectors: Vectors) -> tuple[jax.Array, jax.Array, Vectors]:
    """Lengths, their inverses and directions."""
    x, y, z = vectors
    distance = jnp.sqrt(x**2 + y**2 + z**2)
    inverse = 1 / distance
    return distance, inverse, (x * inverse, y * inverse, z * inverse)


def _functions(
    shape: Shape, mask: jax.Array, distance: jax.Array, direction: Vectors
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Radial functions and slopes [A, R, K], and powers [A, n, K]."""
    return *_radial(shape.radial, mask, distance), _powers(max(shape.ranks), direction)


def _radial(basis: RadialBasis, mask: jax.Array, distance: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Radial functions and slopes, [A, R, K]."""
    size, low, high = basis
    beyond = jnp.where(mask & (distance < high), high - distance, 0)
    s, slope = (2 * distance - (low + high)) / (high - low), 2 / (high - low)
    first, second = _chebyshev(s, size)
    window = beyond**2
    radial = [window * t for t in first]
    slopes = [window * (n * slope) * u - 2 * beyond * t for n, (t, u) in enumerate(zip(first, second, strict=True))]
    return jnp.stack(radial, 1), jnp.stack(slopes, 1)


def _chebyshev(s: jax.Array, size: int) -> tuple[list[jax.Array], list[jax.Array]]:
    """T_0 .. T_(size-1), and U_(-1) .. U_(size-2), for which dT_n / ds = n U_(n-1)."""
    first, second = [jnp.ones_like(s), s], [jnp.zeros_like(s), jnp.ones_like(s)]
    while len(first) < size:
        first.append(2 * s * first[-1] - first[-2])
        second.append(2 * s * second[-1] - second[-2])
    return first[:size], second[:size]


def _powers(highest: int, direction: Vectors) -> jax.Array:
    """Products of components up to a rank, [A, n, K]: those of a rank are components times those of the rank below."""
    x, y, z = (one[:, None] for one in direction)
    found = [jnp.ones_like(x)]
    for rank in range(1, highest + 1):
        below = found[-1]
        found.append(jnp.concatenate([x * below, y * below[:, -rank:], z * below[:, -1:]], axis=1))
    return jnp.concatenate(found, axis=1)


def basic_moments(
    basis: Basis,
    radial_basis: RadialBasis,
    coefficients: jax.Array,
    species: jax.Array,
    vectors: Vectors,
    mask: jax.Array,
) -> jax.Array:
    """The basic moments of some atoms.

    Args:
        basis: which moments, and in which order.
        radial_basis: what radial functions are made of.
        coefficients: [A, mu, Z, R] of each atom, for the species of its neighbours.
        species: [A, Z, K] one-hot, of the neighbours.
        vectors: components x, y, z, [A, K] Angstrom, of lengths greater than 0.
        mask: [A, K] bool, which slots hold an edge.

    Returns:
        [n, A]; differentiable in coefficients and vectors any number of times.
    """
    shape = shape_of(basis, radial_basis)
    sums = _sums(shape, coefficients, species, vectors, mask)
    return chosen_rows(_places(basis, shape), len(shape.rows), jnp.swapaxes(sums, 0, 1))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(shape: Shape, coefficients: jax.Array, species: jax.Array, vectors: Vectors, mask: jax.Array) -> jax.Array:
    """Sums over neighbours, [A, rows of the shape]."""
    return _forward(shape, coefficients, species, vectors, mask)[0]


def _of_edges(coefficients: jax.Array, species: jax.Array, radial: jax.Array) -> jax.Array:
    """Radial functions of each edge [A, mu, K] from coefficients [A, mu, Z, R], species [A, Z, K], basis [A, R, K]."""
    return jnp.einsum("amr,ark->amk", *_flat(coefficients, species, radial))


def _flat(coefficients: jax.Array, species: jax.Array, radial: jax.Array) -> tuple[jax.Array, jax.Array]:
    atoms, mus, kinds, size = coefficients.shape
    told = radial if kinds == 1 else (species[:, :, None] * radial[:, None]).reshape(atoms, kinds * size, -1)
    return coefficients.reshape(atoms, mus, kinds * size), told


def _forward(
    shape: Shape, coefficients: jax.Array, species: jax.Array, vectors: Vectors, mask: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, Edges, jax.Array]]:
    edges = edge_functions(shape, mask, vectors)
    values = _of_edges(coefficients, species, edges.radial)
    found = []
    for first, last, number in shape.parts:
        of_part = jnp.einsum("amk,ank->amn", values[:, first:last], edges.powers[:, :number])
        found.append(of_part.reshape(len(of_part), -1))
    return jnp.concatenate(found, axis=1), (coefficients, species, edges, values)


def _backward(
    shape: Shape, kept: tuple[jax.Array, jax.Array, Edges, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, None, Vectors, None]:
    coefficients, species, edges, values = kept
    atoms = cotangent.shape[0]
    turned = [_turned(shape, part, block) for part, block in zip(shape.parts, _blocks(shape, cotangent), strict=True)]
    found = [
        jnp.einsum("adn,ank->adk", one.reshape(atoms, -1, number), edges.powers[:, :number]).reshape(
            atoms, last - first, 4, -1
        )
        for one, (first, last, number) in zip(turned, shape.parts, strict=True)
    ]
    of_values, *across = unstack(jnp.concatenate(found, axis=1), 2)  # [A, mu, K] each
    slopes = _of_edges(coefficients, species, edges.slopes)
    flat, told = _flat(coefficients, species, edges.radial)
    to_coefficients = jnp.einsum("amk,ark->amr", of_values, told).reshape(coefficients.shape)
    gradient = [jnp.sum(one * values, axis=1) * edges.inverse for one in across]
    outward = sum(n * g for n, g in zip(edges.direction, gradient, strict=True))
    along = jnp.sum(of_values * slopes, axis=1) - outward
    x, y, z = (g + n * along for g, n in zip(gradient, edges.direction, strict=True))
    return to_coefficients, None, (x, y, z), None


_sums.defvjp(_forward, _backward)


def _blocks(shape: Shape, values: jax.Array) -> tuple[jax.Array, ...]:
    """Sums [A, rows] part by part, [A, mus, number]."""
    sizes = tuple((last - first) * number for first, last, number in shape.parts)
    blocks = split(values, sizes, 1)
    return tuple(
        block.reshape(len(block), last - first, number)
        for block, (first, last, number) in zip(blocks, shape.parts, strict=True)
    )


def _turned(shape: Shape, part: tuple[int, int, int], cotangent: jax.Array) -> jax.Array:
    """From cotangents of sums [A, mus, number] to what powers are multiplied by, [A, mus, 4, number].

    That gives, first, the cotangents of radial functions, and then those of directions along x, y and z.
    """
    number = part[2]
    rows = [cotangent]
    for places, factors in _raised(shape.powers[:number]):
        found = jnp.moveaxis(chosen_rows(places, number, jnp.moveaxis(cotangent, 2, 0).reshape(number, -1)), 0, 1)
        rows.append(found.reshape(cotangent.shape) * np.asarray(factors, cotangent.dtype))
    return jnp.stack(rows, 2)


@lru_cache(maxsize=256)
def _raised(powers: tuple[tuple[int, int, int], ...]) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
    """For x, y and z: where the power with one more factor of it is (-1: beyond the highest rank), and its exponent."""
    place: dict[tuple[int, ...], int] = {along: n for n, along in enumerate(powers)}
    found = []
    for axis in range(3):
        raised = [(*along[:axis], along[axis] + 1, *along[axis + 1 :]) for along in powers]
        found.append((tuple(place.get(one, -1) for one in raised), tuple(one[axis] for one in raised)))
    return tuple(found)
