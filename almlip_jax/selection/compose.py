"""Composition: `chain` puts filters before a selector, and `select` runs one in float64 on any arrays."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

from almlip_jax.feature_names import AtomFeatureName, FeatureName
from almlip_jax.precision import full_precision
from almlip_jax.scores import AnyScoreName
from almlip_jax.selection.base import (
    Candidates,
    Enclosing,
    Filter,
    FilterSettings,
    LeafSelector,
    Selection,
    Selector,
    SelectorSettings,
    Stage,
    memoised,
)


@memoised
def chain(*filters: Filter, selector: Selector) -> Selector:
    """A selector that sees only what all filters, in their order, leave of the pool.

    Each stage gets a key of its own.

    >>> from almlip_jax.selection import chain, max_det, threshold
    >>> chosen = chain(threshold("force_std_max", maximum=2.0), selector=max_det(10))
    """

    def select(key: jax.Array, pool: Candidates, labelled: Candidates) -> Selection:
        keys = jax.random.split(key, len(filters) + 1)
        for one, stage in zip(keys[:-1], filters, strict=True):
            pool = stage(one, pool, labelled)
        return selector(keys[-1], pool, labelled)

    return select


def select(
    selector: Selector, key: jax.Array, pool: Candidates, labelled: Candidates, *, double: bool = True
) -> Selection:
    """Runs a selector compiled and in float64, whatever the precision of the features.

    Log-determinants of nearly equal candidates need it.  Rows of atoms keep their precision: there are many, and only
    distances between them are looked at.  A selector is compiled once for each set of shapes.

    Args:
        selector: pure and jittable.
        key: of this selection.
        pool: candidates; pad it to a capacity (``valid`` false) to keep its shape over rounds.
        labelled: the context, likewise.
        double: false leaves features in their own precision, for pools that would not fit twice as large; matrices of
            d x d are factorised in float64 all the same.

    Returns:
        `Selection` as numpy arrays.

    Raises:
        InputError: the selector asks for features or a score that the candidates do not have.

    >>> from almlip_jax.selection import Candidates, select, top_k
    >>> pool = Candidates.of(scores={"force_std_max": [0.1, 0.4, 0.2]})
    >>> select(top_k(2, "force_std_max"), jax.random.key(0), pool, pool).indices.tolist()
    [1, 2]
    """
    if pool.valid.shape[0] == 0:  # reductions over candidates need a row, even one that is not valid
        filled = jax.tree.map(lambda values: np.zeros((1, *values.shape[1:]), values.dtype), replace(pool, scalars={}))
        strata = filled.strata and replace(filled.strata, shares=cast(Any, pool.strata).shares)
        pool = replace(filled, scalars=pool.scalars, strata=strata)
    with jax.enable_x64(True):
        return jax.device_get(_compiled(cast(Any, selector), double)(key, pool, labelled))


@lru_cache(maxsize=64)  # those of a user's own closures are let go
def _compiled(selector: Selector, double: bool) -> Selector:
    if not double:
        return jax.jit(full_precision(selector))

    # widened inside: columns that the selector does not look at are never copied
    def doubled(key: jax.Array, pool: Candidates, labelled: Candidates) -> Selection:
        return selector(key, _doubled(pool), _doubled(labelled))

    return jax.jit(full_precision(doubled))


def _doubled(candidates: Candidates) -> Candidates:
    def leaf(values: jax.Array) -> jax.Array:
        real = jnp.issubdtype(values.dtype, jnp.floating)
        return jnp.asarray(values, jnp.float64 if real else values.dtype)

    # rows of atoms are many, and only distances between them are looked at
    doubled = jax.tree.map(leaf, replace(candidates, environments=None))
    return cast(Candidates, replace(doubled, environments=candidates.environments))


class ChainSettings(Enclosing, SelectorSettings):
    """Filters one after the other, then a selector on what they leave."""

    kind: Literal["chain"] = "chain"
    filters: tuple[FilterSettings, ...] = Field(min_length=1)
    """Filters, in the order in which they are applied."""
    selector: LeafSelector
    """Chooses from what is left."""

    @property
    def score_names(self) -> tuple[AnyScoreName, ...]:
        """Those of filters and selector."""
        return tuple(dict.fromkeys(name for one in self._stages for name in one.score_names))

    @property
    def feature_names(self) -> tuple[FeatureName, ...]:
        """Those of filters and selector."""
        return tuple(dict.fromkeys(name for one in self._stages for name in one.feature_names))

    @property
    def atom_feature_names(self) -> tuple[AtomFeatureName, ...]:
        """Those of filters and selector."""
        return tuple(dict.fromkeys(name for one in self._stages for name in one.atom_feature_names))

    @property
    def asks_teacher(self) -> bool:
        """Where one of them does."""
        return any(one.asks_teacher for one in self._stages)

    @property
    def draws_at_random(self) -> bool:
        """Where the selector does, and no filter prefers uncertain candidates."""
        return self.selector.draws_at_random and not any(one.prefers for one in self.filters)

    def build(self, k: int) -> Selector:
        """See `chain`."""
        return chain(*(one.build() for one in self.filters), selector=self.selector.build(k))

    @property
    def _stages(self) -> tuple[Stage, ...]:
        return (*self.filters, self.selector)
