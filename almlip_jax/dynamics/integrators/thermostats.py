"""Dynamics at constant energy and at constant temperature; each class is one splitting of the equations of motion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

from almlip_jax.dynamics.integrators.base import (
    Integrator,
    IntegratorSettings,
    drift,
    kick,
    next_keys,
    normals,
    take_up,
)
from almlip_jax.dynamics.motion import (
    Evaluation,
    Moment,
    Motion,
    heated,
    kinetic_energy,
    maxwell_boltzmann,
)
from almlip_jax.dynamics.operators import simulate
from almlip_jax.settings import unit
from almlip_jax.units import FEMTOSECOND

_OUTER = 1 / (2 - 2 ** (1 / 3))
_SUZUKI_YOSHIDA = np.array([_OUTER, 1 - 2 * _OUTER, _OUTER])  # fourth order


@dataclass(frozen=True)
class VelocityVerlet(Integrator):
    """B A (force) B: constant energy."""

    bathed = False

    def to_force(self, motion: Motion, at: Moment, step: jax.Array) -> Motion:
        """B A."""
        return drift(kick(motion, at.timestep / 2), at.timestep)

    def from_force(self, motion: Motion, evaluation: Evaluation, at: Moment) -> Motion:
        """B."""
        return kick(take_up(motion, evaluation), at.timestep / 2)


@dataclass(frozen=True)
class Langevin(VelocityVerlet):
    """B A O A (force) B with the exact Ornstein-Uhlenbeck process O.

    Source: Leimkuhler and Matthews, J. Chem. Phys. 138, 174102 (2013).  Parameter: ``friction``.
    """

    bathed = True
    drifts = True

    def to_force(self, motion: Motion, at: Moment, step: jax.Array) -> Motion:
        """B A O A."""
        half = at.timestep / 2
        motion = drift(kick(motion, half), half)
        return drift(ornstein_uhlenbeck(motion, at), half)


@dataclass(frozen=True)
class Andersen(VelocityVerlet):
    """Velocity Verlet; each atom collides with the bath at a rate and then has a fresh momentum.

    Source: Andersen, J. Chem. Phys. 72, 2384 (1980).  Parameter: ``rate``, collisions of an atom per unit of time.
    """

    bathed = True
    drifts = True

    def from_force(self, motion: Motion, evaluation: Evaluation, at: Moment) -> Motion:
        """B, then collisions."""
        motion, keys = next_keys(super().from_force(motion, evaluation, at))
        when, fresh = _two(keys)
        shape = motion.position.shape[1:2]
        draws = jax.vmap(lambda key: jax.random.uniform(key, shape, motion.position.dtype))(when)
        hit = draws < -jnp.expm1(-at.numbers["rate"] * at.timestep)
        momentum = maxwell_boltzmann(fresh, motion.mass, at.mobile, at.kt)
        return heated(motion, motion.set(momentum=jnp.where(hit[..., None], momentum, motion.momentum)))


@dataclass(frozen=True)
class VelocityRescaling(VelocityVerlet):
    """Velocity Verlet and canonical sampling through velocity rescaling (CSVR).

    The kinetic energy follows an exactly solved stochastic process; directions of the momenta stay.  Source: Bussi,
    Donadio and Parrinello, J. Chem. Phys. 126, 014101 (2007), equation A7.  Parameter: ``time``.
    """

    bathed = True

    def from_force(self, motion: Motion, evaluation: Evaluation, at: Moment) -> Motion:
        """B, then one factor for all momenta of a walker."""
        motion, keys = next_keys(super().from_force(motion, evaluation, at))
        noise = normals(keys, motion.momentum).reshape(motion.momentum.shape[0], -1)
        # a walker has as many normal numbers as degrees of freedom; the first moves along, the others are a bath
        counted = jnp.arange(noise.shape[1]) < at.freedom[:, None]
        squares = jnp.sum(jnp.where(counted, noise**2, 0), axis=1)
        kinetic = jnp.maximum(kinetic_energy(motion), jnp.finfo(noise.dtype).tiny)
        kept = jnp.exp(-at.timestep / at.numbers["time"])
        share = (1 - kept) * at.kt / (2 * kinetic)
        squared = kept + share * squares + 2 * noise[:, 0] * jnp.sqrt(kept * share)
        # the sign of the factor matters: with few degrees of freedom momenta may turn round (Bussi et al., A8)
        sign = jnp.where(noise[:, 0] + jnp.sqrt(kept / share) < 0, -1, 1)
        factor = sign * jnp.sqrt(jnp.maximum(squared, 0))
        return heated(motion, motion.set(momentum=factor[:, None, None] * motion.momentum))


@dataclass(frozen=True)
class NoseHoover(VelocityVerlet):
    """Velocity Verlet between two half steps of a Nose-Hoover chain for each walker.

    The links of a chain have velocities [W, length] and masses ``Q_0 = f kT time^2``, ``Q_j = kT time^2``.  (The chain
    of jax-md takes the same number f of degrees of freedom for all.)  Source: Martyna, Tuckerman, Tobias and Klein,
    Mol. Phys. 87, 1117 (1996), section 3.  Parameter: ``time``.

    Attributes:
        length: links of the chain.
        substeps: how often a step of the chain is divided, on top of the three weights of Suzuki and Yoshida.
    """

    length: int = 5
    substeps: int = 2
    bathed = True

    def init(self, motion: Motion, at: Moment) -> jax.Array:
        """Chains at rest."""
        return jnp.zeros((motion.momentum.shape[0], self.length), motion.momentum.dtype)

    def to_force(self, motion: Motion, at: Moment, step: jax.Array) -> Motion:
        """Half a step of the chain, B A."""
        return super().to_force(self._half(motion, at), at, step)

    def from_force(self, motion: Motion, evaluation: Evaluation, at: Moment) -> Motion:
        """B, half a step of the chain."""
        return self._half(super().from_force(motion, evaluation, at), at)

    def restart(self, motion: Motion, again: jax.Array, at: Moment) -> Motion:
        """Chains at rest for the walkers that begin again."""
        return motion.set(extra=jnp.where(again[:, None], 0, motion.extra))

    def _half(self, motion: Motion, at: Moment) -> Motion:
        kt, freedom = at.kt, at.freedom
        mass = kt * at.numbers["time"] ** 2

        def link(j: int, v: list[jax.Array], kinetic: jax.Array, dt: jax.Array) -> jax.Array:
            """Velocity of a link after a quarter of a step."""
            if j == 0:
                pull = (2 * kinetic - freedom * kt) / (freedom * mass)
            else:
                before = freedom * mass if j == 1 else mass
                pull = (before * v[j - 1] ** 2 - kt) / mass
            damping = jnp.exp(-dt / 8 * v[j + 1]) if j + 1 < self.length else 1
            return (v[j] * damping + dt / 4 * pull) * damping

        def part(carry: tuple[jax.Array, jax.Array, jax.Array], weight: jax.Array) -> tuple:
            chain, kinetic, factor = carry
            dt = weight * at.timestep / self.substeps
            v = list(chain.T)
            for j in reversed(range(self.length)):
                v[j] = link(j, v, kinetic, dt)
            scale = jnp.exp(-dt / 2 * v[0])
            factor, kinetic = factor * scale, kinetic * scale**2
            for j in range(self.length):
                v[j] = link(j, v, kinetic, dt)
            return (jnp.stack(v, axis=1), kinetic, factor), None

        weights = jnp.asarray(np.tile(_SUZUKI_YOSHIDA, self.substeps), motion.momentum.dtype)
        start = (motion.extra, kinetic_energy(motion), jnp.ones_like(kt))
        (chain, _, factor), _ = jax.lax.scan(part, start, weights)
        return heated(motion, motion.set(momentum=factor[:, None, None] * motion.momentum, extra=chain))


def ornstein_uhlenbeck(motion: Motion, at: Moment) -> Motion:
    """O: friction and noise on the momenta for a whole step, solved exactly, each walker with its own stream."""

    def one(momentum: jax.Array, mass: jax.Array, key: jax.Array, kt: jax.Array) -> tuple[jax.Array, jax.Array]:
        lone = simulate.NVTLangevinState(momentum, momentum, momentum, mass, key)
        moved = simulate.stochastic_step(lone, at.timestep, kt, at.numbers["friction"])
        return moved.momentum, moved.rng

    momentum, rng = jax.vmap(one)(motion.momentum, motion.mass, motion.rng, at.kt)
    return heated(motion, motion.set(momentum=jnp.where(at.mobile[..., None], momentum, 0), rng=rng))


def _two(keys: jax.Array) -> tuple[jax.Array, jax.Array]:
    both = jax.vmap(jax.random.split)(keys)
    return both[:, 0], both[:, 1]


class NveSettings(IntegratorSettings):
    """Constant energy, velocity Verlet; temperatures only set the first velocities."""

    kind: Literal["nve"] = "nve"

    def build(self) -> Integrator:
        """See `VelocityVerlet`."""
        return VelocityVerlet()


class LangevinSettings(IntegratorSettings):
    """Langevin dynamics, BAOAB splitting (Leimkuhler and Matthews, J. Chem. Phys. 138, 174102, 2013)."""

    kind: Literal["langevin"] = "langevin"
    friction: float = Field(default=0.01, ge=0, le=10.0, json_schema_extra=unit("1/fs"))
    """Friction, 1/fs; at 0 the dynamics are velocity Verlet."""

    def build(self) -> Integrator:
        """See `Langevin`."""
        return Langevin() if self.friction > 0 else VelocityVerlet()

    def numbers(self) -> dict[str, float]:
        """In eV, Angstrom and amu."""
        return {"friction": self.friction / FEMTOSECOND}


class AndersenSettings(IntegratorSettings):
    """Velocity Verlet with collisions that redraw the momenta of single atoms (Andersen, 1980)."""

    kind: Literal["andersen"] = "andersen"
    rate: float = Field(default=0.005, gt=0, le=10.0, json_schema_extra=unit("1/fs"))
    """Collisions of an atom, 1/fs."""

    def build(self) -> Integrator:
        """See `Andersen`."""
        return Andersen()

    def numbers(self) -> dict[str, float]:
        """In eV, Angstrom and amu."""
        return {"rate": self.rate / FEMTOSECOND}


class VelocityRescalingSettings(IntegratorSettings):
    """Velocity Verlet with canonical sampling through velocity rescaling (Bussi, Donadio and Parrinello, 2007)."""

    kind: Literal["csvr"] = "csvr"
    time: float = Field(default=100.0, gt=0, le=1e6, json_schema_extra=unit("fs"))
    """Relaxation time of the kinetic energy, fs."""

    def build(self) -> Integrator:
        """See `VelocityRescaling`."""
        return VelocityRescaling()

    def numbers(self) -> dict[str, float]:
        """In eV, Angstrom and amu."""
        return {"time": self.time * FEMTOSECOND}


class NoseHooverSettings(IntegratorSettings):
    """Velocity Verlet with a Nose-Hoover chain (Martyna et al., 1996)."""

    kind: Literal["nose_hoover"] = "nose_hoover"
    time: float = Field(default=50.0, gt=0, le=1e6, json_schema_extra=unit("fs"))
    """Period over which the chain acts, fs."""
    length: int = Field(default=5, ge=2, le=100)
    """Links of the chain."""
    substeps: int = Field(default=2, ge=1, le=100)
    """Parts of a step of the chain."""

    def build(self) -> Integrator:
        """See `NoseHoover`."""
        return NoseHoover(self.length, self.substeps)

    def numbers(self) -> dict[str, float]:
        """In eV, Angstrom and amu."""
        return {"time": self.time * FEMTOSECOND}

    @property
    def periods(self) -> Mapping[str, float]:
        """That of its own motion."""
        return {"time": self.time}
