"""The protocol of admission: what a rule sees of a frame, where it puts it, and what all settings of rules have."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Protocol, Self, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from pydantic import BeforeValidator, Field, model_validator

from almlip_jax.dynamics.recorder import Frames
from almlip_jax.dynamics.seen import RunContext
from almlip_jax.errors import InputError
from almlip_jax.kinds import Spec, UserCode
from almlip_jax.structures.strata import by_size, named_strata, stratum


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
    """Rules for a buffer whose slots walkers share: one walker after the other, and never full.

    Their states have ``slots``, those of `RunContext`: a frame may take one of its walker's, and is compared with all.
    """

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
        return jnp.zeros(state.slots.shape[:1], bool)

    def _open(self, state: Any, w: jax.Array) -> jax.Array:
        """The slots [B] bool that a frame of walker w may take."""
        slot = jnp.arange(self._room(state))
        return (state.slots[w, 0] <= slot) & (slot < state.slots[w, 1])

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

    never_full: ClassVar[bool] = False
    """Whether there is always a place for a better frame, so that no walker ends for want of one."""

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

    @property
    def tells_apart(self) -> bool:
        """Whether some walkers have slots that others have not, by what `check_strata` looks at."""
        return False

    def check_strata(self, known: Mapping[str, Collection[Any]]) -> None:
        """Refuses shares among walkers that there are not.

        Args:
            known: what walkers have, by what tells them apart; nothing where some have none that lasts.

        Raises:
            ValueError: says what to change.
        """

    def regions(self, walkers: Sequence[Mapping[str, Any]], room: int) -> np.ndarray | None:
        """`RunContext.regions`; None: all walkers share all slots, or the rule sees to it.

        Args:
            walkers: what the frames of each walker carry from its first step on.
            room: slots.
        """
        return None


class SharedAdmission(AdmissionSettings):
    """Rules by which walkers compete for slots, all of them or those of one stratum."""

    never_full: ClassVar[bool] = True

    by: Literal["bath_temperature", "system", "walker"] | None = None
    """What tells strata of walkers apart, each of which has a share of the buffer for itself: temperatures, named
    systems, or each walker alone.  Without, all walkers compete for all slots, and the hottest may take them."""
    shares: Annotated[
        Literal["equal"] | dict[str, Annotated[float, Field(gt=0, le=1e6)]], BeforeValidator(named_strata)
    ] = "equal"
    """Share of each stratum: the same for all, or numbers by its name, such as `{300: 2, 600: 1}`."""

    @model_validator(mode="after")
    def _shares_are_of_strata(self) -> Self:
        if self.by is None and self.shares != "equal":
            raise ValueError("shares are of strata: say by what these are told apart.")
        return self

    @property
    def tells_apart(self) -> bool:
        """Where strata have shares."""
        return self.by is not None

    def check_strata(self, known: Mapping[str, Collection[Any]]) -> None:
        """See `AdmissionSettings.check_strata`."""
        if self.by is None or self.by not in known:
            return
        there = {stratum(value) for value in known[self.by]}
        if not there:
            raise ValueError(f"admission.by is {self.by}, but not every walker has one that lasts; name another.")
        if self.shares == "equal":
            return
        if strange := sorted(self.shares.keys() - there, key=by_size):
            names = ", ".join(sorted(there, key=by_size))
            raise ValueError(f"admission.shares name '{strange[0]}'; walkers have {self.by} of {names}.")
        if left := sorted(there - self.shares.keys(), key=by_size):
            raise ValueError(f"admission.shares leave {self.by} '{left[0]}' out; give it one.")

    def regions(self, walkers: Sequence[Mapping[str, Any]], room: int) -> np.ndarray | None:
        """One region of slots for each stratum, in the order of their names.

        Args:
            walkers: what the frames of each walker carry from its first step on.
            room: slots.

        Raises:
            InputError: a walker is in no stratum, or its stratum has no share.
        """
        if self.by is None:
            return None
        for w, known in enumerate(walkers):
            if known.get(self.by) is None:
                raise InputError(f"walker {w} has no '{self.by}', by which the buffer is shared; give all of them one.")
        names = [stratum(known[self.by]) for known in walkers]
        there = sorted(set(names), key=by_size)
        shares = dict.fromkeys(there, 1.0) if self.shares == "equal" else self.shares
        missing = [name for name in there if name not in shares]
        if missing:
            raise InputError(
                f"shares of the buffer by '{self.by}' are of {', '.join(shares)}; the walkers of {missing[0]} need one."
            )
        parts = np.cumsum([shares[name] for name in there])
        bounds, end = dict[str, tuple[int, int]](), 0
        for n, (name, part) in enumerate(zip(there, room * parts / parts[-1], strict=True), start=1):
            begin, end = end, min(max(round(part), end + 1), room - len(there) + n)  # one slot at least for each
            bounds[name] = begin, end
        return np.array([bounds[name] for name in names], np.int32)


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
