"""Settings of exploration: walkers, integrator, gate, sanity, what is recorded."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from almlip_jax.score_names import ScoreName
from almlip_jax.settings import Settings


class WalkerGroup(Settings):
    """Walkers that share a temperature."""

    temperature: float = Field(gt=0)
    """K."""
    count: int = Field(default=1, ge=1)
    """Number of walkers."""


class LangevinSettings(Settings):
    """Langevin dynamics, BAOAB splitting (Leimkuhler and Matthews, J. Chem. Phys. 138, 174102, 2013)."""

    kind: Literal["langevin"] = "langevin"
    friction: float = Field(default=0.01, ge=0)
    """1/fs; at 0 the dynamics are velocity Verlet."""


class NveSettings(Settings):
    """Constant energy, velocity Verlet; temperatures only set the first velocities."""

    kind: Literal["nve"] = "nve"


Integrator = Annotated[LangevinSettings | NveSettings, Field(discriminator="kind")]


class AbsoluteGate(Settings):
    """Compares a score with two thresholds that stay as they are during a run."""

    kind: Literal["absolute"] = "absolute"
    score: ScoreName = "force_std_max"
    """Which score."""


class AdaptiveGate(Settings):
    """The record threshold follows the walker: the mean of its last scores times ``1 + excess``.

    It never falls below the threshold given for the run, and the stop threshold is not adapted.
    """

    kind: Literal["adaptive"] = "adaptive"
    score: ScoreName = "force_std_max"
    """Which score."""
    window: int = Field(default=400, ge=1)
    """Steps over which the exponential running mean extends."""
    excess: float = Field(default=0.5, ge=0)
    """By how much, as a fraction, a score must exceed the mean."""


GateSettings = Annotated[AbsoluteGate | AdaptiveGate, Field(discriminator="kind")]


class SanitySettings(Settings):
    """What counts as unphysical: such frames end a walker and are never recorded."""

    closest_contact: float = Field(default=0.5, ge=0)
    """Least distance of two atoms, as a fraction of the sum of their covalent radii."""
    max_temperature: float = Field(default=6.0, gt=0)
    """Highest kinetic temperature, as a multiple of the walker's own."""
    max_force: float = Field(default=50.0, gt=0)
    """Largest force on an atom, eV/Angstrom."""
    bond_factor: float = Field(default=2.0, gt=0)
    """Atoms nearer than this multiple of the sum of their covalent radii are connected; an open structure that falls
    into more fragments than it began with has dissociated."""
    dissociation: bool = True
    """Whether to look for dissociation (open structures of up to 128 atoms; others are not looked at)."""


class ExplorationSettings(Settings):
    """Gated molecular dynamics of several walkers in one compiled loop."""

    kind: Literal["md"] = "md"
    walkers: tuple[WalkerGroup, ...] = Field(
        default=(WalkerGroup(temperature=300.0, count=4), WalkerGroup(temperature=600.0, count=4)), min_length=1
    )
    """Groups of walkers."""
    steps: int = Field(default=2000, ge=1)
    """Steps of each walker."""
    timestep: float = Field(default=0.5, gt=0)
    """fs."""
    integrator: Integrator = LangevinSettings()
    """How positions and momenta move."""
    gate: GateSettings = AbsoluteGate()
    """What decides on each frame."""
    sanity: SanitySettings = SanitySettings()
    """What no gate lets pass."""
    record_every: int = Field(default=20, ge=1)
    """Least number of steps between two recorded frames of a walker."""
    buffer: int = Field(default=64, ge=1)
    """Frames that can be recorded of each walker; a walker whose buffer is full ends."""
    trace_every: int = Field(default=10, ge=1)
    """Steps between two entries of the traces of scores and temperature."""
    trajectory_every: int = Field(default=100, ge=1)
    """Steps between two frames of a walker's trajectory."""
    chunk: int = Field(default=500, ge=1)
    """Steps that the device runs on its own between two looks of the host; changes no result."""
    skin: float = Field(default=0.5, ge=0)
    """Angstrom by which neighbour lists reach beyond the cutoff."""

    @model_validator(mode="after")
    def _whole_strides(self) -> Self:
        for name in ("trace_every", "trajectory_every"):
            stride = getattr(self, name)
            if self.chunk % stride:
                raise ValueError(f"chunk {self.chunk} is not a multiple of {name} {stride}.")
        return self

    @property
    def temperatures(self) -> tuple[float, ...]:
        """Temperature of every walker, K, in order."""
        return tuple(group.temperature for group in self.walkers for _ in range(group.count))
