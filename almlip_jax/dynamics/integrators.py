"""Integrators: one step as a product of jax-md's operators, mapped over walkers, with one evaluation inside.

`kick`, `drift` and `thermostat` are the operators B, A and O of the splitting; `baoab_to_force` and
`baoab_from_force` are the parts of a step before and after its single force evaluation, so that the caller can do what
it likes with everything else that the evaluation yields.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from almlip_jax.dynamics.operators import simulate, space
from almlip_jax.units import KB

_shift = space.free()[1]


@struct.dataclass
class Bath:
    """What drives each walker; arrays, so that another run needs no other program.

    Attributes:
        kt: [W] eV, thermal energy.
        friction: [W] in 1 / (Angstrom sqrt(amu / eV)).
        timestep: scalar, Angstrom sqrt(amu / eV).
    """

    kt: jax.Array
    friction: jax.Array
    timestep: jax.Array


@jax.jit
def initial_state(
    positions: jax.Array, masses: jax.Array, atom_mask: jax.Array, kt: jax.Array, keys: jax.Array
) -> simulate.NVTLangevinState:
    """Maxwell-Boltzmann momenta without centre-of-mass motion, forces zero.

    Args:
        positions: [W, N, 3] Angstrom.
        masses: [W, N] amu, 1 for padding atoms.
        atom_mask: [W, N] bool.
        kt: [W] eV.
        keys: [W] random keys, one stream for each walker.
    """

    def one(position: jax.Array, mass: jax.Array, mask: jax.Array, kt: jax.Array, key: jax.Array) -> tuple:
        stream, draw = jax.random.split(key)
        noise = jax.random.normal(draw, position.shape, position.dtype)
        momentum = jnp.where(mask[:, None], noise * jnp.sqrt(kt * mass)[:, None], 0)
        total = jnp.sum(jnp.where(mask, mass, 0))
        drift = jnp.sum(momentum, axis=0) / total
        single = jnp.sum(mask) == 1  # a lone atom keeps its motion: there is nothing it could move against
        momentum = jnp.where(mask[:, None] & ~single, momentum - mass[:, None] * drift, momentum)
        return momentum, stream

    momentum, streams = jax.vmap(one)(positions, masses, atom_mask, kt, keys)
    return simulate.NVTLangevinState(positions, momentum, jnp.zeros_like(positions), masses[..., None], streams)


def kick(state: simulate.NVTLangevinState, dt: jax.Array) -> simulate.NVTLangevinState:
    """B: momenta by the forces."""
    return simulate.momentum_step(state, dt)


def drift(state: simulate.NVTLangevinState, dt: jax.Array) -> simulate.NVTLangevinState:
    """A: positions by the momenta; positions are never wrapped."""
    return simulate.position_step(state, _shift, dt)


def thermostat(state: simulate.NVTLangevinState, dt: jax.Array, bath: Bath) -> simulate.NVTLangevinState:
    """O: exact solution of the Ornstein-Uhlenbeck process, each walker with its own stream and temperature."""

    def one(
        momentum: jax.Array, mass: jax.Array, key: jax.Array, kt: jax.Array, friction: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        lone = simulate.NVTLangevinState(momentum, momentum, momentum, mass, key)
        moved = simulate.stochastic_step(lone, dt, kt, friction)
        return moved.momentum, moved.rng

    momentum, rng = jax.vmap(one)(state.momentum, state.mass, state.rng, bath.kt, bath.friction)
    return state.set(momentum=momentum, rng=rng)


def baoab_to_force(
    state: simulate.NVTLangevinState, bath: Bath, atom_mask: jax.Array, stochastic: bool
) -> simulate.NVTLangevinState:
    """B A O A: to the new positions, where the forces are to be evaluated; without O it is velocity Verlet.

    Source: Leimkuhler and Matthews, J. Chem. Phys. 138, 174102 (2013).
    """
    half = bath.timestep / 2
    state = drift(kick(state, half), half)
    if stochastic:
        state = thermostat(state, bath.timestep, bath)
        state = state.set(momentum=jnp.where(atom_mask[..., None], state.momentum, 0))
    return drift(state, half)


def baoab_from_force(state: simulate.NVTLangevinState, forces: jax.Array, bath: Bath) -> simulate.NVTLangevinState:
    """The last B of a step, with the forces [W, N, 3] at the new positions."""
    return kick(state.set(force=forces), bath.timestep / 2)


def kinetic_temperature(state: simulate.NVTLangevinState, atom_mask: jax.Array, stochastic: bool) -> jax.Array:
    """Kinetic temperature of each walker, [W] K.

    The centre of mass takes part under a Langevin thermostat (3 N degrees of freedom); it is at rest otherwise.
    """
    kinetic = jnp.sum(jnp.where(atom_mask[..., None], state.momentum**2 / (2 * state.mass), 0), axis=(1, 2))
    atoms = jnp.sum(atom_mask, axis=1)
    freedom = 3 * atoms if stochastic else jnp.where(atoms > 1, 3 * atoms - 3, 3)
    return 2 * kinetic / (KB * jnp.maximum(freedom, 1))
