"""Whether a basis of a file is one of ours in another order: functions told apart by their values, exactly."""

from __future__ import annotations

import random
from functools import lru_cache
from typing import NamedTuple

from almlip_jax.models.mtp.basis import Basis, basis
from almlip_jax.models.mtp.contractions import factors_of

_PRIME = 2**61 - 1  # two polynomials of degree 4 that differ agree by chance in 1 of 5e17 cases


class Known(NamedTuple):
    """A basis of ours.

    Attributes:
        level: of it.
        published: whether it is cut as published tables are.
        places: where each of our basis functions is among those of the file.
    """

    level: int
    published: bool
    places: tuple[int, ...]


@lru_cache(maxsize=32)
def level_of(given: Basis) -> int:
    """The highest level of a basis function, each moment (mu, nu) counting 2 + 4 mu + nu."""
    return max(sum(2 + 4 * mu + nu for mu, nu in factors) for factors in factors_of(given))


@lru_cache(maxsize=32)
def recognised(given: Basis) -> Known | None:
    """The basis of ours that holds the same functions; None where there is none."""
    level = level_of(given)
    if level % 2 or level > 28:
        return None
    values = {value: place for place, value in enumerate(_values(given))}
    for published in (True, False):
        ours = basis(level, published)
        if len(ours.scalars) == len(given.scalars) and set(found := _values(ours)) == set(values):
            return Known(level, published, tuple(values[value] for value in found))
    return None


def _values(given: Basis) -> list[int]:
    """The basis functions for random basic moments, which are the same in every basis, modulo a prime."""
    m = [random.Random(repr(moment)).randrange(_PRIME) for moment in given.moments]
    m += [0] * (given.size - len(m))
    for i, j, factor, k in given.products:
        m[k] = (m[k] + factor * m[i] * m[j]) % _PRIME
    return [m[place] for place in given.scalars]
