"""Harmonic restraints on collective variables, at rest or moving, and walls around them or around the walker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, Self

import jax
import jax.numpy as jnp
from flax import struct
from pydantic import Field, model_validator

from almlip_jax.dynamics.biases.base import (
    Bias,
    BiasForce,
    BiasSettings,
    PerWalker,
    PositivePerWalker,
    applied,
    per_walker,
)
from almlip_jax.dynamics.biases.collective import (
    CollectiveVariable,
    VariableSettings,
    check_atoms,
    difference,
    evaluate,
    force_along,
    values_of,
)
from almlip_jax.dynamics.seen import RunContext, Seen
from almlip_jax.settings import unit


@struct.dataclass
class RestraintState:
    """State of `Restraint`.

    Attributes:
        stiffness: [W] eV over the square of the variable's unit.
        centre: [W] in the variable's unit.
    """

    stiffness: jax.Array
    centre: jax.Array


@dataclass(frozen=True)
class Restraint(Bias):
    """``E = k/2 (s - s0)^2``; centre and stiffness may differ from walker to walker (umbrella sampling).

    Args:
        variable: s.
        stiffness: k, eV over the square of its unit, one or one for each walker.
        centre: s0, in its unit, one or one for each walker.
    """

    variable: CollectiveVariable
    stiffness: float | Sequence[float] = field(compare=False)
    centre: float | Sequence[float] = field(compare=False)

    def init(self, context: RunContext) -> RestraintState:
        """The numbers of every walker."""
        check_atoms(self.variable, context.atoms)
        return RestraintState(
            per_walker(self.stiffness, context, "stiffness"), per_walker(self.centre, context, "centre")
        )

    def apply(self, state: RestraintState, seen: Seen) -> tuple[BiasForce, RestraintState]:
        """The restraint of this step."""
        variable = evaluate(self.variable, seen)
        gap = difference(variable.value, state.centre, self.variable.period)
        return force_along(variable, 0.5 * state.stiffness * gap**2, state.stiffness * gap, seen), state

    @property
    def quantities(self) -> dict[str, str]:
        """The variable."""
        return {self.variable.name: self.variable.unit}

    def look(self, state: RestraintState, seen: Seen) -> dict[str, jax.Array]:
        """The variable."""
        return {self.variable.name: values_of(self.variable, seen)}


@struct.dataclass
class SteeredState:
    """State of `Steered`.

    Attributes:
        stiffness: [W] eV over the square of the variable's unit.
        start: [W] centre at the start of the run.
        end: [W] centre at its end.
        centre: [W] centre in the last step whose positions the walker stayed at.
        work: [W] eV, done on the walker by moving the centre so far.
    """

    stiffness: jax.Array
    start: jax.Array
    end: jax.Array
    centre: jax.Array
    work: jax.Array


@dataclass(frozen=True)
class Steered(Bias):
    """A restraint whose centre moves linearly with the progress of the run, and the work that this does.

    The work grows by ``E(x, new centre) - E(x, old centre)`` at the positions of each step: the integral of dE/ds0
    along the way of the centre, in the discrete form for which Jarzynski's equality holds.  The centre rests during a
    Monte Carlo trial, and where a walker does not stay at the positions of a step.

    Args:
        variable: s.
        stiffness: k, eV over the square of its unit, one or one for each walker.
        start: s0 at the start, one or one for each walker.
        end: s0 at the end, one or one for each walker; may lie several periods away.

    Source: Jarzynski, Phys. Rev. Lett. 78, 2690 (1997).
    """

    variable: CollectiveVariable
    stiffness: float | Sequence[float] = field(compare=False)
    start: float | Sequence[float] = field(compare=False)
    end: float | Sequence[float] = field(compare=False)

    def init(self, context: RunContext) -> SteeredState:
        """The centre is at the start, no work is done."""
        check_atoms(self.variable, context.atoms)
        start = per_walker(self.start, context, "start")
        return SteeredState(
            stiffness=per_walker(self.stiffness, context, "stiffness"),
            start=start,
            end=per_walker(self.end, context, "end"),
            centre=start,
            work=jnp.zeros_like(start),
        )

    def apply(self, state: SteeredState, seen: Seen) -> tuple[BiasForce, SteeredState]:
        """The restraint at where its centre is now, and the work of bringing it there."""
        variable = evaluate(self.variable, seen)
        centre = (state.start + (state.end - state.start) * seen.progress).astype(state.centre.dtype)
        gap, old_gap = (difference(variable.value, s0, self.variable.period) for s0 in (centre, state.centre))
        half = 0.5 * state.stiffness
        step_work = jnp.where(seen.visited & (seen.strength != 0), seen.strength * half * (gap**2 - old_gap**2), 0)
        force = force_along(variable, half * gap**2, state.stiffness * gap, seen)
        work = (state.work + step_work).astype(state.work.dtype)
        return force, replace(state, centre=jnp.where(seen.visited, centre, state.centre), work=work)

    @property
    def quantities(self) -> dict[str, str]:
        """The variable, its centre, and the work done so far."""
        of_variable = self.variable.unit
        return {self.variable.name: of_variable, "centre": of_variable, "work": "eV"}

    def look(self, state: SteeredState, seen: Seen) -> dict[str, jax.Array]:
        """The variable, its centre, and the work done so far."""
        return {self.variable.name: values_of(self.variable, seen), "centre": state.centre, "work": state.work}


@struct.dataclass
class WallState:
    """State of `Wall`.

    Attributes:
        position: [W] where the wall is, in the variable's unit.
        stiffness: [W] eV over the unit to the power.
        power: scalar, 2 for a harmonic wall.
    """

    position: jax.Array
    stiffness: jax.Array
    power: jax.Array


@dataclass(frozen=True)
class Wall(Bias):
    """``E = k/p d^p`` where a variable is beyond its wall by d, and nothing before it.

    Args:
        variable: s.
        side: which bound it is.
        position: the bound, one or one for each walker.
        stiffness: k, eV over the variable's unit to the power, one or one for each walker.
        power: p, at least 2, so that the force is continuous.
    """

    variable: CollectiveVariable
    side: Literal["upper", "lower"]
    position: float | Sequence[float] = field(compare=False)
    stiffness: float | Sequence[float] = field(compare=False)
    power: float = field(default=2.0, compare=False)

    def init(self, context: RunContext) -> WallState:
        """The numbers of every walker."""
        check_atoms(self.variable, context.atoms)
        return WallState(
            position=per_walker(self.position, context, "position"),
            stiffness=per_walker(self.stiffness, context, "stiffness"),
            power=jnp.asarray(self.power, context.dtype),
        )

    def apply(self, state: WallState, seen: Seen) -> tuple[BiasForce, WallState]:
        """The wall of this step."""
        variable = evaluate(self.variable, seen)
        sign = 1 if self.side == "upper" else -1
        beyond = jnp.maximum(sign * (variable.value - state.position), 0)
        push = state.stiffness * beyond ** (state.power - 1)
        return force_along(variable, push * beyond / state.power, sign * push, seen), state

    @property
    def quantities(self) -> dict[str, str]:
        """The variable."""
        return {self.variable.name: self.variable.unit}

    def look(self, state: WallState, seen: Seen) -> dict[str, jax.Array]:
        """The variable."""
        return {self.variable.name: values_of(self.variable, seen)}


@struct.dataclass
class SphereState:
    """State of `Sphere`.

    Attributes:
        radius: [W] Angstrom.
        stiffness: [W] eV/Angstrom^2.
    """

    radius: jax.Array
    stiffness: jax.Array


@dataclass(frozen=True)
class Sphere(Bias):
    """``E = sum_i k/2 max(0, |x_i - c| - R)^2`` with c the centre of mass: keeps an open structure together.

    The centre moves with the atoms; what pulls them inwards pushes it back, atom by atom in proportion to mass, so
    that the sphere exerts no force on the walker as a whole.

    Args:
        radius: R, Angstrom, one or one for each walker.
        stiffness: k, eV/Angstrom^2, one or one for each walker.
    """

    radius: float | Sequence[float] = field(compare=False)
    stiffness: float | Sequence[float] = field(compare=False)

    def init(self, context: RunContext) -> SphereState:
        """The numbers of every walker."""
        return SphereState(per_walker(self.radius, context, "radius"), per_walker(self.stiffness, context, "stiffness"))

    def apply(self, state: SphereState, seen: Seen) -> tuple[BiasForce, SphereState]:
        """The pull of this step."""
        share = jnp.where(seen.atom_mask, seen.masses, 0)
        share = (share / jnp.maximum(jnp.sum(share, axis=1, keepdims=True), 1e-6))[..., None]  # [W, N, 1]
        centre = jnp.sum(share * seen.positions, axis=1)[:, None]
        arms = jnp.where(seen.atom_mask[..., None], seen.positions - centre, 0)
        lengths = jnp.linalg.norm(arms, axis=-1)
        beyond = jnp.maximum(lengths - state.radius[:, None], 0)
        stiffness = state.stiffness[:, None]
        gradient = (stiffness * beyond / jnp.where(lengths > 0, lengths, 1))[..., None] * arms
        force = BiasForce(
            energy=jnp.sum(0.5 * stiffness * beyond**2, axis=1),
            forces=share * jnp.sum(gradient, axis=1)[:, None] - gradient,
            virial=-jnp.einsum("wna,wnb->wab", arms, gradient),
        )
        return applied(force, seen), state


class RestraintSettings(BiasSettings):
    """``k/2 (s - s0)^2`` of a collective variable."""

    kind: Literal["restraint"] = "restraint"
    of_each: ClassVar[tuple[str, ...]] = ("stiffness", "centre")
    variable: VariableSettings
    """Collective variable s."""
    stiffness: PositivePerWalker
    """Stiffness k, eV over the square of the variable's unit; one, or one for each walker."""
    centre: PerWalker
    """Centre s0 in the variable's unit; one, or one for each walker."""

    @property
    def last_atom(self) -> int:
        """Of its variable."""
        return self.variable.build().last_atom

    def plain(self) -> Bias:
        """See `Restraint`."""
        return Restraint(self.variable.build(), self.stiffness, self.centre)


class SteeredSettings(BiasSettings):
    """A restraint whose centre moves linearly while the run goes on; its state holds the work done."""

    kind: Literal["steered"] = "steered"
    of_each: ClassVar[tuple[str, ...]] = ("stiffness", "start", "end")
    variable: VariableSettings
    """Collective variable s."""
    stiffness: PositivePerWalker
    """Stiffness k, eV over the square of the variable's unit; one, or one for each walker."""
    start: PerWalker
    """Centre s0 at the start; one, or one for each walker."""
    end: PerWalker
    """Centre s0 at the end; one, or one for each walker."""

    @property
    def follows_progress(self) -> str | None:
        """It does."""
        return super().follows_progress or "the bias 'steered'"

    @property
    def last_atom(self) -> int:
        """Of its variable."""
        return self.variable.build().last_atom

    def plain(self) -> Bias:
        """See `Steered`."""
        return Steered(self.variable.build(), self.stiffness, self.start, self.end)


class WallSettings(BiasSettings):
    """``k/p d^p`` where a collective variable is beyond a bound by d."""

    kind: Literal["wall"] = "wall"
    of_each: ClassVar[tuple[str, ...]] = ("position", "stiffness")
    variable: VariableSettings
    """Collective variable s, not periodic."""
    side: Literal["upper", "lower"]
    """Whether s may not grow or not fall beyond the bound."""
    position: PerWalker
    """The bound in the variable's unit; one, or one for each walker."""
    stiffness: PositivePerWalker
    """Stiffness k, eV over the variable's unit to the power; one, or one for each walker."""
    power: float = Field(default=2.0, ge=2, le=20.0)
    """Power p; 2 is harmonic."""

    @model_validator(mode="after")
    def _has_sides(self) -> Self:
        if self.variable.repeats:
            raise ValueError("a periodic variable is on both sides of a wall; use a restraint.")
        return self

    @property
    def last_atom(self) -> int:
        """Of its variable."""
        return self.variable.build().last_atom

    def plain(self) -> Bias:
        """See `Wall`."""
        return Wall(self.variable.build(), self.side, self.position, self.stiffness, self.power)


class SphereSettings(BiasSettings):
    """Every atom of an open structure within a radius of its centre of mass: ``k/2 (|x_i - c| - R)^2`` beyond."""

    kind: Literal["sphere"] = "sphere"
    of_each: ClassVar[tuple[str, ...]] = ("radius", "stiffness")
    radius: PositivePerWalker = Field(json_schema_extra=unit("Angstrom"))
    """Radius R, Angstrom; one, or one for each walker."""
    stiffness: PositivePerWalker = Field(default=1.0, json_schema_extra=unit("eV/Angstrom^2"))
    """Stiffness k, eV/Angstrom^2; one, or one for each walker."""

    def plain(self) -> Bias:
        """See `Sphere`."""
        return Sphere(self.radius, self.stiffness)
