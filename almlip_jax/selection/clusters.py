"""Selection from clusters: k-means on the pool, then farthest points inside each cluster in turn."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from pydantic import Field

from almlip_jax.selection import distances
from almlip_jax.selection.base import ByFeatures, Selector, WeighedSelector, memoised
from almlip_jax.selection.distances import Nearest, Points
from almlip_jax.selection.greedy import Greedy, Rule
from almlip_jax.selection.rows import Rows, drawn


class _Clustered(NamedTuple):
    """Candidates as points, the cluster [n] of each, and the number of candidates in each cluster [c]."""

    points: Points
    cluster: jax.Array
    sizes: jax.Array


@memoised
def kmeans_fps(k: int, features: str = "last_layer_gradient", clusters: int = 15, iterations: int = 25) -> Greedy:
    """k-means on the pool, then farthest points inside the clusters.

    Clusters take turns: each choice is made in the one that has given fewest so far (the largest first), and is its
    candidate farthest from everything labelled or chosen; ``gain`` is that distance.  Without labelled structures the
    first choice is that of largest norm.  Source: Khan et al., arXiv:2601.06916.

    Args:
        k: number of choices.
        features: which features.
        clusters: number of clusters.
        iterations: of Lloyd, after a k-means++ start.

    >>> import jax
    >>> from almlip_jax.selection import Candidates, kmeans_fps, select
    >>> pool = Candidates.of({"latent": [[0.1, 0.0], [2.0, 0.0], [2.1, 0.0], [0.0, 1.0]]})
    >>> labelled = Candidates.of({"latent": [[1.0, 0.0]]})
    >>> select(kmeans_fps(2, features="latent", clusters=2), jax.random.key(0), pool, labelled).indices.tolist()
    [3, 2]
    """

    def start(key: jax.Array, rows: Rows, scalars: Any) -> tuple[_Clustered, tuple[Nearest, jax.Array]]:
        points, nearest = distances.start(rows)
        cluster, _ = kmeans(key, points, clusters, iterations)
        sizes = jnp.zeros((clusters,), jnp.int32).at[cluster].add(rows.usable.astype(jnp.int32))
        return _Clustered(points, cluster, sizes), (nearest, jnp.zeros((clusters,), jnp.int32))

    def gains(fixed: _Clustered, state: tuple[Nearest, jax.Array], free: jax.Array) -> jax.Array:
        nearest, given = state
        left = jnp.zeros_like(given).at[fixed.cluster].add(free.astype(given.dtype))
        turn = jnp.lexsort((-fixed.sizes, given, left == 0))[0]
        return jnp.where(fixed.cluster == turn, jnp.sqrt(nearest.square), -jnp.inf)

    def update(fixed: _Clustered, state: tuple[Nearest, jax.Array], row: jax.Array) -> tuple[Nearest, jax.Array]:
        nearest, given = state
        return distances.update(fixed.points, nearest, row), given.at[fixed.cluster[row]].add(1)

    return Greedy(k, Rule(start, gains, update, features))


def kmeans(key: jax.Array, points: Points, clusters: int, iterations: int) -> tuple[jax.Array, jax.Array]:
    """Lloyd's k-means from a k-means++ start.

    Args:
        key: decides the start.
        points: what is clustered; only usable rows count.
        clusters: number c of clusters; one that loses all its points keeps its centre.
        iterations: rounds of assignment and averaging.

    Returns:
        cluster [n] int of each point, and the centres [c, d].
    """
    first, *others = jax.random.split(key, clusters)
    row = drawn(first, jnp.ones_like(points.norms), points.usable)
    centres = jnp.zeros((clusters, points.x.shape[1]), points.x.dtype).at[0].set(points.x[row])
    square = distances.squares(points, points.x[row])

    def add(carry: tuple[jax.Array, jax.Array], one: tuple) -> tuple[tuple[jax.Array, jax.Array], None]:
        square, centres = carry
        n, draw = one
        row = drawn(draw, square, points.usable)
        square = jnp.minimum(square, distances.squares(points, points.x[row]))
        return (square, centres.at[n].set(points.x[row])), None

    if others:
        (_, centres), _ = jax.lax.scan(add, (square, centres), (jnp.arange(1, clusters), jnp.stack(others)))

    def assign(centres: jax.Array) -> jax.Array:
        return jnp.argmin(jnp.sum(centres**2, axis=1) - 2 * points.x @ centres.T, axis=1).astype(jnp.int32)

    def improve(_: jax.Array, centres: jax.Array) -> jax.Array:
        mine = (assign(centres)[:, None] == jnp.arange(clusters)) & points.usable[:, None]
        weights = mine.astype(points.x.dtype)
        counts = jnp.sum(weights, axis=0)[:, None]
        return jnp.where(counts > 0, weights.T @ points.x / jnp.maximum(counts, 1), centres)

    centres = jax.lax.fori_loop(0, iterations, improve, centres)
    return assign(centres), centres


class KmeansFpsSettings(ByFeatures, WeighedSelector):
    """Farthest points inside the clusters of the pool, which take turns."""

    kind: Literal["kmeans_fps"] = "kmeans_fps"
    clusters: int = Field(default=15, ge=1, le=100_000)
    """Number of clusters."""
    iterations: int = Field(default=25, ge=0, le=10_000)
    """Rounds of k-means."""

    def build(self, k: int) -> Selector:
        """See `kmeans_fps`."""
        return kmeans_fps(k, self.features, self.clusters, self.iterations)
