"""Biases towards structures on which the committee disagrees.

With the member energies E_m, their mean E and ``sigma = sqrt(mean_m (E_m - E)^2)``, the gradient of sigma is a linear
combination of those of the members, ``sum_m (E_m - E) / (M sigma) grad E_m``: member forces and virials, which the
step has computed anyway, give bias force and bias virial exactly and for almost nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, Self

import jax
import jax.numpy as jnp
from flax import struct
from pydantic import Field, model_validator

from almlip_jax.dynamics.biases.base import Bias, BiasForce, BiasSettings, applied
from almlip_jax.dynamics.seen import RunContext, Seen
from almlip_jax.settings import unit

_FLOOR = 1e-6  # eV; the spread is sqrt(sigma^2 + floor^2), smooth where all members agree
_LEAST_SLOPE = 1e-5  # of the mean force; below, members differ by rounding


@struct.dataclass
class UncertaintyState:
    """State of `UncertaintyBias`.

    Attributes:
        tau: [W] factor on the spread in this step.
        relative: scalar, mean bias force asked for, as a fraction of the mean force.
        share: scalar, weight of a new step in the running means: 1 / window.
        force: [W] eV/Angstrom, running mean of the norm of the force, averaged over real atoms.
        slope: [W] eV/Angstrom, the same of the gradient of the spread.
    """

    tau: jax.Array
    relative: jax.Array
    share: jax.Array
    force: jax.Array
    slope: jax.Array


@dataclass(frozen=True)
class UncertaintyBias(Bias):
    """``E_b = -tau sigma``, with tau fixed, or following the forces so that the bias is a given fraction of them.

    An automatic tau is ``relative <|F|> / <|grad sigma|>``; both are exponential running means over a window of steps,
    of the norm averaged over the real atoms of the walker, F being the mean force of the committee.  In each step tau
    is what the steps before have made it, and a constant in the derivative; it is 0 in the first step, and as long as
    the members agree to within rounding.

    Args:
        tau: fixed factor; without, it is automatic.
        relative: mean bias force over mean force that an automatic tau aims at.
        window: steps of the running means.

    Source: van der Oord, Sachs, Kovacs, Ortner and Csanyi, npj Comput. Mater. 9, 168 (2023).
    """

    automatic: bool = field(init=False)
    tau: float | None = field(default=None, compare=False)
    relative: float = field(default=0.2, compare=False)
    window: float = field(default=100, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "automatic", self.tau is None)

    def init(self, context: RunContext) -> UncertaintyState:
        """The fixed tau, or none yet."""
        walkers, dtype = context.walkers, context.dtype
        zero = jnp.zeros(walkers, dtype)
        return UncertaintyState(
            tau=jnp.full(walkers, self.tau or 0, dtype),
            relative=jnp.asarray(self.relative, dtype),
            share=jnp.asarray(1 / self.window, dtype),
            force=zero,
            slope=zero,
        )

    def apply(self, state: UncertaintyState, seen: Seen) -> tuple[BiasForce, UncertaintyState]:
        """The bias of this step, and tau for the next."""
        deviation = seen.member_energy - jnp.mean(seen.member_energy, axis=0)
        spread = jnp.sqrt(jnp.mean(deviation**2, axis=0) + _FLOOR**2)
        down = _members(deviation / (len(deviation) * spread), seen)  # -grad sigma, -d(sigma)/d(strain)
        tau = state.tau[:, None, None]
        force = applied(BiasForce(-state.tau * spread, -tau * down.forces, -tau * down.virial), seen)
        return force, self._follow(state, down.forces, seen) if self.automatic else state

    @property
    def quantities(self) -> dict[str, str]:
        """The factor on the spread."""
        return {"tau": ""}

    def look(self, state: UncertaintyState, seen: Seen) -> dict[str, jax.Array]:
        """The factor on the spread, for the next step."""
        return {"tau": state.tau}

    def _follow(self, state: UncertaintyState, slope: jax.Array, at: Seen) -> UncertaintyState:
        now = (_mean_norm(jnp.mean(at.member_forces, axis=0), at), _mean_norm(slope, at))
        usable = at.visited & jnp.isfinite(now[0]) & jnp.isfinite(now[1])
        means = [
            jnp.where(usable, old + state.share * (new - old), old).astype(old.dtype)
            for old, new in zip((state.force, state.slope), now, strict=True)
        ]
        # both means started at 0, so that their ratio is right from the first step on
        known = means[1] > _LEAST_SLOPE * means[0]
        tau = jnp.where(known, state.relative * means[0] / jnp.where(known, means[1], 1), 0)
        return replace(state, tau=tau.astype(state.tau.dtype), force=means[0], slope=means[1])


@struct.dataclass
class BoundedState:
    """State of `BoundedUncertaintyBias`.

    Attributes:
        height: scalar, eV.
        width: scalar, eV.
    """

    height: jax.Array
    width: jax.Array


@dataclass(frozen=True)
class BoundedUncertaintyBias(Bias):
    """``E_b = H (exp(-sigma^2 / (N w^2)) - 1)`` for N real atoms: between -H and 0, however large the spread.

    Args:
        height: H, eV.
        width: w, eV: the spread of one atom at which the bias sets in.

    Source: the form of Kulichenko et al., Nat. Comput. Sci. 3, 230 (2023), with sigma^2 the mean square deviation.
    """

    height: float = field(compare=False)
    width: float = field(compare=False)

    def init(self, context: RunContext) -> BoundedState:
        """The two numbers."""
        return BoundedState(jnp.asarray(self.height, context.dtype), jnp.asarray(self.width, context.dtype))

    def apply(self, state: BoundedState, seen: Seen) -> tuple[BiasForce, BoundedState]:
        """The bias of this step."""
        deviation = seen.member_energy - jnp.mean(seen.member_energy, axis=0)
        scale = jnp.maximum(jnp.sum(seen.atom_mask, axis=1), 1) * state.width**2  # [W]
        exponent = -jnp.mean(deviation**2, axis=0) / scale
        slope = -2 * state.height * jnp.exp(exponent) / scale  # dE_b over sigma d(sigma)
        pull = _members(slope * deviation / len(deviation), seen)
        energy = state.height * jnp.expm1(exponent)
        return applied(BiasForce(energy, pull.forces, pull.virial), seen), state


def _members(weights: jax.Array, at: Seen) -> BiasForce:
    """Forces and virial summed over the members with weights [M, W]."""
    return BiasForce(
        energy=jnp.zeros_like(weights[0]),
        forces=jnp.einsum("mw,mwna->wna", weights, at.member_forces),
        virial=jnp.einsum("mw,mwab->wab", weights, at.member_virial),
    )


def _mean_norm(vectors: jax.Array, at: Seen) -> jax.Array:
    norms = jnp.where(at.atom_mask, jnp.linalg.norm(vectors, axis=-1), 0)
    return jnp.sum(norms, axis=1) / jnp.maximum(jnp.sum(at.atom_mask, axis=1), 1)


class UncertaintySettings(BiasSettings):
    """Towards structures on which the committee disagrees: ``E_b = -tau sigma_E``."""

    kind: Literal["uncertainty"] = "uncertainty"
    needs_spread: ClassVar[bool] = True
    tau: float | None = Field(default=None, ge=0, le=1e6)
    """Fixed factor; without, it follows the forces."""
    relative: float = Field(default=0.2, ge=0, le=100.0)
    """Mean bias force over mean force that an automatic tau aims at."""
    window: float = Field(default=100.0, ge=1, le=1e9)
    """Steps over which the running means of an automatic tau extend."""

    @model_validator(mode="after")
    def _what_follows_is_not_fixed(self) -> Self:
        for name in ("relative", "window"):
            if self.tau is not None and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"tau is fixed, and {name} is of one that follows the forces: leave one of them out.")
        return self

    def plain(self) -> Bias:
        """See `UncertaintyBias`."""
        return UncertaintyBias(self.tau, self.relative, self.window)


class BoundedUncertaintySettings(BiasSettings):
    """The same without running away: ``E_b = H (exp(-sigma_E^2 / (N w^2)) - 1)``, N atoms."""

    kind: Literal["bounded_uncertainty"] = "bounded_uncertainty"
    needs_spread: ClassVar[bool] = True
    height: float = Field(gt=0, le=1000.0, json_schema_extra=unit("eV"))
    """Height H, eV: the bias energy lies between -H and 0."""
    width: float = Field(gt=0, le=1000.0, json_schema_extra=unit("eV"))
    """Width w, eV: the spread of one atom at which the bias sets in."""

    def plain(self) -> Bias:
        """See `BoundedUncertaintyBias`."""
        return BoundedUncertaintyBias(self.height, self.width)
