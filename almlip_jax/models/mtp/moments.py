"""From edges to basic moments, and back: radial functions, powers of directions, and derivatives that are spelt out.

A basic moment sums f_mu(r; zi, zj) ux^a uy^b uz^c over the neighbours of an atom, u = r / |r|, with

    f_mu(r; zi, zj) = scaling * (max - r)^2 * sum_k c[zi, zj, mu, k] T_k(s),    s = (2 r - (min + max)) / (max - min),

for r < max and 0 beyond: T_k are Chebyshev polynomials, which nothing stops from being evaluated below s = -1.  Source:
Novikov et al., Mach. Learn.: Sci. Technol. 2, 025002 (2021).

The functions of an edge, (max - r)^2 T_k(s) and the powers of u, hold no parameter and are shared by members.  What
members have of their own are the radial functions, the sums over neighbours of powers of the highest ranks (`ranks`),
and in the backward pass one product of matrices for each atom: the derivative of a power of u is another one, so that
cotangents are rearranged, [A, powers], instead of derivatives of edges, [A, powers, K].
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from almlip_jax.materialise import materialised
from almlip_jax.models.edges import Vectors
from almlip_jax.models.layout import split, unstack
from almlip_jax.models.mtp.basis import Basis, directions
from almlip_jax.models.mtp.ranks import Part, Shape, linearly, shape_of


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


class Edges(NamedTuple):
    """Functions of edges that hold no parameter.

    Attributes:
        radial: [A, R, K] Chebyshev polynomials times (max - r)^2; 0 in padding slots.
        slopes: [A, R, K] their derivatives by the distance.
        powers: [A, n, K] products of components of the directions, `summed_powers` of each of `Shape.tops`.
        direction: components x, y, z of u, [A, K] each.
        inverse: [A, K] of the distance.
    """

    radial: jax.Array
    slopes: jax.Array
    powers: tuple[jax.Array, ...]
    direction: Vectors
    inverse: jax.Array


def edge_functions(shape: Shape, basis: RadialBasis, mask: jax.Array, vectors: Vectors) -> Edges:
    """Functions of edges that hold no parameter; differentiable in the vectors.

    Args:
        shape: which powers.
        basis: which radial functions.
        mask: [A, K] bool; the radial functions of other slots are 0.
        vectors: components x, y, z, [A, K] Angstrom, of lengths greater than 0.
    """
    distance, inverse, direction = _directions(vectors)
    functions = partial(_functions, shape, basis)
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
    shape: Shape, basis: RadialBasis, mask: jax.Array, distance: jax.Array, direction: Vectors
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]:
    """Radial functions and slopes [A, R, K], and powers [A, n, K]."""
    return *_radial(basis, mask, distance), _powers(shape.tops, direction)


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


def _powers(tops: tuple[int, ...], direction: Vectors) -> tuple[jax.Array, ...]:
    """`summed_powers` of some ranks, [A, n, K]: those of a rank are components times those of the rank below."""
    x, y, z = (one[:, None] for one in direction)
    ones = jnp.ones_like(x)
    found = {0: ones}
    below = ones
    for rank in range(1, max(tops, default=0) + 1):
        above = [x * below, y * below[:, -rank:], z * below[:, -1:]]
        lower = [below, ones] if rank == 2 else [below]
        if rank in tops:
            found[rank] = jnp.concatenate([*above, *lower], axis=1)
        below = found[rank][:, : (rank + 1) * (rank + 2) // 2] if rank in tops else jnp.concatenate(above, axis=1)
    return tuple(found[rank] for rank in tops)


def powers_of_ranks(shape: Shape, direction: Vectors) -> list[jax.Array]:
    """Products of components of the directions, [A, n, K] of each rank up to the highest."""
    ranks = tuple(range(max(shape.ranks) + 1))
    return [found[:, : len(directions(rank))] for rank, found in zip(ranks, _powers(ranks, direction), strict=True)]


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
    shape = shape_of(basis)
    sums = _sums(shape, radial_basis, coefficients, species, vectors, mask)
    return linearly(shape.expanded, shape.collected, sums, None if shape.short else jnp.any(mask))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sums(
    shape: Shape, basis: RadialBasis, coefficients: jax.Array, species: jax.Array, vectors: Vectors, mask: jax.Array
) -> jax.Array:
    """Sums over neighbours, [rows, A]."""
    return _forward(shape, basis, coefficients, species, vectors, mask)[0]


def _of_edges(coefficients: jax.Array, species: jax.Array, radial: jax.Array) -> jax.Array:
    """Radial functions of each edge [A, mu, K] from coefficients [A, mu, Z, R], species [A, Z, K], basis [A, R, K]."""
    return jnp.einsum("amr,ark->amk", *_flat(coefficients, species, radial))


def _flat(coefficients: jax.Array, species: jax.Array, radial: jax.Array) -> tuple[jax.Array, jax.Array]:
    atoms, mus, kinds, size = coefficients.shape
    told = radial if kinds == 1 else (species[:, :, None] * radial[:, None]).reshape(atoms, kinds * size, -1)
    return coefficients.reshape(atoms, mus, kinds * size), told


_Kept: TypeAlias = tuple[jax.Array, jax.Array, Edges, jax.Array, jax.Array]


def _forward(
    shape: Shape, basis: RadialBasis, coefficients: jax.Array, species: jax.Array, vectors: Vectors, mask: jax.Array
) -> tuple[jax.Array, _Kept]:
    edges = edge_functions(shape, basis, mask, vectors)
    values = _of_edges(coefficients, species, edges.radial)
    found = []
    for part, of_part in zip(shape.parts, _by_part(shape, values), strict=True):
        if part.rank == 0:
            found.append(jnp.transpose(jnp.sum(of_part, axis=2)))
            continue
        # powers first: XLA's products on CPUs are faster with the larger matrix on the left
        sums = jax.lax.dot_general(_powers_of(shape, edges, part), of_part, (((2,), (2,)), ((0,), (0,))))
        found.append(jnp.transpose(sums, (2, 1, 0)).reshape(-1, len(values)))
    return jnp.concatenate(found), (coefficients, species, edges, values, jnp.any(mask))


def _backward(shape: Shape, _: RadialBasis, kept: _Kept, cotangent: jax.Array) -> tuple[jax.Array, None, Vectors, None]:
    coefficients, species, edges, values, some = kept
    told = _flat(coefficients, species, edges.radial)[1]
    slopes = _of_edges(coefficients, species, edges.slopes)
    by_part = (shape.parts, _blocks(shape, cotangent), _by_part(shape, values), _by_part(shape, slopes))
    to_coefficients, along = [], jnp.zeros_like(edges.inverse)
    across = [along] * 3
    for part, block, own, slope in zip(*by_part, strict=True):
        if part.rank == 0:
            of_values = jnp.broadcast_to(jnp.transpose(block)[:, :, None], own.shape)
        else:
            rows = linearly(part.turned, part.turned_back, block, None if part.short else some)
            turned = jnp.transpose(rows).reshape(len(own), -1, part.powers)
            products = jnp.einsum("adn,ank->adk", turned, _powers_of(shape, edges, part))
            of_values, *of_directions = unstack(products.reshape(len(own), part.functions, 4, -1), 2)  # [A, m, K]
            across = [sums + jnp.sum(one * own, axis=1) for sums, one in zip(across, of_directions, strict=True)]
        to_coefficients.append(jnp.einsum("amk,ark->amr", of_values, told))
        along = along + jnp.sum(of_values * slope, axis=1)
    gradient = [one * edges.inverse for one in across]
    along = along - sum(n * g for n, g in zip(edges.direction, gradient, strict=True))
    x, y, z = (g + n * along for g, n in zip(gradient, edges.direction, strict=True))
    return jnp.concatenate(to_coefficients, 1).reshape(coefficients.shape), None, (x, y, z), None


_sums.defvjp(_forward, _backward)


def _powers_of(shape: Shape, edges: Edges, part: Part) -> jax.Array:
    """What the radial functions of a part are summed with."""
    return edges.powers[shape.tops.index(part.rank)]


def _by_part(shape: Shape, values: jax.Array) -> tuple[jax.Array, ...]:
    """Values [A, mu, K] part by part."""
    return split(values, tuple(part.functions for part in shape.parts), 1)


def _blocks(shape: Shape, values: jax.Array) -> tuple[jax.Array, ...]:
    """Sums [rows, A] part by part."""
    return split(values, tuple(part.functions * part.powers for part in shape.parts), 0)
