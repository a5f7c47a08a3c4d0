"""What needs scores alone: the order of values, and filters by threshold and share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Literal, Self

import jax
import jax.numpy as jnp
from pydantic import Field, model_validator

from almlip_jax.errors import InputError
from almlip_jax.scores import AnyScoreName
from almlip_jax.selection.base import (
    TEACHER_ENERGY,
    TEACHER_FORCES,
    ByScore,
    Candidates,
    Filter,
    FilterSettings,
    Selection,
    memoised,
)
from almlip_jax.settings import unit

_ROUNDING = 1e-6  # 0.07 of 100 candidates are 7, though the product of floats is a little more


@memoised
def threshold(score: str, minimum: float | None = None, maximum: float | None = None) -> Filter:
    """Keeps candidates with ``minimum <= score < maximum``; a bound that is not given binds to what is finite.

    >>> import jax
    >>> from almlip_jax.selection import Candidates, threshold
    >>> pool = Candidates.of(scores={"force_std_max": [0.1, 0.4, 0.2, 2.5]})
    >>> threshold("force_std_max", minimum=0.2, maximum=2.0)(jax.random.key(0), pool, pool).valid.tolist()
    [False, True, True, False]
    """

    def narrow(key: jax.Array, pool: Candidates, labelled: Candidates) -> Candidates:
        values = judged(pool, score)
        keep = pool.valid
        if minimum is not None:
            keep = keep & (values >= minimum)
        if maximum is not None:
            keep = keep & (values < maximum)
        return replace(pool, valid=keep)

    return narrow


@memoised
def top_fraction(score: str, fraction: float) -> Filter:
    """Keeps the given fraction of the valid candidates with the highest score, at least one.

    >>> import jax
    >>> from almlip_jax.selection import Candidates, top_fraction
    >>> pool = Candidates.of(scores={"force_std_max": [0.1, 0.4, 0.2, 2.5]})
    >>> top_fraction("force_std_max", 0.5)(jax.random.key(0), pool, pool).valid.tolist()
    [False, True, False, True]
    """

    def narrow(key: jax.Array, pool: Candidates, labelled: Candidates) -> Candidates:
        share = fraction * jnp.sum(pool.valid)
        wanted = jnp.maximum(jnp.ceil(share - _ROUNDING * jnp.maximum(share, 1)), 1)
        order = ranked(judged(pool, score), pool)
        rank = jnp.zeros_like(order).at[order].set(jnp.arange(order.shape[0], dtype=order.dtype))
        return replace(pool, valid=pool.valid & (rank < wanted))

    return narrow


@memoised
def agreement(forces: float, energy: float | None = None) -> Filter:
    """Keeps candidates on which ensemble and teacher differ: there, a label tells something that neither is sure of.

    Args:
        forces: root mean square difference of the force components up to which they agree, eV/Angstrom.
        energy: difference of the energies up to which they agree, eV/atom; not looked at where not given.

    >>> import jax
    >>> from almlip_jax.selection import Candidates, agreement
    >>> pool = Candidates.of(scores={"teacher_forces": [0.02, 0.3, float("nan")]})
    >>> agreement(0.1)(jax.random.key(0), pool, pool).valid.tolist()
    [False, True, True]
    """

    def narrow(key: jax.Array, pool: Candidates, labelled: Candidates) -> Candidates:
        agree = column(pool.scores, TEACHER_FORCES, "score") <= forces  # not where the teacher had no label
        if energy is not None:
            agree = agree & (column(pool.scores, TEACHER_ENERGY, "score") <= energy)
        return replace(pool, valid=pool.valid & ~agree)

    return narrow


def column(table: Mapping[str, jax.Array], name: str, kind: str) -> jax.Array:
    """The array of one name among features or scores.

    Raises:
        InputError: there is none of that name; the message lists those there are.
    """
    if name not in table:
        raise InputError(f"candidates have no {kind} '{name}'; they have: {', '.join(sorted(table)) or 'none'}.")
    return table[name]


def judged(pool: Candidates, score: str) -> jax.Array:
    """A score of candidates, [n]; not a number where it is not finite, as of a frame that exploded.

    Raises:
        InputError: there is none of that name.
    """
    found = column(pool.scores, score, "score")
    return jnp.where(jnp.isfinite(found), found, jnp.nan)


def ranked(values: jax.Array, pool: Candidates, second: jax.Array | None = None) -> jax.Array:
    """Rows of a pool, [n], in decreasing order of some values; candidates that are not valid come last.

    A value that is not a number counts as the lowest: nothing that could not be judged is preferred.  Among equal
    values ``second``, then the smaller id decides.
    """
    keys = [values] if second is None else [values, second]
    usable = [-jnp.where(jnp.isnan(one), -jnp.inf, one) for one in reversed(keys)]
    return jnp.lexsort((pool.id, *usable, ~pool.valid))


def best(
    values: jax.Array,
    pool: Candidates,
    k: int,
    second: jax.Array | None = None,
    turns: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
) -> Selection:
    """The k valid candidates with the highest values; one whose value is not a number is never among them.

    Args:
        values: [n].
        pool: the candidates.
        k: how many.
        second: [n], decides among equal values.
        turns: ``(order [n], valid [n]) -> order``, where strata take turns.
    """
    pool = replace(pool, valid=pool.valid & ~jnp.isnan(values))
    order = ranked(values, pool, second)
    order = order if turns is None else turns(order, pool.valid)
    rows = jnp.concatenate([order, jnp.zeros((max(k - order.shape[0], 0),), order.dtype)])[:k]
    there = jnp.arange(k) < jnp.sum(pool.valid)
    return Selection(indices=rows, valid=there, gain=jnp.where(there, values[rows], jnp.nan))


class ThresholdSettings(ByScore, FilterSettings):
    """Keeps candidates whose score lies between two bounds."""

    kind: Literal["threshold"] = "threshold"
    score: AnyScoreName = "force_std_max"
    """Score that it looks at."""
    minimum: float | None = Field(default=None, ge=-1e9, le=1e9)
    """Lower bound, kept itself."""
    maximum: float | None = Field(default=None, ge=-1e9, le=1e9)
    """Upper bound, not kept itself."""

    @model_validator(mode="after")
    def _some_score_lies_between(self) -> Self:
        if self.minimum is None and self.maximum is None:
            raise ValueError("a threshold needs a minimum, a maximum or both.")
        if self.minimum is not None and self.maximum is not None and self.minimum >= self.maximum:
            raise ValueError(f"no score lies between minimum {self.minimum} and maximum {self.maximum}; swap them.")
        return self

    @property
    def prefers(self) -> bool:
        """Where it has a lower bound."""
        return self.minimum is not None

    def build(self) -> Filter:
        """See `threshold`."""
        return threshold(self.score, self.minimum, self.maximum)


class TopFractionSettings(ByScore, FilterSettings):
    """Keeps the candidates with the highest scores."""

    kind: Literal["top_fraction"] = "top_fraction"
    score: AnyScoreName = "force_std_max"
    """Score that it looks at."""
    fraction: float = Field(gt=0, le=1)
    """Share of the pool that is kept."""

    @property
    def prefers(self) -> bool:
        """It does."""
        return True

    def build(self) -> Filter:
        """See `top_fraction`."""
        return top_fraction(self.score, self.fraction)


class AgreementSettings(FilterSettings):
    """Keeps candidates on which the ensemble and the campaign's teacher differ.

    The teacher labels all candidates first; energies are compared relative to the reference energies of either source.
    """

    kind: Literal["agreement"] = "agreement"
    forces: float = Field(default=0.1, gt=0, le=1e3, json_schema_extra=unit("eV/Angstrom"))
    """Root mean square difference of the force components up to which they agree, eV/Angstrom."""
    energy: float | None = Field(default=None, gt=0, le=1e3, json_schema_extra=unit("eV/atom"))
    """Difference of the energies up to which they agree, eV/atom; not looked at where not given."""

    @property
    def asks_teacher(self) -> bool:
        """It does."""
        return True

    def build(self) -> Filter:
        """See `agreement`."""
        return agreement(self.forces, self.energy)
