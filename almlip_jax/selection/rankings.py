"""Rankings by one value of each candidate: a score, its entropy, or the error that it leads one to expect."""

from __future__ import annotations

from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp

from almlip_jax.errors import InputError
from almlip_jax.selection.base import Candidates
from almlip_jax.selection.greedy import Ranking
from almlip_jax.selection.scores import column

_Stack: TypeAlias = tuple[jax.Array, jax.Array, jax.Array, jax.Array]
_RIDGE = 1e-9  # of the linear map, relative to columns of unit variance


def top_k(k: int, score: str) -> Ranking:
    """Chooses the k candidates with the highest score: plain query by committee.  ``gain`` is the score."""

    def values(pool: Candidates, labelled: Candidates) -> tuple[jax.Array, jax.Array]:
        found = column(pool.scores, score, "score")
        return found, found

    return Ranking(k, values)


def entropy(k: int, score: str) -> Ranking:
    """Chooses the k candidates of largest entropy ``1/2 ln(2 pi e sigma^2)`` (``gain``, in nats).

    Sigma is a score, taken as the standard deviation of a Gaussian; the ranking is that of the score, the gain is on
    the scale of `max_det`.  A candidate of sigma 0 comes last.
    """

    def values(pool: Candidates, labelled: Candidates) -> tuple[jax.Array, jax.Array]:
        sigma = column(pool.scores, score, "score")
        nats = 0.5 * jnp.log(2 * jnp.pi * jnp.e * sigma**2)
        return nats, sigma

    return Ranking(k, values)


def recalibrated(
    k: int,
    scores: str | tuple[str, ...],
    error: str,
    method: Literal["isotonic", "linear"] = "isotonic",
) -> Ranking:
    """Chooses the k candidates of largest expected error, as learned from the errors of what is labelled.

    The labelled set carries true errors as one more score.  ``isotonic`` fits the monotone step function closest to
    them in the least squares sense and interpolates between its points; ``linear`` fits an affine function of one or
    several scores.  Candidates of the same expectation are ranked by the first score; so are all while no error is
    known.  Labelled rows whose scores or error are not finite do not count.  ``gain`` is the expected error.

    Args:
        k: number of choices.
        scores: one for ``isotonic``, at least one for ``linear``.
        error: name of the score of the labelled set that holds absolute errors.
        method: which fit.

    Raises:
        InputError: several scores for an isotonic fit.
    """
    names = (scores,) if isinstance(scores, str) else tuple(scores)
    if not names or (method == "isotonic" and len(names) > 1):
        raise InputError(f"an {method} map needs {'one score' if method == 'isotonic' else 'a score'}, not {names}.")

    def values(pool: Candidates, labelled: Candidates) -> tuple[jax.Array, jax.Array]:
        at = jnp.stack([column(pool.scores, name, "score") for name in names], axis=1)
        known = jnp.stack([column(labelled.scores, name, "score") for name in names], axis=1)
        errors = column(labelled.scores, error, "score")
        counts = labelled.valid & jnp.isfinite(errors) & jnp.all(jnp.isfinite(known), axis=1)
        if method == "isotonic":
            expected = isotonic(known[:, 0], errors, counts, at[:, 0])
        else:
            expected = _linear(known, errors, counts, at)
        expected = jnp.where(jnp.any(jnp.isnan(at), axis=1), jnp.nan, expected)
        return jnp.where(jnp.any(counts), expected, at[:, 0]), at[:, 0]

    return Ranking(k, values)


def isotonic(x: jax.Array, y: jax.Array, counts: jax.Array, at: jax.Array) -> jax.Array:
    """Least-squares fit of a function that never falls, by pooling adjacent violators, at other points.

    Args:
        x: [t].
        y: [t].
        counts: [t] bool, which of them count.
        at: [n]; between points of the fit it is interpolated linearly, beyond them it is constant.

    Returns:
        [n].
    """
    x, y = jnp.where(counts, x, jnp.inf), jnp.where(counts, y, 0)
    order = jnp.lexsort((-y, x))  # decreasing at equal x: they are pooled
    x, y, weight = x[order], y[order], counts[order].astype(y.dtype)

    def push(n: jax.Array, stack: _Stack) -> _Stack:
        """Stack of pooled blocks: sum, weight and first point of each, and how many there are."""
        sums, weights, firsts, depth = stack
        sums, weights = sums.at[depth].set(y[n]), weights.at[depth].set(weight[n])
        firsts = firsts.at[depth].set(n)

        def violated(stack: _Stack) -> jax.Array:
            sums, weights, _, top = stack
            # means compared as products; a block without weight (padding) joins any
            return (top > 0) & (sums[top - 1] * weights[top] >= sums[top] * weights[top - 1])

        def merge(stack: _Stack) -> _Stack:
            sums, weights, firsts, top = stack
            sums = sums.at[top - 1].add(sums[top]).at[top].set(0)
            weights = weights.at[top - 1].add(weights[top]).at[top].set(0)
            return sums, weights, firsts, top - 1

        sums, weights, firsts, top = jax.lax.while_loop(violated, merge, (sums, weights, firsts, depth))
        return sums, weights, firsts, top + 1

    t = x.shape[0]
    if t == 0:
        return jnp.zeros_like(at)
    zeros = jnp.zeros((t,), y.dtype)
    blank = (zeros, zeros, jnp.full((t,), t, jnp.int32), jnp.zeros((), jnp.int32))
    sums, weights, firsts, depth = jax.lax.fori_loop(0, t, push, blank)
    firsts = jnp.where(jnp.arange(t) < depth, firsts, t)
    block = jnp.searchsorted(firsts, jnp.arange(t), side="right") - 1
    fitted = sums[block] / jnp.where(weights[block] > 0, weights[block], 1)
    last = jnp.maximum(jnp.sum(counts) - 1, 0)
    x = jnp.where(jnp.arange(t) <= last, x, x[last])
    return jnp.interp(at, x, jnp.where(jnp.arange(t) <= last, fitted, fitted[last]))


def _linear(x: jax.Array, y: jax.Array, counts: jax.Array, at: jax.Array) -> jax.Array:
    """Affine least squares of y [t] in x [t, s], at points [n, s]; a column without spread does not count."""
    number = jnp.maximum(jnp.sum(counts), 1)
    weight = counts.astype(x.dtype)
    x, y = jnp.where(counts[:, None], x, 0), jnp.where(counts, y, 0)
    mean, level = jnp.sum(x, axis=0) / number, jnp.sum(y) / number
    centred = (x - mean) * weight[:, None]
    spread = jnp.sqrt(jnp.sum(centred**2, axis=0) / number)
    spread = jnp.where(spread > 0, spread, 1)
    centred = centred / spread
    moments = centred.T @ centred / number + _RIDGE * jnp.eye(x.shape[1], dtype=x.dtype)
    slopes = jnp.linalg.solve(moments, centred.T @ (y - level) / number)
    return level + (at - mean) / spread @ slopes
