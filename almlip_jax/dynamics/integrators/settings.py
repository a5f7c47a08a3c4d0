"""Settings of what moves walkers, and the functions that build it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from almlip_jax.dynamics.integrators.adversarial import Adversarial
from almlip_jax.dynamics.integrators.barostat import CellRescaling
from almlip_jax.dynamics.integrators.base import Integrator
from almlip_jax.dynamics.integrators.minimise import Fire
from almlip_jax.dynamics.integrators.swaps import Swaps
from almlip_jax.dynamics.integrators.thermostats import (
    Andersen,
    Langevin,
    NoseHoover,
    VelocityRescaling,
    VelocityVerlet,
)
from almlip_jax.settings import Settings, unit
from almlip_jax.units import FEMTOSECOND, GPA


class NveSettings(Settings):
    """Constant energy, velocity Verlet; temperatures only set the first velocities."""

    kind: Literal["nve"] = "nve"


class LangevinSettings(Settings):
    """Langevin dynamics, BAOAB splitting (Leimkuhler and Matthews, J. Chem. Phys. 138, 174102, 2013)."""

    kind: Literal["langevin"] = "langevin"
    friction: float = Field(default=0.01, ge=0, le=10.0, json_schema_extra=unit("1/fs"))
    """1/fs; at 0 the dynamics are velocity Verlet."""


class AndersenSettings(Settings):
    """Velocity Verlet with collisions that redraw the momenta of single atoms (Andersen, 1980)."""

    kind: Literal["andersen"] = "andersen"
    rate: float = Field(default=0.005, gt=0, le=10.0, json_schema_extra=unit("1/fs"))
    """Collisions of an atom, 1/fs."""


class VelocityRescalingSettings(Settings):
    """Velocity Verlet with canonical sampling through velocity rescaling (Bussi, Donadio and Parrinello, 2007)."""

    kind: Literal["csvr"] = "csvr"
    time: float = Field(default=100.0, gt=0, le=1e6, json_schema_extra=unit("fs"))
    """Relaxation time of the kinetic energy, fs."""


class NoseHooverSettings(Settings):
    """Velocity Verlet with a Nose-Hoover chain (Martyna et al., 1996)."""

    kind: Literal["nose_hoover"] = "nose_hoover"
    time: float = Field(default=50.0, gt=0, le=1e6, json_schema_extra=unit("fs"))
    """Period over which the chain acts, fs."""
    length: int = Field(default=5, ge=2, le=100)
    """Links of the chain."""
    substeps: int = Field(default=2, ge=1, le=100)
    """Parts of a step of the chain."""


class NptSettings(Settings):
    """Constant pressure and temperature: BAOAB with stochastic cell rescaling (Bernetti and Bussi, 2020).

    For structures that are periodic in three directions; the pressure is that of the walkers.
    """

    kind: Literal["npt"] = "npt"
    cell: Literal["isotropic", "full"] = "isotropic"
    """Whether only the volume moves or the shape of the cell too."""
    friction: float = Field(default=0.01, gt=0, le=10.0, json_schema_extra=unit("1/fs"))
    """Of the thermostat, 1/fs."""
    barostat_time: float = Field(default=500.0, gt=0, le=1e7, json_schema_extra=unit("fs"))
    """Relaxation time of the volume, fs, where the compressibility is right."""
    compressibility: float = Field(default=0.02, gt=0, le=100.0, json_schema_extra=unit("1/GPa"))
    """Isothermal compressibility, 1/GPa; it sets the pace, not the ensemble (silicon 0.01, water 0.45)."""


class FireSettings(Settings):
    """Relaxation with FIRE (Bitzek et al., 2006); a walker ends when it has converged.

    One that the gate ends stays at the frame before.
    """

    kind: Literal["fire"] = "fire"
    cell: Literal["fixed", "isotropic", "full"] = "fixed"
    """Whether the cell relaxes too, against the pressure of the walkers."""
    largest_force: float = Field(default=0.01, gt=0, le=100.0, json_schema_extra=unit("eV/Angstrom"))
    """eV/Angstrom at which a walker has converged."""
    largest_stress: float = Field(default=0.05, gt=0, le=1000.0, json_schema_extra=unit("GPa"))
    """GPa at which it has, where the cell relaxes."""
    largest_step: float = Field(default=0.1, gt=0, le=1.0, json_schema_extra=unit("Angstrom"))
    """Longest move of an atom in a step, Angstrom."""


class AdversarialSettings(Settings):
    """Ascent on the energy variance at bounded energy (Schwalbe-Koda, Tan and Gomez-Bombarelli, 2021)."""

    kind: Literal["adversarial"] = "adversarial"
    rate: float = Field(default=0.005, gt=0, le=1.0, json_schema_extra=unit("Angstrom"))
    """Step of Adam, Angstrom; the walkers' temperature says what energies are bearable."""
    displacement: float = Field(default=0.02, ge=0, le=1.0, json_schema_extra=unit("Angstrom"))
    """Standard deviation of the first displacement of each coordinate, Angstrom."""


class SwapSettings(Settings):
    """Monte Carlo swaps of unlike atoms between the steps of the dynamics."""

    every: int = Field(default=20, ge=2, le=10**9)
    """A trial takes the place of every so manieth step."""
    elements: tuple[str, ...] = ()
    """Elements that take part; all where empty."""


IntegratorSettings = Annotated[
    LangevinSettings
    | NveSettings
    | AndersenSettings
    | VelocityRescalingSettings
    | NoseHooverSettings
    | NptSettings
    | FireSettings
    | AdversarialSettings,
    Field(discriminator="kind"),
]
"""Settings of anything that moves walkers; the field ``kind`` decides."""


def build_integrator(settings: IntegratorSettings, swaps: SwapSettings | None = None) -> Integrator:
    """The integrator that some settings describe, with Monte Carlo swaps in between where asked for."""
    found = _plain(settings)
    return found if swaps is None else Swaps(found)


def _plain(settings: IntegratorSettings) -> Integrator:
    match settings:
        case NveSettings():
            return VelocityVerlet()
        case LangevinSettings(friction=friction):
            return Langevin() if friction > 0 else VelocityVerlet()
        case AndersenSettings():
            return Andersen()
        case VelocityRescalingSettings():
            return VelocityRescaling()
        case NoseHooverSettings():
            return NoseHoover(settings.length, settings.substeps)
        case NptSettings():
            return CellRescaling(isotropic=settings.cell == "isotropic")
        case FireSettings():
            return Fire(settings.cell)
        case AdversarialSettings():
            return Adversarial()


def integrator_numbers(settings: IntegratorSettings, swaps: SwapSettings | None = None) -> dict[str, float]:
    """The parameters of an integrator by name, in the units that it works in (eV, Angstrom, amu)."""
    numbers: dict[str, float] = {} if swaps is None else {"swap_every": swaps.every}
    match settings:
        case LangevinSettings():
            return numbers | {"friction": settings.friction / FEMTOSECOND}
        case AndersenSettings():
            return numbers | {"rate": settings.rate / FEMTOSECOND}
        case VelocityRescalingSettings() | NoseHooverSettings():
            return numbers | {"time": settings.time * FEMTOSECOND}
        case NptSettings():
            return numbers | {
                "friction": settings.friction / FEMTOSECOND,
                "barostat_time": settings.barostat_time * FEMTOSECOND,
                "compressibility": settings.compressibility / GPA,
            }
        case FireSettings():
            return numbers | {
                "largest_force": settings.largest_force,
                "largest_stress": settings.largest_stress * GPA,
                "largest_step": settings.largest_step,
            }
        case AdversarialSettings():
            return numbers | {"rate": settings.rate}
        case NveSettings():
            return numbers
