"""Cover of environments: structures with the most kinds of surroundings that nothing labelled or chosen has."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from pydantic import Field

from almlip_jax.kernels import wide
from almlip_jax.selection.base import (
    ByEnvironments,
    Candidates,
    Filter,
    FilterSettings,
    Selector,
    WeighedSelector,
    memoised,
)
from almlip_jax.selection.greedy import Greedy, Rule
from almlip_jax.selection.sites import Sites, arrange_sites, keep, nearest, scale_of, within

QUANTILE = 0.9
"""Quantile of distances in the labelled set that a radius follows from."""
_AMONG_EQUALS = 1e-3  # of a kind of surroundings: what the farthest of them adds at most


class _Kinds(NamedTuple):
    """A pool, and for each atom its radius and the share [A] of a kind of surroundings that it stands for."""

    sites: Sites
    radius: jax.Array
    share: jax.Array


@memoised
def cover(
    k: int, features: str = "power_spectrum", *, radius: float | None = None, quantile: float = QUANTILE
) -> Greedy:
    """Greedy set cover of the surroundings of atoms: each choice brings the most kinds that are not there yet.

    An atom's surroundings are new where no atom of its element, in anything labelled or chosen, lies within a radius.
    New atoms of a structure that lie within the radius of each other share one count: ``gain`` is the number of new
    kinds, in which a rare site counts as much as a common one and many equal atoms as much as one.  Among structures
    with as many, and where nothing is new any more, the one with the farthest atom comes first (for that, at most 0.001
    are added to the gain).  Memory is in proportion to the atoms.  Source of the greedy rule: Chvatal, Math. Oper. Res.
    4, 233 (1979).

    Args:
        k: number of choices.
        features: rows of atoms.
        radius: in units of the rows, for all elements; by default that quantile of the distances, element by element,
            from the atoms of each labelled structure to the nearest in another one.
        quantile: between 0 and 1.

    >>> import jax
    >>> from almlip_jax.selection import Candidates, Environments, cover, select
    >>> rows = [[[0.1], [0.2], [0.3]], [[7.0], [7.1], [7.2]], [[0.1], [5.0], [3.0]]]
    >>> pool = Candidates.of(environments=Environments.of({"x": rows}, [[6, 6, 6]] * 3))
    >>> labelled = Candidates.of(environments=Environments.of({"x": [[[0.0], [9.0]]]}, [[6, 6]]))
    >>> found = select(cover(3, "x", radius=0.5), jax.random.key(0), pool, labelled)
    >>> found.indices.tolist(), found.gain.round().tolist()
    ([2, 1, 0], [2.0, 1.0, 0.0])
    """

    def start(key: jax.Array, sites: Sites, scalars: Any) -> tuple[_Kinds, jax.Array]:
        reach = scale_of(sites, radius, quantile, k)[sites.points.species]
        alike = within(sites, lambda square: (square <= 1).astype(wide()), reach)
        return _Kinds(sites, reach, 1 / jnp.maximum(alike, 1)), nearest(sites.points, sites.known)

    def gains(fixed: _Kinds, square: jax.Array, free: jax.Array) -> jax.Array:
        distance = jnp.sqrt(square)
        new = fixed.sites.over_members(jnp.where(distance > fixed.radius, fixed.share, 0))
        relative = distance / jnp.where(fixed.radius > 0, fixed.radius, 1)
        far = jnp.where(jnp.isinf(relative), 1, relative / (1 + relative))
        return new + _AMONG_EQUALS * fixed.sites.over_members(far.astype(wide()), jnp.max)

    def update(fixed: _Kinds, square: jax.Array, row: jax.Array) -> jax.Array:
        return nearest(fixed.sites.points, fixed.sites.chosen(row), square)

    return Greedy(k, Rule(start, gains, update, features, atoms=True))


@memoised
def new_environments(
    features: str = "power_spectrum", *, radius: float | None = None, quantile: float = QUANTILE, least: int = 1
) -> Filter:
    """Keeps candidates with `least` atoms or more in surroundings that nothing labelled has; see `cover`.

    >>> import jax
    >>> from almlip_jax.selection import Candidates, Environments, new_environments
    >>> pool = Candidates.of(environments=Environments.of({"x": [[[0.1]], [[2.0]]]}, [[6], [6]]))
    >>> known = Candidates.of(environments=Environments.of({"x": [[[0.0]]]}, [[6]]))
    >>> new_environments("x", radius=0.5)(jax.random.key(0), pool, known).valid.tolist()
    [False, True]
    """

    def narrow(key: jax.Array, pool: Candidates, labelled: Candidates) -> Candidates:
        order, sites = arrange_sites(pool, labelled, features)
        reach = scale_of(sites, radius, quantile, 0)[sites.points.species]
        new = sites.over_members((jnp.sqrt(nearest(sites.points, sites.known)) > reach).astype(jnp.int32))
        return keep(pool, order, new >= least)

    return narrow


class _Radius(ByEnvironments):
    radius: float | None = Field(default=None, gt=0, le=1e9)
    """Distance in units of the features beyond which surroundings are new; else it follows from what is labelled."""
    quantile: float = Field(default=QUANTILE, gt=0, le=1)
    """Where no radius is given: share of the labelled atoms that another labelled structure covers within it."""


class CoverSettings(_Radius, WeighedSelector):
    """Greedy set cover: the most kinds of surroundings of atoms that nothing labelled or chosen has."""

    kind: Literal["cover"] = "cover"

    def build(self, k: int) -> Selector:
        """See `cover`."""
        return cover(k, self.features, radius=self.radius, quantile=self.quantile)


class NewEnvironmentsSettings(_Radius, FilterSettings):
    """Keeps candidates with surroundings of atoms that nothing labelled has."""

    kind: Literal["new_environments"] = "new_environments"
    least: int = Field(default=1, ge=1, le=10**6)
    """Least number of such atoms."""

    @property
    def prefers(self) -> bool:
        """It does."""
        return True

    def build(self) -> Filter:
        """See `new_environments`."""
        return new_environments(self.features, radius=self.radius, quantile=self.quantile, least=self.least)
