"""Collective variables of distances, angles and contacts, in the geometry of each walker.

Vectors between atoms take the nearest image in periodic directions, so that variables are continuous.  A point is an
atom or the geometric centre of several; as positions are never wrapped, these need to be whole in the structure that a
walker starts from.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field, model_validator

from almlip_jax.dynamics.biases.collective import VariableSettings
from almlip_jax.settings import unit

Atoms = tuple[int, ...]
"""Indices of atoms, from 0; as a point, their centre."""

AtomIndex = Annotated[int, Field(ge=0, le=10**7)]
"""Index of an atom, from 0."""

Group = Annotated[tuple[AtomIndex, ...], Field(min_length=1)]
"""Indices of atoms."""

Point = AtomIndex | Group
"""An atom, or the geometric centre of several."""

_STRAIGHT = 1e-10  # square of a product of two sines, below which three atoms lie on a line for a dihedral
_IMAGES = np.array([shift for shift in itertools.product((-1, 0, 1), repeat=3) if shift > (0, 0, 0)])


def nearest_image(vectors: jax.Array, cell: jax.Array, pbc: jax.Array) -> jax.Array:
    """Vectors [..., 3] Angstrom, made as short as whole cell vectors in the periodic directions make them.

    The shortest is looked for next to where rounded fractional coordinates put it, which finds it in any cell that is
    not extremely skewed. It is a constant in the derivative.
    """
    rows = jnp.where(pbc[:, None], cell, 0)
    shift = _nearest_shift(jax.lax.stop_gradient(vectors), jax.lax.stop_gradient(rows), pbc)
    return vectors - _lattice_vectors(shift, rows)


@dataclass(frozen=True)
class Distance:
    """Distance of two points, Angstrom."""

    first: Atoms
    second: Atoms
    period: ClassVar[None] = None
    name: ClassVar[str] = "distance"
    unit: ClassVar[str] = "Angstrom"

    @property
    def last_atom(self) -> int:
        """Highest index."""
        return max(self.first + self.second)

    def __call__(self, positions: jax.Array, cell: jax.Array, pbc: jax.Array) -> jax.Array:
        """The value of one walker."""
        return _length(_between(self.first, self.second, positions, cell, pbc))


@dataclass(frozen=True)
class DistanceDifference:
    """Distance of one pair of points less that of another, Angstrom: where an atom is between two others."""

    first: tuple[Atoms, Atoms]
    second: tuple[Atoms, Atoms]
    period: ClassVar[None] = None
    name: ClassVar[str] = "distance_difference"
    unit: ClassVar[str] = "Angstrom"

    @property
    def last_atom(self) -> int:
        """Highest index."""
        return max(sum(self.first + self.second, ()))

    def __call__(self, positions: jax.Array, cell: jax.Array, pbc: jax.Array) -> jax.Array:
        """The value of one walker."""
        lengths = [_length(_between(*pair, positions, cell, pbc)) for pair in (self.first, self.second)]
        return lengths[0] - lengths[1]


@dataclass(frozen=True)
class Angle:
    """Angle at the second of three points, radians from 0 to pi; where they lie on a line its gradient counts as 0."""

    points: tuple[Atoms, Atoms, Atoms]
    period: ClassVar[None] = None
    name: ClassVar[str] = "angle"
    unit: ClassVar[str] = "rad"

    @property
    def last_atom(self) -> int:
        """Highest index."""
        return max(sum(self.points, ()))

    def __call__(self, positions: jax.Array, cell: jax.Array, pbc: jax.Array) -> jax.Array:
        """The value of one walker."""
        first, corner, last = self.points
        a = _between(corner, first, positions, cell, pbc)
        b = _between(corner, last, positions, cell, pbc)
        return jnp.arctan2(_length(jnp.cross(a, b)), jnp.sum(a * b))


@dataclass(frozen=True)
class Dihedral:
    """Dihedral angle of four points, radians from -pi to pi, 0 where the outer ones eclipse each other (IUPAC sign).

    Where three neighbours lie on a line the angle is not defined: it counts as 0, and so does its gradient.
    """

    points: tuple[Atoms, Atoms, Atoms, Atoms]
    period: ClassVar[float] = 2 * math.pi
    name: ClassVar[str] = "dihedral"
    unit: ClassVar[str] = "rad"

    @property
    def last_atom(self) -> int:
        """Highest index."""
        return max(sum(self.points, ()))

    def __call__(self, positions: jax.Array, cell: jax.Array, pbc: jax.Array) -> jax.Array:
        """The value of one walker."""
        pairs = zip(self.points, self.points[1:], strict=False)
        a, b, c = (_between(*pair, positions, cell, pbc) for pair in pairs)
        normal = jnp.cross(b, c)
        y = _length(b) * jnp.sum(a * normal)
        x = jnp.sum(jnp.cross(a, b) * normal)
        scale = jnp.sum(a * a) * jnp.sum(b * b) ** 2 * jnp.sum(c * c)
        defined = x * x + y * y > _STRAIGHT * scale
        return jnp.arctan2(jnp.where(defined, y, 0), jnp.where(defined, x, 1))


@dataclass(frozen=True)
class Coordination:
    """Number of contacts between two groups: sum over pairs of ``(1 - x^n) / (1 - x^m)`` with x = r / r0.

    Both powers as geometric sums leave no singularity at x = 1.  An atom of both groups is not in contact with itself;
    a pair that lies within both groups counts twice.
    """

    first: Atoms
    second: Atoms
    r0: float
    n: int = 6
    m: int = 12
    period: ClassVar[None] = None
    name: ClassVar[str] = "coordination"
    unit: ClassVar[str] = ""

    @property
    def last_atom(self) -> int:
        """Highest index."""
        return max(self.first + self.second)

    def __call__(self, positions: jax.Array, cell: jax.Array, pbc: jax.Array) -> jax.Array:
        """The value of one walker."""
        i, j = np.array([(i, j) for i in self.first for j in self.second if i != j]).reshape(-1, 2).T
        x = _length(nearest_image(positions[j] - positions[i], cell, pbc)) / self.r0
        near = jnp.minimum(x, 1)
        far = 1 / jnp.maximum(x, 1)  # powers of numbers up to 1 do not overflow
        inside = _geometric_sum(near, self.n) / _geometric_sum(near, self.m)
        outside = far ** (self.m - self.n) * _geometric_sum(far, self.n) / _geometric_sum(far, self.m)
        return jnp.sum(jnp.where(x < 1, inside, outside))


class _Points(VariableSettings):
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
    """The two points."""

    def build(self) -> Distance:
        """See `Distance`."""
        return Distance(*map(_atoms, self.points))


class DistanceDifferenceSettings(_Points):
    """Distance of two points less that of two others, Angstrom (an asymmetric stretch)."""

    kind: Literal["distance_difference"] = "distance_difference"
    first: tuple[Point, Point]
    """Points whose distance is taken."""
    second: tuple[Point, Point]
    """Points whose distance is subtracted."""

    def _neighbours(self) -> tuple[tuple[Point, ...], ...]:
        return self.first, self.second

    def build(self) -> DistanceDifference:
        """See `DistanceDifference`."""
        return DistanceDifference(_pair(self.first), _pair(self.second))


class AngleSettings(_Points):
    """Angle at the second of three points, radians from 0 to pi."""

    kind: Literal["angle"] = "angle"
    points: tuple[Point, Point, Point]
    """Three points, the corner in the middle."""

    def build(self) -> Angle:
        """See `Angle`."""
        first, corner, last = map(_atoms, self.points)
        return Angle((first, corner, last))


class DihedralSettings(_Points):
    """Dihedral angle of four points, radians from -pi to pi, periodic."""

    kind: Literal["dihedral"] = "dihedral"
    points: tuple[Point, Point, Point, Point]
    """Four points, in order along the chain."""

    @property
    def repeats(self) -> bool:
        """It does."""
        return True

    def build(self) -> Dihedral:
        """See `Dihedral`."""
        a, b, c, d = map(_atoms, self.points)
        return Dihedral((a, b, c, d))


class CoordinationSettings(VariableSettings):
    """Number of contacts between two groups: sum over pairs of ``(1 - (r/r0)^n) / (1 - (r/r0)^m)``."""

    kind: Literal["coordination"] = "coordination"
    first: Group
    """Atoms of one group."""
    second: Group
    """Atoms of the other; one that is in both is not in contact with itself."""
    r0: float = Field(gt=0, le=20.0, json_schema_extra=unit("Angstrom"))
    """Distance at which a pair counts n/m, Angstrom."""
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

    def build(self) -> Coordination:
        """See `Coordination`."""
        return Coordination(self.first, self.second, self.r0, self.n, self.m)


def _atoms(point: Point) -> tuple[int, ...]:
    return (point,) if isinstance(point, int) else tuple(point)


def _pair(points: tuple[Point, Point]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return _atoms(points[0]), _atoms(points[1])


def _between(first: Atoms, second: Atoms, positions: jax.Array, cell: jax.Array, pbc: jax.Array) -> jax.Array:
    return nearest_image(_centre(positions, second) - _centre(positions, first), cell, pbc)


def _centre(positions: jax.Array, atoms: Atoms) -> jax.Array:
    return positions[atoms[0]] if len(atoms) == 1 else jnp.mean(positions[np.array(atoms)], axis=0)


def _length(vectors: jax.Array) -> jax.Array:
    """Norms of vectors [..., 3], with gradient 0 where they are 0."""
    square = jnp.sum(vectors**2, axis=-1)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


def _geometric_sum(x: jax.Array, terms: int) -> jax.Array:
    total = jnp.ones_like(x)
    for _ in range(terms - 1):
        total = 1 + x * total
    return total


def _nearest_shift(vectors: jax.Array, rows: jax.Array, pbc: jax.Array) -> jax.Array:
    """Whole cell vectors [..., 3] to take off; 0 in directions that are not periodic, whose rows are 0.

    Fractional coordinates are those of the projection on the space of the periodic directions (the pseudo-inverse of
    their cell vectors).
    """
    gram = jnp.sum(rows[:, None] * rows[None], axis=-1) + jnp.diag(jnp.where(pbc, 0, 1).astype(rows.dtype))
    along = jnp.sum(vectors[..., None, :] * rows, axis=-1)
    rounded = jnp.round(jnp.sum(along[..., None, :] * _inverse_symmetric(gram), axis=-1))
    left = vectors - _lattice_vectors(rounded, rows)
    images = jnp.asarray(_IMAGES, rows.dtype)
    steps = _lattice_vectors(images, rows)
    along = jnp.sum(left[..., None, :] * steps, axis=-1)
    change = jnp.sum(steps**2, axis=-1) - 2 * jnp.abs(along)  # of the square, when the step is taken the better way
    best = jnp.argmin(change, axis=-1)[..., None]
    way = jnp.where(jnp.take_along_axis(change, best, -1) < 0, jnp.sign(jnp.take_along_axis(along, best, -1)), 0)
    return rounded + way * images[best[..., 0]]


def _lattice_vectors(shifts: jax.Array, rows: jax.Array) -> jax.Array:
    return jnp.sum(shifts[..., :, None] * rows, axis=-2)


def _inverse_symmetric(matrix: jax.Array) -> jax.Array:
    a, b, c = matrix
    cofactors = jnp.stack([jnp.cross(b, c), jnp.cross(c, a), jnp.cross(a, b)])
    return cofactors / jnp.sum(a * cofactors[0])
