"""What a step comes to: the gate's decision where nothing is unphysical, and whether its frame counts as below.

Decisions and counts are apart.  What a gate makes of a frame (it may raise its thresholds, wait for a score to come
down, or leave aside what is too far off) decides what is recorded; whether a frame lies below is a matter of its score
and the record threshold of the run alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from almlip_jax.dynamics.gates import Decision, Gate
from almlip_jax.dynamics.sanity import SanityLimits, unphysical_cause
from almlip_jax.dynamics.seen import Observables, Thresholds


@dataclass(frozen=True)
class Judged:
    """What gate and sanity say about a step, [W] each.

    Attributes:
        visited: bool, walkers that run and came to the frame; a refused Monte Carlo trial is not judged.
        decision: int of `Decision`; to go on where nothing is judged.
        cause: int of `Cause`.
        below: bool, visited and physical, with a score below the record threshold of the run.
        safe: bool, the gate lets the frame pass, and its score lies below the stop threshold of the run.
    """

    visited: jax.Array
    decision: jax.Array
    cause: jax.Array
    below: jax.Array
    safe: jax.Array

    def says(self, *decisions: Decision) -> jax.Array:
        """Where it is one of some decisions, [W] bool."""
        return jnp.isin(self.decision, jnp.asarray([int(one) for one in decisions]))


def judge(
    gate: Gate,
    memory: Any,
    score: str,
    seen: Observables,
    limits: SanityLimits,
    thresholds: Thresholds,
    visited: jax.Array,
) -> Judged:
    """The judgement of a step.

    Args:
        gate: decides on frames that are physical.
        memory: its state.
        score: name of its score.
        seen: of the step.
        limits: of sanity.
        thresholds: of the run.
        visited: [W] bool.
    """
    cause = unphysical_cause(seen, limits)
    decision, _ = gate.apply(memory, seen)
    decision = jnp.where(cause > 0, int(Decision.UNPHYSICAL), decision)
    value, passes = seen.scores[score], decision == int(Decision.GO_ON)
    return Judged(
        visited=visited,
        decision=jnp.where(visited, decision, int(Decision.GO_ON)),
        cause=cause,
        below=visited & (cause == 0) & (value < thresholds.record),
        safe=visited & passes & (value < thresholds.stop),
    )
