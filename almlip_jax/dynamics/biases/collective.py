"""Collective variables: functions ``(positions [N, 3], cell [3, 3], pbc [3]) -> scalar`` of one walker.

`evaluate` maps one over the walkers with its derivatives with respect to positions and strain; `force_along` turns an
energy of it into a `BiasForce`.  Vectors between atoms take the nearest image in periodic directions, so that
variables are continuous.  A point is an atom or the geometric centre of several; as positions are never wrapped, these
need to be whole in the structure that a walker starts from.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from almlip_jax.dynamics.biases.base import BiasForce, BiasInput, applied
from almlip_jax.errors import InputError

Atoms = tuple[int, ...]
"""Indices of atoms, from 0; as a point, their centre."""

_STRAIGHT = 1e-10  # square of a product of two sines, below which three atoms lie on a line for a dihedral
_IMAGES = np.array([shift for shift in itertools.product((-1, 0, 1), repeat=3) if shift > (0, 0, 0)])


class CollectiveVariable(Protocol):
    """A function of one walker; hashable, and equal to another that gives the same values."""

    @property
    def period(self) -> float | None:
        """After how much the value repeats, if it does."""
        ...

    @property
    def last_atom(self) -> int:
        """Highest index of an atom looked at; -1 where that is not known."""
        ...

    @property
    def name(self) -> str:
        """What tables call it."""
        ...

    @property
    def unit(self) -> str:
        """Of its values; empty for a pure number, or where that is not known."""
        ...

    def __call__(self, positions: jax.Array, cell: jax.Array, pbc: jax.Array) -> jax.Array:
        """The value at positions [N, 3], cell [3, 3] and pbc [3]."""
        ...


@struct.dataclass
class Collective:
    """A collective variable of all walkers.

    Attributes:
        value: [W].
        gradient: [W, N, 3] with respect to positions, per Angstrom; 0 for padding atoms.
        strain_gradient: [W, 3, 3] with respect to a symmetric strain of positions and cell.
    """

    value: jax.Array
    gradient: jax.Array
    strain_gradient: jax.Array


def evaluate(variable: CollectiveVariable, at: BiasInput) -> Collective:
    """The variable of every walker and its derivatives.

    With the strain e, positions x go to x (1 + e) and cell vectors h to h (1 + e), so that the derivative is
    ``sum_i x_i (x) ds/dx_i + h^T ds/dh``.
    """
    both = jax.vmap(jax.value_and_grad(variable, argnums=(0, 1)))
    value, (gradient, cell_gradient) = both(at.positions, at.cells, at.pbc)
    gradient = jnp.where(at.atom_mask[..., None], gradient, 0)
    strain = jnp.einsum("wna,wnb->wab", at.positions, gradient, precision="highest")
    strain += jnp.einsum("wka,wkb->wab", at.cells, cell_gradient, precision="highest")
    return Collective(value, gradient, 0.5 * (strain + jnp.swapaxes(strain, -1, -2)))


def values_of(variable: CollectiveVariable, at: BiasInput) -> jax.Array:
    """The variable of every walker, [W]."""
    return jax.vmap(variable)(at.positions, at.cells, at.pbc)


def force_along(variable: Collective, energy: jax.Array, slope: jax.Array, at: BiasInput) -> BiasForce:
    """What an energy [W] of a variable does, given its slope dE/ds [W]."""
    pull = -slope[:, None, None]
    return applied(BiasForce(energy, pull * variable.gradient, pull * variable.strain_gradient), at)


def difference(a: jax.Array, b: jax.Array, period: float | None) -> jax.Array:
    """a - b; of a periodic variable, the shortest way around from b to a."""
    gap = a - b
    return gap if period is None else gap - period * jnp.round(gap / period)


def check_atoms(variable: CollectiveVariable, atoms: int) -> None:
    """Raises an `InputError` where a variable looks at an atom that no walker of N atoms has."""
    if variable.last_atom >= atoms:
        raise InputError(
            f"a collective variable looks at atom {variable.last_atom}, but no walker has more than {atoms} atoms "
            "(their count starts at 0)."
        )


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
    name: ClassVar[str] = "distance"
    unit: ClassVar[str] = "Angstrom"

    @property
    def period(self) -> None:
        """It does not repeat."""
        return None

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
    name: ClassVar[str] = "distance_difference"
    unit: ClassVar[str] = "Angstrom"

    @property
    def period(self) -> None:
        """It does not repeat."""
        return None

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
    name: ClassVar[str] = "angle"
    unit: ClassVar[str] = "rad"

    @property
    def period(self) -> None:
        """It does not repeat."""
        return None

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
    name: ClassVar[str] = "dihedral"
    unit: ClassVar[str] = "rad"

    @property
    def period(self) -> float:
        """A full turn."""
        return 2 * math.pi

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

    Both powers as geometric sums leave no singularity at x = 1.  An atom of both groups is no contact of its own; a
    pair that lies within both groups counts twice.
    """

    first: Atoms
    second: Atoms
    r0: float
    n: int = 6
    m: int = 12
    name: ClassVar[str] = "coordination"
    unit: ClassVar[str] = ""

    @property
    def period(self) -> None:
        """It does not repeat."""
        return None

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


@dataclass(frozen=True)
class UserVariable:
    """A user's function ``(positions [N, 3], cell [3, 3]) -> scalar``, told from others by its source alone.

    Attributes:
        function: differentiable by jax; rows of positions beyond the atoms of a walker are padding.
        source: says where the function is from and with which parameters it was made.
        period: after how much the value repeats, if it does.
    """

    function: Callable[[jax.Array, jax.Array], jax.Array] = field(compare=False)
    source: str
    period: float | None = None
    name: ClassVar[str] = "user"
    unit: ClassVar[str] = ""

    @property
    def last_atom(self) -> int:
        """Not known."""
        return -1

    def __call__(self, positions: jax.Array, cell: jax.Array, pbc: jax.Array) -> jax.Array:
        """The value of one walker.

        Raises:
            InputError: the function returns no scalar.
        """
        value = jnp.asarray(self.function(positions, cell), positions.dtype)
        if value.shape != ():
            raise InputError(f"the collective variable {self.source} must return a scalar, not shape {value.shape}.")
        return value


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
