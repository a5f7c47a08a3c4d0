"""The protocol of admission: what a rule sees of a frame, where it puts it, and what all settings of rules have."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from pydantic import Field

from almlip_jax.dynamics.recorder import Frames
from almlip_jax.dynamics.seen import RunContext
from almlip_jax.kinds import Spec, UserCode


@struct.dataclass
class Context:
    """The training set as admission sees it; made by `AdmissionSettings.context`.

    Attributes:
        map: [D, P] from the features of a frame to those that are compared.
        known: [T, P] those of the training set, where distances to it are asked for; else T = 0.
    """

    map: jax.Array
    known: jax.Array


@struct.dataclass
class Offer:
    """One frame of each walker, as an admission rule sees it.

    Attributes:
        wanted: [W] bool, offered.
        score: [W], of the gate.
        features: [W, P] through `Context.map`; P = 0 for rules that do not look at them.
        known: [T, P], `Context.known`.
        frames: what would be recorded.
        key: random key of this step.
        offered: [W] int, frames that each walker offered before.
    """

    wanted: jax.Array
    score: jax.Array
    features: jax.Array
    known: jax.Array
    frames: Frames
    key: jax.Array
    offered: jax.Array


class Admission(Protocol):
    """Which recorded frames keep a slot; ``init`` and ``apply`` as all that lives in the loop (`dynamics.seen`).

    Its answer is what is kept, so that it learns from a frame when it is asked; it is asked where a walker has a frame
    to offer, and not in other steps.

    Attributes:
        looks_at_features: whether `Offer.features` are needed.
        by_chance: whether frames are refused by chance: for the gate's memory such a frame counts as recorded.
    """

    looks_at_features: bool = False
    by_chance: bool = False

    def init(self, context: RunContext) -> Any:
        """State of an empty buffer with `RunContext.room` slots."""
        ...

    def apply(self, state: Any, seen: Offer) -> tuple[jax.Array, Any]:
        """Slot of each walker's frame, [W] int, the number of slots where it is not kept; and the next state."""
        ...

    def full(self, state: Any) -> jax.Array:
        """Walkers [W] bool whose frames can no longer be kept."""
        ...


class Shared(Admission, ABC):
    """Rules for a buffer that all walkers share: one walker after the other, and never full."""

    def apply(self, state: Any, seen: Offer) -> tuple[jax.Array, Any]:
        """Slots, walker by walker; a later one may take the slot of an earlier one."""
        walkers = seen.wanted.shape[0]
        room = self._room(state)

        def one(w: jax.Array, carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
            slots, state = carry
            slot = jnp.where(seen.wanted[w], self._slot(state, seen, w), room)
            slots = jnp.where(slots == slot, room, slots).at[w].set(slot)
            return slots, jax.lax.cond(slot < room, lambda: self._after(state, seen, w, slot), lambda: state)

        return jax.lax.fori_loop(0, walkers, one, (jnp.full((walkers,), room, jnp.int32), state))

    def full(self, state: Any) -> jax.Array:
        """Never."""
        return jnp.zeros(state.walkers.shape, bool)

    @abstractmethod
    def _room(self, state: Any) -> int: ...

    @abstractmethod
    def _slot(self, state: Any, seen: Offer, w: jax.Array) -> jax.Array:
        """Slot for the frame of walker w; ``room`` where it is refused."""

    @abstractmethod
    def _after(self, state: Any, seen: Offer, w: jax.Array, slot: jax.Array) -> Any:
        """The state with that frame in its slot."""


class AdmissionSettings(Spec):
    """Settings of any admission rule."""

    @property
    def looks_at_features(self) -> bool:
        """Whether it compares frames with the training set."""
        return self.build().looks_at_features

    @abstractmethod
    def build(self) -> Admission:
        """The rule.

        Raises:
            InputError: a user's function cannot be imported or built.
        """

    def context(self, features: np.ndarray | None, seed: int, room: int | None = None) -> Context:
        """What the rule needs to know of the training set.

        Args:
            features: [T, D] features of the training set; not looked at by rules that do not compare features.
            seed: decides the sketch.
            room: rows that ``known`` is padded to by repetition, so that a growing training set keeps its shape.

        Returns:
            `Context` in the precision of the features.
        """
        return Context(jnp.zeros((0, 0)), jnp.zeros((0, 0)))


class ByFeatures(AdmissionSettings):
    """Rules that compare sketched features, in units in which their mean square norm over the training set is 1."""

    sketch: int = Field(default=128, ge=1, le=16_384)
    """Dimensions of the sketch."""

    def context(self, features: np.ndarray | None, seed: int, room: int | None = None) -> Context:
        """The map is sketch and scale."""
        if features is None:
            return super().context(features, seed, room)
        sketch, known = self.sketched(features, seed)
        if room is not None and room > len(known):
            known = np.concatenate([known, np.repeat(known[:1], room - len(known), axis=0)])
        return Context(jnp.asarray(sketch.astype(features.dtype)), jnp.asarray(known.astype(features.dtype)))

    def sketched(self, features: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """The map [D, P] and the training set [T, P] through it, in float64."""
        rows = features.astype(np.float64)
        width = rows.shape[1]
        size = min(self.sketch, width)
        sketch = np.eye(width)
        if size < width:
            sketch = np.random.default_rng(seed).normal(size=(width, size)) / np.sqrt(size)
        power = float(np.mean(np.sum((rows @ sketch) ** 2, axis=1)))
        if power > 0:  # features that are all zero set no scale
            sketch = sketch / np.sqrt(power)
        return sketch, rows @ sketch


class UserAdmission(UserCode, ByFeatures):
    """A user's own factory ``(**parameters) -> Admission``."""

    kind: Literal["user"] = "user"

    def check_code(self) -> None:
        """Makes the rule."""
        self.build()

    def build(self) -> Admission:
        """What the factory makes."""
        return cast(Admission, self.call_for(("init", "apply", "full"), ("looks_at_features", "by_chance")))
