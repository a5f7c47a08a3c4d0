"""Settings of biases and collective variables, told apart by ``kind``, and the functions that build them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from almlip_jax.dynamics.biases.base import Bias, Ramp, Sum, combine
from almlip_jax.dynamics.biases.collective import (
    Angle,
    CollectiveVariable,
    Coordination,
    Dihedral,
    Distance,
    DistanceDifference,
    UserVariable,
)
from almlip_jax.dynamics.biases.metadynamics import Metadynamics
from almlip_jax.dynamics.biases.restraints import Restraint, Sphere, Steered, Wall
from almlip_jax.dynamics.biases.uncertainty import BoundedUncertaintyBias, UncertaintyBias
from almlip_jax.errors import InputError
from almlip_jax.kinds import import_function
from almlip_jax.settings import Settings, unit

AtomIndex = Annotated[int, Field(ge=0, le=10**7)]
"""Index of an atom, from 0."""

Group = Annotated[tuple[AtomIndex, ...], Field(min_length=1)]
"""Indices of atoms."""

Point = AtomIndex | Group
"""An atom, or the geometric centre of several."""

_Bounded = Annotated[float, Field(ge=-1e6, le=1e6)]
_Positive = Annotated[float, Field(gt=0, le=1e6)]

PerWalker = _Bounded | Annotated[tuple[_Bounded, ...], Field(min_length=1)]
"""One number for all walkers, or one for each."""

PositivePerWalker = _Positive | Annotated[tuple[_Positive, ...], Field(min_length=1)]
"""The same of numbers above 0."""


class _Points(Settings):
    """Variables of points that must differ."""

    @model_validator(mode="after")
    def _points_differ(self) -> Self:
        for points in self._neighbours():
            if len({_atoms(point) for point in points}) < len(points):
                raise ValueError(f"two points of {list(points)} are the same; name different atoms.")
        return self

    def _neighbours(self) -> tuple[tuple[Point, ...], ...]:
        return (self.points,)  # type: ignore[attr-defined]


class DistanceSettings(_Points):
    """Distance of two points, Angstrom."""

    kind: Literal["distance"] = "distance"
    points: tuple[Point, Point]
    """The two."""


class DistanceDifferenceSettings(_Points):
    """Distance of two points less that of two others, Angstrom (an asymmetric stretch)."""

    kind: Literal["distance_difference"] = "distance_difference"
    first: tuple[Point, Point]
    """Whose distance counts."""
    second: tuple[Point, Point]
    """Whose distance is taken off."""

    def _neighbours(self) -> tuple[tuple[Point, ...], ...]:
        return self.first, self.second


class AngleSettings(_Points):
    """Angle at the second of three points, radians from 0 to pi."""

    kind: Literal["angle"] = "angle"
    points: tuple[Point, Point, Point]
    """The corner in the middle."""


class DihedralSettings(_Points):
    """Dihedral angle of four points, radians from -pi to pi, periodic."""

    kind: Literal["dihedral"] = "dihedral"
    points: tuple[Point, Point, Point, Point]
    """In order along the chain."""


class CoordinationSettings(Settings):
    """Number of contacts between two groups: sum over pairs of ``(1 - (r/r0)^n) / (1 - (r/r0)^m)``."""

    kind: Literal["coordination"] = "coordination"
    first: Group
    """Atoms of one group."""
    second: Group
    """Atoms of the other; one that is in both is no contact of its own."""
    r0: float = Field(gt=0, le=20.0, json_schema_extra=unit("Angstrom"))
    """Angstrom, where a pair counts n/m."""
    n: int = Field(default=6, ge=1, le=63)
    """Lower power."""
    m: int = Field(default=12, le=64, ge=2)
    """Higher power."""

    @model_validator(mode="after")
    def _contacts_exist(self) -> Self:
        if self.m <= self.n:
            raise ValueError(f"m {self.m} must be larger than n {self.n}.")
        if not any(i != j for i in self.first for j in self.second):
            raise ValueError("the two groups hold no pair of different atoms.")
        return self


class UserVariableSettings(Settings):
    """A user's own factory ``(**parameters) -> cv(positions [N, 3], cell [3, 3]) -> scalar``."""

    kind: Literal["user"] = "user"
    function: str
    """Where the factory is, as ``module:function``."""
    parameters: dict[str, Any] = {}
    """Keyword arguments of the factory."""
    period: float | None = Field(default=None, gt=0, le=1e6)
    """After how much the value repeats, if it does."""


VariableSettings = Annotated[
    DistanceSettings
    | DistanceDifferenceSettings
    | AngleSettings
    | DihedralSettings
    | CoordinationSettings
    | UserVariableSettings,
    Field(discriminator="kind"),
]
"""Settings of any collective variable."""


class _Scheduled(Settings):
    """What every bias can have."""

    ramp: tuple[_Bounded, _Bounded] | None = None
    """Factors on the bias at the start and at the end of a run, linear in between; none leaves it at 1."""


class UncertaintySettings(_Scheduled):
    """Towards what the committee does not agree on: ``E_b = -tau sigma_E``."""

    kind: Literal["uncertainty"] = "uncertainty"
    tau: float | None = Field(default=None, ge=0, le=1e6)
    """Fixed factor; without, it follows the forces."""
    relative: float = Field(default=0.2, ge=0, le=100.0)
    """Mean bias force over mean force that an automatic tau aims at."""
    window: float = Field(default=100.0, ge=1, le=1e9)
    """Steps over which the running means of an automatic tau extend."""


class BoundedUncertaintySettings(_Scheduled):
    """The same without running away: ``E_b = H (exp(-sigma_E^2 / (N w^2)) - 1)``, N atoms."""

    kind: Literal["bounded_uncertainty"] = "bounded_uncertainty"
    height: float = Field(gt=0, le=1000.0, json_schema_extra=unit("eV"))
    """H, eV: the bias energy lies between -H and 0."""
    width: float = Field(gt=0, le=1000.0, json_schema_extra=unit("eV"))
    """w, eV."""


class RestraintSettings(_Scheduled):
    """``k/2 (s - s0)^2`` of a collective variable."""

    kind: Literal["restraint"] = "restraint"
    variable: VariableSettings
    """s."""
    stiffness: PositivePerWalker
    """k, eV over the square of the variable's unit; one, or one for each walker."""
    centre: PerWalker
    """s0 in the variable's unit; one, or one for each walker."""


class SteeredSettings(_Scheduled):
    """A restraint whose centre moves linearly while the run goes on; its state holds the work done."""

    kind: Literal["steered"] = "steered"
    variable: VariableSettings
    """s."""
    stiffness: PositivePerWalker
    """k, eV over the square of the variable's unit; one, or one for each walker."""
    start: PerWalker
    """s0 at the start; one, or one for each walker."""
    end: PerWalker
    """s0 at the end; one, or one for each walker."""


class WallSettings(_Scheduled):
    """``k/p d^p`` where a collective variable is beyond a bound by d."""

    kind: Literal["wall"] = "wall"
    variable: VariableSettings
    """s, not periodic."""
    side: Literal["upper", "lower"]
    """Whether s may not grow or not fall beyond the bound."""
    position: PerWalker
    """The bound in the variable's unit; one, or one for each walker."""
    stiffness: PositivePerWalker
    """k, eV over the variable's unit to the power; one, or one for each walker."""
    power: float = Field(default=2.0, ge=2, le=20.0)
    """p; 2 is harmonic."""

    @model_validator(mode="after")
    def _has_sides(self) -> Self:
        if self.variable.kind == "dihedral" or getattr(self.variable, "period", None) is not None:
            raise ValueError("a periodic variable is on both sides of a wall; use a restraint.")
        return self


class SphereSettings(_Scheduled):
    """Every atom of an open structure within a radius of its centre of mass: ``k/2 (|x_i - c| - R)^2`` beyond."""

    kind: Literal["sphere"] = "sphere"
    radius: PositivePerWalker
    """R, Angstrom; one, or one for each walker."""
    stiffness: PositivePerWalker = 1.0
    """k, eV/Angstrom^2; one, or one for each walker."""


class MetadynamicsSettings(_Scheduled):
    """Well-tempered metadynamics on one to three collective variables."""

    kind: Literal["metadynamics"] = "metadynamics"
    variables: tuple[VariableSettings, ...] = Field(min_length=1, max_length=3)
    """In which the hills stand."""
    widths: tuple[_Positive, ...]
    """Standard deviation of a hill along each variable, in its unit."""
    height: float = Field(gt=0, le=1000.0, json_schema_extra=unit("eV"))
    """Of the first hill, eV."""
    pace: int = Field(ge=1, le=10**9)
    """Steps between two hills of a walker."""
    bias_factor: float | None = Field(default=10.0, gt=1, le=1e6)
    """gamma: hills shrink as if the variables were at gamma times the temperature; null keeps their height."""
    hills: int = Field(default=1000, ge=1, le=10**6)
    """Room for hills, of each walker or of all that share; when it is full the bias stays as it is."""
    shared: bool = False
    """Whether all walkers fill one landscape (they should have one temperature), or each its own."""

    @model_validator(mode="after")
    def _one_width_each(self) -> Self:
        if len(self.widths) != len(self.variables):
            raise ValueError(
                f"widths has {len(self.widths)} values for {len(self.variables)} variables; give one each."
            )
        return self


BiasSettings = Annotated[
    UncertaintySettings
    | BoundedUncertaintySettings
    | RestraintSettings
    | SteeredSettings
    | WallSettings
    | SphereSettings
    | MetadynamicsSettings,
    Field(discriminator="kind"),
]
"""Settings of any bias."""


def build_bias(settings: Sequence[BiasSettings]) -> Sum:
    """The sum of the biases that some settings describe; its state is the tuple of theirs, in order.

    Raises:
        InputError: a user's collective variable cannot be imported or built.
    """
    return combine([_built(one) for one in settings])


def build_variable(settings: VariableSettings) -> CollectiveVariable:
    """The collective variable that some settings describe.

    Raises:
        InputError: a user's function cannot be imported or built.
    """
    match settings:
        case DistanceSettings():
            return Distance(*map(_atoms, settings.points))
        case DistanceDifferenceSettings():
            return DistanceDifference(_pair(settings.first), _pair(settings.second))
        case AngleSettings():
            first, corner, last = map(_atoms, settings.points)
            return Angle((first, corner, last))
        case DihedralSettings():
            a, b, c, d = map(_atoms, settings.points)
            return Dihedral((a, b, c, d))
        case CoordinationSettings():
            return Coordination(settings.first, settings.second, settings.r0, settings.n, settings.m)
        case UserVariableSettings():
            return _user_variable(settings)


def _built(settings: BiasSettings) -> Bias:
    bias = _bare(settings)
    return bias if settings.ramp is None else Ramp(bias, *settings.ramp)


def _bare(settings: BiasSettings) -> Bias:
    match settings:
        case UncertaintySettings():
            return UncertaintyBias(settings.tau, settings.relative, settings.window)
        case BoundedUncertaintySettings():
            return BoundedUncertaintyBias(settings.height, settings.width)
        case RestraintSettings():
            return Restraint(build_variable(settings.variable), settings.stiffness, settings.centre)
        case SteeredSettings():
            return Steered(build_variable(settings.variable), settings.stiffness, settings.start, settings.end)
        case WallSettings():
            variable = build_variable(settings.variable)
            return Wall(variable, settings.side, settings.position, settings.stiffness, settings.power)
        case SphereSettings():
            return Sphere(settings.radius, settings.stiffness)
        case MetadynamicsSettings():
            return Metadynamics(
                variables=tuple(map(build_variable, settings.variables)),
                room=settings.hills,
                shared=settings.shared,
                height=settings.height,
                widths=settings.widths,
                pace=settings.pace,
                bias_factor=settings.bias_factor,
            )


def _user_variable(settings: UserVariableSettings) -> UserVariable:
    factory = import_function(settings.function)
    try:
        made = factory(**settings.parameters)
    except TypeError as error:
        raise InputError(f"'{settings.function}' does not take the parameters given ({error}).") from error
    if not callable(made):
        raise InputError(f"'{settings.function}' must return a function, but returns a {type(made).__name__}.")
    source = f"{settings.function} {json.dumps(settings.parameters, sort_keys=True, default=str)}"
    return UserVariable(made, source, settings.period)


def _atoms(point: Point) -> tuple[int, ...]:
    return (point,) if isinstance(point, int) else tuple(point)


def _pair(points: tuple[Point, Point]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return _atoms(points[0]), _atoms(points[1])
