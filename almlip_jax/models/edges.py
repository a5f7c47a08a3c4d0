"""The edges of a graph expanded in radial functions and spherical harmonics, with derivatives that are spelt out.

The derivative of a radial function is a function like it, and that of a harmonic of degree l is made of harmonics of
degree l - 1.  Both are computed once, with the functions themselves; what each member of an ensemble adds to them on
the way back is then a short sum for each edge.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from almlip_jax.materialise import materialised
from almlip_jax.models.bilinear import harmonic_recursion, spherical_harmonics
from almlip_jax.models.layout import stack, unstack
from almlip_jax.models.radial import polynomial_cutoff, radial_basis
from almlip_jax.structures.graph import Graph

Vectors: TypeAlias = tuple[jax.Array, jax.Array, jax.Array]
"""Components x, y, z, each [A, K]."""


def edge_vectors(graph: Graph, cutoff: float) -> Vectors:
    """Components of the vectors of all edges, Angstrom.

    A padding slot gets a vector at the cutoff: functions of it vanish there and their derivatives are finite.
    """
    far = (0.0, 0.0, cutoff)
    x, y, z = (jnp.where(graph.edge_mask, part, f) for part, f in zip(unstack(graph.vectors, 2), far, strict=True))
    return x, y, z


class EdgeBasis(NamedTuple):
    """Which functions.

    Attributes:
        cutoff: Angstrom.
        cutoff_power: power of the polynomial cutoff.
        radial: number of radial functions B.
        l_max: highest degree of the harmonics.
        kind: name of the radial functions.
    """

    cutoff: float
    cutoff_power: int
    radial: int
    l_max: int
    kind: str = "bessel"


class _Kept(NamedTuple):
    """What the derivative needs: slopes [A, B, K], harmonics [A, LM, K], directions and inverse lengths [A, K]."""

    slopes: jax.Array
    harmonics: jax.Array
    direction: Vectors
    inverse: jax.Array


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def expand_edges(basis: EdgeBasis, mask: jax.Array, vectors: Vectors) -> tuple[jax.Array, jax.Array]:
    """Radial functions times the cutoff function, and spherical harmonics, of every edge.

    Args:
        basis: which functions.
        mask: [A, K] bool; the radial functions of other slots are 0.
        vectors: Angstrom, of length greater than 0.

    Returns:
        radial functions [A, B, K] (`radial.RadialBasis`) and harmonics [A, (l_max + 1)^2, K]
        (`bilinear.spherical_harmonics`); differentiable in the vectors, any number of times.  Where no slot holds an
        edge all of them are 0.
    """
    return _forward(basis, mask, vectors)[0]


def _forward(basis: EdgeBasis, mask: jax.Array, vectors: Vectors) -> tuple[tuple[jax.Array, jax.Array], _Kept]:
    x, y, z = vectors
    distance = jnp.sqrt(x**2 + y**2 + z**2)
    inverse = 1 / distance
    direction = (x * inverse, y * inverse, z * inverse)

    family = radial_basis(basis.kind)

    def window(r: jax.Array) -> jax.Array:
        """What all radial functions have in common."""
        cut = jnp.where(mask, polynomial_cutoff(r, basis.cutoff, basis.cutoff_power), 0)
        return cut if family.factor is None else family.factor(r, basis.cutoff) * cut

    shared, slope = jax.jvp(window, (distance,), (jnp.ones_like(distance),))
    functions, arguments = partial(_functions, basis), family.arguments(distance, basis.cutoff)
    radial, slopes, harmonics = materialised(functions, jnp.any(mask), arguments, shared, slope, direction)
    return (radial, harmonics), _Kept(slopes, harmonics, direction, inverse)


def _functions(
    basis: EdgeBasis, arguments: tuple[jax.Array, ...], window: jax.Array, slope: jax.Array, direction: Vectors
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Radial functions and their slopes [A, B, K], harmonics [A, LM, K], from arrays [A, K]."""
    values, slopes = radial_basis(basis.kind).functions(arguments, basis.cutoff, basis.radial)
    slopes = values * slope[:, None] + slopes * window[:, None]
    return values * window[:, None], slopes, stack(spherical_harmonics(direction, basis.l_max), 1)


def _backward(
    basis: EdgeBasis, kept: _Kept, cotangent: tuple[jax.Array, jax.Array]
) -> tuple[None, tuple[jax.Array, ...]]:
    along = sum(c * slope for c, slope in zip(unstack(cotangent[0], 1), unstack(kept.slopes, 1), strict=True))
    gradient = _solid_gradient(basis.l_max, unstack(cotangent[1], 1), unstack(kept.harmonics, 1))
    # of the solid harmonics, only the part across the edge is that of the spherical ones
    outward = sum(n * g for n, g in zip(kept.direction, gradient, strict=True))
    along = along - outward * kept.inverse
    return None, tuple(g * kept.inverse + n * along for g, n in zip(gradient, kept.direction, strict=True))


expand_edges.defvjp(_forward, _backward)


def _solid_gradient(l_max: int, weights: tuple[jax.Array, ...], harmonics: tuple[jax.Array, ...]) -> list[jax.Array]:
    """Gradient [A, K] along x, y and z, at length 1, of the weighted sum of the solid harmonics ``r^l Y_l``.

    With ``Y_l = sum c Y_(l-1) Y_1`` it is ``l sqrt(3) sum c Y_(l-1)``: harmonics of degree l - 1 make a vector for each
    Y_l in one way only, and by Euler's theorem its part along the edge is l Y_l.
    """
    found = []
    for component in range(3):
        terms: list[jax.Array] = []
        if l_max:
            terms.append(weights[1 + component] * np.asarray(np.sqrt(3.0), weights[0].dtype))
        for degree in range(2, l_max + 1):
            factor, lower = degree * np.sqrt(3.0), harmonics[(degree - 1) ** 2 : degree**2]
            for m, row in enumerate(harmonic_recursion(degree)[0]):
                own = [np.asarray(factor * c, lower[0].dtype) * lower[i] for _, i, _, j, c in row if j == component]
                if own:
                    terms.append(weights[degree**2 + m] * sum(own[1:], own[0]))
        found.append(sum(terms[1:], terms[0]) if terms else jnp.zeros_like(weights[0]))
    return found
