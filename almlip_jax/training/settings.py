"""Settings of training: batches, optimiser, loss weights, stopping."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Annotated, Any, Final, Self, cast

from ase.data import atomic_numbers
from pydantic import Field, field_validator, model_validator

from almlip_jax.ensembles.bootstrap import BootstrapSettings
from almlip_jax.ensembles.likelihoods import LikelihoodSettings
from almlip_jax.ensembles.settings import EnsembleSettings
from almlip_jax.errors import InputError, any_of
from almlip_jax.models import ModelSettings, how_given
from almlip_jax.names import Known
from almlip_jax.settings import Settings, unit
from almlip_jax.target_settings import ByTarget
from almlip_jax.targets import Target, further_targets, targets
from almlip_jax.training.optimisers import AmsGrad, OptimiserSettings
from almlip_jax.training.penalties import SQUARES, LossSettings
from almlip_jax.training.projection.settings import ProjectionSettings
from almlip_jax.training.schedules import Cosine, ScheduleSettings


class SecondStageSettings(ByTarget):
    """The end of a training, with other weights: usually more weight on energies, once forces have been learned.

    The parameters that are kept are the best ones by the loss of this stage, and patience counts in it alone.
    """

    start: float = Field(default=0.75, gt=0, lt=1)
    """Share of the steps after which it begins."""
    kind: Annotated[str, Known("kind of loss that needs no keys", LossSettings.kinds_without_keys)] | None = None
    """Kind of the loss from then on, as in `loss` where not given: for ``nll``, a first stage with ``mse`` finds good
    means before variances are learned, which is more stable.  What both kinds have besides weights stays."""
    loss: LossSettings | None = None
    """The whole loss from then on, in place of `kind` and weights: for a kind with keys of its own."""
    energy: float | None = Field(default=None, ge=0, le=1e6)
    """Weight of energies from then on; where not given, like the others, as in `loss`, or what belongs to another
    kind."""
    forces: float | None = Field(default=None, ge=0, le=1e6)
    """Weight of forces."""
    virial: float | None = Field(default=None, ge=0, le=1e6)
    """Weight of virials."""
    learning_rate_factor: float = Field(default=1.0, gt=0, le=100.0)
    """What the learning rate of the schedule is multiplied by."""

    @classmethod
    def keys_of(cls, target: Target) -> Iterator[tuple[str, Any, Any]]:
        """A weight."""
        kind: Any = float | None
        yield target.name, kind, Field(default=None, ge=0, le=1e6, description=f"Weight of {target.many}.")

    def after(self, first: LossSettings) -> LossSettings:
        """The loss of this stage, after that of the first one."""
        if self.loss is not None:
            return self.loss
        weights: dict[str, Any] = {one.name: value for one in targets() if (value := self.said(one.name)) is not None}
        if self.kind in (None, first.kind):
            return first.model_copy(update=weights)
        return first.as_kind(cast(str, self.kind), weights)

    @model_validator(mode="after")
    def _says_it_once(self) -> Self:
        said = [name for name in ("kind", *(one.name for one in targets())) if self.said(name) is not None]
        if self.loss is not None and said:
            raise ValueError(f"loss says it all; leave out {said[0]}, or say it there.")
        return self


class TrainingSettings(Settings):
    """One training of the whole ensemble."""

    batch_size: int = Field(default=5, ge=1, le=10_000_000)
    """Structures in a batch; at most as many as there are."""
    max_epochs: int = Field(default=1000, ge=1, le=10**9)
    """Longest training in passes over the data."""
    max_steps: int = Field(default=6000, ge=1, le=10**9)
    """Longest training in optimiser steps; what comes first ends it, and the learning rate decays until then."""
    learning_rate: float = Field(default=5e-3, gt=0, le=1.0)
    """Highest learning rate."""
    optimiser: OptimiserSettings = AmsGrad()
    """How gradients become steps: the name of a kind, or a section where it has keys of its own."""
    weight_decay: float = Field(default=0.01, ge=0, le=100.0)
    """With ``adamw``: share of a parameter that a step takes away, times the learning rate."""
    schedule: ScheduleSettings = Cosine()
    """How the learning rate falls after warming up: the name of a kind, or a section where it has keys of its own."""
    warm_up: float = Field(default=0.05, ge=0, lt=1)
    """Share of the training in which the learning rate rises from 0."""
    final_learning_rate: float = Field(default=0.0, ge=0, le=1)
    """Last learning rate as a share of the highest; with ``plateau`` the lowest one, and more than 0 with
    ``exponential``."""
    plateau_factor: float = Field(default=0.5, gt=0, lt=1)
    """With ``plateau``: the rate is multiplied by this."""
    plateau_patience: int = Field(default=5, ge=1, le=10**6)
    """With ``plateau``: after this many validations in a row in which the mean loss of the members was not better than
    ever before (without validation structures that is the loss of the training)."""
    ema: float = Field(default=0.99, ge=0, lt=1)
    """Decay of the moving average of the parameters; the average is validated and kept."""
    clip_norm: float = Field(default=1.0, gt=0, le=1e9)
    """Gradients of a member are scaled down to this norm."""
    loss: LossSettings = SQUARES
    """Penalty, and weights of energies, forces and virials."""
    second_stage: SecondStageSettings | None = None
    """Other weights and another learning rate towards the end of the training; none by default."""
    projection: ProjectionSettings | None = None
    """Instead of by gradients, train by variable projection: for models that are linear in most parameters, such as
    moment tensor potentials.  Batches, optimiser and learning rate then have no meaning."""
    validation_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Share of the structures kept for early stopping; 0 trains on all and keeps the last parameters."""
    patience: int = Field(default=50, ge=1, le=10**9)
    """A member stops after this many validations without improvement."""
    validate_every: int = Field(default=50, ge=1, le=10**6)
    """Optimiser steps between validations, rounded up to whole epochs."""
    warm_start: bool = False
    """Begin each round of a campaign, or each `fit` of a `Learner`, from the parameters of the one before instead of
    from fresh ones."""
    warm_steps: int | None = Field(default=None, ge=1, le=10**9)
    """`max_steps`, or `projection.iterations`, of a training that starts warm, with `warm_start` (of a sweep, its own)
    or from a given potential (`almlip train --from`); the same where not given."""
    final_steps: int | None = Field(default=None, ge=1, le=10**9)
    """Once a campaign has ended, one more training on its last dataset, of this length in place of `max_steps` and
    `max_epochs` (or of `projection.iterations`), gives its final potential; none where not given."""

    replay: int = Field(default=64, ge=0, le=1_000_000)
    """Structures, labels included, that a potential remembers of its training, drawn from all compositions and config
    types; a training that begins with it is trained on them too, so that it does not forget.  0: it remembers none, and
    none are trained on again."""

    reference_energies: dict[str, Annotated[float, Field(ge=-1e7, le=1e7)]] | Path = Field(
        default={}, json_schema_extra=unit("eV")
    )
    """Energies of isolated atoms, eV by chemical symbol, or a file with these atoms: what the energies of structures
    are relative to, and what the potential gives for an isolated atom.  They come before those of isolated atoms
    among the structures; energies of elements that are in neither follow from a fit."""

    @field_validator("reference_energies")
    @classmethod
    def _are_of_elements(cls, given: dict[str, float] | Path) -> dict[str, float] | Path:
        for symbol, energy in given.items() if isinstance(given, dict) else ():
            if symbol not in atomic_numbers or symbol == "X":
                raise ValueError(f"'{symbol}' is not a chemical symbol.")
            if not math.isfinite(energy):
                raise ValueError(f"the energy of {symbol} is not finite.")
        return given

    def most_steps(self, structures: int, *, warm: bool) -> int:
        """Length in steps of a training on some structures, if nothing ends it earlier; ``warm`` as in `warm_steps`."""
        given = self.warm_steps if warm else None
        if self.projection is not None:
            return given or self.projection.iterations
        return min(given or self.max_steps, self.max_epochs * math.ceil(structures / self.batch_size))

    @property
    def on_device(self) -> TrainingSettings:
        """What the program of a training depends on: what only the host looks at is as where nothing is given."""
        return self.model_copy(update={name: type(self).model_fields[name].default for name in OF_THE_HOST})

    @property
    def losses(self) -> tuple[LossSettings, ...]:
        """The loss of each stage."""
        return (self.loss,) if self.second_stage is None else (self.loss, self.second_stage.after(self.loss))

    @model_validator(mode="after")
    def _learns_something(self) -> Self:
        for name, loss in zip(("loss", "second_stage"), self.losses, strict=False):
            if loss.energy == loss.forces == loss.virial == 0:
                raise ValueError(f"{name} has only weights of 0; give energy, forces or virial a weight.")
        return self

    @model_validator(mode="after")
    def _projects_squares(self) -> Self:
        if self.projection is not None and not self.loss.is_square:
            raise ValueError(f"projection minimises squares, not a loss of kind '{self.loss.kind}'; take mse or mlip.")
        return self

    @model_validator(mode="after")
    def _rate_is_one(self) -> Self:
        self.schedule.check(self)
        return self


OF_THE_HOST: Final = (
    "batch_size",
    "max_epochs",
    "max_steps",
    "projection",
    "validation_fraction",
    "validate_every",
    "warm_start",
    "warm_steps",
    "final_steps",
    "replay",
    "reference_energies",
)
"""Training settings that the program on the device does not look at: what it is given depends on them."""


def check_targets(training: TrainingSettings, further: Collection[str], heads: int) -> None:
    """Whether what a model gives besides energies can be learned with these settings.

    Raises:
        InputError: heads or the kind of a loss do not suit it, or the loss weighs what the model does not give.
    """
    for target in further_targets():
        name = target.name
        if name in further and heads > 1:
            raise InputError(f"model.{name} needs ensemble.heads 1: the heads of a model share its {target.name}.")
        for loss in training.losses:
            if name in further and loss.judges_uncertainty:
                raise InputError(
                    f"a loss of kind '{loss.kind}' judges no {target.many}; take kind 'mse' or 'huber', or a model "
                    f"without (leave out model.{name})."
                )
            if name not in further and loss.weight_of(target) not in (0.0, SQUARES.weight_of(target)):
                raise InputError(
                    f"the loss weighs {target.many} by {loss.weight_of(target):g}, but the model gives none; "
                    f"{how_given(name)}, or leave the weight out."
                )


def check_projection(
    training: TrainingSettings, model: ModelSettings, ensemble: EnsembleSettings, models: int | None = None
) -> None:
    """Whether models can be trained by projection, where that is asked for.

    Args:
        training: of the models.
        model: their architecture.
        ensemble: that they belong to.
        models: how many of it they are; all where not given.

    Raises:
        InputError: the model is not linear in most parameters, the members are of a kind that gradients train, or a
            training is too short for as many.
    """
    projection = training.projection
    if projection is None:
        return
    if not model.separable:
        raise InputError(
            f"training.projection needs a model that is linear in most of its parameters, as kind 'mtp' is; kind "
            f"'{model.kind}' is not: leave projection out."
        )
    if ensemble.heads > 1 or not ensemble.likelihood.silent:
        raise InputError("training.projection finds one energy by squares; leave ensemble.heads and likelihood out.")
    if ensemble.order == "own":
        raise InputError(
            "training.projection has no batches, so that ensemble.order 'own' has no meaning; leave it out."
        )
    if projection.members == "own" and projection.starts != ProjectionSettings().starts:
        raise InputError("training.projection.starts has no meaning with members 'own', which begin with one each.")
    if projection.members == "shared" and not ensemble.bootstrap.tells_apart and ensemble.size > 1:
        those = any_of(name for name, kind in BootstrapSettings.kinds().items() if kind.tells_apart)
        raise InputError(
            f"with training.projection.members 'shared', models differ by ensemble.bootstrap alone; take {those}, or "
            "members 'own'."
        )
    _check_passes(training, projection, ensemble.size if models is None else models)


def _check_passes(training: TrainingSettings, projection: ProjectionSettings, models: int) -> None:
    """Whether passes over the data are left for the search that several models share.

    Raises:
        InputError: a training is too short.
    """
    if models == 1 or projection.members != "shared":
        return
    least = projection.member_iterations + 2
    lengths = {
        "projection.iterations": projection.iterations,
        "warm_steps": training.warm_steps,
        "final_steps": training.final_steps,
    }
    for name, length in lengths.items():
        if length is not None and length < least:
            raise InputError(
                f"training.{name} is {length}, but {models} models take at least {least} passes over the data: one for "
                "the search that they share, one for their weights, and projection.member_iterations "
                f"({projection.member_iterations}); raise {name}, or lower member_iterations."
            )


def check_plain(heads: int, likelihood: LikelihoodSettings) -> None:
    """Whether members can have a last layer for each of two label sources.

    Raises:
        InputError: they have several heads already, or say how sure they are of the labels of one source.
    """
    if heads > 1 or not likelihood.silent:
        raise InputError(
            "a teacher's frames are trained on again under a last layer of their own, which members with "
            "ensemble.heads or ensemble.likelihood cannot have; leave these out, or teacher.replay at 0."
        )


def check_losses(training: TrainingSettings, heads: int, likelihood: LikelihoodSettings) -> None:
    """Whether the members can be trained with these losses.

    Raises:
        InputError: a loss judges uncertainties that the members do not have, or none judges those that they have.
    """
    judged = any(loss.judges_uncertainty for loss in training.losses)
    if judged and heads == 1 and likelihood.silent:
        kind = next(loss.kind for loss in training.losses if loss.judges_uncertainty)
        raise InputError(
            f"a loss of kind '{kind}' needs members that say how sure they are; give ensemble.heads or "
            "ensemble.likelihood, or take kind 'mse' or 'huber'."
        )
    if not likelihood.silent and not judged:
        those = any_of(name for name, kind in LossSettings.kinds().items() if kind.judges_uncertainty)
        raise InputError(
            f"ensemble.likelihood '{likelihood.kind}' learns from a loss of kind {those} only; give one as "
            "training.loss.kind, or as training.second_stage.kind."
        )
