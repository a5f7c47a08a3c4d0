"""Admission to the candidate buffer: which recorded frames keep a slot, decided inside the loop.

The gate says which frames are worth a look; a rule of admission says which of them the buffer keeps.  Rules that look
at features know the training set and every frame that any walker has recorded, so that ten walkers in one place record
one frame.  Walkers of one step are taken one after the other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from pydantic import Field

from almlip_jax.settings import Settings, unit


class FirstAdmission(Settings):
    """Each walker keeps its first ``buffer`` frames."""

    kind: Literal["first"] = "first"


class ReservoirAdmission(Settings):
    """A uniform sample of all frames offered (Vitter, 1985, algorithm R)."""

    kind: Literal["reservoir"] = "reservoir"


class TopAdmission(Settings):
    """The frames with the highest score of the gate."""

    kind: Literal["top_k"] = "top_k"


class FarthestAdmission(Settings):
    """Frames far from the training set and from one another in sketched features; the most crowded one gives way."""

    kind: Literal["farthest"] = "farthest"
    least_distance: float = Field(default=0.05, ge=0, le=1000.0)
    """From everything known, in units of the root mean square norm of the training set's features."""
    sketch: int = Field(default=128, ge=1, le=16_384)
    """Dimensions of the sketch."""


class LogDetAdmission(Settings):
    """Frames that add most to ``log det`` of the information matrix; exchanges as long as one raises it.

    Of a stream that is seen once, the buffer holds 0.95 to 1.0 of what greedy selection from all its frames would add
    to ``log det`` (defaults, clouds of features of 5 to 32 dimensions); a high ``least_gain`` leaves slots empty.
    """

    kind: Literal["log_det"] = "log_det"
    least_gain: float = Field(default=0.1, ge=0, le=1000.0, json_schema_extra=unit("nats"))
    """Nats that a frame must add to take a free slot.  A near copy of a frame that the buffer holds must add 0.7 at
    least; a copy adds log 2 = 0.69 at most."""
    sigma: float = Field(default=1e-2, ge=1e-4, le=100.0)
    """Regularisation, relative to features of mean square norm 1 over the training set."""
    sketch: int = Field(default=128, ge=1, le=16_384)
    """Dimensions of the sketch."""


AdmissionSettings = Annotated[
    FirstAdmission | ReservoirAdmission | TopAdmission | FarthestAdmission | LogDetAdmission,
    Field(discriminator="kind"),
]


@struct.dataclass
class Context:
    """The training set as admission sees it; made by `context_of`.

    Attributes:
        map: [D, P] from the features of a frame to those that are compared.
        known: [T, P] those of the training set, where distances to it are asked for; else T = 0.
    """

    map: jax.Array
    known: jax.Array


@struct.dataclass
class Offer:
    """One frame of each walker, in the eyes of an admission rule.

    Attributes:
        wanted: [W] bool, offered.
        score: [W], of the gate.
        features: [W, P] through `Context.map`; P = 0 for rules that do not look at them.
        key: random key of this step.
        offered: [W] int, frames that each walker offered before.
    """

    wanted: jax.Array
    score: jax.Array
    features: jax.Array
    key: jax.Array
    offered: jax.Array


class Admission(Protocol):
    """``init`` makes the state of a buffer, ``place`` hands out slots; both are pure and jittable."""

    @property
    def looks_at_features(self) -> bool:
        """Whether `Offer.features` are needed."""
        ...

    @property
    def by_chance(self) -> bool:
        """Whether frames are refused by chance: for the gate's memory such a frame counts as recorded."""
        ...

    def init(self, walkers: int, room: int, context: Context) -> Any:
        """State of an empty buffer with ``room`` slots."""
        ...

    def place(self, state: Any, offer: Offer, context: Context) -> tuple[jax.Array, Any]:
        """Slot of each walker's frame, [W] int, ``room`` where it is not kept; and the next state."""
        ...

    def full(self, state: Any) -> jax.Array:
        """Walkers [W] bool whose frames can no longer be kept."""
        ...


@struct.dataclass
class Counted:
    """Frames kept of each walker, [W] int; ``room`` slots belong to all."""

    count: jax.Array
    room: jax.Array


@dataclass(frozen=True)
class First:
    """Each walker has a region of its own."""

    looks_at_features = False
    by_chance = False

    def init(self, walkers: int, room: int, context: Context) -> Counted:
        """Nothing kept."""
        return Counted(jnp.zeros((walkers,), jnp.int32), jnp.asarray(room, jnp.int32))

    def place(self, state: Counted, offer: Offer, context: Context) -> tuple[jax.Array, Counted]:
        """The next slot of the walker's region."""
        walkers = state.count.shape[0]
        own = state.room // walkers
        taken = offer.wanted & (state.count < own)
        slot = jnp.where(taken, own * jnp.arange(walkers) + state.count, state.room)
        return slot, Counted(state.count + taken, state.room)

    def full(self, state: Counted) -> jax.Array:
        """Regions without a free slot."""
        return state.count >= state.room // state.count.shape[0]


@struct.dataclass
class Scored:
    """A score for each slot [B], -inf where it is empty; and the number of walkers, as the length of an array."""

    score: jax.Array
    walkers: jax.Array


class _Shared(ABC):
    """Rules for a buffer that all walkers share: one walker after the other, and never full."""

    by_chance = False

    def place(self, state: Any, offer: Offer, context: Context) -> tuple[jax.Array, Any]:
        """Slots, walker by walker; a later one may take the slot of an earlier one."""
        walkers = offer.wanted.shape[0]
        room = self._room(state)

        def one(w: jax.Array, carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
            slots, state = carry
            slot = jnp.where(offer.wanted[w], self._slot(state, offer, w, context), room)
            slots = jnp.where(slots == slot, room, slots).at[w].set(slot)
            return slots, jax.lax.cond(slot < room, lambda: self._after(state, offer, w, slot, context), lambda: state)

        return jax.lax.fori_loop(0, walkers, one, (jnp.full((walkers,), room, jnp.int32), state))

    @abstractmethod
    def _room(self, state: Any) -> int: ...

    @abstractmethod
    def _slot(self, state: Any, offer: Offer, w: jax.Array, context: Context) -> jax.Array:
        """Slot for the frame of walker w; ``room`` where it is refused."""

    @abstractmethod
    def _after(self, state: Any, offer: Offer, w: jax.Array, slot: jax.Array, context: Context) -> Any:
        """The state with that frame in its slot."""


@dataclass(frozen=True)
class TopK(_Shared):
    """The lowest of those kept gives way."""

    looks_at_features = False

    def init(self, walkers: int, room: int, context: Context) -> Scored:
        """Nothing kept."""
        return Scored(jnp.full((room,), -jnp.inf), jnp.zeros((walkers,)))

    def _room(self, state: Scored) -> int:
        return state.score.shape[0]

    def _score(self, offer: Offer, w: jax.Array) -> jax.Array:
        return offer.score[w]

    def _slot(self, state: Scored, offer: Offer, w: jax.Array, context: Context) -> jax.Array:
        lowest = jnp.argmin(state.score)
        return jnp.where(self._score(offer, w) > state.score[lowest], lowest, self._room(state)).astype(jnp.int32)

    def _after(self, state: Scored, offer: Offer, w: jax.Array, slot: jax.Array, context: Context) -> Scored:
        return Scored(state.score.at[slot].set(self._score(offer, w).astype(state.score.dtype)), state.walkers)

    def full(self, state: Scored) -> jax.Array:
        """Never."""
        return jnp.zeros(state.walkers.shape, bool)


@dataclass(frozen=True)
class Reservoir(TopK):
    """A random number for each frame offered, and the highest are kept: a uniform sample without replacement."""

    by_chance = True

    def _score(self, offer: Offer, w: jax.Array) -> jax.Array:
        return jax.random.uniform(jax.random.fold_in(offer.key, w))


@struct.dataclass
class Spread:
    """Features of the frames kept [B, P], whether there is one [B], distance to the nearest neighbour or known [B]."""

    features: jax.Array
    kept: jax.Array
    nearest: jax.Array
    walkers: jax.Array


@dataclass(frozen=True)
class Farthest(_Shared):
    """Greedy farthest points of a stream: free slots first, then the most crowded frame gives way to a lonelier one.

    Attributes:
        least_distance: below which a frame is as good as known.
    """

    least_distance: float
    looks_at_features = True

    def init(self, walkers: int, room: int, context: Context) -> Spread:
        """Nothing kept."""
        dtype = context.map.dtype
        return Spread(
            features=jnp.zeros((room, context.map.shape[1]), dtype),
            kept=jnp.zeros((room,), bool),
            nearest=jnp.zeros((room,), dtype),
            walkers=jnp.zeros((walkers,)),
        )

    def _room(self, state: Spread) -> int:
        return state.kept.shape[0]

    def full(self, state: Spread) -> jax.Array:
        """Never."""
        return jnp.zeros(state.walkers.shape, bool)

    def _slot(self, state: Spread, offer: Offer, w: jax.Array, context: Context) -> jax.Array:
        x, room = offer.features[w], self._room(state)
        to_kept = jnp.where(state.kept, _distances(state.features, x), jnp.inf)
        to_known = jnp.min(_distances(context.known, x), initial=jnp.inf)
        crowded = jnp.argmin(jnp.where(state.kept, state.nearest, -1))  # a free slot where there is one
        without = to_kept.at[crowded].set(jnp.inf)
        own = jnp.minimum(to_known, jnp.min(without))
        free = ~state.kept[crowded]
        better = jnp.where(free, True, own > state.nearest[crowded])
        new_enough = jnp.minimum(to_known, jnp.min(jnp.where(free, to_kept, without))) > self.least_distance
        return jnp.where(better & new_enough, crowded, room).astype(jnp.int32)

    def _after(self, state: Spread, offer: Offer, w: jax.Array, slot: jax.Array, context: Context) -> Spread:
        features, kept = state.features.at[slot].set(offer.features[w]), state.kept.at[slot].set(True)
        room = self._room(state)
        squares = jnp.sum(features**2, axis=1)
        between = squares[:, None] + squares[None, :] - 2 * features @ features.T
        between = jnp.where(kept[None, :] & ~jnp.eye(room, dtype=bool), between, jnp.inf)
        among = jnp.sqrt(jnp.maximum(jnp.min(between, axis=1), 0))
        known = jnp.min(jax.vmap(lambda row: _distances(context.known, row))(features), axis=1, initial=jnp.inf)
        return Spread(features, kept, jnp.minimum(among, known), state.walkers)


@struct.dataclass
class Design:
    """Features of the frames kept [B, P] (0 in free slots), ``inv(1 + Phi Phi^T)`` [B, B], slots that are taken [B]."""

    features: jax.Array
    inverse: jax.Array
    kept: jax.Array
    walkers: jax.Array


@dataclass(frozen=True)
class LogDet(_Shared):
    """D-optimal exchange on a stream.

    With ``Phi`` the whitened features of the frames kept (so that the training set is the identity), ``G = 1 + Phi
    Phi^T``, and a candidate of norm ``c = 1 + phi.phi`` and products ``g = Phi phi``: it adds ``log(c - g G^-1 g)``;
    in place of frame j the determinant changes by the factor ``d_j (c - g G^-1 g) + (G^-1 g)_j^2``, d the diagonal of
    ``G^-1`` (a rank-two update, as in Fedorov's exchange).  Free slots are filled by frames that add enough and are no
    copies; after that the best exchange is made where it raises the determinant.

    Attributes:
        least_gain: nats.
    """

    least_gain: float
    looks_at_features = True

    def init(self, walkers: int, room: int, context: Context) -> Design:
        """Nothing kept."""
        dtype = context.map.dtype
        return Design(
            features=jnp.zeros((room, context.map.shape[1]), dtype),
            inverse=jnp.eye(room, dtype=dtype),
            kept=jnp.zeros((room,), bool),
            walkers=jnp.zeros((walkers,)),
        )

    def _room(self, state: Design) -> int:
        return state.kept.shape[0]

    def full(self, state: Design) -> jax.Array:
        """Never."""
        return jnp.zeros(state.walkers.shape, bool)

    def _slot(self, state: Design, offer: Offer, w: jax.Array, context: Context) -> jax.Array:
        x, room = _resolvable(offer.features[w]), self._room(state)
        products = state.features @ x
        solved = state.inverse @ products
        size = 1 + x @ x
        left = size - products @ solved
        # what is left of a copy is rounding; it must not pass for novelty
        left = jnp.where(left > jnp.maximum(1, _ROUNDING * jnp.finfo(x.dtype).eps * size), left, 1)
        ratio = jnp.diag(state.inverse) * left + solved**2
        free = jnp.argmin(state.kept)  # the first free slot
        any_free = ~state.kept[free]
        exchange = jnp.argmax(ratio)
        slot = jnp.where(any_free, free, exchange)
        # what a frame adds to all that is kept decides on its novelty, and the exchange on its worth
        near = jnp.sum((state.features - x) ** 2, axis=1) <= _COPY**2 * (x @ x)
        least = jnp.where(jnp.any(state.kept & near), max(self.least_gain, _COPY_GAIN), self.least_gain)
        novel = jnp.log(left) > least
        worth = jnp.where(any_free, novel, ratio[exchange] > 1 + _LEAST_EXCHANGE)
        return jnp.where(worth, slot, room).astype(jnp.int32)

    def _after(self, state: Design, offer: Offer, w: jax.Array, slot: jax.Array, context: Context) -> Design:
        features = state.features.at[slot].set(_resolvable(offer.features[w]))
        identity = jnp.eye(self._room(state), dtype=features.dtype)
        factor = jax.scipy.linalg.cho_factor(features @ features.T + identity)
        inverse = jax.scipy.linalg.cho_solve(factor, identity)
        return Design(features, inverse, state.kept.at[slot].set(True), state.walkers)


_COPY = 0.1  # distance of two frames, relative to the length of one, below which they are taken for copies
_COPY_GAIN = 0.7  # nats; a copy adds log 2 at most
_ROUNDING = 100  # units of rounding of a frame's own norm that count as nothing


def _resolvable(x: jax.Array) -> jax.Array:
    """Whitened features no longer than what a copy can be told from in this precision (about 30 in float32).

    The rounding of a gain grows with the fourth power of the length.  A frame that far out is new whatever its length;
    its direction is kept.
    """
    longest = 0.3 / jnp.sqrt(jnp.finfo(x.dtype).eps)  # squared
    return x * jnp.sqrt(jnp.minimum(1, longest / jnp.maximum(x @ x, 1)))


_LEAST_EXCHANGE = 1e-3  # relative growth of the determinant that an exchange is made for


def _distances(rows: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum((rows - x) ** 2, axis=1))


def build_admission(settings: AdmissionSettings) -> Admission:
    """The rule that some settings describe."""
    match settings:
        case ReservoirAdmission():
            return Reservoir()
        case TopAdmission():
            return TopK()
        case FarthestAdmission():
            return Farthest(settings.least_distance)
        case LogDetAdmission():
            return LogDet(settings.least_gain)
        case _:
            return First()


def context_of(settings: AdmissionSettings, features: np.ndarray | None, seed: int, room: int | None = None) -> Context:
    """What an admission rule needs to know of the training set.

    Args:
        settings: of the rule.
        features: [T, D] features of the training set; not looked at by rules that do not compare features.
        seed: decides the sketch.
        room: rows that ``known`` is padded to by repetition, so that a growing training set keeps its shape.

    Returns:
        `Context` in the precision of the features; the map is sketch, scale and, for ``log_det``, the posterior
        transform ``L^-T`` with ``L L^T = Phi^T Phi / sigma^2 + 1``.
    """
    if not isinstance(settings, FarthestAdmission | LogDetAdmission) or features is None:
        return Context(jnp.zeros((0, 0)), jnp.zeros((0, 0)))
    rows = features.astype(np.float64)
    width = rows.shape[1]
    size = min(settings.sketch, width)
    sketch = np.eye(width)
    if size < width:
        sketch = np.random.default_rng(seed).normal(size=(width, size)) / np.sqrt(size)
    sketch = sketch / np.sqrt(max(np.mean(np.sum((rows @ sketch) ** 2, axis=1)), 1e-300))
    known = rows @ sketch
    if isinstance(settings, LogDetAdmission):
        information = known.T @ known / settings.sigma**2 + np.eye(size)
        whiten = np.linalg.inv(np.linalg.cholesky(information)).T / settings.sigma
        return Context(jnp.asarray((sketch @ whiten).astype(features.dtype)), jnp.zeros((0, size), features.dtype))
    if room is not None and room > len(known):
        known = np.concatenate([known, np.repeat(known[:1], room - len(known), axis=0)])
    return Context(jnp.asarray(sketch.astype(features.dtype)), jnp.asarray(known.astype(features.dtype)))
