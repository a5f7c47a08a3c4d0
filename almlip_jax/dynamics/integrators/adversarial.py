"""Adversarial search: ascent on uncertainty at bounded energy, inside the same gated loop as dynamics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import optax
from pydantic import Field

from almlip_jax.dynamics.integrators.base import Integrator, IntegratorSettings, take_up
from almlip_jax.dynamics.motion import Evaluation, Moment, Motion, chosen
from almlip_jax.settings import unit

_LEAST_STD = 1e-6  # eV; members that agree to rounding show no direction


@dataclass(frozen=True)
class Adversarial(Integrator):
    """Adam on the positions, up the logarithm of ``exp(-E / kT) Var_E``.

    The gradient ``F / kT + grad Var_E / Var_E`` is a combination of the member forces of the step's one evaluation:
    ``grad Var_E = -(2 / M) sum_m (E_m - E) F_m``.  A normalisation of the Boltzmann factor on the training set changes
    nothing here; biases would not act, and settings refuse them.  Source: Schwalbe-Koda, Tan and Gomez-Bombarelli, Nat.
    Commun. 12, 5104 (2021), with the logarithm of their objective (the same maxima, and finite steps where the variance
    is small).  Parameters: ``rate`` (Angstrom), the step of Adam; the temperature of the walker bounds the energy.
    """

    thermal = False
    biased = False

    def _optimiser(self, at: Moment) -> optax.GradientTransformation:
        return optax.adam(at.numbers["rate"])

    def init(self, motion: Motion, at: Moment) -> Any:
        """Adam's moments, of each walker, and the direction of the next step."""
        return jax.vmap(self._optimiser(at).init)(motion.position), jnp.zeros_like(motion.position)

    def restart(self, motion: Motion, again: jax.Array, at: Moment) -> Motion:
        """Fresh moments."""
        extra = chosen(again, self.init(motion, at), motion.extra)
        return motion.set(extra=extra, momentum=jnp.zeros_like(motion.momentum))

    def from_start(self, motion: Motion, evaluation: Evaluation, at: Moment) -> Motion:
        """The first direction."""
        return self.from_force(motion, evaluation, at)

    def to_force(self, motion: Motion, at: Moment, step: jax.Array) -> Motion:
        """A step of Adam."""
        moments, ascent = motion.extra
        update, moments = jax.vmap(self._optimiser(at).update)(-ascent, moments)
        return motion.set(position=motion.position + update, extra=(moments, ascent))

    def from_force(self, motion: Motion, evaluation: Evaluation, at: Moment) -> Motion:
        """The direction at the new positions."""
        motion = take_up(motion, evaluation)
        return motion.set(extra=(motion.extra[0], ascent_direction(evaluation, at)))


def ascent_direction(evaluation: Evaluation, at: Moment) -> jax.Array:
    """Gradient of ``ln(exp(-E / kT) Var_E)`` with respect to positions, [W, N, 3] per Angstrom; E the members' mean."""
    deviation = evaluation.member_energy - jnp.mean(evaluation.member_energy, axis=0)
    variance = jnp.maximum(jnp.mean(deviation**2, axis=0), _LEAST_STD**2)
    of_variance = -2 * jnp.mean(deviation[:, :, None, None] * evaluation.member_forces, axis=0)
    boltzmann = jnp.mean(evaluation.member_forces, axis=0) / at.kt[:, None, None]
    ascent = boltzmann + of_variance / variance[:, None, None]
    return jnp.where(at.mobile[..., None], ascent, 0)


class AdversarialSettings(IntegratorSettings):
    """Ascent on the energy variance at bounded energy (Schwalbe-Koda, Tan and Gomez-Bombarelli, 2021)."""

    kind: Literal["adversarial"] = "adversarial"
    needs_spread: ClassVar[bool] = True
    rate: float = Field(default=0.005, gt=0, le=1.0, json_schema_extra=unit("Angstrom"))
    """Step of Adam, Angstrom; the walkers' temperature says what energies are bearable."""
    displacement: float = Field(default=0.02, ge=0, le=1.0, json_schema_extra=unit("Angstrom"))
    """Standard deviation of the first displacement of each coordinate, Angstrom."""

    @property
    def first_displacement(self) -> float:
        """That."""
        return self.displacement

    def build(self) -> Integrator:
        """See `Adversarial`."""
        return Adversarial()

    def numbers(self) -> dict[str, float]:
        """In eV, Angstrom and amu."""
        return {"rate": self.rate}
