"""What a model says about its own errors: distributions around its predictions, and the outputs they are made of.

A mean-variance model (Nix and Weigend 1994; for forces, Busk et al., Phys. Chem. Chem. Phys. 25, 25828, 2023) predicts
the variance of its errors; an evidential one (Amini et al., NeurIPS 2020) a normal-inverse-gamma distribution with
parameters (v, alpha, beta) around its prediction: variance of the noise ``beta / (alpha - 1)``, of the prediction
``beta / (v (alpha - 1))``.  Variances of energies and virials are sums over atoms, those of forces belong to each atom
and are the same for its three components; v and alpha of a structure are means over its atoms.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal, Self, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.scipy.special import gammaln
from jax.scipy.stats import norm
from pydantic import Field

from almlip_jax.errors import InputError
from almlip_jax.kinds import Named, UserCode
from almlip_jax.structures.graph import Graph, atom_counts, lone_atom, sum_over_atoms

_LEAST = 1e-3  # of v and alpha - 1: variances stay finite far from what was trained on
_FIRST_SIGMA = 0.1  # standard deviation that a fresh model predicts for an atom, in energy scales


@struct.dataclass
class Belief:
    """A normal distribution of errors around a prediction; classes below it are other distributions.

    The variance alone has a unit, and what such a class adds has none.

    Attributes:
        variance: of the noise of one component.
    """

    variance: jax.Array

    @property
    def epistemic(self) -> jax.Array:
        """Variance of the prediction itself; 0 where the model says nothing about it."""
        return jnp.zeros_like(self.variance)

    @classmethod
    def gives(cls) -> frozenset[str]:
        """What a single model tells by it: ``total`` deviations, and ``epistemic`` ones where these are not 0."""
        return frozenset({"total"} if cls.epistemic is Belief.epistemic else {"total", "epistemic"})

    def per_atom(self, counts: jax.Array) -> Self:
        """What belongs to structures, for the same quantity per atom; counts [S]."""
        return cast(Self, replace(self, variance=self.variance / counts**2))

    def for_components(self, axes: int) -> Self:
        """One belief for all components, which lie along further axes."""
        return cast(Self, jax.tree.map(lambda x: x.reshape(*x.shape, *axes * (1,)), self))

    def normal(self, residual: jax.Array, floor: float) -> tuple[jax.Array, jax.Array]:
        """Residual of the mean over heads, and the variance predicted for it: of heads, noise and the prediction.

        Args:
            residual: [H, ...] of the heads of a model.
            floor: standard deviation whose square is added.
        """
        mean, variance = of_heads(residual, floor)
        return mean, variance + self.variance + self.epistemic

    def nll(self, residual: jax.Array, floor: float) -> jax.Array:
        """Negative log-likelihood of the labels, up to a constant, [...]; arguments as for `normal`."""
        return normal_nll(*self.normal(residual, floor))

    def crps(self, residual: jax.Array, floor: float) -> jax.Array:
        """Continuous ranked probability score of the labels, in the unit of the residual, [...]; as `nll`.

        That of a normal distribution of the same variance, where a class gives no other.
        """
        return normal_crps(*self.normal(residual, floor))

    def wrong_evidence(self, residual: jax.Array, floor: float, weight: float) -> jax.Array | None:
        """What `nll` costs besides where a prediction is wrong in spite of much evidence, times a weight, [...]."""
        return None


@struct.dataclass
class EvidentialBelief(Belief):
    """A normal-inverse-gamma distribution, whose labels have Student's (Amini et al., eqs. 8 and 9).

    Attributes:
        evidence: v, with which the variance of the prediction itself is ``variance / evidence``.
        shape: alpha.
    """

    evidence: jax.Array
    shape: jax.Array

    @property
    def epistemic(self) -> jax.Array:
        """Variance of the prediction itself."""
        return self.variance / self.evidence

    def nll(self, residual: jax.Array, floor: float) -> jax.Array:
        """That of Student's distribution, for models with one head."""
        mean = jnp.mean(residual, axis=0)
        v, alpha = self.evidence, self.shape
        noise = self.variance + floor**2
        omega = 2 * noise * (alpha - 1) * (1 + v)  # noise = beta / (alpha - 1)
        return (
            -0.5 * jnp.log(v)
            - alpha * jnp.log(omega)
            + (alpha + 0.5) * jnp.log(v * mean**2 + omega)
            + gammaln(alpha)
            - gammaln(alpha + 0.5)
        )

    def wrong_evidence(self, residual: jax.Array, floor: float, weight: float) -> jax.Array:
        """``|residual| (2 v + alpha)`` in units of the noise."""
        noise = self.variance + floor**2
        in_noise = jnp.abs(jnp.mean(residual, axis=0)) / jax.lax.stop_gradient(jnp.sqrt(noise))
        return weight * in_noise * (2 * self.evidence + self.shape)


def of_heads(residual: jax.Array, floor: float) -> tuple[jax.Array, jax.Array]:
    """Mean of residuals [H, ...] over heads, and their variance with the square of a floor added."""
    mean = jnp.mean(residual, axis=0)
    return mean, jnp.mean((residual - mean) ** 2, axis=0) + floor**2


def normal_nll(mean: jax.Array, variance: jax.Array) -> jax.Array:
    """The negative logarithm of a normal density, without constants."""
    return 0.5 * (jnp.log(variance) + mean**2 / variance)


def normal_crps(mean: jax.Array, variance: jax.Array) -> jax.Array:
    """The continuous ranked probability score of a normal distribution (Gneiting and Raftery, JASA 102, 359, 2007)."""
    sigma = jnp.sqrt(variance)
    z = mean / sigma
    return sigma * (z * (2 * norm.cdf(z) - 1) + 2 * norm.pdf(z) - np.asarray(1 / np.sqrt(np.pi), z.dtype))


@struct.dataclass
class Noise:
    """What a model says about its own errors.

    Attributes:
        energy: of the energy of a structure, [(L,) S] eV^2.
        forces: of each component of the force on an atom, [(L,) A] (eV/Angstrom)^2.
        virial: of each component of the virial of a structure, [(L,) S] eV^2.
    """

    energy: Belief
    forces: Belief
    virial: Belief


class LikelihoodSettings(Named):
    """What each model says about its own errors."""

    silent: ClassVar[bool] = False
    """Whether that is nothing."""
    several_heads: ClassVar[bool] = True
    """Whether it goes with several heads, which have a spread of their own."""
    looks_at: ClassVar[frozenset[str]] = frozenset()
    """Keys of losses that it alone looks at."""

    @property
    @abstractmethod
    def outputs(self) -> int:
        """Further outputs of the last layer for each atom."""

    @property
    def gives(self) -> frozenset[str]:
        """What a single model tells by it, as `Belief.gives` of its distributions."""
        return Belief.gives()

    @abstractmethod
    def noise(self, raw: jax.Array, graph: Graph, scale: jax.Array) -> Noise | None:
        """What a model says about its errors in a graph.

        Args:
            raw: [A, outputs] of the last layer, of order 0.1 and around 0 in a fresh model.
            graph: its padding atoms have outputs too.
            scale: [] scale of energies, eV.

        Raises:
            InputError: a user's factory cannot be imported, or makes none.
        """


class NoLikelihood(LikelihoodSettings):
    """Models say nothing about their errors."""

    silent: ClassVar[bool] = True

    kind: Literal["none"] = "none"

    @property
    def outputs(self) -> int:
        """None."""
        return 0

    @property
    def gives(self) -> frozenset[str]:
        """Nothing."""
        return frozenset()

    def noise(self, raw: jax.Array, graph: Graph, scale: jax.Array) -> Noise | None:
        """Nothing."""
        return None


class MeanVariance(LikelihoodSettings):
    """A variance of the energy, of force components and of virial components."""

    kind: Literal["mean_variance"] = "mean_variance"

    @property
    def outputs(self) -> int:
        """One for each."""
        return 3

    def noise(self, raw: jax.Array, graph: Graph, scale: jax.Array) -> Noise:
        """Normal distributions."""
        energy, forces, virial = _variances(raw, scale)
        return Noise(Belief(sum_over_atoms(energy, graph)), Belief(forces), Belief(sum_over_atoms(virial, graph)))


class Evidential(LikelihoodSettings):
    """Parameters of a normal-inverse-gamma distribution, which tell noise from ignorance."""

    several_heads: ClassVar[bool] = False
    looks_at: ClassVar[frozenset[str]] = frozenset({"evidence_penalty"})

    kind: Literal["evidential"] = "evidential"

    @property
    def outputs(self) -> int:
        """Variance, v and alpha of each."""
        return 9

    @property
    def gives(self) -> frozenset[str]:
        """Epistemic deviations too."""
        return EvidentialBelief.gives()

    def noise(self, raw: jax.Array, graph: Graph, scale: jax.Array) -> Noise:
        """Student's distributions of labels."""
        energy, forces, virial = _variances(raw, scale)
        evidence = _LEAST + jax.nn.softplus(raw[:, 3:6] + _inverse_softplus(1.0))
        shape = 1 + _LEAST + jax.nn.softplus(raw[:, 6:9] + _inverse_softplus(1.0))
        counts = atom_counts(graph)

        def of_structure(variance: jax.Array, column: int) -> EvidentialBelief:
            means = (sum_over_atoms(x[:, column], graph) / counts for x in (evidence, shape))
            # a padding slot holds no atom, whose sums are zero
            v, alpha = (jnp.where(graph.structure_mask, mean, 2.0) for mean in means)
            return EvidentialBelief(sum_over_atoms(variance, graph), v, alpha)

        of_atoms = EvidentialBelief(forces, evidence[:, 1], shape[:, 1])
        return Noise(of_structure(energy, 0), of_atoms, of_structure(virial, 2))


class UserLikelihood(UserCode, LikelihoodSettings):
    """A user's own factory ``(**parameters) -> noise``, a function ``(raw, graph, scale) -> Noise`` in jax.numpy.

    Arguments are those of `LikelihoodSettings.noise`, and the distributions `Belief` or classes below it.
    """

    kind: Literal["user"] = "user"

    columns: int = Field(default=3, ge=1, le=64)
    """Further outputs of the last layer for each atom, of which the function makes distributions."""
    epistemic: bool = False
    """Whether its distributions also tell the variance of the prediction itself, so that scores of kind epistemic are
    more than the spread of the members."""

    @property
    def outputs(self) -> int:
        """As said."""
        return self.columns

    @property
    def gives(self) -> frozenset[str]:
        """As said."""
        return frozenset({"total", "epistemic"} if self.epistemic else {"total"})

    def check_code(self) -> None:
        """Asks the function for the distributions of an atom, and these for their scores."""
        super().check_code()
        raw, number = jax.ShapeDtypeStruct((1, self.columns), jnp.float32), jax.ShapeDtypeStruct((), jnp.float32)
        with self.tried_on(f"{self.columns} outputs of an atom"):
            self._check(jax.eval_shape(lambda raw, scale: self.noise(raw, lone_atom(), scale), raw, number))

    def _check(self, noise: Any) -> None:
        """Refuses what is no `Noise` of as many structures and atoms, or tells more or less than the settings say."""
        beliefs = [getattr(noise, name, None) for name in ("energy", "forces", "virial")]
        if not isinstance(noise, Noise) or not all(isinstance(belief, Belief) for belief in beliefs):
            raise InputError(
                f"'{self.function}' must return a function that makes an almlip_jax.ensembles.Noise of three Beliefs."
            )
        for belief in cast(list[Belief], beliefs):
            self._check_belief(belief)

    def _check_belief(self, belief: Belief) -> None:
        """Refuses a distribution of one atom or structure, as shapes, that cannot be judged."""
        made = f"the {type(belief).__name__} of '{self.function}'"
        for name, held in vars(belief).items():
            if held.shape != (1,):
                raise InputError(
                    f"{made} has {name} of shape {held.shape} for one atom or structure, which should be (1,): "
                    "energies and virials have one for each structure, forces one for each atom."
                )
        residual = jax.ShapeDtypeStruct((2, 1, 3), jnp.float32)  # of two heads
        for score in (type(belief).nll, type(belief).crps):
            found = jax.eval_shape(partial(_of_components, score), belief, residual)
            if found.shape != (1, 3):
                raise InputError(
                    f"{score.__name__} of {made} must give a number for each residual, but of two heads with residuals "
                    f"of shape (1, 3) it makes {found.shape}."
                )
        if belief.gives() != self.gives:
            says = "no variance" if self.epistemic else "a variance"
            raise InputError(
                f"{made} tells {says} of the prediction itself; set ensemble.likelihood.epistemic to "
                f"{str(not self.epistemic).lower()}."
            )

    def noise(self, raw: jax.Array, graph: Graph, scale: jax.Array) -> Noise:
        """What the function gives."""
        function: Callable[..., Noise] = self.kept(lambda: self.call_for_function("raw", "graph", "scale"))
        return function(raw, graph, scale)


def deviations(raw: jax.Array, scale: jax.Array) -> jax.Array:
    """Standard deviations > 0 of outputs of a last layer: a tenth of a scale where these are 0, as in fresh models.

    Args:
        raw: outputs, [...].
        scale: in the unit of the deviations; broadcasts against the outputs.

    >>> import jax.numpy as jnp
    >>> from almlip_jax.ensembles import deviations
    >>> [round(float(one), 2) for one in deviations(jnp.array([0.0, 2.0]), 3.0)]
    [0.3, 1.72]
    """
    return scale * jax.nn.softplus(raw + _inverse_softplus(_FIRST_SIGMA))


def _of_components(score: Callable[..., jax.Array], belief: Belief, residual: jax.Array) -> jax.Array:
    """A score of three components, with some floor."""
    return score(belief.for_components(1), residual, 0.1)


def _variances(raw: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What each atom adds to the variance of the energy, that of its forces, what it adds to that of the virial."""
    sigma = deviations(raw[:, :3], scale)
    return sigma[:, 0] ** 2, sigma[:, 1] ** 2, sigma[:, 2] ** 2


def _inverse_softplus(value: float) -> float:
    return float(np.log(np.expm1(value)))
