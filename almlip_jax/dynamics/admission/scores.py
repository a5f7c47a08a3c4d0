"""Rules that look at no features: each walker's first frames, a uniform sample, the highest scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import struct

from almlip_jax.dynamics.admission.base import Admission, AdmissionSettings, Offer, Shared, SharedAdmission
from almlip_jax.dynamics.seen import RunContext


@struct.dataclass
class Counted:
    """Frames kept of each walker, [W] int; ``room`` slots belong to all."""

    count: jax.Array
    room: jax.Array


@dataclass(frozen=True)
class First(Admission):
    """Each walker has a region of its own."""

    def init(self, context: RunContext) -> Counted:
        """Nothing kept."""
        return Counted(jnp.zeros((context.walkers,), jnp.int32), jnp.asarray(context.room, jnp.int32))

    def apply(self, state: Counted, seen: Offer) -> tuple[jax.Array, Counted]:
        """The next slot of the walker's region."""
        walkers = state.count.shape[0]
        own = state.room // walkers
        taken = seen.wanted & (state.count < own)
        slot = jnp.where(taken, own * jnp.arange(walkers) + state.count, state.room)
        return slot, Counted(state.count + taken, state.room)

    def full(self, state: Counted) -> jax.Array:
        """Regions without a free slot."""
        return state.count >= state.room // state.count.shape[0]


@struct.dataclass
class Scored:
    """A score for each slot [B], -inf where it is empty; and `RunContext.slots`, [W, 2] int."""

    score: jax.Array
    slots: jax.Array


@dataclass(frozen=True)
class TopK(Shared):
    """The lowest of those kept gives way."""

    def init(self, context: RunContext) -> Scored:
        """Nothing kept."""
        return Scored(jnp.full((context.room,), -jnp.inf), context.slots)

    def _room(self, state: Scored) -> int:
        return state.score.shape[0]

    def _score(self, seen: Offer, w: jax.Array) -> jax.Array:
        return seen.score[w]

    def _slot(self, state: Scored, seen: Offer, w: jax.Array) -> jax.Array:
        lowest = jnp.argmin(jnp.where(self._open(state, w), state.score, jnp.inf))
        return jnp.where(self._score(seen, w) > state.score[lowest], lowest, self._room(state)).astype(jnp.int32)

    def _after(self, state: Scored, seen: Offer, w: jax.Array, slot: jax.Array) -> Scored:
        return Scored(state.score.at[slot].set(self._score(seen, w).astype(state.score.dtype)), state.slots)


@dataclass(frozen=True)
class Reservoir(TopK):
    """A random number for each frame offered, and the highest are kept: a uniform sample without replacement."""

    by_chance = True

    def _score(self, seen: Offer, w: jax.Array) -> jax.Array:
        return jax.random.uniform(jax.random.fold_in(seen.key, w))


class FirstAdmission(AdmissionSettings):
    """Each walker keeps its first ``buffer`` frames."""

    kind: Literal["first"] = "first"

    def build(self) -> Admission:
        """See `First`."""
        return First()


class ReservoirAdmission(SharedAdmission):
    """A uniform sample of all frames offered (Vitter, 1985, algorithm R)."""

    kind: Literal["reservoir"] = "reservoir"

    def build(self) -> Admission:
        """See `Reservoir`."""
        return Reservoir()


class TopAdmission(SharedAdmission):
    """The frames with the highest score of the gate."""

    kind: Literal["top_k"] = "top_k"

    def build(self) -> Admission:
        """See `TopK`."""
        return TopK()
