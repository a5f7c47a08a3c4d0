"""The protocol of biases: energies added to the potential while walkers explore, with their forces and virials.

A bias is a pair of pure functions: ``init`` makes the state of W walkers, ``apply`` looks at one step and returns what
acts on the walkers and the next state.  Every number that may differ from run to run (a stiffness, a centre, a pace)
is read by ``init`` and nowhere else, and lives in the state as an array: biases that differ in such numbers alone
compare equal, because one compiled program serves them all.

Every bias multiplies what it does by `BiasInput.strength`, with `applied`; schedules are therefore biases around
biases that change the strength, like `Ramp`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike

from almlip_jax.errors import InputError


@struct.dataclass
class BiasInput:
    """What a bias may look at: the one evaluation of this step, and where the walkers are.

    Attributes:
        positions: [W, N, 3] Angstrom, never wrapped: molecules stay whole.
        cells: [W, 3, 3] Angstrom, rows are the cell vectors (anything where not periodic).
        pbc: [W, 3] bool.
        atom_mask: [W, N] bool, true for real atoms.
        masses: [W, N] amu (1 for padding atoms).
        kt: [W] eV.
        step: scalar int, steps done before this one.
        progress: scalar in [0, 1], share of the planned steps done.
        strength: [W] factor of each walker on every bias; at 0 nothing acts on the walker and it leaves no hills.
        member_energy: [M, W] eV.
        member_forces: [M, W, N, 3] eV/Angstrom.
        member_virial: [M, W, 3, 3] eV, -dE/d(strain).
        visited: [W] bool, whether the walker is at these positions after the step; what a walker did not visit (a Monte
            Carlo trial that was refused, an unphysical frame, a step after its end) leaves nothing in a state.
    """

    positions: jax.Array
    cells: jax.Array
    pbc: jax.Array
    atom_mask: jax.Array
    masses: jax.Array
    kt: jax.Array
    step: jax.Array
    progress: jax.Array
    strength: jax.Array
    member_energy: jax.Array
    member_forces: jax.Array
    member_virial: jax.Array
    visited: jax.Array | bool = True


@struct.dataclass
class BiasForce:
    """What a bias does to each walker.

    Attributes:
        energy: [W] eV.
        forces: [W, N, 3] eV/Angstrom, 0 on padding atoms.
        virial: [W, 3, 3] eV, -dE/d(strain), symmetric.
    """

    energy: jax.Array
    forces: jax.Array
    virial: jax.Array


class Bias(Protocol):
    """``init`` makes the state of W walkers, ``apply`` looks at one step; ``apply`` is pure and jittable.

    In the loop the force is asked for first, and the next state once it is known which walkers stay at these positions
    (`BiasInput.visited`).  The derivative is that of the energy at a given state: what ``apply`` learns from a step
    acts from the next one on.
    """

    def init(self, walkers: int, atoms: int, dtype: DTypeLike) -> Any:
        """State for W walkers of N atoms each, a pytree with floating numbers of the given type.

        Raises:
            InputError: the bias does not suit that many walkers or atoms.
        """
        ...

    def apply(self, state: Any, at: BiasInput) -> tuple[BiasForce, Any]:
        """Energy, forces and virial of this step, and the next state."""
        ...

    @property
    def quantities(self) -> Mapping[str, str]:
        """What `look` tells: name -> unit."""
        ...

    def look(self, state: Any, at: BiasInput) -> dict[str, jax.Array]:
        """What tables show of the bias after a step, name -> [W]; called for the steps that are shown alone.

        Args:
            state: after the step.
            at: what the step looked at.
        """
        ...


def applied(force: BiasForce, at: BiasInput) -> BiasForce:
    """What acts on the walkers: times their strength, nothing on padding atoms, nothing at all at strength 0."""

    def scaled(values: jax.Array, keep: jax.Array | bool = True) -> jax.Array:
        strength = at.strength.reshape((-1,) + (1,) * (values.ndim - 1))
        kept = jnp.where(keep & (strength != 0), strength * values, 0)
        return kept.astype(at.positions.dtype)

    return BiasForce(
        energy=scaled(force.energy),
        forces=scaled(force.forces, at.atom_mask[..., None]),
        virial=scaled(force.virial),
    )


def no_force(at: BiasInput) -> BiasForce:
    """Zeros."""
    walkers, dtype = len(at.positions), at.positions.dtype
    return BiasForce(jnp.zeros(walkers, dtype), jnp.zeros_like(at.positions), jnp.zeros((walkers, 3, 3), dtype))


@dataclass(frozen=True)
class Sum:
    """Any number of biases at once; its state is the tuple of theirs, in order."""

    parts: tuple[Bias, ...] = ()

    def init(self, walkers: int, atoms: int, dtype: DTypeLike) -> tuple[Any, ...]:
        """The states of the parts, side by side."""
        return tuple(part.init(walkers, atoms, dtype) for part in self.parts)

    def apply(self, state: tuple[Any, ...], at: BiasInput) -> tuple[BiasForce, tuple[Any, ...]]:
        """Sums of energies, forces and virials; zeros where there are no parts."""
        total, after = no_force(at), []
        for part, own in zip(self.parts, state, strict=True):
            force, own = part.apply(own, at)
            total = jax.tree.map(jnp.add, total, force)
            after.append(own)
        return total, tuple(after)

    @property
    def quantities(self) -> dict[str, str]:
        """Those of the parts; the names begin with ``bias`` and the position of the part, from 0."""
        return {f"bias{n}.{name}": unit for n, part in enumerate(self.parts) for name, unit in part.quantities.items()}

    def look(self, state: tuple[Any, ...], at: BiasInput) -> dict[str, jax.Array]:
        """Those of the parts."""
        both = enumerate(zip(self.parts, state, strict=True))
        return {f"bias{n}.{name}": value for n, (part, own) in both for name, value in part.look(own, at).items()}


def combine(biases: Sequence[Bias]) -> Sum:
    """The sum of any number of biases, none included."""
    return Sum(tuple(biases))


@struct.dataclass
class RampState:
    """State of a ramp.

    Attributes:
        factors: [2] at the start and at the end of the run.
        bias: state of the bias within.
    """

    factors: jax.Array
    bias: Any


@dataclass(frozen=True)
class Ramp:
    """A bias whose strength goes linearly from one factor to another while the run goes on."""

    bias: Bias
    start: float = field(compare=False)
    end: float = field(compare=False)

    def init(self, walkers: int, atoms: int, dtype: DTypeLike) -> RampState:
        """The factors, and the state of the bias."""
        return RampState(jnp.asarray((self.start, self.end), dtype), self.bias.init(walkers, atoms, dtype))

    def apply(self, state: RampState, at: BiasInput) -> tuple[BiasForce, RampState]:
        """The bias at the strength of this step."""
        start, end = state.factors
        strength = (at.strength * (start + (end - start) * at.progress)).astype(at.strength.dtype)
        force, inner = self.bias.apply(state.bias, replace(at, strength=strength))
        return force, replace(state, bias=inner)

    @property
    def quantities(self) -> Mapping[str, str]:
        """Those of the bias within."""
        return self.bias.quantities

    def look(self, state: RampState, at: BiasInput) -> dict[str, jax.Array]:
        """Those of the bias within."""
        return self.bias.look(state.bias, at)


def per_walker(value: float | Sequence[float], walkers: int, dtype: DTypeLike, name: str) -> jax.Array:
    """One number for each walker, [W]: the same for all, or as many as there are.

    Raises:
        InputError: there are as many numbers as neither one nor the walkers.
    """
    numbers = jnp.asarray(value, dtype)
    if numbers.ndim and len(numbers) != walkers:
        raise InputError(
            f"{name} of a bias has {len(numbers)} values for {walkers} walkers; give one for each, or one."
        )
    return jnp.broadcast_to(numbers, (walkers,))
