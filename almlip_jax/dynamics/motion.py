"""Where the walkers are and how they move: the state that integrators act on, what drives it, what it is judged by."""

from __future__ import annotations

from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import struct

from almlip_jax.keys import in_a_row
from almlip_jax.units import KB


@struct.dataclass
class Motion:
    """The mechanical state of W walkers of N atoms each; jax-md's operators act on it.

    Attributes:
        position: [W, N, 3] Angstrom, never wrapped into the cell.
        momentum: [W, N, 3] in sqrt(amu eV).
        force: [W, N, 3] eV/Angstrom, of the last evaluation, biases included.
        mass: [W, N, 1] amu, 1 for padding atoms.
        rng: [W] random keys, one stream for each walker.
        cell: [W, 3, 3] Angstrom, rows are the cell vectors.
        virial: [W, 3, 3] eV, of the last evaluation, biases included.
        extra: whatever else the integrator keeps.
        supplied: [W, 2] eV, energy that thermostats, swaps and changing biases have given to the walker, as a sum and
            what it lacks by rounding; None where it is not counted.
    """

    position: jax.Array
    momentum: jax.Array
    force: jax.Array
    mass: jax.Array
    rng: jax.Array
    cell: jax.Array
    virial: jax.Array
    extra: Any = None
    supplied: jax.Array | None = None

    def set(self, **changes: Any) -> Self:
        """The same state with other fields; the name that jax-md's operators ask for."""
        return self.replace(**changes)  # type: ignore[attr-defined, no-any-return]


@struct.dataclass
class Drive:
    """What drives each walker; arrays, so that another run needs no other program.  Ramps are linear in the progress.

    Attributes:
        kt: [W, 2] eV, thermal energy at the first and at the last step.
        pressure: [W, 2] eV/Angstrom^3, likewise.
        timestep: scalar, Angstrom sqrt(amu / eV).
        mobile: [W, N] bool, true for real atoms that are not held fixed.
        free: [W] bool, structures in which no atom is held fixed: whose centre of mass has a motion of its own.
        freedom: [W] degrees of freedom that the kinetic temperature is taken over.
        elastic: [W] bool, periodic in three directions: whose cells move, if any do.
        numbers: parameters of the integrator by name, scalars.
    """

    kt: jax.Array
    pressure: jax.Array
    timestep: jax.Array
    mobile: jax.Array
    free: jax.Array
    freedom: jax.Array
    elastic: jax.Array
    numbers: dict[str, jax.Array]

    def at(self, progress: jax.Array) -> Moment:
        """What drives the walkers when a share of the run, a scalar in [0, 1], is over."""
        return Moment(
            kt=_between(self.kt, progress),
            pressure=_between(self.pressure, progress),
            timestep=self.timestep,
            mobile=self.mobile,
            free=self.free,
            freedom=self.freedom,
            elastic=self.elastic,
            numbers=self.numbers,
        )


@struct.dataclass
class Moment:
    """`Drive` at one step: ``kt`` and ``pressure`` are [W]."""

    kt: jax.Array
    pressure: jax.Array
    timestep: jax.Array
    mobile: jax.Array
    free: jax.Array
    freedom: jax.Array
    elastic: jax.Array
    numbers: dict[str, jax.Array]


@struct.dataclass
class Evaluation:
    """What the one evaluation of a step says to the integrator.

    Attributes:
        energy: [W] eV, mean of the members and biases, relative to the reference energies.
        forces: [W, N, 3] eV/Angstrom, mean of the members and biases; 0 for atoms that are not mobile.
        virial: [W, 3, 3] eV, likewise.
        member_energy: [M, W] eV, without biases.
        member_forces: [M, W, N, 3] eV/Angstrom, without biases.
        energy_before: [W] eV, as ``energy``, of where the walkers were before a trial, with the biases of this step;
            None where the integrator holds no `Integrator.member_energies` to make it of.
    """

    energy: jax.Array
    forces: jax.Array
    virial: jax.Array
    member_energy: jax.Array
    member_forces: jax.Array
    energy_before: jax.Array | None = None


def _between(ends: jax.Array, progress: jax.Array) -> jax.Array:
    return ends[:, 0] + progress * (ends[:, 1] - ends[:, 0])


def kinetic_tensor(motion: Motion) -> jax.Array:
    """``sum_a p_a p_a / m_a`` of each walker, [W, 3, 3] eV: twice the kinetic energy, direction by direction."""
    return jnp.einsum("wni,wnj->wij", motion.momentum / motion.mass, motion.momentum)


def kinetic_energy(motion: Motion) -> jax.Array:
    """Kinetic energy of each walker, [W] eV."""
    return jnp.sum(motion.momentum**2 / (2 * motion.mass), axis=(1, 2))


def supply(motion: Motion, energy: jax.Array) -> Motion:
    """The state with energy [W] eV counted as given to the walkers; by Kahan's sum, since steps are many."""
    if motion.supplied is None:
        return motion
    total, lacking = motion.supplied[:, 0], motion.supplied[:, 1]
    term = energy.astype(total.dtype) - lacking
    grown = total + term
    return motion.set(supplied=jnp.stack([grown, (grown - total) - term], axis=1))


def heated(before: Motion, after: Motion) -> Motion:
    """``after``, with the change of the kinetic energy since ``before`` counted as given to the walkers."""
    if before.supplied is None:
        return after
    change, middle = after.momentum - before.momentum, (after.momentum + before.momentum) / 2
    return supply(after, jnp.sum(change * middle / after.mass, axis=(1, 2)))


def kinetic_temperature(motion: Motion, freedom: jax.Array) -> jax.Array:
    """Kinetic temperature of each walker, [W] K, over its degrees of freedom [W]."""
    return 2 * kinetic_energy(motion) / (KB * freedom)


def pressure_tensor(motion: Motion) -> jax.Array:
    """Internal pressure from the momenta and the virial, [W, 3, 3] eV/Angstrom^3."""
    volume = jnp.abs(jnp.linalg.det(motion.cell))
    return (kinetic_tensor(motion) + motion.virial) / volume[:, None, None]


def maxwell_boltzmann(keys: jax.Array, mass: jax.Array, mobile: jax.Array, kt: jax.Array) -> jax.Array:
    """Momenta at a temperature, that of the centre of mass included, [W, N, 3].

    Args:
        keys: [W] random keys.
        mass: [W, N, 1] amu.
        mobile: [W, N] bool.
        kt: [W] eV.
    """

    def one(key: jax.Array, mass: jax.Array, mobile: jax.Array, kt: jax.Array) -> jax.Array:
        noise = jax.random.normal(key, (mobile.shape[0], 3), mass.dtype)
        return jnp.where(mobile[:, None], noise * jnp.sqrt(kt * mass), 0)

    return jax.vmap(one)(in_a_row(keys), mass, mobile, kt)


def without_drift(momentum: jax.Array, mass: jax.Array, mobile: jax.Array, free: jax.Array) -> jax.Array:
    """Momenta with the centre of mass at rest, [W, N, 3].

    A lone atom keeps its motion, and so do atoms beside some that are held fixed: there is no drift of these.

    Args:
        momentum: [W, N, 3].
        mass: [W, N, 1] amu.
        mobile: [W, N] bool.
        free: [W] bool, structures in which no atom is held fixed.
    """
    moving = jnp.where(mobile[..., None], mass, 0)
    total = jnp.maximum(jnp.sum(moving, axis=1, keepdims=True), jnp.finfo(mass.dtype).tiny)
    velocity = jnp.sum(jnp.where(mobile[..., None], momentum, 0), axis=1, keepdims=True) / total
    drifting = (free & (jnp.sum(mobile, axis=1) > 1))[:, None, None]
    return jnp.where(drifting & mobile[..., None], momentum - moving * velocity, momentum)


def chosen(mask: jax.Array, new: Any, old: Any) -> Any:
    """Leaves of ``new`` for the walkers of a mask [W], those of ``old`` for the others; scalars are taken as new."""

    def leaf(a: jax.Array, b: jax.Array) -> jax.Array:
        return a if a.ndim == 0 else jnp.where(mask.reshape((-1,) + (1,) * (a.ndim - 1)), a, b)

    return jax.tree.map(leaf, new, old)
