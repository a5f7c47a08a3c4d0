"""Selectors that can weigh their gains by cost: greedy ones, made of a rule, and rankings by one value.

A `Rule` is a triple of pure functions: what is computed once, what each candidate would add now, and what changes when
one is chosen.  `Greedy` repeats the last two k times.  With a `Backward` it chooses more than k, and gives back the
least valuable.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from pydantic import Field

from almlip_jax.errors import InputError
from almlip_jax.feature_names import AtomFeatureName, FeatureName
from almlip_jax.scores import ScoreName
from almlip_jax.selection.base import (
    Candidates,
    LeafSelector,
    Selection,
    Selector,
    SelectorSettings,
    WeighedSelector,
    memoised,
)
from almlip_jax.selection.rows import Rows, arrange, drawn, first_best
from almlip_jax.selection.scores import best
from almlip_jax.selection.sites import Sites, arrange_sites


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
    """

    k: int
    rule: Rule
    per_cost: bool = False

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

        def step(carry: tuple[Any, jax.Array], n: jax.Array) -> tuple[tuple[Any, jax.Array], tuple[jax.Array, ...]]:
            state, free = carry
            gains = rule.gains(fixed, state, free)
            if self.per_cost:
                gains = gains / rows.cost
            row = drawn(jax.random.fold_in(draw, n), gains, free) if rule.draws else first_best(gains, free)
            left = (rule.update(fixed, state, row), free.at[row].set(False))
            return left, (row, jnp.any(free), gains[row])

        number = self.k + (rule.backward.spare if rule.backward else 0)
        _, (chosen, there, gain) = jax.lax.scan(step, (state, rows.usable), jnp.arange(number))
        if rule.backward:
            prices = rows.cost[chosen] if self.per_cost else jnp.ones_like(gain)
            kept = _kept(rule.backward, rule.backward.start(fixed, chosen, there), there, prices)
            chosen, there, gain = chosen[kept], there[kept], gain[kept]
        return Selection(indices=order[chosen], valid=there, gain=jnp.where(there, gain, jnp.nan))


@dataclass(frozen=True)
class Ranking:
    """A selector that takes the k highest of some values.

    Attributes:
        k: number of choices.
        values: ``(pool, labelled) -> (values [n], [n])``, highest first; the second decide among equal values.
        per_cost: rank by value over the cost of the label.
    """

    k: int
    values: Callable[[Candidates, Candidates], tuple[jax.Array, jax.Array]]
    per_cost: bool = False

    def __call__(self, key: jax.Array, pool: Candidates, labelled: Candidates) -> Selection:
        """The choice; ``gain`` is the value."""
        values, second = self.values(pool, labelled)
        if self.per_cost:
            pool = _payable(pool)
            values = values / pool.cost
        return best(values, pool, self.k, second)


@memoised
def cost_aware(selector: Selector) -> Selector:
    """The same selector, with every gain divided by the candidate's `Candidates.cost`: the most for the money.

    Greedy selectors weigh each choice when they make it, rankings their values; ``gain`` is that ratio.  Candidates
    whose cost is not a positive number are not chosen.

    Raises:
        InputError: the selector has no gains to weigh (`random`, `dpp`, `maxvol`, a chain, a user's own).

    >>> from almlip_jax.selection import cost_aware, max_det
    >>> cheap = cost_aware(max_det(10))
    """
    if not isinstance(selector, Greedy | Ranking):
        raise InputError(
            "cost_aware needs a greedy selector or a ranking: others have no gain that a cost could weigh."
        )
    return replace(selector, per_cost=True)


def _kept(backward: Backward, state: Any, there: jax.Array, prices: jax.Array) -> jax.Array:
    """Places [k] of the choices that stay, in their order; among equals the last is given back."""

    def step(carry: tuple[Any, jax.Array], n: jax.Array) -> tuple[tuple[Any, jax.Array], None]:
        state, left = carry
        worthless = jnp.where(there, -backward.losses(state) / prices, 1)  # what is not there goes first
        place = there.shape[0] - 1 - first_best(worthless[::-1], left[::-1])
        return (backward.update(state, place), left.at[place].set(False)), None

    (_, left), _ = jax.lax.scan(step, (state, jnp.ones_like(there)), jnp.arange(backward.spare))
    return jnp.argsort(~left, stable=True)[: there.shape[0] - backward.spare]


def _payable(pool: Candidates) -> Candidates:
    sane = jnp.isfinite(pool.cost) & (pool.cost > 0)
    return replace(pool, valid=pool.valid & sane, cost=jnp.where(sane, pool.cost, 1))


class CostAwareSettings(LeafSelector):
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
    def innermost(self) -> SelectorSettings:
        """That of the selector inside."""
        return self.selector.innermost

    @property
    def score_names(self) -> tuple[ScoreName, ...]:
        """Those of the selector inside."""
        return self.selector.score_names

    @property
    def feature_names(self) -> tuple[FeatureName, ...]:
        """Those of the selector inside."""
        return self.selector.feature_names

    @property
    def atom_feature_names(self) -> tuple[AtomFeatureName, ...]:
        """Those of the selector inside."""
        return self.selector.atom_feature_names

    @property
    def cost_exponent(self) -> float | None:
        """Its exponent."""
        return self.exponent

    def build(self, k: int) -> Selector:
        """See `cost_aware`."""
        return cost_aware(self.selector.build(k))
