"""Metadynamics: a bias of Gaussian hills that walkers leave behind, and the free energy that follows from the hills."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import ArrayLike
from pydantic import Field, model_validator

from almlip_jax.dynamics.biases.base import Bias, BiasForce, BiasSettings, Positive, applied
from almlip_jax.dynamics.biases.collective import (
    CollectiveVariable,
    VariableSettings,
    check_atoms,
    evaluate,
    values_of,
)
from almlip_jax.dynamics.seen import RunContext, Seen
from almlip_jax.errors import InputError
from almlip_jax.settings import unit


@struct.dataclass
class HillState:
    """Hills of G sets of walkers (one set where they are shared, else one for each walker) with room for K hills.

    Attributes:
        centres: [G, K, D] in the units of the D variables.
        heights: [G, K] eV, 0 where there is no hill yet.
        count: [G] int, hills so far.
        missed: [G] int, hills that found no room.
        owed: [W] bool, a hill was due where the walker did not stay; it is left at the next frame that is visited.
        widths: [D] standard deviations of the Gaussians.
        periods: [D] of the variables, 0 where one does not repeat.
        height: scalar, eV, of a hill on flat ground.
        damping: scalar, 1 / (bias factor - 1); 0 leaves every hill at full height.
        pace: scalar int, steps between two hills.
    """

    centres: jax.Array
    heights: jax.Array
    count: jax.Array
    missed: jax.Array
    owed: jax.Array
    widths: jax.Array
    periods: jax.Array
    height: jax.Array
    damping: jax.Array
    pace: jax.Array


@dataclass(frozen=True)
class Metadynamics(Bias):
    """Well-tempered metadynamics on one to three variables.

    Every ``pace`` steps each walker leaves a hill of height ``h exp(-V(s) / (kT (gamma - 1)))`` where it is, V being
    the bias that acts on it there.  Once its room is full the bias stays as it is, and `HillState.missed` counts.
    Walkers of strength 0 and variables that are not finite leave no hills.  A frame that was not visited leaves none
    either: the hill is left at the next one that is visited.

    Args:
        variables: D collective variables.
        room: hills of each set, at most.
        shared: whether all walkers fill one landscape, or each its own.
        height: h, eV.
        widths: standard deviation along each variable.
        pace: steps between two hills of a walker.
        bias_factor: gamma > 1; without, heights do not fall (plain metadynamics).

    Source: Barducci, Bussi and Parrinello, Phys. Rev. Lett. 100, 020603 (2008); shared: Raiteri, Laio, Gervasio,
    Micheletti and Parrinello, J. Phys. Chem. B 110, 3533 (2006).
    """

    variables: tuple[CollectiveVariable, ...]
    room: int
    shared: bool
    height: float = field(compare=False)
    widths: tuple[float, ...] = field(compare=False)
    pace: int = field(compare=False)
    bias_factor: float | None = field(default=None, compare=False)

    def init(self, context: RunContext) -> HillState:
        """No hills."""
        walkers, dtype = context.walkers, context.dtype
        if len(self.widths) != len(self.variables):
            raise InputError(
                f"metadynamics has {len(self.variables)} variables, but {len(self.widths)} widths; give one each."
            )
        for variable in self.variables:
            check_atoms(variable, context.atoms)
        sets, dimensions = 1 if self.shared else walkers, len(self.variables)
        return HillState(
            centres=jnp.zeros((sets, self.room, dimensions), dtype),
            heights=jnp.zeros((sets, self.room), dtype),
            count=jnp.zeros(sets, jnp.int32),
            missed=jnp.zeros(sets, jnp.int32),
            owed=jnp.zeros(walkers, bool),
            widths=jnp.asarray(self.widths, dtype),
            periods=jnp.asarray([variable.period or 0 for variable in self.variables], dtype),
            height=jnp.asarray(self.height, dtype),
            damping=jnp.asarray(0 if self.bias_factor is None else 1 / (self.bias_factor - 1), dtype),
            pace=jnp.asarray(self.pace, jnp.int32),
        )

    def apply(self, state: HillState, seen: Seen) -> tuple[BiasForce, HillState]:
        """The bias of the hills so far, and the hills of this step for the next."""
        variables = [evaluate(variable, seen) for variable in self.variables]
        values = jnp.stack([variable.value for variable in variables], axis=-1)  # [W, D]
        energy, slopes = _landscape(state, values)
        down = -slopes.T[..., None, None]  # [D, W, 1, 1]
        pull = BiasForce(
            energy=energy,
            forces=jnp.sum(down * jnp.stack([one.gradient for one in variables]), axis=0),
            virial=jnp.sum(down * jnp.stack([one.strain_gradient for one in variables]), axis=0),
        )
        return applied(pull, seen), self._deposit(state, values, energy, seen)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the variables, numbered where two are of a kind."""
        kinds = [variable.name for variable in self.variables]
        return tuple(kind if kinds.count(kind) == 1 else f"{kind}{d}" for d, kind in enumerate(kinds))

    @property
    def quantities(self) -> dict[str, str]:
        """The variables, and the number of hills of the walker's set."""
        units = [variable.unit for variable in self.variables]
        return dict(zip(self.names, units, strict=True)) | {"hills": ""}

    def look(self, state: HillState, seen: Seen) -> dict[str, jax.Array]:
        """The variables, and the number of hills of the walker's set."""
        values = [values_of(variable, seen) for variable in self.variables]
        hills = jnp.broadcast_to(state.count, seen.strength.shape).astype(seen.positions.dtype)
        return dict(zip(self.names, values, strict=True)) | {"hills": hills}

    def hills(self, state: HillState) -> Hills:
        """What is kept of a state, on the host."""
        arrays = {name: np.asarray(getattr(state, name)) for name in Hills.__annotations__ if hasattr(state, name)}
        units = np.array([variable.unit for variable in self.variables])
        return Hills(**arrays, names=np.array(self.names), units=units)

    def _deposit(self, state: HillState, values: jax.Array, energy: jax.Array, at: Seen) -> HillState:
        due = state.owed | ((at.step > 0) & (at.step % state.pace == 0))
        heights = state.height * jnp.exp(-at.strength * energy * state.damping / at.kt)
        hill = due & at.visited & (at.strength > 0)
        hill = hill & jnp.all(jnp.isfinite(values), axis=-1) & jnp.isfinite(heights)
        if self.shared:
            owner = jnp.zeros(len(values), jnp.int32)
            turn = jnp.cumsum(hill, dtype=jnp.int32) - 1
        else:
            owner = jnp.arange(len(values), dtype=jnp.int32)
            turn = jnp.zeros_like(owner)
        slot = jnp.where(hill, state.count[owner] + turn, self.room)
        slot = jnp.minimum(slot, self.room)  # the slot after the last is none: what goes there is dropped
        stored = jnp.zeros_like(state.count).at[owner].add((slot < self.room).astype(jnp.int32))
        wanted = jnp.zeros_like(state.count).at[owner].add(hill.astype(jnp.int32))
        return replace(
            state,
            centres=state.centres.at[owner, slot].set(values.astype(state.centres.dtype), mode="drop"),
            heights=state.heights.at[owner, slot].set(heights.astype(state.heights.dtype), mode="drop"),
            count=state.count + stored,
            missed=state.missed + wanted - stored,
            owed=due & ~jnp.broadcast_to(at.visited, due.shape),
        )


@dataclass(frozen=True)
class Hills:
    """Hills on the host, as they are kept; the arrays of `HillState` that describe them.

    Attributes:
        centres: [G, K, D].
        heights: [G, K] eV.
        count: [G] hills of each set.
        missed: [G] hills that found no room.
        widths: [D].
        periods: [D], 0 where a variable does not repeat.
        damping: scalar, 1 / (bias factor - 1).
        names: of the variables.
        units: of the variables.
    """

    centres: np.ndarray
    heights: np.ndarray
    count: np.ndarray
    missed: np.ndarray
    widths: np.ndarray
    periods: np.ndarray
    damping: np.ndarray
    names: np.ndarray
    units: np.ndarray


def free_energy(state: HillState | Hills, grid: Sequence[ArrayLike]) -> np.ndarray:
    """The free energy that the hills of a run estimate, on the host: ``-gamma / (gamma - 1) V``, least value 0.

    Holds for hills laid at strength 1 (no ramp), all at one temperature.

    Args:
        state: at the end of the run.
        grid: one axis of points for each of the D variables.

    Returns:
        [G, n_1, .., n_D] eV, float64, for each set of hills.

    Raises:
        InputError: the grid has not one axis for each variable.

    >>> import numpy as np
    >>> from almlip_jax.dynamics.biases import Hills, free_energy
    >>> one = dict(widths=np.array([0.2]), periods=np.array([0.0]), damping=np.array(1 / 9))  # bias factor 10
    >>> named = dict(names=np.array(["distance"]), units=np.array(["A"]))
    >>> hill = dict(centres=np.full((1, 1, 1), 1.5), heights=np.full((1, 1), 0.09), count=np.array([1]))
    >>> free_energy(Hills(**hill, **one, **named, missed=np.array([0])), [[1.5, 1.7, 5.0]]).round(3)  # eV
    array([[0.   , 0.039, 0.1  ]])
    """
    widths, periods = np.asarray(state.widths, float), np.asarray(state.periods, float)
    if len(grid) != len(widths):
        raise InputError(f"the grid has {len(grid)} axes for {len(widths)} variables.")
    sets = []
    for centres, heights, count in zip(*map(np.asarray, (state.centres, state.heights, state.count)), strict=True):
        operands: list = [heights[:count].astype(float), [0]]
        for d, axis in enumerate(grid):
            gap = np.asarray(axis, float) - centres[:count, d, None].astype(float)
            if periods[d]:
                gap -= periods[d] * np.round(gap / periods[d])
            operands += [np.exp(-0.5 * (gap / widths[d]) ** 2), [0, d + 1]]
        bias = np.einsum(*operands, list(range(1, len(grid) + 1)), optimize=True)
        sets.append((1 + float(state.damping)) * (bias.max() - bias))
    return np.stack(sets)


def _landscape(state: HillState, values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Height [W] of all hills at values [W, D], and its slopes [W, D]."""
    gap = values[:, None] - state.centres  # [W, K, D]
    turns = jnp.where(state.periods > 0, jnp.round(gap / jnp.where(state.periods > 0, state.periods, 1)), 0)
    reduced = (gap - turns * state.periods) / state.widths
    hills = state.heights * jnp.exp(-0.5 * jnp.sum(reduced**2, axis=-1))  # [W, K]
    return jnp.sum(hills, axis=1), -jnp.sum(hills[..., None] * reduced, axis=1) / state.widths


class MetadynamicsSettings(BiasSettings):
    """Well-tempered metadynamics on one to three collective variables."""

    kind: Literal["metadynamics"] = "metadynamics"
    leaves_hills: ClassVar[bool] = True
    variables: tuple[VariableSettings, ...] = Field(min_length=1, max_length=3)
    """Variables along which hills are left."""
    widths: tuple[Positive, ...]
    """Standard deviation of a hill along each variable, in its unit."""
    height: float = Field(gt=0, le=1000.0, json_schema_extra=unit("eV"))
    """Height of the first hill, eV."""
    pace: int = Field(ge=1, le=10**9)
    """Steps between two hills of a walker."""
    bias_factor: float | None = Field(default=10.0, gt=1, le=1e6)
    """Bias factor gamma: hills shrink as if the variables were at gamma times the temperature; null keeps their
    height."""
    hills: int = Field(default=1000, ge=1, le=10**6)
    """Room for hills, of each walker or of all that share; when it is full the bias stays as it is."""
    shared: bool = False
    """Whether all walkers fill one landscape (they should have one temperature), or each its own."""

    @property
    def couples_walkers(self) -> bool:
        """Where they share hills."""
        return self.shared

    @model_validator(mode="after")
    def _one_width_each(self) -> Self:
        if len(self.widths) != len(self.variables):
            raise ValueError(
                f"widths has {len(self.widths)} values for {len(self.variables)} variables; give one each."
            )
        return self

    @property
    def last_atom(self) -> int:
        """Of its variables."""
        return max(one.build().last_atom for one in self.variables)

    @property
    def paces(self) -> Mapping[str, int]:
        """That of the hills."""
        return {"pace": self.pace}

    def plain(self) -> Bias:
        """See `Metadynamics`."""
        return Metadynamics(
            variables=tuple(one.build() for one in self.variables),
            room=self.hills,
            shared=self.shared,
            height=self.height,
            widths=self.widths,
            pace=self.pace,
            bias_factor=self.bias_factor,
        )
