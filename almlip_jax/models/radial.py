"""Radial functions of an edge: a Bessel basis under a polynomial cutoff, smooth to second order where it ends."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def polynomial_cutoff(distance: jax.Array, cutoff: float, power: int = 6) -> jax.Array:
    """Cutoff function that is 1 at 0 and reaches 0 at the cutoff with vanishing first and second derivatives.

    With u = distance / cutoff and p = power, ``1 - (p+1)(p+2)/2 u^p + p(p+2) u^(p+1) - p(p+1)/2 u^(p+2)``.
    Source: Gasteiger et al., arXiv:2003.03123, eq. 8.

    Args:
        distance: any shape, Angstrom.
        cutoff: Angstrom.
        power: p, at least 2 (a second derivative must exist at 0).

    Returns:
        Values in [0, 1], the shape of ``distance``; exactly 0 from the cutoff on.
    """
    u = distance / cutoff
    p = float(power)
    tail = (p + 1) * (p + 2) / 2 - p * (p + 2) * u + p * (p + 1) / 2 * u**2
    return jnp.where(u < 1, 1 - tail * u**power, 0)


def bessel_functions(distance: jax.Array, cutoff: float, count: int) -> list[jax.Array]:
    """Spherical Bessel functions of order zero that vanish at the cutoff.

    ``B_n(r) = sqrt(2 / cutoff) sin(n pi r / cutoff) / r`` for n = 1..count, times ``cutoff`` to the power that makes
    it free of units.  Source: Gasteiger et al., arXiv:2003.03123, eq. 7.

    Args:
        distance: any shape, Angstrom, greater than 0.
        cutoff: Angstrom.
        count: number of functions B.

    Returns:
        B arrays of the shape of ``distance``.
    """
    u = distance / cutoff
    # sin(n x) by the Chebyshev recursion: one sine and one cosine instead of B sines.
    first, double = jnp.sin(jnp.pi * u), 2 * jnp.cos(jnp.pi * u)
    waves = [first, double * first]
    for _ in range(count - 2):
        waves.append(double * waves[-1] - waves[-2])
    factor = jnp.sqrt(2.0).astype(u.dtype) / u
    return [wave * factor for wave in waves[:count]]


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


def gaussian_functions(distance: jax.Array, cutoff: float, count: int) -> list[jax.Array]:
    """Gaussians at equal spacing from 0 to the cutoff, as wide as the spacing.

    Args:
        distance: any shape, Angstrom.
        cutoff: Angstrom.
        count: number of functions B, at least 2.

    Returns:
        B arrays of the shape of ``distance``.
    """
    spacing = cutoff / (count - 1)
    return [jnp.exp(-0.5 * (distance / spacing - n) ** 2) for n in range(count)]
