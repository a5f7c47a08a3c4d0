"""Selectors that can weigh their gains by cost, and let strata take turns: greedy ones, made of a rule, and rankings.

A `Rule` is a triple of pure functions: what is computed once, what each candidate would add now, and what changes when
one is chosen.  `Greedy` repeats the last two k times.  With a `Backward` it chooses more than k, and gives back the
least valuable.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from pydantic import Field

from almlip_jax.errors import InputError
from almlip_jax.selection.base import (
    Candidates,
    Enclosing,
    LeafSelector,
    Selection,
    Selector,
    SteppingSelector,
    WeighedSelector,
    memoised,
)
from almlip_jax.selection.rows import Rows, arrange, drawn, first_best
from almlip_jax.selection.scores import best
from almlip_jax.selection.sites import Sites, arrange_sites
from almlip_jax.selection.strata import Stratification, Turns


class Backward(NamedTuple):
    """How a greedy criterion gives choices back.

    Attributes:
        spare: number of choices beyond k, as many of which are given back one by one.
        start: ``(fixed, chosen [m], there [m]) -> state``, of the choices that are there.
        losses: ``state -> [m]``, not negative: what would be lost without each of them.
        update: ``(state, place) -> state``, after the choice at a place was given back.
    """

    spare: int
    start: Callable[[Any, jax.Array, jax.Array], Any]
    losses: Callable[[Any], jax.Array]
    update: Callable[[Any, jax.Array], Any]


class Rule(NamedTuple):
    """A greedy criterion.

    Attributes:
        start: ``(key, rows, scalars) -> (fixed, state)``: what stays as it is while choosing, and what changes.  Rows
            are `Rows`, or `Sites` where the rule looks at atoms.
        gains: ``(fixed, state, free [n]) -> [n]``, what each candidate adds; -inf for one that may not be chosen now.
        update: ``(fixed, state, row) -> state``, after a row was chosen.
        features: features it looks at.
        score: score it looks at, if any.
        draws: choose with probability proportional to the gain, not the largest.
        backward: how choices beyond k are given back; None where there are no such.
        atoms: whether it looks at the rows of atoms, and not at those of structures.
    """

    start: Callable[[jax.Array, Any, Any], tuple[Any, Any]]
    gains: Callable[[Any, Any, jax.Array], jax.Array]
    update: Callable[[Any, Any, jax.Array], Any]
    features: str
    score: str | None = None
    draws: bool = False
    backward: Backward | None = None
    atoms: bool = False


@dataclass(frozen=True)
class Greedy:
    """A selector that chooses one candidate after the other by a rule.

    Attributes:
        k: number of choices.
        rule: what a choice is worth.
        per_cost: weigh gains by the cost of the label.
        in_turns: choose from the stratum whose turn it is.
    """

    k: int
    rule: Rule
    per_cost: bool = False
    in_turns: bool = False

    def __call__(self, key: jax.Array, pool: Candidates, labelled: Candidates) -> Selection:
        """The choice; ``gain`` is that of each when it was made."""
        rule = self.rule
        pool = _payable(pool) if self.per_cost else pool
        rows: Rows | Sites
        if rule.atoms:
            order, rows = arrange_sites(pool, labelled, rule.features)
        else:
            order, rows = arrange(pool, labelled, rule.features, rule.score)
        begin, draw = jax.random.split(key)
        fixed, state = rule.start(begin, rows, {**pool.scalars, **labelled.scalars})
        turns, counts = _turns(pool, labelled, order) if self.in_turns else (None, None)

        def step(carry: tuple[Any, ...], n: jax.Array) -> tuple[tuple[Any, ...], tuple[jax.Array, ...]]:
            """Chooses one, from the stratum whose turn it is where these take turns."""
            state, free, counts = carry
            due = free if turns is None else turns.due(counts, free)
            gains = rule.gains(fixed, state, due)
            if self.per_cost:
                gains = _for_money(gains, rows.cost)
            row = drawn(jax.random.fold_in(draw, n), gains, due) if rule.draws else first_best(gains, due)
            there = jnp.any(free)
            counts = None if turns is None else counts.at[turns.number[row]].add(there)
            return (rule.update(fixed, state, row), free.at[row].set(False), counts), (row, there, gains[row])

        number = self.k + (rule.backward.spare if rule.backward else 0)
        (_, _, counts), (chosen, there, gain) = jax.lax.scan(step, (state, rows.usable, counts), jnp.arange(number))
        if rule.backward:
            prices = rows.cost[chosen] if self.per_cost else jnp.ones_like(gain)
            kept = _kept(rule.backward, rule.backward.start(fixed, chosen, there), chosen, there, prices, turns, counts)
            chosen, there, gain = chosen[kept], there[kept], gain[kept]
        return Selection(indices=order[chosen], valid=there, gain=jnp.where(there, gain, jnp.nan))


@dataclass(frozen=True)
class Ranking:
    """A selector that takes the k highest of some values.

    Attributes:
        k: number of choices.
        values: ``(key, pool, labelled) -> (values [n], [n])``, highest first; the second decide among equal values.
        per_cost: rank by value over the cost of the label.
        in_turns: take from the stratum whose turn it is.
        weighable: whether the values are gains, which a cost can weigh.
    """

    k: int
    values: Callable[[jax.Array, Candidates, Candidates], tuple[jax.Array, jax.Array]]
    per_cost: bool = False
    in_turns: bool = False
    weighable: bool = True

    def __call__(self, key: jax.Array, pool: Candidates, labelled: Candidates) -> Selection:
        """The choice; ``gain`` is the value."""
        values, second = self.values(key, pool, labelled)
        if self.per_cost:
            pool = _payable(pool)
            values = _for_money(values, pool.cost)
        if not self.in_turns:
            return best(values, pool, self.k, second)
        turns, counts = _turns(pool, labelled)
        return best(values, pool, self.k, second, partial(turns.ranks, counts))


@memoised
def cost_aware(selector: Selector) -> Selector:
    """The same selector, with every gain divided by the candidate's `Candidates.cost`: the most for the money.

    Greedy selectors weigh each choice when they make it, rankings their values; ``gain`` is that ratio.  A gain below 0
    is multiplied instead: what does harm does more of it where it is dear.  Candidates whose cost is not a positive
    number are not chosen.

    Raises:
        InputError: the selector has no gains to weigh: `random`, `dpp`, `maxvol`, a chain, a user's own; or `entropy`,
            which is below 0 for small deviations and whose zero is a matter of units.

    >>> from almlip_jax.selection import cost_aware, max_det
    >>> cheap = cost_aware(max_det(10))
    """
    if not isinstance(selector, Greedy) and not (isinstance(selector, Ranking) and selector.weighable):
        raise InputError("cost_aware needs a greedy selector or top_k: others have no gain that a cost could weigh.")
    return replace(selector, per_cost=True)


@memoised
def stratified(selector: Selector) -> Selector:
    """The same selector, choosing from the strata of the candidates in turn (`Candidates.strata`).

    Whose turn it is follows from the shares, and from how many are labelled or chosen of each; within a stratum the
    selector decides, with all that was chosen before in mind.  Candidates of no stratum come when nothing else is left.

    Raises:
        InputError: the selector does not choose one after the other (`dpp`, `maxvol`, a chain, a user's own).

    >>> import jax
    >>> from almlip_jax.selection import Candidates, Strata, select, stratified, top_k
    >>> strata = Strata(number=jax.numpy.array([0, 0, 1, 1]), shares=jax.numpy.array([1.0, 1.0]))
    >>> pool = Candidates.of(scores={"force_std_max": [0.4, 0.9, 0.1, 0.2]}, strata=strata)
    >>> nothing = pool.replace(valid=jax.numpy.zeros(4, bool))
    >>> select(stratified(top_k(2, "force_std_max")), jax.random.key(0), pool, nothing).indices.tolist()
    [1, 3]
    """
    if not isinstance(selector, Greedy | Ranking):
        raise InputError(
            "stratified needs a greedy selector or a ranking: others do not choose one candidate after the other."
        )
    return replace(selector, in_turns=True)


def _turns(pool: Candidates, labelled: Candidates, order: jax.Array | None = None) -> tuple[Turns, jax.Array]:
    """Turns of the candidates, in an order of theirs, and how many of each stratum are labelled."""
    if pool.strata is None or labelled.strata is None:
        raise InputError("candidates have no strata, by which the selector is stratified.")
    turns, known = Turns.of(pool.strata), Turns.of(labelled.strata)
    number = turns.number if order is None else turns.number[order]
    return replace(turns, number=number), known.counts(labelled.valid)


def _kept(
    backward: Backward,
    state: Any,
    chosen: jax.Array,
    there: jax.Array,
    prices: jax.Array,
    turns: Turns | None,
    counts: jax.Array | None,
) -> jax.Array:
    """Places [k] of the choices that stay, in their order; among equals the last is given back.

    Where strata take turns, the one that had the last gives one back.
    """

    def step(carry: tuple[Any, ...], n: jax.Array) -> tuple[tuple[Any, ...], None]:
        state, left, counts = carry
        asked = left if turns is None else jnp.where(jnp.any(left & ~there), left, turns.surplus(counts, chosen, left))
        worthless = jnp.where(there, -backward.losses(state) / prices, 1)  # what is not there goes first
        place = there.shape[0] - 1 - first_best(worthless[::-1], asked[::-1])
        counts = None if turns is None else counts.at[turns.number[chosen[place]]].add(-there[place].astype(jnp.int32))
        return (backward.update(state, place), left.at[place].set(False), counts), None

    (_, left, _), _ = jax.lax.scan(step, (state, jnp.ones_like(there), counts), jnp.arange(backward.spare))
    return jnp.argsort(~left, stable=True)[: there.shape[0] - backward.spare]


def _for_money(gains: jax.Array, cost: jax.Array) -> jax.Array:
    return jnp.where(gains < 0, gains * cost, gains / cost)


def _payable(pool: Candidates) -> Candidates:
    sane = jnp.isfinite(pool.cost) & (pool.cost > 0)
    return replace(pool, valid=pool.valid & sane, cost=jnp.where(sane, pool.cost, 1))


class CostAwareSettings(Enclosing, SteppingSelector):
    """A selector whose gains are divided by the expected cost of the label, in seconds of the label source.

    The cost follows from the labels in the store: the mean over those of the same composition, or a power of the number
    of atoms through the others.  It follows measured times, so that two runs of a campaign may choose otherwise.
    """

    kind: Literal["cost_aware"] = "cost_aware"
    selector: WeighedSelector
    """Selector whose gains are divided by the cost."""
    exponent: float = Field(default=1.0, ge=0, le=10)
    """Cost where the store cannot tell (labels of a file, one size of structures): atoms to this power."""

    @property
    def cost_exponent(self) -> float | None:
        """Its exponent."""
        return self.exponent

    def build(self, k: int) -> Selector:
        """See `cost_aware`."""
        return cost_aware(self.selector.build(k))


class StratifiedSettings(Stratification, Enclosing, LeafSelector):
    """A selector that chooses from groups of structures in turn, so that each holds its share.

    A key of the structures' `info` tells the groups apart.  What a group cannot use goes to the others.
    """

    kind: Literal["stratified"] = "stratified"
    selector: SteppingSelector
    """Decides within a group, with all that was chosen before in mind."""

    @property
    def stratification(self) -> Stratification:
        """Its own."""
        return self

    def build(self, k: int) -> Selector:
        """See `stratified`."""
        return stratified(self.selector.build(k))
