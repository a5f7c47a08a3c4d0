"""Constant pressure: BAOAB with stochastic cell rescaling, isotropic or of the full cell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from pydantic import Field

from almlip_jax.dynamics.integrators.base import Integrator, IntegratorSettings, drift, kick, next_keys, normals
from almlip_jax.dynamics.integrators.thermostats import Langevin, ornstein_uhlenbeck
from almlip_jax.dynamics.motion import Moment, Motion, pressure_tensor
from almlip_jax.settings import unit
from almlip_jax.units import FEMTOSECOND, GPA

_LARGEST_STRAIN = 0.1  # of one step; only cells far from equilibrium come near it


@dataclass(frozen=True)
class CellRescaling(Langevin):
    """B A S O A (force) B, where S strains the cell, the positions and (inversely) the momenta by a diffusion step.

    The logarithmic strain moves by ``(b / 3t) (P_int - P) dt`` and a noise of variance ``2 D dt``,
    ``D = kT b / (3 V t)``, in each of six directions (for the isotropic cell, their trace alone): the invariant density
    is ``V^-2 exp(-(K + U + P V) / kT)`` over cell matrices, so that an ideal gas has ``<V> = (N + 1) kT / P``.  With
    the internal pressure from the momenta themselves the Ito correction and the derivative of the measure cancel.
    Sources:
    Bernetti and Bussi, J. Chem. Phys. 153, 114107 (2020); Del Tatto, Raiteri, Bernetti and Bussi, Appl. Sci. 12, 1139
    (2022).  Parameters: ``friction``, ``barostat_time`` t, ``compressibility`` b.

    Attributes:
        isotropic: whether the shape of the cell is kept.
    """

    isotropic: bool = True
    changes_cell = True

    def to_force(self, motion: Motion, at: Moment, step: jax.Array) -> Motion:
        """B A S O A."""
        half = at.timestep / 2
        motion = drift(kick(motion, half), half)
        motion = strained(*self._strain(motion, at))
        return drift(ornstein_uhlenbeck(motion, at), half)

    def _strain(self, motion: Motion, at: Moment) -> tuple[Motion, jax.Array]:
        """The strain of this step, [W, 3, 3], symmetric."""
        motion, keys = next_keys(motion)
        draws = normals(keys, motion.cell)
        volume = jnp.abs(jnp.linalg.det(motion.cell))
        rate = at.numbers["compressibility"] / (3 * at.numbers["barostat_time"])
        identity = jnp.eye(3, dtype=motion.cell.dtype)
        excess = pressure_tensor(motion) - at.pressure[:, None, None] * identity
        deviation = jnp.sqrt(2 * at.kt * rate / volume * at.timestep)[:, None, None]
        noise = (draws + jnp.swapaxes(draws, 1, 2)) / 2  # unit variance on the diagonal, half of it beside
        strain = rate * at.timestep * excess + deviation * noise
        strain = (strain + jnp.swapaxes(strain, 1, 2)) / 2
        if self.isotropic:
            strain = jnp.trace(strain, axis1=1, axis2=2)[:, None, None] / 3 * identity
        strain = jnp.clip(strain, -_LARGEST_STRAIN, _LARGEST_STRAIN)
        return motion, jnp.where(at.elastic[:, None, None], strain, 0)  # without a volume it is not a number


def strained(motion: Motion, strain: jax.Array) -> Motion:
    """The state after a logarithmic strain [W, 3, 3]: ``x exp(e)``, ``h exp(e)``, ``p exp(-e)`` (e symmetric)."""
    forward, backward = (_exponential(sign * strain) for sign in (1, -1))
    return motion.set(
        position=jnp.einsum("wni,wij->wnj", motion.position, forward),
        cell=jnp.einsum("wni,wij->wnj", motion.cell, forward),
        momentum=jnp.einsum("wni,wij->wnj", motion.momentum, backward),
    )


def _exponential(strain: jax.Array) -> jax.Array:
    """Matrix exponential of small matrices [W, 3, 3], by its series to sixth order (rounding at a strain of 10 %)."""
    result = term = jnp.broadcast_to(jnp.eye(3, dtype=strain.dtype), strain.shape)
    for order in range(1, 7):
        term = jnp.einsum("wij,wjk->wik", term, strain) / order
        result = result + term
    return result


class NptSettings(IntegratorSettings):
    """Constant pressure and temperature: BAOAB with stochastic cell rescaling (Bernetti and Bussi, 2020).

    The pressure is that of the walkers; those that are not periodic in three directions keep their cell.
    """

    kind: Literal["npt"] = "npt"
    cell: Literal["isotropic", "full"] = "isotropic"
    """Whether only the volume moves or the shape of the cell too."""
    friction: float = Field(default=0.01, gt=0, le=10.0, json_schema_extra=unit("1/fs"))
    """Friction of the thermostat, 1/fs."""
    barostat_time: float = Field(default=500.0, gt=0, le=1e7, json_schema_extra=unit("fs"))
    """Relaxation time of the volume, fs, where the compressibility is right."""
    compressibility: float = Field(default=0.02, gt=0, le=100.0, json_schema_extra=unit("1/GPa"))
    """Isothermal compressibility, 1/GPa; it sets the pace, not the ensemble (silicon 0.01, water 0.45)."""

    def build(self) -> Integrator:
        """See `CellRescaling`."""
        return CellRescaling(isotropic=self.cell == "isotropic")

    def numbers(self) -> dict[str, float]:
        """In eV, Angstrom and amu."""
        return {
            "friction": self.friction / FEMTOSECOND,
            "barostat_time": self.barostat_time * FEMTOSECOND,
            "compressibility": self.compressibility / GPA,
        }

    @property
    def periods(self) -> Mapping[str, float]:
        """That of its own motion."""
        return {"barostat_time": self.barostat_time}
