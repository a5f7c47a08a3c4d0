"""Relaxation of positions and cells by FIRE, inside the same gated loop as dynamics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import struct
from pydantic import Field

from almlip_jax.dynamics.integrators.barostat import strained
from almlip_jax.dynamics.integrators.base import Integrator, IntegratorSettings, take_up
from almlip_jax.dynamics.motion import Evaluation, Moment, Motion, chosen
from almlip_jax.settings import unit
from almlip_jax.units import GPA

_FIRST, _LONGEST = 0.1, 1.0  # time steps for unit masses, sqrt(Angstrom^2 / eV), whatever that of dynamics is
_START, _SHRINK, _GROW, _HALVE, _PATIENCE = 0.1, 0.99, 1.1, 0.5, 5  # the constants of the paper


@struct.dataclass
class FireState:
    """What FIRE keeps of each walker.

    Attributes:
        velocity: [W, N, 3] Angstrom per unit of its own time.
        cell_velocity: [W, 3, 3], of the logarithmic strain times the number of atoms.
        timestep: [W].
        mixing: [W].
        downhill: [W] int, steps since the last one uphill.
    """

    velocity: jax.Array
    cell_velocity: jax.Array
    timestep: jax.Array
    mixing: jax.Array
    downhill: jax.Array


@dataclass(frozen=True)
class Fire(Integrator):
    """Fast inertial relaxation engine; momenta stay zero, its velocities have unit mass.

    With ``cell`` the logarithmic strain relaxes too, against the pressure of the walker, where this is periodic in
    three directions: its generalised force is ``virial - P V`` over the number of atoms, so that cells and positions
    move at one pace.  Source: Bitzek et al., Phys. Rev. Lett. 97, 170201 (2006).  Parameters: ``largest_force``
    (eV/Angstrom) and ``largest_stress`` (eV/Angstrom^3) at which a walker has converged, ``largest_step`` (Angstrom).

    Attributes:
        cell: ``fixed``, ``isotropic`` or ``full``.
    """

    cell: str = "fixed"
    thermal = False
    retreats = True
    bathed = False

    @property
    def changes_cell(self) -> bool:  # type: ignore[override]
        """Whether cells relax."""
        return self.cell != "fixed"

    def init(self, motion: Motion, at: Moment) -> FireState:
        """At rest."""
        walkers = motion.position.shape[0]
        return FireState(
            velocity=jnp.zeros_like(motion.position),
            cell_velocity=jnp.zeros_like(motion.cell),
            timestep=jnp.full((walkers,), _FIRST, motion.position.dtype),
            mixing=jnp.full((walkers,), _START, motion.position.dtype),
            downhill=jnp.zeros((walkers,), jnp.int32),
        )

    def restart(self, motion: Motion, again: jax.Array, at: Moment) -> Motion:
        """At rest again."""
        extra = chosen(again, self.init(motion, at), motion.extra)
        return motion.set(extra=extra, momentum=jnp.zeros_like(motion.momentum))

    def to_force(self, motion: Motion, at: Moment, step: jax.Array) -> Motion:
        """A step along the velocities, no longer than allowed."""
        state: FireState = motion.extra
        dt = state.timestep[:, None, None]
        velocity = state.velocity + dt * motion.force
        cell_velocity = state.cell_velocity + dt * self._cell_force(motion, at)
        move = dt * velocity
        atoms = _number(at)[:, None, None]
        strain = dt * cell_velocity / atoms
        longest = jnp.sqrt(jnp.max(jnp.sum(move**2, axis=2), axis=1))
        # a strain moves atoms by itself times the size of the cell
        size = jnp.sqrt(jnp.max(jnp.sum(motion.cell**2, axis=2), axis=1))
        longest = jnp.maximum(longest, size * jnp.max(jnp.abs(strain), axis=(1, 2)))
        shorter = jnp.minimum(1, at.numbers["largest_step"] / jnp.maximum(longest, 1e-12))[:, None, None]
        motion = motion.set(
            position=motion.position + shorter * move,
            extra=state.replace(velocity=velocity, cell_velocity=cell_velocity),  # type: ignore[attr-defined]
        )
        return strained(motion, shorter * strain) if self.changes_cell else motion

    def from_force(self, motion: Motion, evaluation: Evaluation, at: Moment) -> Motion:
        """Turns the velocities towards the forces, or stops where they point uphill."""
        motion = take_up(motion, evaluation)
        state: FireState = motion.extra
        force, cell_force = motion.force, self._cell_force(motion, at)
        power = _dot(force, state.velocity) + _dot(cell_force, state.cell_velocity)
        speed = jnp.sqrt(_dot(state.velocity, state.velocity) + _dot(state.cell_velocity, state.cell_velocity))
        pull = jnp.sqrt(_dot(force, force) + _dot(cell_force, cell_force))
        forward = power > 0
        long_enough = forward & (state.downhill >= _PATIENCE)
        turn = (state.mixing * speed / jnp.maximum(pull, 1e-12))[:, None, None]
        keep, going = (1 - state.mixing)[:, None, None], forward[:, None, None]
        timestep = jnp.where(long_enough, jnp.minimum(_GROW * state.timestep, _LONGEST), state.timestep)
        return motion.set(
            extra=FireState(
                velocity=jnp.where(going, keep * state.velocity + turn * force, 0),
                cell_velocity=jnp.where(going, keep * state.cell_velocity + turn * cell_force, 0),
                timestep=jnp.where(forward, timestep, _HALVE * state.timestep),
                mixing=jnp.where(forward, jnp.where(long_enough, _SHRINK * state.mixing, state.mixing), _START),
                downhill=jnp.where(forward, state.downhill + 1, 0),
            )
        )

    def converged(self, motion: Motion, at: Moment) -> jax.Array:
        """Whether the largest force, and with a cell the largest excess stress, are small enough."""
        small = jnp.max(jnp.sum(motion.force**2, axis=2), axis=1) < at.numbers["largest_force"] ** 2
        if not self.changes_cell:
            return small
        volume = jnp.abs(jnp.linalg.det(motion.cell))
        atoms = _number(at)
        stress = jnp.max(jnp.abs(self._cell_force(motion, at)), axis=(1, 2)) * atoms / volume
        return small & (~at.elastic | (stress < at.numbers["largest_stress"]))

    def _cell_force(self, motion: Motion, at: Moment) -> jax.Array:
        """Generalised force on the strain over the number of atoms, [W, 3, 3] eV; 0 for fixed cells."""
        if not self.changes_cell:
            return jnp.zeros_like(motion.cell)
        identity = jnp.eye(3, dtype=motion.cell.dtype)
        volume = jnp.abs(jnp.linalg.det(motion.cell))
        force = motion.virial - (at.pressure * volume)[:, None, None] * identity
        if self.cell == "isotropic":
            force = jnp.trace(force, axis1=1, axis2=2)[:, None, None] / 3 * identity
        return jnp.where(at.elastic[:, None, None], force / _number(at)[:, None, None], 0)


def _number(at: Moment) -> jax.Array:
    """Atoms that move, [W]; 1 where none does, which then has nothing to relax."""
    return jnp.maximum(jnp.sum(at.mobile, axis=1), 1)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.sum(a * b, axis=(1, 2))


class FireSettings(IntegratorSettings):
    """Relaxation with FIRE (Bitzek et al., 2006); a walker ends when it has converged.

    One that the gate ends stays at the frame before.
    """

    kind: Literal["fire"] = "fire"
    cell: Literal["fixed", "isotropic", "full"] = "fixed"
    """Whether the cell relaxes too, against the pressure of the walkers."""
    largest_force: float = Field(default=0.01, gt=0, le=100.0, json_schema_extra=unit("eV/Angstrom"))
    """Largest force at which a walker has converged, eV/Angstrom."""
    largest_stress: float = Field(default=0.05, gt=0, le=1000.0, json_schema_extra=unit("GPa"))
    """Largest excess stress at which it has, where the cell relaxes, GPa."""
    largest_step: float = Field(default=0.1, gt=0, le=1.0, json_schema_extra=unit("Angstrom"))
    """Longest move of an atom in a step, Angstrom."""

    def build(self) -> Integrator:
        """See `Fire`."""
        return Fire(self.cell)

    def numbers(self) -> dict[str, float]:
        """In eV, Angstrom and amu."""
        return {
            "largest_force": self.largest_force,
            "largest_stress": self.largest_stress * GPA,
            "largest_step": self.largest_step,
        }
