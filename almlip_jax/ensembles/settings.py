"""Settings of an ensemble: how many members, what they have in common, and what makes them differ."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from almlip_jax.ensembles.bootstrap import BootstrapSettings, GammaBootstrap
from almlip_jax.ensembles.likelihoods import LikelihoodSettings, NoLikelihood
from almlip_jax.settings import Settings


class VariantSettings(Settings):
    """What some of the members have for themselves: keys of ``model`` and of ``training`` with other values."""

    model: dict[str, Any] = {}
    """Changes to the model; one that names another ``kind`` begins from the defaults of that kind."""
    training: dict[str, Any] = {}
    """Changes to the training."""


class EnsembleSettings(Settings):
    """How many members, and what makes them differ."""

    size: int = Field(default=4, ge=1, le=256)
    """Number of models; each starts from its own random parameters."""
    heads: int = Field(default=1, ge=1, le=1024)
    """Members that share one model except for their last layer: more than one make a shallow ensemble.  With
    ``size: 1`` it is one; with more, several of them.  Train it with a loss of kind ``nll`` or ``crps``."""
    likelihood: LikelihoodSettings = NoLikelihood()
    """What each model says about its own errors: ``none``, nothing; ``mean_variance``, a variance of its energy, forces
    and virial; ``evidential``, the parameters of a normal-inverse-gamma distribution, which tell noise from ignorance;
    or distributions of a user's own.  Train it with ``nll`` or ``crps``."""
    bootstrap: BootstrapSettings = GammaBootstrap()
    """Weights of the structures in each model's loss, of mean 1: ``none``, all equal; ``gamma``-distributed (every
    structure counts; at variance 1 this is the Bayesian bootstrap); ``poisson`` (the classical bootstrap, in which a
    third of the structures is left out of each model); or of a user's own.  A single model learns from all alike."""
    bootstrap_variance: float = Field(default=0.1, gt=0, le=100.0)
    """Variance of gamma weights: more makes the members differ more, and each of them less accurate."""
    order: Literal["shared", "own"] = "shared"
    """Order of the structures in training: one for all models, so that geometry is computed once for all of them; or
    one of its own for each, which makes members differ more and training slower."""
    variants: tuple[VariantSettings, ...] = ()
    """A committee of architectures: the models take these variants in turn; none makes all of them equal."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.heads > 1 and not self.likelihood.several_heads:
            raise ValueError(
                f"likelihood '{self.likelihood.kind}' needs heads: 1; several heads have a spread of their own."
            )
        if len(self.variants) > self.size:
            raise ValueError(
                f"size {self.size} is too small for {len(self.variants)} variants; give at least one each."
            )
        return self

    @property
    def members(self) -> int:
        """Number of members, models and their heads counted."""
        return self.size * self.heads

    @property
    def gives(self) -> frozenset[str]:
        """What a single member tells of its errors, as `LikelihoodSettings.gives`."""
        return self.likelihood.gives

    def without(self, models: Collection[int]) -> EnsembleSettings:
        """Settings of the ensemble that is left without some models, numbered architecture by architecture.

        Of a committee of architectures, each model that is left is then a variant of its own.
        """
        if not models:
            return self
        count = max(1, len(self.variants))
        places = [n for n in range(count) for _ in range(n, self.size, count)]  # the variant of each model
        kept = [n for model, n in enumerate(places) if model not in models]
        variants = self.variants if count == 1 else tuple(self.variants[n] for n in kept)
        return self.model_copy(update={"size": len(kept), "variants": variants})
