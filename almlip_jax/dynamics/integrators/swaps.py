"""Monte Carlo swaps of unlike atoms in between the steps of any dynamics, for alloys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from pydantic import Field

from almlip_jax.dynamics.integrators.base import Integrator, next_keys
from almlip_jax.dynamics.motion import Evaluation, Moment, Motion, supply
from almlip_jax.settings import Settings


@struct.dataclass
class SwapState:
    """What swaps keep in addition to the dynamics they stand between.

    Attributes:
        inner: of the dynamics.
        species: [W, N] int.
        swappable: [W, N] bool, atoms that may be swapped.
        energies: [W, M] eV, of the members at the last configuration that was taken up; -inf where it is not known, and
            M = 0 before the first evaluation.
        pair: [W, 2] int, atoms of the trial.
        trial: scalar bool, whether this step is a trial.
        refused: [W] bool, whether the trial of this step was refused.
        tried, taken: [W] int, trials and those that were taken up.
    """

    inner: Any
    species: jax.Array
    swappable: jax.Array
    energies: jax.Array
    pair: jax.Array
    trial: jax.Array
    refused: jax.Array
    tried: jax.Array
    taken: jax.Array


@dataclass(frozen=True)
class Swaps(Integrator):
    """At a fixed interval, in place of a step of the dynamics, two unlike atoms of each walker exchange positions.

    The trial is the evaluation of that step, and Metropolis decides: hybrid Monte Carlo with one evaluation a step.
    Both energies are with the biases of that step, which do not move on in a trial.  Momenta stay with their atoms.
    Parameter: ``swap_every``.

    Attributes:
        inner: the dynamics.
    """

    inner: Integrator

    @property
    def thermal(self) -> bool:  # type: ignore[override]
        """As the dynamics."""
        return self.inner.thermal

    @property
    def drifts(self) -> bool:  # type: ignore[override]
        """As the dynamics."""
        return self.inner.drifts

    @property
    def changes_cell(self) -> bool:  # type: ignore[override]
        """As the dynamics."""
        return self.inner.changes_cell

    @property
    def bathed(self) -> bool:  # type: ignore[override]
        """Trials have a temperature, whatever the dynamics."""
        return True

    @property
    def biased(self) -> bool:  # type: ignore[override]
        """As the dynamics."""
        return self.inner.biased

    @property
    def retreats(self) -> bool:  # type: ignore[override]
        """As the dynamics."""
        return self.inner.retreats

    def init(self, motion: Motion, at: Moment) -> SwapState:
        """Nothing tried yet; species and swappable atoms are filled in by the caller."""
        walkers, atoms, _ = motion.position.shape
        return SwapState(
            inner=self.inner.init(motion, at),
            species=jnp.zeros((walkers, atoms), jnp.int32),
            swappable=at.mobile,
            energies=jnp.zeros((walkers, 0), motion.position.dtype),
            pair=jnp.zeros((walkers, 2), jnp.int32),
            trial=jnp.zeros((), bool),
            refused=jnp.zeros((walkers,), bool),
            tried=jnp.zeros((walkers,), jnp.int32),
            taken=jnp.zeros((walkers,), jnp.int32),
        )

    def from_start(self, motion: Motion, evaluation: Evaluation, at: Moment) -> Motion:
        """As the dynamics, and the energies that the first trial is compared with."""
        state: SwapState = motion.extra
        moved = self.inner.from_start(motion.set(extra=state.inner), evaluation, at)
        extra = state.replace(inner=moved.extra, energies=evaluation.member_energy.T)  # type: ignore[attr-defined]
        return moved.set(extra=extra)

    def to_force(self, motion: Motion, at: Moment, step: jax.Array) -> Motion:
        """A trial where its turn has come, else half a step of the dynamics."""
        # the step before a multiple, so that traces at the usual strides show the dynamics and not a trial
        trial = (step + 2) % at.numbers["swap_every"].astype(jnp.int32) == 0
        state: SwapState = motion.extra.replace(trial=trial, refused=jnp.zeros_like(motion.extra.refused))

        def propose() -> Motion:
            moved, keys = next_keys(motion)
            pair = jax.vmap(_unlike_pair)(keys, state.species, state.swappable)
            position = _exchanged(moved.position, pair)
            return moved.set(position=position, extra=state.replace(pair=pair))  # type: ignore[attr-defined]

        def move() -> Motion:
            moved = self.inner.to_force(motion.set(extra=state.inner), at, step)
            return moved.set(extra=state.replace(inner=moved.extra))  # type: ignore[attr-defined]

        return jax.lax.cond(trial, propose, move)

    def from_force(self, motion: Motion, evaluation: Evaluation, at: Moment) -> Motion:
        """Metropolis, or the rest of the step."""
        state: SwapState = motion.extra
        energies, before = evaluation.member_energy.T, evaluation.energy_before
        assert before is not None

        def judge() -> Motion:
            moved, keys = next_keys(motion)
            dtype = motion.position.dtype
            draw = jax.vmap(lambda key: jax.random.uniform(key, (), dtype, minval=jnp.finfo(dtype).tiny))(keys)
            taken = jnp.log(draw) < (before - evaluation.energy) / at.kt
            chosen = taken[:, None, None]
            back = _exchanged(motion.position, state.pair)
            moved = supply(moved, jnp.where(taken, evaluation.energy - before, 0))
            return moved.set(
                position=jnp.where(chosen, motion.position, back),
                force=jnp.where(chosen, evaluation.forces, motion.force),
                virial=jnp.where(chosen, evaluation.virial, motion.virial),
                extra=state.replace(  # type: ignore[attr-defined]
                    energies=jnp.where(taken[:, None], energies, state.energies),
                    refused=~taken,
                    tried=state.tried + 1,
                    taken=state.taken + taken,
                ),
            )

        def move() -> Motion:
            moved = self.inner.from_force(motion.set(extra=state.inner), evaluation, at)
            extra = state.replace(inner=moved.extra, energies=energies)  # type: ignore[attr-defined]
            return moved.set(extra=extra)

        return jax.lax.cond(state.trial, judge, move)

    def restart(self, motion: Motion, again: jax.Array, at: Moment) -> Motion:
        """As the dynamics."""
        state: SwapState = motion.extra
        moved = self.inner.restart(motion.set(extra=state.inner), again, at)
        energies = jnp.where(again[:, None], -jnp.inf, state.energies)  # unknown: a trial right now is refused
        return moved.set(extra=state.replace(inner=moved.extra, energies=energies))  # type: ignore[attr-defined]

    def visited(self, motion: Motion) -> jax.Array:
        """False for a trial that was refused."""
        return ~motion.extra.refused

    def trial(self, motion: Motion) -> jax.Array:
        """Whether this step is a trial."""
        return motion.extra.trial  # type: ignore[no-any-return]

    def member_energies(self, motion: Motion) -> jax.Array:
        """Those of the last configuration that was taken up."""
        return motion.extra.energies.T  # type: ignore[no-any-return]

    def converged(self, motion: Motion, at: Moment) -> jax.Array:
        """As the dynamics; a trial that was refused has reached nothing."""
        return self.inner.converged(motion.set(extra=motion.extra.inner), at) & self.visited(motion)


def _unlike_pair(key: jax.Array, species: jax.Array, swappable: jax.Array) -> jax.Array:
    """Two swappable atoms of different species, [2]; an atom with itself where there are none.

    The first is drawn among all that have a partner, the second among its partners.  The composition does not change,
    so the way back is equally probable.
    """
    first_key, second_key = jax.random.split(key)
    unlike = (species[:, None] != species[None, :]) & swappable[:, None] & swappable[None, :]

    def draw(key: jax.Array, allowed: jax.Array) -> jax.Array:
        return jnp.argmax(jnp.where(allowed, jax.random.uniform(key, allowed.shape), -1)).astype(jnp.int32)

    first = draw(first_key, jnp.any(unlike, axis=1))
    second = jnp.where(jnp.any(unlike), draw(second_key, unlike[first]), first)
    return jnp.stack([first, second])


def _exchanged(positions: jax.Array, pair: jax.Array) -> jax.Array:
    """Positions [W, N, 3] with those of two atoms [W, 2] of each walker exchanged."""
    rows = jnp.arange(positions.shape[0])
    one, other = positions[rows, pair[:, 0]], positions[rows, pair[:, 1]]
    return positions.at[rows, pair[:, 0]].set(other).at[rows, pair[:, 1]].set(one)


class SwapSettings(Settings):
    """Monte Carlo swaps of unlike atoms between the steps of the dynamics."""

    every: int = Field(default=20, ge=2, le=10**9)
    """Number of steps from one trial to the next; a trial takes the place of a step."""
    elements: tuple[str, ...] = ()
    """Elements that take part; all where empty."""

    def around(self, dynamics: Integrator) -> Swaps:
        """The dynamics with swaps in between."""
        return Swaps(dynamics)

    def numbers(self) -> dict[str, float]:
        """Of the swaps."""
        return {"swap_every": self.every}
