"""The protocol of integrators: half a step to the new positions, the one evaluation, half a step from its forces.

An integrator is a frozen dataclass that holds what is static (its kind); its parameters are arrays in
`motion.Drive.numbers`, so that other values need no other program.  `kick` and `drift` are jax-md's operators, mapped
over walkers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from pydantic import Field

from almlip_jax.dynamics.motion import Evaluation, Moment, Motion
from almlip_jax.dynamics.operators import simulate, space
from almlip_jax.errors import InputError
from almlip_jax.keys import in_a_row
from almlip_jax.kinds import Spec, UserCode

_shift = space.free()[1]


class Integrator(ABC):
    """What moves walkers; subclasses are frozen dataclasses.

    Attributes:
        thermal: whether momenta have a temperature that may be judged.
        drifts: whether the centre of mass has a temperature too (3 N degrees of freedom instead of 3 N - 3).
        changes_cell: whether cells move.
        retreats: whether a walker that the gate ends stays at the frame before, which the gate let pass.
        bathed: whether a temperature acts on walkers at every step, so that a ramp of it does.
        biased: whether biases act on walkers.
    """

    thermal: bool = True
    drifts: bool = False
    changes_cell: bool = False
    retreats: bool = False
    bathed: bool = True
    biased: bool = True

    def init(self, motion: Motion, at: Moment) -> Any:
        """What the integrator keeps besides positions and momenta, a pytree."""
        return None

    def from_start(self, motion: Motion, evaluation: Evaluation, at: Moment) -> Motion:
        """The state with the forces at the start, so that the first step can begin."""
        return take_up(motion, evaluation)

    @abstractmethod
    def to_force(self, motion: Motion, at: Moment, step: jax.Array) -> Motion:
        """To the positions at which the forces of this step are to be evaluated; ``step`` counts from 0."""

    @abstractmethod
    def from_force(self, motion: Motion, evaluation: Evaluation, at: Moment) -> Motion:
        """The rest of the step, with what the evaluation said."""

    def restart(self, motion: Motion, again: jax.Array, at: Moment) -> Motion:
        """The state after some walkers [W] bool have been put elsewhere with other momenta."""
        return motion

    def visited(self, motion: Motion) -> jax.Array:
        """Whether the evaluated positions were taken up, [W] bool; false for a Monte Carlo trial that was refused."""
        return jnp.ones(motion.position.shape[0], bool)

    def trial(self, motion: Motion) -> jax.Array:
        """Whether the positions to be evaluated are a Monte Carlo trial, scalar bool; biases do not move on in one."""
        return jnp.zeros((), bool)

    def member_energies(self, motion: Motion) -> jax.Array | None:
        """Energies of the members where the walkers are, [M, W] eV, if trials are compared with them; else None."""
        return None

    def converged(self, motion: Motion, at: Moment) -> jax.Array:
        """Whether a walker has reached what it was looking for, [W] bool; dynamics look for nothing."""
        return jnp.zeros(motion.position.shape[0], bool)


def kick(motion: Motion, dt: jax.Array) -> Motion:
    """B: momenta by the forces."""
    return simulate.momentum_step(motion, dt)


def drift(motion: Motion, dt: jax.Array) -> Motion:
    """A: positions by the momenta; positions are never wrapped."""
    return simulate.position_step(motion, _shift, dt)


def take_up(motion: Motion, evaluation: Evaluation) -> Motion:
    """The state with the forces and the virial of an evaluation."""
    return motion.set(force=evaluation.forces, virial=evaluation.virial)


def next_keys(motion: Motion) -> tuple[Motion, jax.Array]:
    """The state with its random streams moved on, and a key for each walker, [W]."""
    both = jax.vmap(jax.random.split)(motion.rng)
    return motion.set(rng=both[:, 0]), both[:, 1]


def normals(keys: jax.Array, like: jax.Array) -> jax.Array:
    """Standard normal numbers of the shape of an array [W, ...], each walker from its own key."""
    return jax.vmap(lambda key: jax.random.normal(key, like.shape[1:], like.dtype))(in_a_row(keys))


class IntegratorSettings(Spec):
    """Settings of anything that moves walkers."""

    needs_spread: ClassVar[bool] = False
    """Whether it goes nowhere where members cannot disagree."""

    @property
    def thermal(self) -> bool:
        """Whether walkers have momenta whose temperature means something."""
        return self.build().thermal

    @property
    def moves_cell(self) -> bool:
        """Whether cells move, against the pressure of the walkers."""
        return self.build().changes_cell

    @property
    def periods(self) -> Mapping[str, float]:
        """Keys of times, fs, into each of which at least two steps have to fit."""
        return {}

    @property
    def first_displacement(self) -> float:
        """Standard deviation by which each coordinate is displaced before the first step, Angstrom."""
        return 0.0

    @abstractmethod
    def build(self) -> Integrator:
        """The integrator, which holds what is static.

        Raises:
            InputError: a user's function cannot be imported or built.
        """

    def numbers(self) -> dict[str, float]:
        """Its other parameters by name (`Moment.numbers`), in the units that it works in (eV, Angstrom, amu)."""
        return {}


class UserIntegrator(UserCode, IntegratorSettings):
    """A user's own factory ``(**parameters) -> Integrator``."""

    kind: Literal["user"] = "user"
    values: dict[str, Annotated[float, Field(ge=-1e30, le=1e30)]] = {}
    """What it finds in `Moment.numbers`, in eV, Angstrom and amu; others need no other program."""

    def check_code(self) -> None:
        """Makes the integrator."""
        self.build()

    def build(self) -> Integrator:
        """What the factory makes."""
        made = self.call()
        if not isinstance(made, Integrator):
            raise InputError(
                f"'{self.function}' must return an Integrator (a subclass of the one in "
                f"{Integrator.__module__.rpartition('.')[0]}), but returns a {type(made).__name__}."
            )
        return made

    def numbers(self) -> dict[str, float]:
        """As given."""
        return dict(self.values)
