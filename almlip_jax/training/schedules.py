"""Learning rates: how large a step of an update is taken when."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, Literal, cast

import jax
import jax.numpy as jnp

from almlip_jax.errors import InputError
from almlip_jax.kinds import Named, UserCode

if TYPE_CHECKING:
    from almlip_jax.training.settings import TrainingSettings


class ScheduleSettings(Named):
    """How the learning rate falls after warming up."""

    looks_at: ClassVar[frozenset[str]] = frozenset({"final_learning_rate"})
    """Keys of `training` that only some schedules look at, this one among them."""
    follows_validation: ClassVar[bool] = False
    """Whether it looks at the factor that falls where validation does not improve for a while."""

    @abstractmethod
    def share(self, settings: TrainingSettings, progress: jax.Array, plateau_factor: jax.Array) -> jax.Array:
        """Share of the highest learning rate, before it is multiplied by that of the warm-up.

        Args:
            settings: of the training.
            progress: [] share of the training that has been done, with the step that is being taken; more than 1 in
                one that goes on beyond its length.
            plateau_factor: [] what a factor that follows validation has come to.
        """

    def check(self, settings: TrainingSettings) -> None:
        """Refuses keys of a training that do not suit it.

        Raises:
            ValueError: with a sentence.
        """


class Cosine(ScheduleSettings):
    """Along a cosine to `final_learning_rate`."""

    kind: Literal["cosine"] = "cosine"

    def share(self, settings: TrainingSettings, progress: jax.Array, plateau_factor: jax.Array) -> jax.Array:
        """Half a period."""
        cosine = 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(progress, 1.0)))
        return settings.final_learning_rate + (1 - settings.final_learning_rate) * cosine


class Exponential(ScheduleSettings):
    """Geometrically to `final_learning_rate`, which must be more than 0."""

    kind: Literal["exponential"] = "exponential"

    def share(self, settings: TrainingSettings, progress: jax.Array, plateau_factor: jax.Array) -> jax.Array:
        """A power of the last share."""
        return jnp.asarray(settings.final_learning_rate ** jnp.minimum(progress, 1.0))

    def check(self, settings: TrainingSettings) -> None:
        """Refuses an end that it never reaches."""
        if settings.final_learning_rate == 0:
            raise ValueError("schedule 'exponential' never reaches 0; give final_learning_rate, for example 0.01.")


class Constant(ScheduleSettings):
    """It stays as it is."""

    looks_at: ClassVar[frozenset[str]] = frozenset()

    kind: Literal["constant"] = "constant"

    def share(self, settings: TrainingSettings, progress: jax.Array, plateau_factor: jax.Array) -> jax.Array:
        """1."""
        return jnp.ones_like(progress)


class FallsOnPlateau(ScheduleSettings):
    """By `plateau_factor` whenever validation has not improved `plateau_patience` times, to `final_learning_rate`."""

    looks_at: ClassVar[frozenset[str]] = frozenset({"final_learning_rate", "plateau_factor", "plateau_patience"})
    follows_validation: ClassVar[bool] = True

    kind: Literal["plateau"] = "plateau"

    def share(self, settings: TrainingSettings, progress: jax.Array, plateau_factor: jax.Array) -> jax.Array:
        """The factor so far."""
        return jnp.maximum(plateau_factor, settings.final_learning_rate)


class UserSchedule(UserCode, ScheduleSettings):
    """A user's own factory ``(**parameters) -> schedule``, a function ``(progress) -> share`` in jax.numpy.

    ``progress`` is the share of the training's steps that have been done, and what it gives the share of
    `learning_rate`; the warm-up comes on top.
    """

    looks_at: ClassVar[frozenset[str]] = frozenset()

    kind: Literal["user"] = "user"

    def check_code(self) -> None:
        """Makes the schedule, and asks it once."""
        super().check_code()
        asked = jax.ShapeDtypeStruct((), jnp.float32)
        with self.tried_on("a share of the steps"):
            found = jax.eval_shape(self._function, asked)
        if getattr(found, "shape", None) != ():
            raise InputError(
                f"'{self.function}' must return a function that gives one number for a share of the steps."
            )

    def share(self, settings: TrainingSettings, progress: jax.Array, plateau_factor: jax.Array) -> jax.Array:
        """What the function gives."""
        return self._function(progress)

    @property
    def _function(self) -> Callable[[jax.Array], jax.Array]:
        return cast(Callable[[jax.Array], jax.Array], self.kept(lambda: self.call_for_function("progress")))


def learning_rate(
    settings: TrainingSettings, step: jax.Array, total_steps: jax.Array, plateau_factor: jax.Array
) -> jax.Array:
    """Learning rate of a step.

    Args:
        settings: of the training.
        step: [] steps done so far.
        total_steps: [] length of the training.
        plateau_factor: [] what `follow_plateau` has come to, of schedules that follow validation.
    """
    progress = (step + 1).astype(plateau_factor.dtype) / total_steps
    rise = jnp.minimum(1.0, progress / settings.warm_up) if settings.warm_up > 0 else 1.0
    rate = settings.learning_rate * rise * settings.schedule.share(settings, progress, plateau_factor)
    if settings.second_stage is None:
        return rate
    late = in_second_stage(settings, step, total_steps)
    return rate * jnp.where(late, settings.second_stage.learning_rate_factor, 1.0)


def in_second_stage(settings: TrainingSettings, step: jax.Array, total_steps: jax.Array) -> jax.Array:
    """Whether the step after ``step`` done ones belongs to the second stage; traced, so that it compiles nothing."""
    if settings.second_stage is None:
        return jnp.zeros(jnp.shape(step), bool)
    return step >= jnp.round(settings.second_stage.start * total_steps).astype(jnp.int32)
