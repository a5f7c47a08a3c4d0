"""How walkers end, and what is counted along the way."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from almlip_jax.dynamics.gates import Decision
from almlip_jax.dynamics.sanity import Cause
from almlip_jax.dynamics.seen import Observables
from almlip_jax.dynamics.state import Ends, Setup, State, Status
from almlip_jax.dynamics.verdicts import Judged
from almlip_jax.ensembles import Prediction

_STATUS = {
    Decision.UNPHYSICAL: Status.UNPHYSICAL,
    Decision.STOP: Status.STOPPED,
    Decision.LEAVE: Status.BEYOND_TRUST,
}


@dataclass(frozen=True)
class Endings:
    """Decides how walkers fare.

    Attributes:
        rewinds: endings that are undone, as `Decision`.
        when_full: ``end_walker``, ``end_all`` or ``go_on``.
        departures: whether it is noted which atom left the training distribution; needs the score ``latent_distance``.
    """

    rewinds: tuple[Decision, ...]
    when_full: str
    departures: bool

    def after(
        self,
        state: State,
        setup: Setup,
        observables: Observables,
        judged: Judged,
        full: jax.Array,
        converged: jax.Array,
        force_std: jax.Array,
        prediction: Prediction,
    ) -> tuple[Ends, jax.Array]:
        """How walkers fare after a step, and which of them begin again [W].

        Args:
            state: before the step.
            setup: of the run.
            observables: of the step.
            judged: what gate and sanity say.
            full: [W] bool, walkers that had no room for a frame.
            converged: [W] bool, walkers that reached what they were looking for.
            force_std: [W, N] eV/Angstrom.
            prediction: of every member.
        """
        ends, running, step = state.ends, state.running, state.step + 1
        status = jnp.where(running & converged, int(Status.CONVERGED), ends.status)
        if self.when_full != "go_on":
            over = running & jnp.any(full) if self.when_full == "end_all" else full
            status = jnp.where(over, int(Status.BUFFER_FULL), status)
        again = jnp.zeros_like(running)
        for what, code in reversed(_STATUS.items()):
            hit = judged.says(what)
            if what in self.rewinds:
                spared = hit & (ends.restarts < setup.restarts)
                again = again | spared
                hit = hit & ~spared
            status = jnp.where(hit, int(code), status)
        ended = running & (status != int(Status.RUNNING))
        unphysical = ended & (status == int(Status.UNPHYSICAL))
        broken = first_broken(prediction)
        broken = jnp.where(broken < 0, ends.member, broken)  # of the start, after which every member has no number
        departed = self._departed(ends, judged.visited, observables, setup, step)
        return replace(
            departed,
            status=status,
            cause=jnp.where(unphysical, judged.cause, ends.cause),
            member=jnp.where(unphysical & (judged.cause == int(Cause.NOT_FINITE)), broken, ends.member),
            step=jnp.where(ended, step, ends.step),
            atom=jnp.where(ended, jnp.argmax(force_std, axis=1).astype(jnp.int32), ends.atom),
            visited=ends.visited + judged.visited,
            below=ends.below + judged.below,
            restarts=ends.restarts + again,
            origin=jnp.where(again, step, ends.origin),
        ), again

    def _departed(
        self, ends: Ends, visited: jax.Array, observables: Observables, setup: Setup, step: jax.Array
    ) -> Ends:
        """Which atom of which walker left the training distribution, when, and how far."""
        if not self.departures:
            return ends
        distance = observables.atom_scores["latent_distance"]
        farthest = jnp.where(visited, jnp.max(distance, axis=1), 0)
        first = (farthest > setup.departure) & (ends.departed_step < 0)
        return replace(
            ends,
            departed_step=jnp.where(first, step, ends.departed_step),
            departed_atom=jnp.where(first, jnp.argmax(distance, axis=1).astype(jnp.int32), ends.departed_atom),
            departure=jnp.maximum(ends.departure, farthest),
        )


def first_broken(prediction: Prediction) -> jax.Array:
    """The first member whose energy or forces of a walker are not finite while others' are, [W] int; else -1."""
    members, walkers = prediction.energy.shape
    size = jnp.sum(jnp.abs(prediction.forces.reshape(members, walkers, -1)), axis=2)
    wrong = ~jnp.isfinite(prediction.energy + size)
    return jnp.where(jnp.all(wrong, axis=0) | ~jnp.any(wrong, axis=0), -1, jnp.argmax(wrong, axis=0)).astype(jnp.int32)
