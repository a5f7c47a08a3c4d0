"""Selectors that weigh uncertainty against diversity: by a fixed weight, or by one that follows measured progress."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

from almlip_jax.selection import distances
from almlip_jax.selection.base import ByFeatures, ByScore, Selector, WeighedSelector, memoised
from almlip_jax.selection.distances import Nearest, Points
from almlip_jax.selection.greedy import Greedy, Rule
from almlip_jax.selection.rows import Rows

WEIGHT = "uncertainty_weight"
"""Name among `Candidates.scalars` of the weight that `adaptive` uses."""


class _Mixture(NamedTuple):
    """Candidates as points, their normalised uncertainty [n], and its weight []."""

    points: Points
    uncertainty: jax.Array
    weight: jax.Array


@memoised
def hybrid(k: int, score: str, features: str = "last_layer_gradient", alpha: float = 0.6) -> Greedy:
    """Greedy in ``alpha * uncertainty + (1 - alpha) * diversity``, both between 0 and 1.

    Uncertainty is a score, from 0 for the lowest of the pool to 1 for the highest.  Diversity is the distance to
    everything labelled or chosen over the largest such distance of a candidate (without labelled structures, at the
    first choice, norms take the place of distances).  ``gain`` is the sum.  Source: Khan et al., arXiv:2601.06916.

    Args:
        k: number of choices.
        score: of uncertainty.
        features: in which diversity is measured.
        alpha: weight of uncertainty.

    >>> import jax
    >>> from almlip_jax.selection import Candidates, hybrid, select
    >>> rows = [[0.1, 0.0], [2.0, 0.0], [2.1, 0.0], [0.0, 1.0]]
    >>> pool = Candidates.of({"latent": rows}, {"force_std_max": [0.9, 0.1, 0.2, 0.3]})
    >>> labelled = Candidates.of({"latent": [[1.0, 0.0]]})
    >>> select(hybrid(1, "force_std_max", "latent", alpha=0.9), jax.random.key(0), pool, labelled).indices.tolist()
    [0]
    """
    return _mixture(k, score, features, lambda scalars: jnp.asarray(alpha))


@memoised
def adaptive(k: int, score: str, features: str = "last_layer_gradient", alpha: float = 0.3) -> Greedy:
    """`hybrid` with a weight that is data: the scalar `WEIGHT` of the labelled set or the pool.

    Nothing is compiled anew when it changes; `adapt` computes it from one round to the next.

    Args:
        k: number of choices.
        score: of uncertainty.
        features: in which diversity is measured.
        alpha: weight of uncertainty where the candidates carry none: before progress has been measured.

    >>> import jax
    >>> from almlip_jax.selection import Candidates, adaptive, select
    >>> rows = [[0.1, 0.0], [2.0, 0.0], [2.1, 0.0], [0.0, 1.0]]
    >>> pool = Candidates.of({"latent": rows}, {"force_std_max": [0.9, 0.1, 0.2, 0.3]})
    >>> labelled = Candidates.of({"latent": [[1.0, 0.0]]})
    >>> select(adaptive(1, "force_std_max", "latent", alpha=0.1), jax.random.key(0), pool, labelled).indices.tolist()
    [3]
    """
    return _mixture(k, score, features, lambda scalars: jnp.asarray(scalars.get(WEIGHT, alpha)))


def adapt(
    alpha: jax.Array | float, progress: jax.Array | float, *, expected: float = 0.1, rate: float = 0.3
) -> jax.Array:
    """The weight of uncertainty for the next round, from how much the last batch helped.

    Diversity pays early and exhausts itself: as progress falls behind what is expected, the weight moves towards 1, by
    at most ``rate`` of the way (where there was none).  A batch that made the error larger, by more than half of what
    was expected to be gained (too many extremes), moves it towards 0 likewise.  In the spirit of Donmez et al., ECML
    2007, where it only rises.

    Args:
        alpha: weight so far, between 0 and 1.
        progress: share of the error that the last batch took away, ``1 - error / error_before``; where it is not a
            number, the weight stays.
        expected: share at which the weight stays as it is.
        rate: of change, between 0 and 1.

    Returns:
        [] between 0 and 1.

    >>> from almlip_jax.selection import adapt
    >>> round(float(adapt(0.3, progress=0.1, expected=0.1)), 2)  # as much as expected
    0.3
    >>> round(float(adapt(0.3, progress=0.0, expected=0.1)), 2)  # nothing gained: more weight on uncertainty
    0.51
    """
    relative = jnp.clip(jnp.asarray(progress) / expected, -1, 1)
    pull = rate * jnp.where(relative < 0, 1 + 2 * relative, 1 - relative)
    moved = jnp.where(pull < 0, alpha * (1 + pull), alpha + pull * (1 - alpha))
    return jnp.where(jnp.isnan(relative), alpha, moved)


def uncertainty_weight(alpha: float, errors: Sequence[float]) -> float:
    """Weight of uncertainty after the validation errors of all rounds, the first weight given; see `adapt`.

    A round without an error (not a number) is passed over.

    >>> from almlip_jax.selection import uncertainty_weight
    >>> round(uncertainty_weight(0.3, [1.0, 0.8, 0.8]), 2)  # nothing gained by the last batch
    0.51
    """
    known = [error for error in errors if np.isfinite(error)]
    for before, after in zip(known[:-1], known[1:], strict=True):
        alpha = float(adapt(alpha, 1 - after / before if before > 0 else float("nan")))
    return alpha


def _mixture(k: int, score: str, features: str, weight: Any) -> Greedy:
    def start(key: jax.Array, rows: Rows, scalars: Any) -> tuple[_Mixture, Nearest]:
        points, nearest = distances.start(rows)
        lowest = jnp.min(jnp.where(rows.usable, rows.score, jnp.inf))
        highest = jnp.max(jnp.where(rows.usable, rows.score, -jnp.inf))
        spread = highest - lowest
        uncertainty = jnp.where(spread > 0, (rows.score - lowest) / jnp.where(spread > 0, spread, 1), 0)
        alpha = weight(scalars).astype(points.x.dtype)
        return _Mixture(points, uncertainty.astype(points.x.dtype), alpha), nearest

    def gains(fixed: _Mixture, state: Nearest, free: jax.Array) -> jax.Array:
        distance = jnp.sqrt(state.square)
        largest = jnp.max(jnp.where(free, distance, 0))
        diversity = distance / jnp.where(largest > 0, largest, 1)
        return fixed.weight * fixed.uncertainty + (1 - fixed.weight) * diversity

    def update(fixed: _Mixture, state: Nearest, row: jax.Array) -> Nearest:
        return distances.update(fixed.points, state, row)

    return Greedy(k, Rule(start, gains, update, features, score))


class HybridSettings(ByScore, ByFeatures, WeighedSelector):
    """Greedy in a weighted sum of uncertainty and diversity."""

    kind: Literal["hybrid"] = "hybrid"
    alpha: float = Field(default=0.6, ge=0, le=1)
    """Weight of uncertainty."""

    def build(self, k: int) -> Selector:
        """See `hybrid`."""
        return hybrid(k, self.score, self.features, self.alpha)


class AdaptiveSettings(ByScore, ByFeatures, WeighedSelector):
    """As hybrid, with a weight that follows progress: the force error on the structures kept for early stopping."""

    kind: Literal["adaptive"] = "adaptive"
    alpha: float = Field(default=0.3, ge=0, le=1)
    """Weight of uncertainty before any progress was measured."""

    @property
    def follows_errors(self) -> bool:
        """It does."""
        return True

    def scalars(self, errors: Sequence[float]) -> dict[str, float]:
        """The weight of uncertainty."""
        return {WEIGHT: uncertainty_weight(self.alpha, errors)}

    def build(self, k: int) -> Selector:
        """See `adaptive`."""
        return adaptive(k, self.score, self.features, self.alpha)
