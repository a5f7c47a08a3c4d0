"""Optimisers: which update a gradient becomes, before the learning rate says how large a step of it is taken."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import optax

from almlip_jax.errors import InputError
from almlip_jax.kinds import Named, UserCode
from almlip_jax.models.constants import is_learned

if TYPE_CHECKING:
    from almlip_jax.training.settings import TrainingSettings


class OptimiserSettings(Named):
    """How gradients become steps."""

    looks_at: ClassVar[frozenset[str]] = frozenset()
    """Keys of `training` that it alone looks at."""

    @abstractmethod
    def build(self, settings: TrainingSettings) -> optax.GradientTransformation:
        """Gradients of a model to updates of order one, to be multiplied by minus the learning rate.

        What has no gradient, as constants and parameters of elements that the data do not hold, must stay as it is.

        Raises:
            InputError: a user's factory cannot be imported, or makes no gradient transformation.
        """


class AmsGrad(OptimiserSettings):
    """Adam with the largest second moment so far (Reddi, Kale and Kumar, ICLR 2018)."""

    kind: Literal["amsgrad"] = "amsgrad"

    def build(self, settings: TrainingSettings) -> optax.GradientTransformation:
        """That of optax."""
        return optax.scale_by_amsgrad()


class Adam(OptimiserSettings):
    """Adam (Kingma and Ba, ICLR 2015)."""

    kind: Literal["adam"] = "adam"

    def build(self, settings: TrainingSettings) -> optax.GradientTransformation:
        """That of optax."""
        return optax.scale_by_adam()


class AdamW(OptimiserSettings):
    """Adam with decoupled weight decay (Loshchilov and Hutter, ICLR 2019), `weight_decay` of what is learned."""

    looks_at: ClassVar[frozenset[str]] = frozenset({"weight_decay"})

    kind: Literal["adamw"] = "adamw"

    def build(self, settings: TrainingSettings) -> optax.GradientTransformation:
        """That of optax, and the decay."""
        return optax.chain(optax.scale_by_adam(), _decay_learned(settings.weight_decay))


class UserOptimiser(UserCode, OptimiserSettings):
    """A factory ``(**parameters) -> optax.GradientTransformation``, of optax itself (``optax:scale_by_lion``) or a
    user's own.

    Its updates are taken away from the parameters, times the learning rate of the schedule: those that optax calls
    ``scale_by_...``, not the ones that hold a learning rate of their own.  Constants of models, such as scales taken
    from the data, are left alone whatever it does; gradients have been scaled down to `clip_norm` before.
    """

    kind: Literal["user"] = "user"

    def check_code(self) -> None:
        """Makes the optimiser."""
        self._made()

    def build(self, settings: TrainingSettings) -> optax.GradientTransformation:
        """What the factory makes, for what is learned."""
        inner = optax.with_extra_args_support(self._made())

        def update_fn(
            updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
        ) -> tuple[optax.Updates, optax.OptState]:
            found, state = inner.update(updates, state, params)
            kept = jax.tree.map(
                lambda learned, update: update if learned else jnp.zeros_like(update), is_learned(params), found
            )
            return kept, state

        return optax.GradientTransformation(inner.init, update_fn)

    def _made(self) -> optax.GradientTransformation:
        made: Any = self.kept(self.call)
        if not isinstance(made, optax.GradientTransformation | optax.GradientTransformationExtraArgs):
            raise InputError(
                f"'{self.function}' must return a gradient transformation of optax, but returns a "
                f"{type(made).__name__}."
            )
        return made


def build_optimiser(settings: TrainingSettings) -> optax.GradientTransformation:
    """Gradients to updates of order one, to be multiplied by minus the learning rate.

    Raises:
        InputError: as for `OptimiserSettings.build`.
    """
    return optax.chain(optax.clip_by_global_norm(settings.clip_norm), settings.optimiser.build(settings))


def _decay_learned(weight_decay: float) -> optax.GradientTransformation:
    """Decoupled weight decay of what is learned; constants must not shrink.

    Nor does what has not been updated so far, as parameters of elements that the data do not hold.
    """

    def decayed(learned: bool, update: jax.Array, param: jax.Array) -> jax.Array:
        return update + jnp.where(update != 0, weight_decay * param, 0) if learned else update

    def update_fn(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        return jax.tree.map(decayed, is_learned(params), updates, params), state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update_fn)
