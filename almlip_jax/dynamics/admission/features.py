"""Rules that compare features of frames with the training set and with one another."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from pydantic import Field

from almlip_jax.dynamics.admission.base import Admission, ByFeatures, Context, Offer, Shared, SharedAdmission
from almlip_jax.dynamics.seen import RunContext
from almlip_jax.settings import unit

_COPY = 0.1  # distance of two frames, relative to the length of one, below which they are taken for copies
_COPY_GAIN = 0.7  # nats; a copy adds log 2 at most
_ROUNDING = 100  # units of rounding of a frame's own norm that count as nothing
_LEAST_EXCHANGE = 1e-3  # relative growth of the determinant that an exchange is made for


@struct.dataclass
class Spread:
    """Frames kept by `Farthest`.

    Attributes:
        features: [B, P].
        kept: [B] bool, whether there is one.
        nearest: [B] distance to the nearest neighbour, or to what is known.
        least_distance: scalar.
        slots: [W, 2] int, `RunContext.slots`.
    """

    features: jax.Array
    kept: jax.Array
    nearest: jax.Array
    least_distance: jax.Array
    slots: jax.Array


@dataclass(frozen=True)
class Farthest(Shared):
    """Greedy farthest points of a stream: free slots first, then the most crowded frame gives way to a lonelier one.

    Attributes:
        least_distance: below which a frame is as good as known.
    """

    least_distance: float = field(compare=False)
    looks_at_features = True

    def init(self, context: RunContext) -> Spread:
        """Nothing kept."""
        room, dtype = context.room, context.dtype
        return Spread(
            features=jnp.zeros((room, context.width), dtype),
            kept=jnp.zeros((room,), bool),
            nearest=jnp.zeros((room,), dtype),
            least_distance=jnp.asarray(self.least_distance, dtype),
            slots=context.slots,
        )

    def _room(self, state: Spread) -> int:
        return state.kept.shape[0]

    def _slot(self, state: Spread, seen: Offer, w: jax.Array) -> jax.Array:
        x, room = seen.features[w], self._room(state)
        to_kept = jnp.where(state.kept, _distances(state.features, x), jnp.inf)
        to_known = jnp.min(_distances(seen.known, x), initial=jnp.inf)
        # a free slot goes before all that are kept; what is alone may have its nearest neighbour infinitely far away
        crowding = jnp.where(state.kept, jnp.minimum(state.nearest, jnp.finfo(x.dtype).max), -1)
        crowded = jnp.argmin(jnp.where(self._open(state, w), crowding, jnp.inf))
        without = to_kept.at[crowded].set(jnp.inf)
        own = jnp.minimum(to_known, jnp.min(without))
        free = ~state.kept[crowded]
        better = jnp.where(free, True, own > state.nearest[crowded])
        new_enough = jnp.minimum(to_known, jnp.min(jnp.where(free, to_kept, without))) > state.least_distance
        return jnp.where(better & new_enough, crowded, room).astype(jnp.int32)

    def _after(self, state: Spread, seen: Offer, w: jax.Array, slot: jax.Array) -> Spread:
        features, kept = state.features.at[slot].set(seen.features[w]), state.kept.at[slot].set(True)
        room = self._room(state)
        squares = jnp.sum(features**2, axis=1)
        between = squares[:, None] + squares[None, :] - 2 * features @ features.T
        between = jnp.where(kept[None, :] & ~jnp.eye(room, dtype=bool), between, jnp.inf)
        among = jnp.sqrt(jnp.maximum(jnp.min(between, axis=1), 0))
        known = jnp.min(jax.vmap(lambda row: _distances(seen.known, row))(features), axis=1, initial=jnp.inf)
        return replace(state, features=features, kept=kept, nearest=jnp.minimum(among, known))


@struct.dataclass
class Design:
    """Frames kept by `LogDet`.

    Attributes:
        features: [B, P], 0 in free slots.
        inverse: [B, B] ``inv(1 + Phi Phi^T)``.
        kept: [B] bool, slots that are taken.
        least_gain: scalar, nats.
        least_gain_of_copies: scalar, nats.
        slots: [W, 2] int, `RunContext.slots`.
    """

    features: jax.Array
    inverse: jax.Array
    kept: jax.Array
    least_gain: jax.Array
    least_gain_of_copies: jax.Array
    slots: jax.Array


@dataclass(frozen=True)
class LogDet(Shared):
    """D-optimal exchange on a stream.

    With ``Phi`` the whitened features of the frames kept (so that the training set is the identity), ``G = 1 + Phi
    Phi^T``, and a candidate of norm ``c = 1 + phi.phi`` and products ``g = Phi phi``: it adds ``log(c - g G^-1 g)``;
    in place of frame j the determinant changes by the factor ``d_j (c - g G^-1 g) + (G^-1 g)_j^2``, d the diagonal of
    ``G^-1`` (a rank-two update, as in Fedorov's exchange).  Free slots are filled by frames that add enough and are no
    copies; after that the best exchange is made where it raises the determinant.

    Attributes:
        least_gain: nats.
    """

    least_gain: float = field(compare=False)
    looks_at_features = True

    def init(self, context: RunContext) -> Design:
        """Nothing kept."""
        room, dtype = context.room, context.dtype
        return Design(
            features=jnp.zeros((room, context.width), dtype),
            inverse=jnp.eye(room, dtype=dtype),
            kept=jnp.zeros((room,), bool),
            least_gain=jnp.asarray(self.least_gain, dtype),
            least_gain_of_copies=jnp.asarray(max(self.least_gain, _COPY_GAIN), dtype),
            slots=context.slots,
        )

    def _room(self, state: Design) -> int:
        return state.kept.shape[0]

    def _slot(self, state: Design, seen: Offer, w: jax.Array) -> jax.Array:
        x, room = _resolvable(seen.features[w]), self._room(state)
        products = state.features @ x
        solved = state.inverse @ products
        size = 1 + x @ x
        left = size - products @ solved
        # what is left of a copy is rounding; it must not pass for novelty
        left = jnp.where(left > jnp.maximum(1, _ROUNDING * jnp.finfo(x.dtype).eps * size), left, 1)
        mine = self._open(state, w)
        ratio = jnp.where(mine, jnp.diag(state.inverse) * left + solved**2, 0)
        free = jnp.argmax(mine & ~state.kept)  # the first free slot
        any_free = (mine & ~state.kept)[free]
        exchange = jnp.argmax(ratio)
        slot = jnp.where(any_free, free, exchange)
        # what a frame adds to all that is kept decides on its novelty, and the exchange on its worth
        near = jnp.sum((state.features - x) ** 2, axis=1) <= _COPY**2 * (x @ x)
        least = jnp.where(jnp.any(state.kept & near), state.least_gain_of_copies, state.least_gain)
        novel = jnp.log(left) > least
        worth = jnp.where(any_free, novel, ratio[exchange] > 1 + _LEAST_EXCHANGE)
        return jnp.where(worth, slot, room).astype(jnp.int32)

    def _after(self, state: Design, seen: Offer, w: jax.Array, slot: jax.Array) -> Design:
        features = state.features.at[slot].set(_resolvable(seen.features[w]))
        identity = jnp.eye(self._room(state), dtype=features.dtype)
        factor = jax.scipy.linalg.cho_factor(features @ features.T + identity)
        inverse = jax.scipy.linalg.cho_solve(factor, identity)
        return replace(state, features=features, inverse=inverse, kept=state.kept.at[slot].set(True))


def _resolvable(x: jax.Array) -> jax.Array:
    """Whitened features, cut to the length up to which copies are recognised in this precision (about 30 in float32).

    The rounding of a gain grows with the fourth power of the length.  A frame that far out is new whatever its length;
    its direction is kept.
    """
    longest = 0.3 / jnp.sqrt(jnp.finfo(x.dtype).eps)  # squared
    return x * jnp.sqrt(jnp.minimum(1, longest / jnp.maximum(x @ x, 1)))


def _distances(rows: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum((rows - x) ** 2, axis=1))


class FarthestAdmission(ByFeatures, SharedAdmission):
    """Frames far from the training set and from one another in sketched features; the most crowded one gives way."""

    kind: Literal["farthest"] = "farthest"
    least_distance: float = Field(default=0.05, ge=0, le=1000.0)
    """From everything known, in units of the root mean square norm of the training set's features."""

    def build(self) -> Admission:
        """See `Farthest`."""
        return Farthest(self.least_distance)


class LogDetAdmission(ByFeatures, SharedAdmission):
    """Frames that add most to ``log det`` of the information matrix; exchanges as long as one raises it.

    Of a stream that is seen once, the buffer holds 0.95 to 1.0 of what greedy selection from all its frames would add
    to ``log det`` (defaults, clouds of features of 5 to 32 dimensions; of last-layer features of a molecule 0.99 to
    1.01, ``experiments/in_loop_selection``); a high ``least_gain`` leaves slots empty.
    """

    kind: Literal["log_det"] = "log_det"
    least_gain: float = Field(default=0.1, ge=0, le=1000.0, json_schema_extra=unit("nats"))
    """Nats that a frame must add to take a free slot.  A near copy of a frame that the buffer holds must add 0.7 at
    least; a copy adds log 2 = 0.69 at most."""
    sigma: float = Field(default=1e-2, ge=1e-4, le=100.0)
    """Regularisation, relative to features of mean square norm 1 over the training set."""

    def build(self) -> Admission:
        """See `LogDet`."""
        return LogDet(self.least_gain)

    def context(self, features: np.ndarray | None, seed: int, room: int | None = None) -> Context:
        """The map is sketch, scale and the posterior transform ``L^-T``, ``L L^T = Phi^T Phi / sigma^2 + 1``."""
        if features is None:
            return super().context(features, seed, room)
        sketch, known = self.sketched(features, seed)
        size = sketch.shape[1]
        information = known.T @ known / self.sigma**2 + np.eye(size)
        whiten = np.linalg.inv(np.linalg.cholesky(information)).T / self.sigma
        return Context(jnp.asarray((sketch @ whiten).astype(features.dtype)), jnp.zeros((0, size), features.dtype))
