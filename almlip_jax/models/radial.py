"""Radial functions of an edge, and a polynomial cutoff that ends them smoothly to second order.

A basis is declared once, under the name that settings of models call it by; other packages declare theirs in a module
of their entry point (`almlip_jax.kinds`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from almlip_jax.kinds import load_plugins
from almlip_jax.names import Known


def _distance_alone(distance: jax.Array, cutoff: float) -> tuple[jax.Array, ...]:
    return (distance,)


@dataclass(frozen=True)
class RadialBasis:
    """Radial functions, which models multiply with the cutoff function.

    Attributes:
        name: in settings.
        functions: ``(arguments, cutoff, count)`` gives functions and their slopes in the distance, [A, B, K] each, from
            arrays [A, K].
        arguments: ``(distance, cutoff)`` gives these arrays, made once of distances [A, K] above 0, Angstrom; the
            distance alone where not given.
        factor: ``(distance, cutoff)`` gives what all functions are multiplied with, [A, K].
        by_order: whether NequIP- and MACE-type models divide the n-th by n, so that functions of higher frequency start
            with less weight.
    """

    name: str
    functions: Callable[[tuple[jax.Array, ...], float, int], tuple[jax.Array, jax.Array]]
    arguments: Callable[[jax.Array, float], tuple[jax.Array, ...]] = _distance_alone
    factor: Callable[[jax.Array, float], jax.Array] | None = None
    by_order: bool = False


_DECLARED: dict[str, RadialBasis] = {}


def declare(basis: RadialBasis) -> None:
    """Makes a radial basis known, or anew, as when a cell of a notebook runs twice.

    Raises:
        ValueError: one of ours has this name.
    """
    if basis.name in _OURS:
        raise ValueError(f"there is another radial basis '{basis.name}'; choose another name.")
    _DECLARED[basis.name] = basis


def radial_basis(name: str) -> RadialBasis:
    """The radial basis of a name that settings take."""
    load_plugins()
    return (_OURS | _DECLARED)[name]


def _names() -> tuple[str, ...]:
    load_plugins()
    return *_OURS, *_DECLARED


RadialBasisName: TypeAlias = Annotated[str, Known("radial basis", _names)]
"""Name of a radial basis."""


def polynomial_cutoff(distance: jax.Array, cutoff: float | jax.Array, power: int = 6) -> jax.Array:
    """Cutoff function that is 1 at 0 and reaches 0 at the cutoff with vanishing first and second derivatives.

    With u = distance / cutoff and p = power, ``1 - (p+1)(p+2)/2 u^p + p(p+2) u^(p+1) - p(p+1)/2 u^(p+2)``.
    Source: Gasteiger et al., arXiv:2003.03123, eq. 8.  Its terms cancel all but a few digits near the cutoff; evaluated
    is ``(1-u)^3 sum_{k<p} (k+1)(k+2)/2 u^k``, which is the same: the first terms of the series of ``(1-u)^-3``.

    Args:
        distance: any shape, Angstrom.
        cutoff: Angstrom; broadcasts.
        power: p, at least 2 (a second derivative must exist at 0).

    Returns:
        Values in [0, 1], the shape of ``distance``; exactly 0 from the cutoff on.
    """
    u = distance / cutoff
    left = (cutoff - distance) / cutoff  # exact where 1 - u is not: close to the cutoff
    series = jnp.full_like(u, power * (power + 1) / 2)
    for k in reversed(range(power - 1)):
        series = series * u + (k + 1) * (k + 2) / 2
    return jnp.where(u < 1, left**3 * series, 0)


def sine_functions(sine: jax.Array, cosine: jax.Array, cutoff: float, count: int) -> tuple[jax.Array, jax.Array]:
    """What differs between spherical Bessel functions of order zero: ``sin(n pi r / cutoff)`` for n = 1..count.

    With ``sqrt(2) cutoff / r`` before them they vanish at the cutoff and are free of units.  Source: Gasteiger et al.,
    arXiv:2003.03123, eq. 7.

    Args:
        sine: of ``pi r / cutoff``, [A, K].
        cosine: likewise.
        cutoff: Angstrom.
        count: number of functions B.

    Returns:
        functions and their slopes in the distance r, [A, B, K] each.
    """
    last, before = chebyshev_polynomials(cosine, count)
    frequency = np.pi / cutoff * np.arange(1, count + 1, dtype=sine.dtype)[:, None]
    return sine[:, None] * last, (cosine[:, None] * last - before) * frequency


def chebyshev_polynomials(x: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Chebyshev polynomials of the second kind, U_0 .. U_(count-1) and U_(-1) .. U_(count-2).

    With ``x = cos(a)`` they give ``sin(n a) = sin(a) U_(n-1)`` and ``cos(n a) = x U_(n-1) - U_(n-2)``.  Clenshaw's
    recursion runs over all orders at once, as arithmetic on whole arrays, which a compiler vectorises.

    Args:
        x: [A, K].
        count: number of polynomials.

    Returns:
        two arrays [A, count, K].
    """
    x = x[:, None]
    before = last = jnp.zeros((x.shape[0], count, x.shape[2]), x.dtype)
    for order in reversed(range(count)):
        starts = np.eye(count, dtype=x.dtype)[order][:, None]
        before, last = last, starts + 2 * x * last - before
    return last, before


def gaussian_functions(distance: jax.Array, cutoff: float, count: int) -> tuple[jax.Array, jax.Array]:
    """Gaussians at equal spacing from 0 to the cutoff, as wide as the spacing.

    Args:
        distance: [A, K], Angstrom.
        cutoff: Angstrom.
        count: number of functions B, at least 2.

    Returns:
        functions and their slopes in the distance, [A, B, K] each.
    """
    spacing = cutoff / (count - 1)
    along = distance[:, None] / spacing - np.arange(count, dtype=distance.dtype)[:, None]
    values = jnp.exp(-0.5 * along**2)
    return values, -along / spacing * values


def _bessel(arguments: tuple[jax.Array, ...], cutoff: float, count: int) -> tuple[jax.Array, jax.Array]:
    sine, cosine = arguments
    return sine_functions(sine, cosine, cutoff, count)


def _waves(distance: jax.Array, cutoff: float) -> tuple[jax.Array, ...]:
    angle = jnp.pi / cutoff * distance
    return jnp.sin(angle), jnp.cos(angle)


def _before_waves(distance: jax.Array, cutoff: float) -> jax.Array:
    return jnp.sqrt(2.0).astype(distance.dtype) * cutoff / distance


def _gaussian(arguments: tuple[jax.Array, ...], cutoff: float, count: int) -> tuple[jax.Array, jax.Array]:
    (distance,) = arguments
    return gaussian_functions(distance, cutoff, count)


_OURS = {
    "bessel": RadialBasis("bessel", _bessel, _waves, _before_waves, by_order=True),
    "gaussian": RadialBasis("gaussian", _gaussian),
}
