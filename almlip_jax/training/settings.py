"""Settings of training: batches, optimiser, loss weights, stopping; and of the ensemble that is trained."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from almlip_jax.settings import Settings


class EnsembleSettings(Settings):
    """How many members, and what makes them differ."""

    size: int = Field(default=4, ge=1)
    """Number of members; each starts from its own random parameters."""
    bootstrap: Literal["none", "gamma", "poisson"] = "gamma"
    """Weights of the structures in each member's loss, of mean 1: all equal; gamma-distributed (every structure
    counts; at variance 1 this is the Bayesian bootstrap); or Poisson (the classical bootstrap, in which a third of the
    structures is left out of each member)."""
    bootstrap_variance: float = Field(default=0.1, gt=0)
    """Variance of gamma weights: more makes the members differ more, and each of them less accurate."""


class LossSettings(Settings):
    """How residuals are penalised, and the weights of their means: eV/atom, eV/Angstrom and, for virials, eV/atom."""

    kind: Literal["mse", "huber"] = "mse"
    """Squares; or squares up to a delta and linear beyond it, so that a few bad labels or atoms pull less."""
    energy: float = Field(default=10.0, ge=0)
    """Weight of the mean penalty of the energy residual per atom."""
    forces: float = Field(default=1.0, ge=0)
    """Weight of the mean penalty of the force components."""
    virial: float = Field(default=1.0, ge=0)
    """Weight of the mean penalty of the virial components per atom; structures without stress do not count."""
    energy_delta: float = Field(default=0.01, gt=0)
    """With ``huber``: energy residual beyond which the penalty is linear, eV/atom."""
    forces_delta: float = Field(default=0.1, gt=0)
    """With ``huber``: residual of a force component beyond which the penalty is linear, eV/Angstrom."""
    virial_delta: float = Field(default=0.01, gt=0)
    """With ``huber``: residual of a virial component beyond which the penalty is linear, eV/atom."""


class SecondStageSettings(Settings):
    """The end of a training, with other weights: usually more weight on energies, once forces have been learned.

    The parameters that are kept are the best ones by the loss of this stage, and patience counts in it alone.
    """

    start: float = Field(default=0.75, gt=0, lt=1)
    """Share of the steps after which it begins."""
    energy: float | None = Field(default=None, ge=0)
    """Weight of energies from then on; as in `loss` where not given, like the two others."""
    forces: float | None = Field(default=None, ge=0)
    """Weight of forces."""
    virial: float | None = Field(default=None, ge=0)
    """Weight of virials."""
    learning_rate_factor: float = Field(default=1.0, gt=0)
    """What the learning rate of the schedule is multiplied by."""

    @property
    def weights(self) -> tuple[float | None, float | None, float | None]:
        """Energy, forces, virial."""
        return self.energy, self.forces, self.virial


class TrainingSettings(Settings):
    """One training of the whole ensemble."""

    batch_size: int = Field(default=5, ge=1)
    """Structures in a batch."""
    max_epochs: int = Field(default=1000, ge=1)
    """Longest training in passes over the data."""
    max_steps: int = Field(default=6000, ge=1)
    """Longest training in optimiser steps; what comes first ends it, and the learning rate decays until then."""
    learning_rate: float = Field(default=5e-3, gt=0)
    """Highest learning rate."""
    optimiser: Literal["amsgrad", "adam", "adamw"] = "amsgrad"
    """How gradients become steps; ``adamw`` is Adam with decoupled weight decay."""
    weight_decay: float = Field(default=0.01, ge=0)
    """With ``adamw``: share of a parameter that a step takes away, times the learning rate."""
    schedule: Literal["cosine", "exponential", "constant", "plateau"] = "cosine"
    """How the learning rate falls after warming up: along a cosine or an exponential to its last value, not at all, or
    by a factor whenever validation does not improve for a while."""
    warm_up: float = Field(default=0.05, ge=0, lt=1)
    """Share of the training in which the learning rate rises from 0."""
    final_learning_rate: float = Field(default=0.0, ge=0, le=1)
    """Last learning rate as a share of the highest; with ``plateau`` the lowest one, and more than 0 with
    ``exponential``."""
    plateau_factor: float = Field(default=0.5, gt=0, lt=1)
    """With ``plateau``: the rate is multiplied by this."""
    plateau_patience: int = Field(default=5, ge=1)
    """With ``plateau``: after this many validations in a row in which the mean loss of the members was not better than
    ever before (without validation structures that is the loss of the training)."""
    ema: float = Field(default=0.99, ge=0, lt=1)
    """Decay of the moving average of the parameters; the average is validated and kept."""
    clip_norm: float = Field(default=1.0, gt=0)
    """Gradients of a member are scaled down to this norm."""
    loss: LossSettings = LossSettings()
    """Penalty, and weights of energies, forces and virials."""
    second_stage: SecondStageSettings | None = None
    """Other weights and another learning rate towards the end of the training; none by default."""
    validation_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Share of the structures kept for early stopping; 0 trains on all and keeps the last parameters."""
    patience: int = Field(default=50, ge=1)
    """A member stops after this many validations without improvement."""
    validate_every: int = Field(default=50, ge=1)
    """Optimiser steps between validations, rounded up to whole epochs."""
    warm_start: bool = False
    """Begin each round from the parameters of the round before instead of from fresh ones."""
    warm_steps: int | None = Field(default=None, ge=1)
    """`max_steps` of a training that starts warm; the same where not given."""

    @model_validator(mode="after")
    def _exponential_needs_an_end(self) -> Self:
        if self.schedule == "exponential" and self.final_learning_rate == 0:
            raise ValueError("schedule 'exponential' never reaches 0; give final_learning_rate, for example 0.01.")
        return self
