"""Selectors by linear algebra: D-optimal and Fisher designs, Frank-Wolfe coresets, determinantal point processes.

All work with the posterior given the labelled set: rows phi, scaled to a mean square norm of 1 over the labelled set
(over the pool, without one), become ``psi = phi L^-T`` with ``L L^T = Phi^T Phi + sigma^2 I`` over the labelled rows
Phi (see `almlip_jax.kernels`).  ``1 + |psi|^2`` is then the factor by which a candidate raises the determinant of the
information matrix.  Choosing a candidate projects it out of the others: ``P' = P - c (P psi)(P psi)^T`` with
``c = 1 / (1 + psi^T P psi)``.  Only the k vectors ``sqrt(c) P psi`` are kept, so that a choice costs one or two
matrix-vector products with the pool and no memory beyond the rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from pydantic import Field

from almlip_jax.errors import InputError
from almlip_jax.kernels import gram, information_factor, unit_diagonal, wide
from almlip_jax.selection.base import ByDesign, Candidates, LeafSelector, Selection, Selector, WeighedSelector, memoised
from almlip_jax.selection.greedy import Backward, Greedy, Rule
from almlip_jax.selection.rows import Rows, arrange, drawn

_BLOCK = 4096  # rows at a time


class _Posterior(NamedTuple):
    """Rows psi [n, d] of the candidates, and the matrix that makes them of raw rows."""

    psi: jax.Array
    map: jax.Array


class _Design(NamedTuple):
    """What candidates are worth given the choices so far.

    Attributes:
        variance: [n] psi^T P psi.
        chosen: [k, d] vectors sqrt(c) P psi of the choices.
        number: of choices.
    """

    variance: jax.Array
    chosen: jax.Array
    number: jax.Array


@memoised
def max_det(k: int, features: str = "last_layer_gradient", sigma: float = 1e-3) -> Greedy:
    """Greedy D-optimal design: each choice adds most to ``log det(Phi^T Phi + sigma^2 I)`` over labelled and chosen.

    The gain of a candidate is ``log(1 + psi^T P psi)``, in nats; after each choice a pivoted-Cholesky step brings the
    gains of all candidates up to date at the cost of one matrix-vector product.

    Use float64 (`selection.select` does): variances span twelve orders of magnitude.  Sources: Holzmueller et al., J.
    Mach. Learn. Res. 24, 164 (2023), section 5 (MaxDet with the posterior transformation); Wynn, Ann. Math. Stat. 41,
    1655.

    Args:
        k: number of choices.
        features: which features.
        sigma: regularisation, relative to the scaled features.

    >>> import jax
    >>> from almlip_jax.selection import Candidates, max_det, select
    >>> pool = Candidates.of({"latent": [[0.1, 0.0], [2.0, 0.0], [2.1, 0.0], [0.0, 1.0]]})
    >>> labelled = Candidates.of({"latent": [[1.0, 0.0]]})
    >>> select(max_det(2, features="latent"), jax.random.key(0), pool, labelled).indices.tolist()
    [3, 2]
    """

    def start(key: jax.Array, rows: Rows, scalars: Any) -> tuple[_Posterior, _Design]:
        fixed = _posterior(rows, sigma)
        return fixed, _begin(fixed.psi, k)

    def gains(fixed: _Posterior, state: _Design, free: jax.Array) -> jax.Array:
        return jnp.log1p(jnp.maximum(state.variance, 0))

    def update(fixed: _Posterior, state: _Design, row: jax.Array) -> _Design:
        return _choose(fixed.psi, state, row, noise=1.0)[0]

    return Greedy(k, Rule(start, gains, update, features))


class _Fisher(NamedTuple):
    """State of `bait`.

    Attributes:
        design: variances and choices.
        weight: [n] psi^T P F P psi.
    """

    design: _Design
    weight: jax.Array


class _Spared(NamedTuple):
    """What `bait` keeps of m choices while it gives some back: their rows are X, in the unit of the noise.

    Attributes:
        rest: [m, m] (1 + X X^T)^-1 of those that are left, zeros elsewhere.
        weight: [m, m] X P F P X^T, likewise.
    """

    rest: jax.Array
    weight: jax.Array


@memoised
def bait(k: int, features: str = "last_layer_gradient", sigma: float = 1e-3, overselect: float = 1.0) -> Greedy:
    """Greedy BAIT: each choice lowers most the mean posterior variance over labelled and pool.

    With the information F of labelled set and pool and the posterior covariance P of labelled and chosen, the trace of
    ``P F`` falls by ``psi^T P F P psi / (1 + psi^T P psi)``, which is the gain.  Both are brought up to date by a
    rank-one step at the cost of two matrix-vector products.

    With ``overselect`` above 1 that many times k are chosen, and those whose loss raises the trace least are given back
    one by one: forward-backward BAIT.  A loss is ``psi^T P F P psi / (1 - psi^T P psi)``, of the chosen rows alone, so
    that giving back costs little compared with choosing.  Choices stay in their order, with the ``gain`` they had then.

    Sources: Ash et al., NeurIPS 2021 (forward-backward, 2 k); Holzmueller et al., J. Mach. Learn. Res. 24, 164 (2023),
    section 5.2.3.

    Args:
        k: number of choices.
        features: which features.
        sigma: standard deviation of the noise, relative to the scaled features.
        overselect: number of choices before some are given back, over k; one more than k at least where above 1.

    Raises:
        InputError: ``overselect`` is below 1.

    >>> import jax
    >>> from almlip_jax.selection import Candidates, bait, select
    >>> pool = Candidates.of({"latent": [[0.1, 0.0], [2.0, 0.0], [2.1, 0.0], [0.0, 1.0]]})
    >>> labelled = Candidates.of({"latent": [[1.0, 0.0]]})
    >>> select(bait(2, features="latent"), jax.random.key(0), pool, labelled).indices.tolist()
    [3, 2]
    """
    if not overselect >= 1:
        raise InputError(f"bait cannot choose {overselect} times as many as it is to keep: overselect is at least 1.")
    number = math.ceil(round(overselect * k, 6))

    def start(key: jax.Array, rows: Rows, scalars: Any) -> tuple[tuple[jax.Array, jax.Array], _Fisher]:
        made = _posterior(rows, sigma)
        fisher = (gram(made.psi) + made.map.T @ gram(rows.known) @ made.map).astype(made.psi.dtype)
        weight = _by_blocks(lambda block: jnp.sum((block @ fisher) * block, axis=1), made.psi)
        return (made.psi, fisher), _Fisher(_begin(made.psi, number), weight)

    def gains(fixed: tuple[jax.Array, jax.Array], state: _Fisher, free: jax.Array) -> jax.Array:
        return jnp.maximum(state.weight, 0) / (1 + jnp.maximum(state.design.variance, 0))

    def update(fixed: tuple[jax.Array, jax.Array], state: _Fisher, row: jax.Array) -> _Fisher:
        psi, fisher = fixed
        design, direction, products = _choose(psi, state.design, row, noise=1.0)
        carried = fisher @ direction
        mixed = psi @ _project(state.design.chosen, carried)
        weight = state.weight - 2 * products * mixed + (direction @ carried) * products**2
        return _Fisher(design, weight)

    def spared(fixed: tuple[jax.Array, jax.Array], chosen: jax.Array, there: jax.Array) -> _Spared:
        psi, fisher = fixed
        x = jnp.where(there[:, None], psi[chosen], 0).astype(wide())
        rest = jnp.linalg.inv(x @ x.T + jnp.eye(number, dtype=x.dtype))
        seen = rest @ x  # X P: no difference of large numbers
        return _Spared(rest, seen @ fisher.astype(x.dtype) @ seen.T)

    backward = Backward(number - k, spared, _losses, _give_back) if number > k else None
    return Greedy(k, Rule(start, gains, update, features, backward=backward))


def _losses(state: _Spared) -> jax.Array:
    """[m], what the trace of P F rises by without each choice."""
    rest = jnp.diagonal(state.rest)
    return jnp.maximum(jnp.diagonal(state.weight), 0) / jnp.where(rest > 0, rest, 1)


def _give_back(state: _Spared, place: jax.Array) -> _Spared:
    """Without the choice at a place: a Schur complement."""
    column, carried = state.rest[place], state.weight[place]
    share = column / column[place]
    mixed = jnp.outer(share, carried)
    weight = state.weight - mixed - mixed.T + carried[place] * jnp.outer(share, share)
    return _Spared(state.rest - jnp.outer(share, column), weight)


class _Coreset(NamedTuple):
    """What `frank_wolfe` keeps: psi [n, d], their norms [n], the sum of those, the sum of psi [d]."""

    psi: jax.Array
    norms: jax.Array
    total: jax.Array
    target: jax.Array


@memoised
def frank_wolfe(k: int, features: str = "last_layer_gradient", sigma: float = 1e-3) -> Greedy:
    """Sparse approximation of the whole pool by Frank-Wolfe steps (active Bayesian coresets, ACS-FW).

    The sum of all posterior rows is approximated by a weighted sum of the chosen ones: each step takes the candidate
    best aligned with what is missing (``gain``: the scalar product with its direction), and moves towards it by an
    exact line search.  A candidate is taken once.  Source: Pinsler et al., NeurIPS 2019.

    Args:
        k: number of choices.
        features: which features.
        sigma: standard deviation of the noise, relative to the scaled features.

    >>> import jax
    >>> from almlip_jax.selection import Candidates, frank_wolfe, select
    >>> pool = Candidates.of({"latent": [[0.1, 0.0], [2.0, 0.0], [2.1, 0.0], [0.0, 1.0]]})
    >>> labelled = Candidates.of({"latent": [[1.0, 0.0]]})
    >>> select(frank_wolfe(2, features="latent"), jax.random.key(0), pool, labelled).indices.tolist()
    [3, 0]
    """

    def start(key: jax.Array, rows: Rows, scalars: Any) -> tuple[_Coreset, jax.Array]:
        psi = (
            _posterior(rows, sigma).psi * sigma
        )  # noise in the unit of the features: of order 1 where nothing is known
        norms = jnp.sqrt(jnp.sum(psi**2, axis=1))
        target = jnp.sum(psi, axis=0)
        return _Coreset(psi, norms, jnp.sum(norms), target), jnp.zeros_like(target)

    def gains(fixed: _Coreset, so_far: jax.Array, free: jax.Array) -> jax.Array:
        aligned = fixed.psi @ (fixed.target - so_far)
        return jnp.where(fixed.norms > 0, aligned / jnp.where(fixed.norms > 0, fixed.norms, 1), 0)

    def update(fixed: _Coreset, so_far: jax.Array, row: jax.Array) -> jax.Array:
        norm = jnp.where(fixed.norms[row] > 0, fixed.norms[row], 1)
        step = fixed.total / norm * fixed.psi[row] - so_far
        length = jnp.sum(step**2)
        share = step @ (fixed.target - so_far) / jnp.where(length > 0, length, 1)
        return so_far + jnp.clip(share, 0, 1) * step

    return Greedy(k, Rule(start, gains, update, features))


@memoised
def dpp(k: int, features: str = "last_layer_gradient", sigma: float = 1e-3) -> Selector:
    """An exact sample of a determinantal point process of k candidates: probability ~ det of their posterior kernel.

    The kernel of n candidates is never formed: eigenvectors come from the d x d dual.  A set of them is drawn by
    elementary symmetric polynomials, then candidates one by one from the span.  Choose fewer than there are independent
    features: at k of them the span is everything and what is labelled plays no role; beyond them the rest is uniform.
    Choices come in the order in which they were drawn; ``gain`` is the square norm of what was left of each in the
    span.  Sources: Kulesza and Taskar, ICML 2011 (k-DPP) and Found. Trends Mach. Learn. 5, 123 (2012), section 3.3.

    Args:
        k: number of choices.
        features: which features.
        sigma: standard deviation of the noise, relative to the scaled features.

    >>> import jax
    >>> from almlip_jax.selection import Candidates, dpp, select
    >>> pool = Candidates.of({"latent": [[0.1, 0.0], [2.0, 0.0], [2.1, 0.0], [0.0, 1.0]]})
    >>> labelled = Candidates.of({"latent": [[1.0, 0.0]]})
    >>> select(dpp(2, features="latent"), jax.random.key(0), pool, labelled).valid.tolist()
    [True, True]
    """

    def select(key: jax.Array, pool: Candidates, labelled: Candidates) -> Selection:
        order, rows = arrange(pool, labelled, features)
        psi = _posterior(rows, sigma).psi
        for_vectors, for_rows = jax.random.split(key)
        values, vectors = jnp.linalg.eigh(gram(psi))
        values = jnp.where(values > values[-1] * psi.shape[1] * jnp.finfo(psi.dtype).eps, values, 0)
        which, there = draw_eigenvectors(for_vectors, values, min(k, values.shape[0]))
        span = vectors[:, which] * jnp.where(there, jax.lax.rsqrt(jnp.where(there, values[which], 1)), 0)
        inside = psi @ span.astype(psi.dtype)  # [n, k]: orthonormal columns
        rank = jnp.sum(there)

        def step(carry: tuple[_Design, jax.Array], n: jax.Array) -> tuple[tuple[_Design, jax.Array], tuple]:
            design, free = carry
            left = jnp.where(n < rank, design.variance, 0)
            row = drawn(jax.random.fold_in(for_rows, n), left, free)
            after = _choose(inside, design, row, noise=0.0)[0]
            return (after, free.at[row].set(False)), (row, jnp.any(free), left[row])

        _, (chosen, found, gain) = jax.lax.scan(step, (_begin(inside, k), rows.usable), jnp.arange(k))
        return Selection(indices=order[chosen], valid=found, gain=jnp.where(found, gain, jnp.nan))

    return select


def draw_eigenvectors(key: jax.Array, values: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Draws which eigenvectors span a k-DPP: a set J of a given size with probability ~ the product of its eigenvalues.

    Args:
        key: decides.
        values: [d] eigenvalues, not negative; zeros are never drawn.
        size: of the set; fewer where fewer eigenvalues are positive.

    Returns:
        indices [size] of the eigenvalues, and which of them count [size] bool.
    """
    logs = jnp.log(values)
    empty = jnp.full((size + 1,), -jnp.inf, values.dtype).at[0].set(0)

    def grow(polynomials: jax.Array, one: jax.Array) -> tuple[jax.Array, jax.Array]:
        more = jnp.logaddexp(polynomials[1:], one + polynomials[:-1])
        return jnp.concatenate([polynomials[:1], more]), polynomials

    # before[j, l]: log of the elementary symmetric polynomial of degree l in the first j eigenvalues
    last, before = jax.lax.scan(grow, empty, logs)
    degrees = jnp.arange(size + 1)
    wanted = jnp.max(jnp.where(jnp.isfinite(last), degrees, 0))

    def decide(carry: tuple[jax.Array, jax.Array], one: tuple) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        left, polynomials = carry
        log, polynomials_before, draw = one
        chance = jnp.where(left > 0, log + polynomials_before[left - 1] - polynomials[left], -jnp.inf)
        taken = jnp.log(draw) < chance
        return (left - taken, polynomials_before), taken

    draws = jax.random.uniform(key, values.shape, values.dtype)
    _, taken = jax.lax.scan(decide, (wanted, last), (logs, before, draws), reverse=True)
    which = jnp.argsort(~taken, stable=True)[:size]
    return which, taken[which]


def _posterior(rows: Rows, sigma: float) -> _Posterior:
    scale = unit_diagonal(rows.x, rows.known, rows.counts, rows.usable)
    made, _ = information_factor(rows.known, sigma, scale)
    return _Posterior(rows.x @ made.astype(rows.x.dtype), made)


def _begin(psi: jax.Array, k: int) -> _Design:
    chosen = jnp.zeros((k, psi.shape[1]), psi.dtype)
    return _Design(jnp.sum(psi**2, axis=1), chosen, jnp.zeros((), jnp.int32))


def _choose(psi: jax.Array, design: _Design, row: jax.Array, noise: float) -> tuple[_Design, jax.Array, jax.Array]:
    """The design after a choice, the vector that was projected out, and its products [n] with all rows."""
    left = _project(design.chosen, psi[row])
    pivot = noise + jnp.maximum(design.variance[row], 0)
    direction = left * jax.lax.rsqrt(jnp.where(pivot > 0, pivot, 1))
    products = psi @ direction
    variance = design.variance - products**2
    return _Design(variance, design.chosen.at[design.number].set(direction), design.number + 1), direction, products


def _project(chosen: jax.Array, vector: jax.Array) -> jax.Array:
    """P vector: without what the choices so far say of it."""
    return vector - (chosen @ vector) @ chosen  # chosen.T @ ... is compiled to strided loops, 20 times as slow on a CPU


def _by_blocks(function: Callable[[jax.Array], jax.Array], rows: jax.Array) -> jax.Array:
    """A function of rows, [n, d] -> [n], applied to a few of them at a time."""
    return jax.lax.map(lambda row: function(row[None])[0], rows, batch_size=_BLOCK)


class MaxDetSettings(ByDesign, WeighedSelector):
    """Greedy D-optimal design given everything labelled."""

    kind: Literal["max_det"] = "max_det"

    def build(self, k: int) -> Selector:
        """See `max_det`."""
        return max_det(k, self.features, self.sigma)


class BaitSettings(ByDesign, WeighedSelector):
    """Greedy design that lowers most the mean posterior variance over labelled structures and pool."""

    kind: Literal["bait"] = "bait"
    overselect: float = Field(default=1.0, ge=1, le=100.0)
    """Number of choices before the least valuable are given back, over the size of the batch."""

    def build(self, k: int) -> Selector:
        """See `bait`."""
        return bait(k, self.features, self.sigma, self.overselect)


class FrankWolfeSettings(ByDesign, WeighedSelector):
    """A sparse weighted sum that stands for the whole pool."""

    kind: Literal["frank_wolfe"] = "frank_wolfe"

    def build(self, k: int) -> Selector:
        """See `frank_wolfe`."""
        return frank_wolfe(k, self.features, self.sigma)


class DppSettings(ByDesign, LeafSelector):
    """A sample of a determinantal point process: at random, and diverse."""

    kind: Literal["dpp"] = "dpp"

    def build(self, k: int) -> Selector:
        """See `dpp`."""
        return dpp(k, self.features, self.sigma)
