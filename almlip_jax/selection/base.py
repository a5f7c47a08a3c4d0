"""The protocol of selection: candidates in, indices out, nothing else known.

A selector is a pure, jittable function ``(key, pool, labelled) -> Selection``; a filter is a pure, jittable function
``(key, pool, labelled) -> pool`` that only narrows `Candidates.valid`.  Both are made by functions that take the static
choices (how many, by which score, on which features), in the manner of optax; `chain` composes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Protocol

import jax
from flax import struct


@struct.dataclass
class Candidates:
    """A pool to select from, or the labelled set that is its context.

    Attributes:
        features: name -> [n, d] feature matrix, one row a structure.
        scores: name -> [n] acquisition scores; larger is more uncertain.
        cost: [n] expected price of a label, in any one unit.
        valid: [n] bool, false for padding and for what a filter has put aside.
        id: [n] int, a stable identity; breaks ties (the smallest wins), so that pool order does not matter.
        scalars: name -> [] quantities of the campaign so far that belong to no candidate, such as a weight.
    """

    features: Mapping[str, jax.Array]
    scores: Mapping[str, jax.Array]
    cost: jax.Array
    valid: jax.Array
    id: jax.Array
    scalars: Mapping[str, jax.Array] = field(default_factory=dict)


@struct.dataclass
class Selection:
    """What a selector chose, best first.

    Attributes:
        indices: [k] int, rows of the pool; never the same twice where valid.
        valid: [k] bool, false where the pool had fewer than k candidates.
        gain: [k] value the selector gave each choice at the time it was made (its meaning is the selector's).
    """

    indices: jax.Array
    valid: jax.Array
    gain: jax.Array


class Selector(Protocol):
    """Chooses k candidates, k being static."""

    def __call__(self, key: jax.Array, pool: Candidates, labelled: Candidates) -> Selection:
        """The choice, for a random key, a pool and what is labelled already."""
        ...


class Filter(Protocol):
    """Narrows the pool: returns it with fewer `Candidates.valid`, and otherwise unchanged."""

    def __call__(self, key: jax.Array, pool: Candidates, labelled: Candidates) -> Candidates:
        """The narrowed pool."""
        ...
