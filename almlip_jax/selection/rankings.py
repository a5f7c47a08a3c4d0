"""Rankings by one value of each candidate: a score, its entropy, or a number at random."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from almlip_jax.selection.base import ByScore, Candidates, Selector, SteppingSelector, WeighedSelector, memoised
from almlip_jax.selection.greedy import Ranking
from almlip_jax.selection.scores import judged


@memoised
def random(k: int) -> Ranking:
    """Chooses k candidates uniformly at random.

    Each candidate's draw depends on the key and its id alone: the order of the pool and its padding change nothing.
    ``gain`` is the draw.

    >>> import jax
    >>> from almlip_jax.selection import Candidates, random, select
    >>> pool = Candidates.of(scores={"force_std_max": [0.1, 0.4, 0.2, 2.5]})
    >>> select(random(2), jax.random.key(0), pool, pool).valid.tolist()
    [True, True]
    """

    def values(key: jax.Array, pool: Candidates, labelled: Candidates) -> tuple[jax.Array, jax.Array]:
        draws = jax.vmap(lambda one: jax.random.uniform(jax.random.fold_in(key, one)))(pool.id)
        return draws, draws

    return Ranking(k, values, weighable=False)


@memoised
def top_k(k: int, score: str) -> Ranking:
    """Chooses the k candidates with the highest score: plain query by committee.  ``gain`` is the score.

    >>> import jax
    >>> from almlip_jax.selection import Candidates, select, top_k
    >>> pool = Candidates.of(scores={"force_std_max": [0.1, 0.4, 0.2, 2.5]})
    >>> select(top_k(2, "force_std_max"), jax.random.key(0), pool, pool).indices.tolist()
    [3, 1]
    """

    def values(key: jax.Array, pool: Candidates, labelled: Candidates) -> tuple[jax.Array, jax.Array]:
        found = judged(pool, score)
        return found, found

    return Ranking(k, values)


@memoised
def entropy(k: int, score: str) -> Ranking:
    """Chooses the k candidates of largest entropy ``1/2 ln(2 pi e sigma^2)`` (``gain``, in nats).

    Sigma is a score, taken as the standard deviation of a Gaussian; the ranking is that of the score, the gain is on
    the scale of `max_det`.  A candidate of sigma 0 comes last.  Below a sigma of 0.24 it is negative: no gain that
    `cost_aware` could weigh, which takes `top_k`.

    >>> import jax
    >>> from almlip_jax.selection import Candidates, entropy, select
    >>> pool = Candidates.of(scores={"force_std_max": [0.1, 0.4, 0.2, 2.5]})
    >>> select(entropy(2, "force_std_max"), jax.random.key(0), pool, pool).gain.round(2)
    array([2.34, 0.5 ])
    """

    def values(key: jax.Array, pool: Candidates, labelled: Candidates) -> tuple[jax.Array, jax.Array]:
        sigma = judged(pool, score)
        nats = 0.5 * jnp.log(2 * jnp.pi * jnp.e * sigma**2)
        return nats, sigma

    return Ranking(k, values, weighable=False)


class RandomSettings(SteppingSelector):
    """Uniformly at random."""

    kind: Literal["random"] = "random"

    @property
    def draws_at_random(self) -> bool:
        """It does."""
        return True

    def build(self, k: int) -> Selector:
        """See `random`."""
        return random(k)


class TopKSettings(ByScore, WeighedSelector):
    """The highest scores."""

    kind: Literal["top_k"] = "top_k"

    def build(self, k: int) -> Selector:
        """See `top_k`."""
        return top_k(k, self.score)


class EntropySettings(ByScore, SteppingSelector):
    """The largest entropies of a Gaussian whose standard deviation is a score."""

    kind: Literal["entropy"] = "entropy"

    def build(self, k: int) -> Selector:
        """See `entropy`."""
        return entropy(k, self.score)
