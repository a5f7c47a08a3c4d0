"""Kinds of losses: what a residual costs, and the weights of the means of these costs.

A penalty turns each residual r into what is averaged:

- ``mse``: its square;
- ``huber``: ``r^2`` up to delta and ``delta (2 |r| - delta)`` beyond.  That is twice the usual Huber function, so that
  it equals the square for small residuals and the weights of the loss keep their meaning;
- ``nll``: the negative log-likelihood of the label, without constants, under the distribution that the model predicts:
  ``(ln sigma^2 + r^2 / sigma^2) / 2`` for a normal one (mean and variance of the heads, plus the variance of a noise
  that is learned); the Student distribution of an evidential model (Amini et al., NeurIPS 2020, eqs. 8 and 9);
- ``crps``: the continuous ranked probability score of that normal distribution (Gneiting and Raftery, JASA 102, 359,
  2007);
- ``mlip``: the square of the residual of the whole structure, and components are summed instead of averaged (six of a
  virial): the loss of MLIP-2, divided by the number of structures, ``mean of w_e dE^2 + w_f sum |dF|^2 + w_s sum dW^2``
  with the virial W (Novikov et al., Mach. Learn.: Sci. Technol. 2, 025002, 2021);
- ``user``: a function of one's own.

Models with several heads are penalised head by head under all but ``nll`` and ``crps``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Literal, cast

import jax
import jax.numpy as jnp
from pydantic import ConfigDict, Field, model_validator

from almlip_jax.ensembles import Belief
from almlip_jax.ensembles.likelihoods import normal_crps, normal_nll, of_heads
from almlip_jax.errors import InputError, any_of
from almlip_jax.kinds import Spec, UserCode
from almlip_jax.settings import unit
from almlip_jax.target_settings import ByTarget
from almlip_jax.targets import Target

WEIGHTS = ("energy", "forces", "virial")
"""Keys of the weights that every loss has."""


class LossSettings(ByTarget, Spec):
    """How residuals are penalised, and the weights of their means: eV/atom, eV/Angstrom and, for virials, eV/atom.

    What else models give (dipoles) has a weight under its name.
    """

    model_config = ConfigDict(extra="allow")  # of `ByTarget`, which `Spec` would take back

    default_kind: ClassVar[str | None] = "mse"
    judges_uncertainty: ClassVar[bool] = False
    """Whether it needs members that say how sure they are."""
    is_square: ClassVar[bool] = False
    """Whether penalties are squares of residuals, which variable projection minimises."""
    summed: ClassVar[bool] = False
    """Whether residuals are of whole structures and summed over components and atoms."""

    energy: float = Field(default=10.0, ge=0, le=1e6)
    """Weight of the mean penalty of the energy residual per atom."""
    forces: float = Field(default=1.0, ge=0, le=1e6)
    """Weight of the mean penalty of the force components."""
    virial: float = Field(default=1.0, ge=0, le=1e6)
    """Weight of the mean penalty of the virial components per atom; structures without stress do not count."""

    @abstractmethod
    def penalty(self, residual: jax.Array, belief: Belief | None, target: Target) -> jax.Array:
        """Penalties of residuals.

        Args:
            residual: [H, ...] of the heads of a model; for what belongs to whole structures and grows with them, per
                atom, unless the loss is ``summed``.
            belief: what the model says about its error, [...]; None where it says nothing.
            target: what the residuals are of.

        Returns:
            [...] penalties, one for all heads.
        """

    @classmethod
    def keys_of(cls, target: Target) -> Iterator[tuple[str, Any, Any]]:
        """A weight."""
        said = (
            f"Weight of the mean penalty of the {target.name}{' (its components)' if target.shape else ''}, of models "
            f"that give {target.one}; {'atoms' if target.per == 'atom' else 'structures'} without do not count."
        )
        yield target.name, float, Field(default=target.weight, ge=0, le=1e6, description=said)

    def weight_of(self, target: Target) -> float:
        """Weight of the mean penalty of a target."""
        return float(self.said(target.name, target.weight))

    def as_kind(self, kind: str, weights: Mapping[str, float]) -> LossSettings:
        """The loss of another kind with some weights; what both have besides weights stays, as do further targets."""
        other = LossSettings.kinds()[kind]
        kept = {name: value for name, value in self.model_dump().items() if name not in (*WEIGHTS, "kind")}
        shared = {name: value for name, value in kept.items() if name in other.known_fields()}
        return other.model_validate(shared | dict(weights))

    @model_validator(mode="before")
    @classmethod
    def _leave_out_other_kinds(cls, given: Any) -> Any:
        """Keys of other kinds are refused, unless they have their defaults: earlier versions wrote down all keys."""
        if not isinstance(given, dict) or given.keys() <= cls.model_fields.keys():
            return given
        idle = {}
        for key in given.keys() - cls.known_fields().keys():
            kinds = {name: kind.known_fields()[key] for name, kind in _kinds_with(key)}
            if kinds and all(field.default != given[key] for field in kinds.values()):
                raise ValueError(f"{key} counts with a loss of kind {any_of(kinds)} only; leave it out, or take that.")
            if kinds:
                idle[key] = given[key]
        return {key: value for key, value in given.items() if key not in idle}


def _kinds_with(key: str) -> Iterator[tuple[str, type[LossSettings]]]:
    """The kinds of losses that have a key which has a default."""
    for name, kind in LossSettings.kinds().items():
        field = kind.known_fields().get(key)
        if field is not None and not field.is_required():
            yield name, kind


class SquaredLoss(LossSettings):
    """Mean squares."""

    is_square: ClassVar[bool] = True

    kind: Literal["mse"] = "mse"

    def penalty(self, residual: jax.Array, belief: Belief | None, target: Target) -> jax.Array:
        """Squares, as mean over the heads."""
        return jnp.mean(residual**2, axis=0)


class HuberLoss(LossSettings):
    """Squares up to a delta and linear beyond it, so that a few bad labels or atoms pull less."""

    kind: Literal["huber"] = "huber"

    energy_delta: float = Field(default=0.01, ge=1e-8, le=1000.0, json_schema_extra=unit("eV/atom"))
    """Energy residual beyond which the penalty is linear, eV/atom."""
    forces_delta: float = Field(default=0.1, ge=1e-8, le=1000.0, json_schema_extra=unit("eV/Angstrom"))
    """Residual of a force component beyond which the penalty is linear, eV/Angstrom."""
    virial_delta: float = Field(default=0.01, ge=1e-8, le=1000.0, json_schema_extra=unit("eV/atom"))
    """Residual of a virial component beyond which the penalty is linear, eV/atom."""

    @classmethod
    def keys_of(cls, target: Target) -> Iterator[tuple[str, Any, Any]]:
        """Weight, and residual beyond which the penalty is linear."""
        yield from super().keys_of(target)
        of = f"Residual of {target.one}{' component' if target.shape else ''}"
        written = target.written + "/atom" * target.by_atoms
        said = f"{of} beyond which the penalty is linear, {written}."
        field = Field(default=target.delta, ge=1e-8, le=1e6, json_schema_extra=unit(written), description=said)
        yield f"{target.name}_delta", float, field

    def delta_of(self, target: Target) -> float:
        """Residual of a target beyond which the penalty is linear."""
        return float(self.said(f"{target.name}_delta", target.delta))

    def penalty(self, residual: jax.Array, belief: Belief | None, target: Target) -> jax.Array:
        """Twice Huber's function, as mean over the heads."""
        delta, size = self.delta_of(target), jnp.abs(residual)
        return jnp.mean(jnp.where(size <= delta, residual**2, delta * (2 * size - delta)), axis=0)


class _OfDistributions(LossSettings):
    """What judges the distribution that members predict: `ensemble.heads` or `ensemble.likelihood` is needed."""

    judges_uncertainty: ClassVar[bool] = True

    energy_floor: float = Field(default=1e-4, ge=1e-8, le=10.0, json_schema_extra=unit("eV/atom"))
    """Standard deviation that is added to the predicted one in square, eV/atom."""
    forces_floor: float = Field(default=1e-3, ge=1e-8, le=10.0, json_schema_extra=unit("eV/Angstrom"))
    """The same for a force component, eV/Angstrom."""
    virial_floor: float = Field(default=1e-4, ge=1e-8, le=10.0, json_schema_extra=unit("eV/atom"))
    """The same for a virial component, eV/atom."""

    def floor_of(self, target: Target) -> float:
        """Standard deviation that is added to the predicted one of a target in square; 0 where none is predicted."""
        return float(self.said(f"{target.name}_floor", 0.0))


class LikelihoodLoss(_OfDistributions):
    """The negative log-likelihood of the labels under what members predict: heads, or `ensemble.likelihood`."""

    kind: Literal["nll"] = "nll"

    energy: float = Field(default=0.1, ge=0, le=1e6)
    """Weight of the mean penalty of the energy residual per atom; penalties have no unit here."""
    virial: float = Field(default=0.1, ge=0, le=1e6)
    """Weight of the mean penalty of the virial components per atom; structures without stress do not count."""
    evidence_penalty: float = Field(default=0.01, ge=0, le=1000.0)
    """With evidential members: weight of |residual| (2 v + alpha), in units of the noise, which takes evidence away
    where predictions are wrong."""

    def penalty(self, residual: jax.Array, belief: Belief | None, target: Target) -> jax.Array:
        """The negative logarithm of a density, without constants: normal of heads alone, or as the model believes."""
        floor = self.floor_of(target)
        if belief is None:
            return normal_nll(*of_heads(residual, floor))
        found = belief.nll(residual, floor)
        wrong = belief.wrong_evidence(residual, floor, self.evidence_penalty)
        return found if wrong is None else found + wrong


class RankedLoss(_OfDistributions):
    """The continuous ranked probability score: judges the predicted distribution too, more lenient with outliers."""

    kind: Literal["crps"] = "crps"

    def penalty(self, residual: jax.Array, belief: Belief | None, target: Target) -> jax.Array:
        """The score of a normal distribution of heads alone, or of what the model believes, in the residual's unit."""
        floor = self.floor_of(target)
        return normal_crps(*of_heads(residual, floor)) if belief is None else belief.crps(residual, floor)


class SummedLoss(LossSettings):
    """The loss of MLIP-2: squares of the energy of a structure, of the three components of each force and of the six of
    the virial, summed and not averaged.
    """

    is_square: ClassVar[bool] = True
    summed: ClassVar[bool] = True

    kind: Literal["mlip"] = "mlip"

    energy: float = Field(default=1.0, ge=0, le=1e6)
    """Weight of the square of a structure's energy residual (eV)."""
    forces: float = Field(default=0.01, ge=0, le=1e6)
    """Weight of the sum of the squares of all force components."""
    virial: float = Field(default=0.001, ge=0, le=1e6)
    """Weight of the sum of the squares of the virial (eV); structures without stress do not count."""

    def penalty(self, residual: jax.Array, belief: Belief | None, target: Target) -> jax.Array:
        """Squares, as mean over the heads."""
        return jnp.mean(residual**2, axis=0)


class UserLoss(UserCode, LossSettings):
    """A user's own factory ``(**parameters) -> penalty``.

    The penalty is a function ``(residual, target)`` in jax.numpy, element by element and with a derivative everywhere:
    of residuals of any shape in the unit of the target (energies and virials per atom) and the target's name to
    penalties of the same shape.  Members with several heads are penalised head by head.
    """

    kind: Literal["user"] = "user"

    def check_code(self) -> None:
        """Refuses what is no penalty.

        Raises:
            InputError: as for `UserCode.check_code`, or it does not give a number for each residual.
        """
        super().check_code()
        asked = jax.ShapeDtypeStruct((2, 3), jnp.float32)
        with self.tried_on("residuals"):
            found = jax.eval_shape(lambda residual: self._function(residual, "forces"), asked)
        if getattr(found, "shape", None) != asked.shape:
            raise InputError(
                f"'{self.function}' must return a function that gives one penalty for each residual, but of residuals "
                f"of shape {asked.shape} it makes {getattr(found, 'shape', type(found).__name__)}."
            )

    def penalty(self, residual: jax.Array, belief: Belief | None, target: Target) -> jax.Array:
        """What the function gives, as mean over the heads."""
        return jnp.mean(self._function(residual, target.name), axis=0)

    @property
    def _function(self) -> Callable[[jax.Array, str], jax.Array]:
        made = self.kept(lambda: self.call_for_function("residual", "target"))
        return cast(Callable[[jax.Array, str], jax.Array], made)


SQUARES = SquaredLoss()
"""The penalties that mean squared errors are made of."""


def with_all_keys(loss: Mapping[str, Any]) -> dict[str, Any]:
    """What is said of a loss, with the keys of the other kinds of this package at their defaults.

    Identities of what was calculated by versions in which all losses had all keys are made of these.
    """
    others = (HuberLoss, LikelihoodLoss, RankedLoss)
    keys = {name: field.default for kind in others for name, field in kind.model_fields.items()}
    return {name: value for name, value in keys.items() if name not in (*WEIGHTS, "kind")} | dict(loss)
