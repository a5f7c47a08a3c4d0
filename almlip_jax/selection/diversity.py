"""Selectors by distance, with the labelled set as context: farthest points, largest clusters, k-means++ sampling."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp

from almlip_jax.selection import distances
from almlip_jax.selection.base import ByFeatures, Selector, WeighedSelector, memoised
from almlip_jax.selection.distances import Nearest, Points
from almlip_jax.selection.greedy import Greedy, Rule
from almlip_jax.selection.rows import Rows, ties


@memoised
def max_dist(k: int, features: str = "last_layer_gradient") -> Greedy:
    """Farthest-point sampling: each choice is the candidate farthest from everything labelled or chosen before.

    Without labelled structures the first choice is the candidate of largest norm.  ``gain`` is the distance (of the
    first choice, without context, the norm).  Source: Sener and Savarese, ICLR 2018 (core-set, greedy k-center).

    >>> import jax
    >>> from almlip_jax.selection import Candidates, max_dist, select
    >>> pool = Candidates.of({"latent": [[0.1, 0.0], [2.0, 0.0], [2.1, 0.0], [0.0, 1.0]]})
    >>> labelled = Candidates.of({"latent": [[1.0, 0.0]]})
    >>> select(max_dist(2, features="latent"), jax.random.key(0), pool, labelled).indices.tolist()
    [3, 2]
    """
    return Greedy(k, Rule(_start, lambda fixed, state, free: jnp.sqrt(state.square), distances.update, features))


@memoised
def lcmd(k: int, features: str = "last_layer_gradient") -> Greedy:
    """Largest cluster maximum distance: the farthest candidate of the cluster with the largest sum of squares.

    Clusters are made of the candidates that have the same nearest among everything labelled or chosen; their size is
    the sum of the square distances to it.  Dense regions get more choices than with `max_dist`, outliers fewer.
    Without labelled structures the first choice is the candidate of largest norm.  ``gain`` is the distance.  Source:
    Holzmueller et al., J. Mach. Learn. Res. 24, 164 (2023), section 5.2.6.

    >>> import jax
    >>> from almlip_jax.selection import Candidates, lcmd, select
    >>> pool = Candidates.of({"latent": [[0.1, 0.0], [2.0, 0.0], [2.1, 0.0], [0.0, 1.0]]})
    >>> labelled = Candidates.of({"latent": [[1.0, 0.0]]})
    >>> select(lcmd(2, features="latent"), jax.random.key(0), pool, labelled).indices.tolist()
    [3, 2]
    """

    def begin(key: jax.Array, rows: Rows, scalars: Any) -> tuple[tuple[Points, jax.Array], Nearest]:
        points, nearest = distances.start(rows)
        return (points, jnp.zeros((rows.known.shape[0] + k,), rows.x.dtype)), nearest

    def gains(fixed: tuple[Points, jax.Array], state: Nearest, free: jax.Array) -> jax.Array:
        sizes = fixed[1].at[state.owner].add(jnp.where(free, state.square, 0))  # of what may be chosen now
        largest = sizes >= jnp.max(sizes) * (1 - ties(sizes))
        return jnp.where(largest[state.owner], jnp.sqrt(state.square), -jnp.inf)

    def update(fixed: tuple[Points, jax.Array], state: Nearest, row: jax.Array) -> Nearest:
        return distances.update(fixed[0], state, row)

    return Greedy(k, Rule(begin, gains, update, features))


@memoised
def kmeans_pp(k: int, features: str = "last_layer_gradient") -> Greedy:
    """k-means++ sampling: probability proportional to the square distance from everything labelled or chosen.

    On gradients this is BADGE.  Without labelled structures the first choice is drawn by square norm.  ``gain`` is the
    square distance.  Sources: Arthur and Vassilvitskii, SODA 2007; Ash et al., ICLR 2020 (BADGE).

    >>> import jax
    >>> from almlip_jax.selection import Candidates, kmeans_pp, select
    >>> pool = Candidates.of({"latent": [[0.1, 0.0], [2.0, 0.0], [2.1, 0.0], [0.0, 1.0]]})
    >>> labelled = Candidates.of({"latent": [[1.0, 0.0]]})
    >>> select(kmeans_pp(2, features="latent"), jax.random.key(0), pool, labelled).valid.tolist()
    [True, True]
    """
    return Greedy(k, Rule(_start, lambda fixed, state, free: state.square, distances.update, features, draws=True))


def _start(key: jax.Array, rows: Rows, scalars: Any) -> tuple[Points, Nearest]:
    return distances.start(rows)


class MaxDistSettings(ByFeatures, WeighedSelector):
    """Farthest points from everything labelled or chosen."""

    kind: Literal["max_dist"] = "max_dist"

    def build(self, k: int) -> Selector:
        """See `max_dist`."""
        return max_dist(k, self.features)


class LcmdSettings(ByFeatures, WeighedSelector):
    """The farthest point of the largest cluster around what is labelled or chosen."""

    kind: Literal["lcmd"] = "lcmd"

    def build(self, k: int) -> Selector:
        """See `lcmd`."""
        return lcmd(k, self.features)


class KmeansPpSettings(ByFeatures, WeighedSelector):
    """At random, with probability proportional to the square distance from everything labelled or chosen."""

    kind: Literal["kmeans_pp"] = "kmeans_pp"

    def build(self, k: int) -> Selector:
        """See `kmeans_pp`."""
        return kmeans_pp(k, self.features)
