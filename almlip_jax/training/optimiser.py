"""Optimisers and learning rates: which update a gradient becomes, and how large a step of it is taken when."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from almlip_jax.models.constants import is_learned
from almlip_jax.training.settings import TrainingSettings


def build_optimiser(settings: TrainingSettings) -> optax.GradientTransformation:
    """Gradients to updates of order one, to be multiplied by minus the learning rate."""
    chain = [optax.clip_by_global_norm(settings.clip_norm)]
    if settings.optimiser == "amsgrad":
        chain.append(optax.scale_by_amsgrad())
    else:
        chain.append(optax.scale_by_adam())
    if settings.optimiser == "adamw":
        chain.append(_decay_learned(settings.weight_decay))
    return optax.chain(*chain)


def _decay_learned(weight_decay: float) -> optax.GradientTransformation:
    """Decoupled weight decay (Loshchilov and Hutter 2019) of what is learned; constants must not shrink.

    Nor does what has not been updated so far, as parameters of elements that the data do not hold.
    """

    def decayed(learned: bool, update: jax.Array, param: jax.Array) -> jax.Array:
        return update + jnp.where(update != 0, weight_decay * param, 0) if learned else update

    def update_fn(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        return jax.tree.map(decayed, is_learned(params), updates, params), state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update_fn)


def learning_rate(
    settings: TrainingSettings, step: jax.Array, total_steps: jax.Array, plateau_factor: jax.Array
) -> jax.Array:
    """Learning rate of a step.

    Args:
        settings: of the training.
        step: [] steps done so far.
        total_steps: [] length of the training.
        plateau_factor: [] what `follow_plateau` has come to; only the schedule ``plateau`` looks at it.
    """
    s = settings
    progress = (step + 1).astype(plateau_factor.dtype) / total_steps
    rise = jnp.minimum(1.0, progress / s.warm_up) if s.warm_up > 0 else 1.0
    if s.schedule == "cosine":
        cosine = 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(progress, 1.0)))
        rate = s.learning_rate * rise * (s.final_learning_rate + (1 - s.final_learning_rate) * cosine)
    elif s.schedule == "exponential":
        rate = s.learning_rate * rise * s.final_learning_rate ** jnp.minimum(progress, 1.0)
    elif s.schedule == "plateau":
        rate = s.learning_rate * rise * jnp.maximum(plateau_factor, s.final_learning_rate)
    else:
        rate = s.learning_rate * rise * jnp.ones_like(progress)
    if s.second_stage is None:
        return rate
    return rate * jnp.where(in_second_stage(s, step, total_steps), s.second_stage.learning_rate_factor, 1.0)


def in_second_stage(settings: TrainingSettings, step: jax.Array, total_steps: jax.Array) -> jax.Array:
    """Whether the step after ``step`` done ones belongs to the second stage; traced, so that it compiles nothing."""
    if settings.second_stage is None:
        return jnp.zeros(jnp.shape(step), bool)
    return step >= jnp.round(settings.second_stage.start * total_steps).astype(jnp.int32)
