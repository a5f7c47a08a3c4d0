"""Collective variables: functions ``(positions [N, 3], cell [3, 3], pbc [3]) -> scalar`` of one walker.

`evaluate` maps one over the walkers with its derivatives with respect to positions and strain; `force_along` turns an
energy of it into a `BiasForce`.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol

import jax
import jax.numpy as jnp
from flax import struct
from pydantic import Field

from almlip_jax.dynamics.biases.base import BiasForce, applied
from almlip_jax.dynamics.seen import Seen
from almlip_jax.errors import InputError
from almlip_jax.kinds import Spec, UserCode


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


def evaluate(variable: CollectiveVariable, at: Seen) -> Collective:
    """The variable of every walker and its derivatives.

    With the strain e, positions x go to x (1 + e) and cell vectors h to h (1 + e), so that the derivative is
    ``sum_i x_i (x) ds/dx_i + h^T ds/dh``.
    """
    both = jax.vmap(jax.value_and_grad(variable, argnums=(0, 1)))
    value, (gradient, cell_gradient) = both(at.positions, at.cells, at.pbc)
    gradient = jnp.where(at.atom_mask[..., None], gradient, 0)
    strain = jnp.einsum("wna,wnb->wab", at.positions, gradient)
    strain += jnp.einsum("wka,wkb->wab", at.cells, cell_gradient)
    return Collective(value, gradient, 0.5 * (strain + jnp.swapaxes(strain, -1, -2)))


def values_of(variable: CollectiveVariable, at: Seen) -> jax.Array:
    """The variable of every walker, [W]."""
    return jax.vmap(variable)(at.positions, at.cells, at.pbc)


def force_along(variable: Collective, energy: jax.Array, slope: jax.Array, at: Seen) -> BiasForce:
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
            "(atoms count from 0)."
        )


@dataclass(frozen=True)
class UserVariable:
    """A user's function ``(positions [N, 3], cell [3, 3]) -> scalar``, distinguished from others by its source alone.

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


class VariableSettings(Spec):
    """Settings of any collective variable."""

    @property
    def repeats(self) -> bool:
        """Whether the variable is periodic."""
        return False

    @abstractmethod
    def build(self) -> CollectiveVariable:
        """The collective variable.

        Raises:
            InputError: a user's function cannot be imported or built.
        """


class UserVariableSettings(UserCode, VariableSettings):
    """A user's own factory ``(**parameters) -> cv(positions [N, 3], cell [3, 3]) -> scalar``."""

    kind: Literal["user"] = "user"
    period: float | None = Field(default=None, gt=0, le=1e6)
    """After how much the value repeats, if it does."""

    @property
    def repeats(self) -> bool:
        """Whether a period is given."""
        return self.period is not None

    def check_code(self) -> None:
        """Makes the variable."""
        self.build()

    def build(self) -> UserVariable:
        """What the factory makes."""
        source = f"{self.function} {json.dumps(self.parameters, sort_keys=True, default=str)}"
        return UserVariable(self.call_for_function("positions", "cell"), source, self.period)
