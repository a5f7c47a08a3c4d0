"""The protocol of biases: energies added to the potential while walkers explore, with their forces and virials.

Every bias multiplies what it does by `Seen.strength`, with `applied`; schedules are therefore biases around
biases that change the strength, like `Ramp`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal, Protocol, Self, cast

import jax
import jax.numpy as jnp
from flax import struct
from pydantic import Field

from almlip_jax.dynamics.seen import RunContext, Seen
from almlip_jax.errors import InputError
from almlip_jax.kinds import Spec, UserCode


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
    """An energy added to the potential; ``init`` and ``apply`` as all that lives in the loop (`dynamics.seen`).

    The force is asked for first, and the next state once it is known which walkers stay at these positions
    (`Seen.visited`).  The derivative is that of the energy at a given state: what ``apply`` learns from a step acts
    from the next one on.
    """

    def init(self, context: RunContext) -> Any:
        """State for all walkers, a pytree with floating numbers of the type of the run.

        Raises:
            InputError: the bias does not suit that many walkers or atoms.
        """
        ...

    def apply(self, state: Any, seen: Seen) -> tuple[BiasForce, Any]:
        """Energy, forces and virials of this step, and the next state."""
        ...

    @property
    def quantities(self) -> Mapping[str, str]:
        """What `look` tells: name -> unit."""
        return {}

    def look(self, state: Any, seen: Seen) -> dict[str, jax.Array]:
        """What tables show of the bias after a step, name -> [W]; called only for the steps that are shown.

        Args:
            state: after the step.
            seen: what the bias saw in the step.
        """
        return {}

    def hills(self, state: Any) -> Any:
        """What a state holds of a landscape of hills, on the host (`metadynamics.Hills`); None where there is none."""
        return None


def applied(force: BiasForce, at: Seen) -> BiasForce:
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


def no_force(at: Seen) -> BiasForce:
    """Zeros, for walkers on which a bias does not act.

    >>> from types import SimpleNamespace
    >>> import jax.numpy as jnp
    >>> from almlip_jax.dynamics.biases import no_force
    >>> no_force(SimpleNamespace(positions=jnp.ones((2, 5, 3)))).energy.tolist()  # eV, of 2 walkers
    [0.0, 0.0]
    """
    walkers, dtype = len(at.positions), at.positions.dtype
    return BiasForce(jnp.zeros(walkers, dtype), jnp.zeros_like(at.positions), jnp.zeros((walkers, 3, 3), dtype))


@dataclass(frozen=True)
class Sum(Bias):
    """Any number of biases at once; its state is the tuple of theirs, in order."""

    parts: tuple[Bias, ...] = ()

    def init(self, context: RunContext) -> tuple[Any, ...]:
        """The states of the parts, side by side."""
        return tuple(part.init(context) for part in self.parts)

    def apply(self, state: tuple[Any, ...], seen: Seen) -> tuple[BiasForce, tuple[Any, ...]]:
        """Sums of energies, forces and virials; zeros where there are no parts."""
        total, after = no_force(seen), []
        for part, own in zip(self.parts, state, strict=True):
            force, own = part.apply(own, seen)
            total = jax.tree.map(jnp.add, total, force)
            after.append(own)
        return total, tuple(after)

    @property
    def quantities(self) -> dict[str, str]:
        """Those of the parts; the names begin with ``bias`` and the position of the part, from 0."""
        return {f"bias{n}.{name}": unit for n, part in enumerate(self.parts) for name, unit in part.quantities.items()}

    def look(self, state: tuple[Any, ...], seen: Seen) -> dict[str, jax.Array]:
        """Those of the parts."""
        both = enumerate(zip(self.parts, state, strict=True))
        return {f"bias{n}.{name}": value for n, (part, own) in both for name, value in part.look(own, seen).items()}


def combine(biases: Sequence[Bias]) -> Sum:
    """The sum of any number of biases, none included.

    >>> from almlip_jax.dynamics.biases import Distance, Restraint, combine
    >>> bonds = [Restraint(Distance((0,), (n,)), stiffness=5.0, centre=1.2) for n in (1, 2)]
    >>> combine(bonds).quantities
    {'bias0.distance': 'Angstrom', 'bias1.distance': 'Angstrom'}
    """
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
class Ramp(Bias):
    """A bias whose strength goes linearly from one factor to another while the run goes on."""

    bias: Bias
    start: float = field(compare=False)
    end: float = field(compare=False)

    def init(self, context: RunContext) -> RampState:
        """The factors, and the state of the bias."""
        return RampState(jnp.asarray((self.start, self.end), context.dtype), self.bias.init(context))

    def apply(self, state: RampState, seen: Seen) -> tuple[BiasForce, RampState]:
        """The bias at the strength of this step."""
        start, end = state.factors
        strength = (seen.strength * (start + (end - start) * seen.progress)).astype(seen.strength.dtype)
        force, inner = self.bias.apply(state.bias, replace(seen, strength=strength))
        return force, replace(state, bias=inner)

    @property
    def quantities(self) -> Mapping[str, str]:
        """Those of the bias within."""
        return self.bias.quantities

    def look(self, state: RampState, seen: Seen) -> dict[str, jax.Array]:
        """Those of the bias within."""
        return self.bias.look(state.bias, seen)

    def hills(self, state: RampState) -> Any:
        """Those of the bias within."""
        return self.bias.hills(state.bias)


def per_walker(value: float | Sequence[float], context: RunContext, name: str) -> jax.Array:
    """One number for each walker, [W]: the same for all, or as many as there are.

    Raises:
        InputError: there are neither one number nor as many as walkers.
    """
    numbers = jnp.asarray(value, context.dtype)
    if numbers.ndim and len(numbers) != context.walkers:
        raise InputError(
            f"{name} of a bias has {len(numbers)} values for {context.walkers} walkers; give one, or one for each."
        )
    return jnp.broadcast_to(numbers, (context.walkers,))


Bounded = Annotated[float, Field(ge=-1e6, le=1e6)]
Positive = Annotated[float, Field(gt=0, le=1e6)]

PerWalker = Bounded | Annotated[tuple[Bounded, ...], Field(min_length=1)]
"""One number for all walkers, or one for each."""

PositivePerWalker = Positive | Annotated[tuple[Positive, ...], Field(min_length=1)]
"""The same, for numbers above 0."""


class BiasSettings(Spec):
    """Settings of any bias."""

    needs_spread: ClassVar[bool] = False
    """Whether it does nothing where members cannot disagree."""
    leaves_hills: ClassVar[bool] = False
    """Whether its state holds hills from which a free energy follows; see `Bias.hills`."""
    of_each: ClassVar[tuple[str, ...]] = ()
    """Keys that may be lists with one value for each walker."""

    ramp: tuple[Bounded, Bounded] | None = None
    """Factors on the bias at the start and at the end of a run, linear in between; none leaves it at 1."""

    @property
    def last_atom(self) -> int:
        """Highest index of an atom that it looks at; -1 where it looks at none by index, or that is not known."""
        return -1

    def lists(self) -> dict[str, tuple[float, ...]]:
        """The keys that have one value for each walker, and these."""
        return {key: given for key in self.of_each if isinstance(given := getattr(self, key), tuple)}

    def of_walkers(self, numbers: Sequence[int]) -> Self:
        """The bias of some of its walkers alone."""
        return self.model_copy(update={key: tuple(one[n] for n in numbers) for key, one in self.lists().items()})

    @property
    def follows_progress(self) -> str | None:
        """What in it depends on how much of the run is over, in words; None where nothing does."""
        return None if self.ramp is None else f"the ramp of the bias '{self.kind}'"

    @property
    def couples_walkers(self) -> bool:
        """Whether what one walker does acts on the others."""
        return False

    @property
    def paces(self) -> Mapping[str, int]:
        """Keys that say after how many steps, in the next one, it does something for the first time."""
        return {}

    @abstractmethod
    def plain(self) -> Bias:
        """The bias without its ramp.

        Raises:
            InputError: a user's function cannot be imported or built.
        """

    def build(self) -> Bias:
        """The bias, with its ramp; errors as for `plain`."""
        return self.plain() if self.ramp is None else Ramp(self.plain(), *self.ramp)


class UserBias(UserCode, BiasSettings):
    """A user's own factory ``(**parameters) -> Bias``."""

    kind: Literal["user"] = "user"
    scheduled: bool = True
    """Whether it looks at the progress of the run; a run whose biases do cannot be made longer."""

    @property
    def follows_progress(self) -> str | None:
        """True unless the settings say otherwise."""
        return super().follows_progress or ("the bias 'user' (scheduled)" if self.scheduled else None)

    def check_code(self) -> None:
        """Makes the bias."""
        self.plain()

    def plain(self) -> Bias:
        """What the factory makes."""
        return cast(Bias, self.call_for(("init", "apply", "look"), ("quantities",)))


def build_bias(settings: Sequence[BiasSettings]) -> Sum:
    """The sum of the biases that some settings describe; its state is the tuple of theirs, in order.

    Raises:
        InputError: a user's function cannot be imported or built.

    >>> from almlip_jax.dynamics.biases import BiasSettings, build_bias
    >>> held = {"kind": "sphere", "radius": 8.0}
    >>> build_bias([BiasSettings.parse(held)]).parts
    (Sphere(radius=8.0, stiffness=1.0),)
    """
    return combine([one.build() for one in settings])
