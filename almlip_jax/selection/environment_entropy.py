"""Entropy of environments: structures whose atoms make the labelled set more diverse, by the density of its atoms."""

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
from almlip_jax.selection.sites import (
    Points,
    Sites,
    arrange_sites,
    counts_of,
    folded,
    keep,
    scale_of,
    sums_of,
    within,
)

QUANTILE = 0.5
"""Quantile of distances in the labelled set that a bandwidth follows from."""


class _Fixed(NamedTuple):
    """A pool, bandwidths [A] of its atoms and [T] of those of its context, and for each atom of the pool [A] the sum of
    the kernel over its own structure, and the number of atoms of its element there.
    """

    sites: Sites
    width: jax.Array
    known_width: jax.Array
    own: jax.Array
    alike: jax.Array


class _Set(NamedTuple):
    """What is labelled or chosen.

    Attributes:
        density: [A] sum of the kernel over the set, of the atoms of the pool.
        usual: [A] sum of the kernel over the set, each atom of it divided by its density when it came in.
        known: [T] density of the atoms of the labelled set.
        chosen: [A] bool, which atoms of the pool are in the set.
    """

    density: jax.Array
    usual: jax.Array
    known: jax.Array
    chosen: jax.Array


@memoised
def environment_entropy(
    k: int, features: str = "power_spectrum", *, bandwidth: float | None = None, quantile: float = QUANTILE
) -> Greedy:
    """Greedy in the entropy of the surroundings of atoms in everything labelled and chosen.

    The entropy of the n atoms of an element is ``H = -1/n sum_i log(1/n sum_j K_ij)``, ``K_ij = exp(-d_ij^2 / 2 h^2)``,
    in nats (Schwalbe-Koda et al., Nat. Commun. 16, 4014 (2025): QUESTS).  A structure adds m atoms; to first order in
    what it adds, each of them changes H by ``1/(n + m)`` times

        -log(1/(n + m) sum_j K_aj) - H + 1 - sum_i K_ai / sum_j K_ij,

    i over the set before, j in the first sum over the set with the structure and in the last over that before: how
    surprising its surroundings are beyond the average, less what it makes of others' surprise.  ``gain`` is the sum
    over the atoms for which that is positive: what a rare site adds is not set against common sites next to it.
    Elements count alike however many atoms they have: their entropies are added.  Within a batch, the last sum keeps
    the densities that atoms of the set had when they came in.  Memory is in proportion to the atoms.

    Args:
        k: number of choices.
        features: rows of atoms.
        bandwidth: h in units of the rows, for all elements; by default that quantile of the distances, element by
            element, from the atoms of each labelled structure to the nearest in another one.
        quantile: between 0 and 1.

    >>> import jax
    >>> from almlip_jax.selection import Candidates, Environments, environment_entropy, select
    >>> pool = Candidates.of(environments=Environments.of({"x": [[[0.1], [0.2]], [[7.0], [0.2]]]}, [[6, 6]] * 2))
    >>> labelled = Candidates.of(environments=Environments.of({"x": [[[0.0], [0.1], [0.2]]]}, [[6] * 3]))
    >>> select(environment_entropy(1, "x", bandwidth=0.5), jax.random.key(0), pool, labelled).indices.tolist()
    [1]
    """

    def start(key: jax.Array, sites: Sites, scalars: Any) -> tuple[_Fixed, _Set]:
        """Bandwidths and sums over own structures, and densities of the labelled set."""
        points, known = sites.points, sites.known
        width = scale_of(sites, bandwidth, quantile, k)
        own, there = width[points.species], width[known.species]
        nothing = jnp.zeros_like(points.norms)
        of_known = _density(known, known, there)
        fixed = _Fixed(
            sites,
            own,
            there,
            own=within(sites, lambda square: jnp.exp(-0.5 * square), own),
            alike=within(sites, lambda square: jnp.isfinite(square).astype(points.x.dtype), jnp.ones_like(own)),
        )
        density, usual = _added(points, known, own, of_known, (nothing, nothing))
        return fixed, _Set(density, usual, of_known, jnp.zeros(points.there.shape, bool))

    def gains(fixed: _Fixed, state: _Set, free: jax.Array) -> jax.Array:
        """What each structure would change of the entropies, [n]."""
        points, known = fixed.sites.points, fixed.sites.known
        taken = points._replace(there=points.there & state.chosen)
        number = counts_of(known) + counts_of(taken)
        surprise = sums_of(_log(state.known), known) + sums_of(_log(state.density), taken)
        entropy = jnp.where(number > 0, jnp.log(jnp.maximum(number, 1)) - surprise / jnp.maximum(number, 1), 0)
        total = number[points.species] + fixed.alike
        value = jnp.log(total) - _log(state.density + fixed.own) - entropy[points.species] + 1 - state.usual
        return fixed.sites.over_members(jnp.maximum(value, 0) / jnp.maximum(total, 1))

    def update(fixed: _Fixed, state: _Set, row: jax.Array) -> _Set:
        points, members = fixed.sites.points, fixed.sites.members[row]
        atoms = fixed.sites.chosen(row)
        after = (state.density + fixed.own)[members]
        density, usual = _added(points, atoms, fixed.width, after, (state.density, state.usual))
        known = state.known + _density(fixed.sites.known, atoms, fixed.known_width)
        place = jnp.where(members >= 0, members, points.there.shape[0])
        return _Set(density, usual, known, state.chosen.at[place].set(True, mode="drop"))

    return Greedy(k, Rule(start, gains, update, features, atoms=True))


@memoised
def surprising(
    features: str = "power_spectrum",
    *,
    bandwidth: float | None = None,
    quantile: float = QUANTILE,
    minimum: float = 0.0,
) -> Filter:
    """Keeps candidates with an atom in surroundings that surprise: ``-log sum_i K_ai > minimum``, i over the labelled.

    Above 0 the kernels of all labelled atoms do not add up to one like it; K is that of `environment_entropy`.  Source:
    Schwalbe-Koda et al., Nat. Commun. 16, 4014 (2025), where it is the differential entropy.

    >>> import jax
    >>> from almlip_jax.selection import Candidates, Environments, surprising
    >>> pool = Candidates.of(environments=Environments.of({"x": [[[0.1]], [[2.0]]]}, [[6], [6]]))
    >>> known = Candidates.of(environments=Environments.of({"x": [[[0.0], [0.2]]]}, [[6, 6]]))
    >>> surprising("x", bandwidth=0.5)(jax.random.key(0), pool, known).valid.tolist()
    [False, True]
    """

    def narrow(key: jax.Array, pool: Candidates, labelled: Candidates) -> Candidates:
        order, sites = arrange_sites(pool, labelled, features)
        points = sites.points
        width = scale_of(sites, bandwidth, quantile, 0)[points.species]
        surprise = -_log(_density(points, sites.known, width))
        return keep(pool, order, sites.over_members((surprise > minimum).astype(jnp.int32)) > 0)

    return narrow


def _density(points: Points, others: Points, width: jax.Array) -> jax.Array:
    """Sum of the kernel over some others, [A]."""
    return _added(points, others, width, jnp.ones_like(others.norms), (jnp.zeros_like(points.norms),) * 2)[0]


def _added(
    points: Points, others: Points, width: jax.Array, densities: jax.Array, so_far: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Sums of the kernel over some others added to those so far, [A]: as it is, and over their densities [B]."""
    scale = 0.5 / jnp.maximum(width, jnp.sqrt(jnp.finfo(width.dtype).tiny))[:, None] ** 2

    def fold(sums: tuple[jax.Array, jax.Array], square: jax.Array, share: jax.Array) -> tuple[jax.Array, jax.Array]:
        kernel = jnp.exp(-scale * square)
        return sums[0] + jnp.sum(kernel, axis=1), sums[1] + kernel @ share

    return folded(points, others, so_far, fold, jnp.where(densities > 0, 1 / densities, 0))


def _log(density: jax.Array) -> jax.Array:
    """Logarithm of a density, of nothing a very small one, [A]."""
    return jnp.log(jnp.maximum(density, jnp.finfo(density.dtype).tiny)).astype(wide())


class _Bandwidth(ByEnvironments):
    bandwidth: float | None = Field(default=None, gt=0, le=1e9)
    """Standard deviation of the kernel in units of the features; by default it follows from the labelled set."""
    quantile: float = Field(default=QUANTILE, gt=0, le=1)
    """Where no bandwidth is given: share of the labelled atoms that have one of another structure within it."""


class EnvironmentEntropySettings(_Bandwidth, WeighedSelector):
    """Greedy in the entropy of the surroundings of atoms in everything labelled and chosen."""

    kind: Literal["environment_entropy"] = "environment_entropy"

    def build(self, k: int) -> Selector:
        """See `environment_entropy`."""
        return environment_entropy(k, self.features, bandwidth=self.bandwidth, quantile=self.quantile)


class SurprisingSettings(_Bandwidth, FilterSettings):
    """Keeps candidates with an atom in surroundings that are rare in the labelled set, or not there."""

    kind: Literal["surprising"] = "surprising"
    minimum: float = Field(default=0.0, ge=-100, le=100)
    """Least surprise of an atom, in nats: minus the logarithm of the sum of kernels over the labelled atoms."""

    @property
    def prefers(self) -> bool:
        """It does."""
        return True

    def build(self) -> Filter:
        """See `surprising`."""
        return surprising(self.features, bandwidth=self.bandwidth, quantile=self.quantile, minimum=self.minimum)
