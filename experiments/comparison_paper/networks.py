"""Committees of small networks, side by side: members of many runs are trained and asked in one program.

Labelled rows of a run are the first ``count`` of an array that has room for the largest labelled set, so that its shape
never changes; what is behind them is never looked at.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct

HIDDEN = (128, 128)
LEARNING_RATE, BATCH = 1e-3, 32


class Network(nn.Module):
    """Rows [n, d] to numbers [n] through rectified layers."""

    hidden: tuple[int, ...] = HIDDEN

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width in self.hidden:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(1)(x)[..., 0]


@struct.dataclass
class Runs:
    """What committees learn from and are asked, R of them.

    Attributes:
        x: [R, N, d] standardised descriptors, the labelled rows first.
        y: [R, N] labels.
        count: [R] int, how many rows are labelled.
        keys: [R, M] random keys, one a member: its first parameters and the order in which it sees labels.
        asked: [R, A, d] rows to predict.
    """

    x: jax.Array
    y: jax.Array
    count: jax.Array
    keys: jax.Array
    asked: jax.Array


def trained(key: jax.Array, x: jax.Array, y: jax.Array, count: jax.Array, steps: int) -> dict:
    """Parameters of one member after Adam on the mean square error of batches drawn among the first ``count`` rows."""
    network, optimiser = Network(), optax.adam(LEARNING_RATE)
    start, order = jax.random.split(key)
    params = network.init(start, x[:1])

    def loss(params: dict, rows: jax.Array) -> jax.Array:
        return jnp.mean((network.apply(params, x[rows]) - y[rows]) ** 2)

    def step(carry: tuple, key: jax.Array) -> tuple[tuple, None]:
        params, state = carry
        draws = jax.random.uniform(key, (BATCH,))  # their number does not depend on the room that there is
        rows = jnp.minimum((draws * count).astype(jnp.int32), count - 1)
        updates, state = optimiser.update(jax.grad(loss)(params, rows), state)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, optimiser.init(params)), jax.random.split(order, steps))
    return params


@partial(jax.jit, static_argnames="steps")
def predictions(runs: Runs, steps: int) -> jax.Array:
    """What each member of each run says after its training, [R, M, A].

    Labels are standardised with mean and deviation of those that a run has.  Members are computed together, runs one
    after the other: the parameters of a committee and their moments stay in the caches of a core.
    """

    def one(run: Runs) -> jax.Array:
        known = jnp.arange(run.y.shape[0]) < run.count
        mean = jnp.sum(jnp.where(known, run.y, 0)) / run.count
        scale = jnp.sqrt(jnp.sum(jnp.where(known, run.y - mean, 0) ** 2) / run.count) + 1e-6
        y = (run.y - mean) / scale
        params = jax.vmap(lambda key: trained(key, run.x, y, run.count, steps))(run.keys)
        return mean + scale * jax.vmap(Network().apply, in_axes=(0, None))(params, run.asked)

    return jax.lax.map(one, runs)
