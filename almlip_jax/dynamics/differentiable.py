"""Short trajectories as differentiable functions: of first momenta, temperature, parameters of a bias, start positions.

The steps are those of the exploration (the same integrator, ensemble and biases) without gate and recorder; noise is
drawn from fixed streams, so that a trajectory is a smooth function of its inputs.  Memory grows with the square root of
the number of steps: only one state of each block of steps is kept for the backward pass.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from almlip_jax.dynamics.loop import Loop
from almlip_jax.dynamics.motion import Motion
from almlip_jax.dynamics.state import Setup, State
from almlip_jax.ensembles import committee_statistics
from almlip_jax.models import Params


@struct.dataclass
class Rollout:
    """A trajectory of T steps.

    Attributes:
        motion: at its end.
        scores: name -> [T, W], every committee score at every step.
        energy: [T, W] eV, mean of the members, relative to the reference energies.
        listed: scalar bool, whether the neighbour list held all edges all the way; if not, choose a wider skin.
    """

    motion: Motion
    scores: dict[str, jax.Array]
    energy: jax.Array
    listed: jax.Array


def rollout(loop: Loop, params: Params, state: State, setup: Setup, steps: int) -> Rollout:
    """Runs some steps; differentiable in ``params`` and in arrays of ``state.motion``, ``state.bias``, ``setup.drive``.

    The edges are those of the state's neighbour list, all the way; cells that move take them along.  Steps beyond those
    that the exploration planned are at the end of its ramps.

    Args:
        loop: the static part; gate, admission and rewinding are not looked at.
        params: of the ensemble.
        state: where to begin, as `Explorer.begin` makes it.  Forces at the start are computed afresh.
        setup: temperatures, time step, numbers of the integrator.
        steps: static.

    Returns:
        `Rollout`.
    """
    segments = int(np.ceil(np.sqrt(steps)))
    state = loop.begin(params, state, setup)

    def step(current: State, n: jax.Array) -> tuple[State, tuple[dict[str, jax.Array], jax.Array, jax.Array]]:
        at = setup.drive.at(jnp.minimum(current.step.astype(current.motion.position.dtype) / setup.steps, 1))
        done = loop.moved(params, current, setup, at, relist=False)
        committee = committee_statistics(done.prediction, done.graph)
        look = done.look.replace(visited=loop.integrator.visited(done.motion))  # type: ignore[attr-defined]
        _, bias = loop.bias.apply(current.bias, look)
        following = replace(current, motion=done.motion, bias=bias, step=current.step + 1)
        # the last segment may be shorter: steps beyond the end are not taken
        kept = jax.tree.map(lambda new, old: jnp.where(n < steps, new, old), following, current)
        line = dict(committee.scores)
        holds = current.neighbors.holds(done.offered, loop.cells_of(done.motion))
        return kept, (line, committee.energy, holds)

    @jax.checkpoint
    def segment(current: State, numbers: jax.Array) -> tuple[State, Any]:
        return jax.lax.scan(step, current, numbers)

    numbers = jnp.arange(segments * segments).reshape(segments, segments)
    end, lines = jax.lax.scan(segment, state, numbers)
    scores, energy, listed = jax.tree.map(lambda x: x.reshape(segments * segments, *x.shape[2:])[:steps], lines)
    return Rollout(end.motion, scores, energy, jnp.all(listed))
