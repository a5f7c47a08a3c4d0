"""The program of a training: what runs on the device between two looks of the host, as pure functions of its state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from almlip_jax.ensembles import Ensemble, Prediction
from almlip_jax.ensembles.second_source import SecondSource
from almlip_jax.ensembles.sharding import MEMBERS, PARTS, TRAININGS
from almlip_jax.models import LastLayer, Params, Survey
from almlip_jax.models.constants import is_learned
from almlip_jax.precision import full_precision
from almlip_jax.structures.graph import Graph, Targets
from almlip_jax.structures.packing import BatchPlan, PackedDataset, take_batch
from almlip_jax.targets import targets as declared
from almlip_jax.training.loss import Residuals, mean_of_heads, means, residuals, unweighted, weighted
from almlip_jax.training.optimisers import build_optimiser
from almlip_jax.training.penalties import SQUARES, LossSettings
from almlip_jax.training.schedules import in_second_stage, learning_rate
from almlip_jax.training.settings import TrainingSettings

_REMEMBERED = 8  # programs; a campaign has one for each architecture


@struct.dataclass
class State:
    """Device state of a training; leaves carry the member axis.

    Attributes:
        params: what the optimiser moves: the models, or `TwoHeaded` ones.
        average: their moving average, which is validated.
        best: of each member the average that validated best.
        optimiser: state of the optimiser.
        best_loss: [M] validation loss of ``best``.
        waited: [M] validations since the best.
        stopped: [M] members that ended early.
        step: [] steps done.
        plateau: what schedules that follow validation look at.
    """

    params: Params
    average: Params
    best: Params
    optimiser: optax.OptState
    best_loss: jax.Array
    waited: jax.Array
    stopped: jax.Array
    step: jax.Array
    plateau: Plateau


@struct.dataclass
class TwoHeaded:
    """Models that learn from two label sources.

    Attributes:
        models: their parameters; their own last layer is of the first source.
        second: last layer of the other one, which no potential keeps.
    """

    models: Params
    second: LastLayer


@struct.dataclass
class Plateau:
    """What validation has said so far of a rate that follows it; one for the ensemble, which shares its rate."""

    factor: jax.Array  # [] of the learning rate
    best: jax.Array  # [] lowest mean loss so far
    waited: jax.Array  # [] validations since then, or since the last fall


@struct.dataclass
class Run:
    """What one training keeps constant on the device.

    Attributes:
        data: structures and labels.
        weights: [M, n] bootstrap weights.
        validation: batches of the validation structures.
        validation_steps: [] how many of these there are.
        total_steps: [] length of the training.
    """

    data: PackedDataset
    weights: jax.Array
    validation: BatchPlan
    validation_steps: jax.Array
    total_steps: jax.Array


@dataclass(frozen=True)
class Program:
    """Functions of the training of an ensemble; `compiled` compiles them.

    Attributes:
        ensemble: model and number of members.
        settings: of the training.
        dtype: of parameters and data.
        own_order: each model sees batches of its own, and plans have a leading axis over models; geometry is then
            computed for each of them.
        two_sources: whether structures may have labels of a second source, which has a last layer of its own.
        devices: those that share out the structures of each batch (`ensembles.training_devices`), each the part that
            plans have for it on a further axis; None where each takes whole batches.  Those of trainings side by side
            (`ensembles.devices_side_by_side`) share out these too.
    """

    ensemble: Ensemble
    settings: TrainingSettings
    dtype: np.dtype
    own_order: bool = False
    two_sources: bool = False
    devices: Mesh | AbstractMesh | None = None

    @property
    def _optimiser(self) -> optax.GradientTransformation:
        return build_optimiser(self.settings)

    @property
    def _whole(self) -> Ensemble:
        """The ensemble, which sees all atoms of a batch at once: its derivatives keep what all blocks would need."""
        return replace(self.ensemble, atom_blocks=False)

    def fresh(
        self, key: jax.Array, data: PackedDataset, plan: BatchPlan, steps: jax.Array, energy_scale: float
    ) -> Params:
        """Parameters to begin with, their constants set from the first batches of a plan."""

        def survey(step: jax.Array) -> Survey:
            return self.ensemble.survey(take_batch(data, plan, step)[0])

        def body(step: jax.Array, sums: Survey) -> Survey:
            return jax.tree.map(jnp.add, sums, survey(step))

        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(survey, jnp.int32(0)))
        sums = jax.lax.fori_loop(0, steps, body, zero)
        return self.ensemble.standardise(self.ensemble.init(key), sums, energy_scale)

    def initial(self, params: Params) -> State:
        """The state before the first step."""
        members = self.ensemble.size
        return State(
            params=params,
            average=jax.tree.map(jnp.copy, params),
            best=jax.tree.map(jnp.copy, params),
            optimiser=jax.vmap(self._optimiser.init)(params),
            best_loss=jnp.full((members,), jnp.inf, self.dtype),
            waited=jnp.zeros((members,), jnp.int32),
            stopped=jnp.zeros((members,), bool),
            step=jnp.zeros((), jnp.int32),
            plateau=Plateau(
                factor=jnp.ones((), self.dtype),
                best=jnp.full((), jnp.inf, self.dtype),
                waited=jnp.zeros((), jnp.int32),
            ),
        )

    def segment(self, state: State, run: Run, plan: BatchPlan, steps: jax.Array) -> tuple[State, dict[str, jax.Array]]:
        """Optimiser steps through a plan, then one validation."""

        def body(step: jax.Array, carry: tuple[State, jax.Array]) -> tuple[State, jax.Array]:
            current, total = carry
            late = in_second_stage(self.settings, current.step, run.total_steps)
            of_models = current.params, run.weights
            gradient, loss = self._shared_out(Program._gradient, of_models, plan, run.data, step, late)
            return self._update(current, gradient, run.total_steps), total + loss

        zero = jnp.zeros((self.ensemble.size,), self.dtype)
        began_late = in_second_stage(self.settings, state.step, run.total_steps)
        state, total = jax.lax.fori_loop(0, steps, body, (state, zero))
        late = in_second_stage(self.settings, state.step, run.total_steps)
        squares, *penalties = self.validate(state.average, run)
        loss = self._by_stage(penalties, late)
        observed = run.validation_steps > 0
        if self.settings.second_stage is not None:
            state = _begin_second_stage(state, late, late & ~began_late)
        state, kept = self._keep_best(state, jnp.where(observed, loss, -state.step.astype(self.dtype)))
        if self.settings.schedule.follows_validation:
            seen = jnp.where(observed, loss, total / steps)
            state = replace(state, plateau=self.follow_plateau(state.plateau, seen))
        nothing = jnp.where(observed, 0.0, jnp.nan)
        report = {
            "step": state.step,
            "train_loss": total / steps,
            "validation_loss": loss + nothing,
            "stopped": state.stopped,
            "kept": kept,
        }
        return state, report | root_mean_squares(squares)

    def _shared_out(self, function: Callable[..., Any], of_models: Any, plan: BatchPlan, *others: Any) -> Any:
        """Sums over structures, of which each device takes its part, for its models.

        Args:
            function: of a program for the models at hand, and of the other arguments; gives sums over the structures of
                its part, with a leading axis over models.
            of_models: pytree with a leading axis over models.
            plan: with an axis over parts where devices share batches out.
            others: the same for all.
        """
        if self.devices is None:
            return function(self, of_models, plan, *others)
        here = self._of_some(self.ensemble.size // self.devices.shape[MEMBERS])

        def on_one(of_models: Any, plan: BatchPlan, *others: Any) -> Any:
            part = jax.tree.map(lambda x: x[..., 0, :], plan)
            return jax.lax.psum(function(here, of_models, part, *others), PARTS)

        models, same = PartitionSpec(MEMBERS), PartitionSpec()
        parts = PartitionSpec(*(MEMBERS,) * (plan.ids.ndim - 3), None, PARTS)
        # that all parts end with the same sums is not seen through loops
        shared = jax.shard_map(
            on_one,
            mesh=self.devices,
            in_specs=(models, parts, *(same,) * len(others)),
            out_specs=models,
            check_vma=False,
        )
        return shared(of_models, plan, *others)

    def _of_some(self, models: int) -> Program:
        """The same program for that many models."""
        return replace(self, ensemble=replace(self.ensemble, size=models))

    def _gradient(
        self,
        of_models: tuple[Params, jax.Array],
        plan: BatchPlan,
        data: PackedDataset,
        step: jax.Array,
        late: jax.Array,
    ) -> tuple[Params, jax.Array]:
        """What a batch, or the part of it at hand, adds to gradients and losses; ``of_models`` with weights [L, n]."""
        params, weights = of_models
        if self.own_order:
            return self._own_gradients(params, weights, plan, data, step, late)
        graph, targets = take_batch(data, plan, step)
        return self._loss_gradient(params, graph, targets, weights[:, plan.ids[step]], late)

    def _own_gradients(
        self,
        params: Params,
        weights: jax.Array,
        plan: BatchPlan,
        data: PackedDataset,
        step: jax.Array,
        late: jax.Array,
    ) -> tuple[Params, jax.Array]:
        """As `_loss_gradient`, each model on its own batch."""
        alone = self._of_some(1)

        def one(own: tuple[Params, jax.Array, BatchPlan]) -> tuple[Params, jax.Array]:
            model, weights, its = own
            graph, targets = take_batch(data, its, step)
            stacked = jax.tree.map(lambda x: x[None], model)
            found = alone._loss_gradient(stacked, graph, targets, weights[its.ids[step]][None], late)
            return jax.tree.map(lambda x: x[0], found)  # type: ignore[no-any-return]

        over_models = jax.lax.map if self.ensemble.one_by_one else _side_by_side
        return over_models(one, (params, weights, plan))  # type: ignore[no-any-return]

    def _loss_gradient(
        self, params: Params, graph: Graph, targets: Targets, weights: jax.Array, late: jax.Array
    ) -> tuple[Params, jax.Array]:
        """Gradient of each model's loss with respect to its own parameters, and the losses [L].

        Of a part of a batch, what it adds to those.  ``weights`` [L, S] are those of the structures, ``late`` tells the
        stage.
        """
        if self.ensemble.one_by_one and self.ensemble.size > 1:
            # the whole gradient of one after the other: what the reverse pass needs is kept for one model at a time
            alone = self._of_some(1)

            def one(own: tuple[Params, jax.Array]) -> tuple[Params, jax.Array]:
                stacked, weight = jax.tree.map(lambda x: x[None], own)
                return jax.tree.map(lambda x: x[0], alone._loss_gradient(stacked, graph, targets, weight, late))

            return jax.lax.map(one, (params, weights))

        def summed(stacked: Params) -> tuple[jax.Array, jax.Array]:
            prediction = self._by_model(self._predict(stacked, graph, targets))
            sums = [self._residuals(prediction, graph, targets, weights, loss) for loss in self.settings.losses]
            losses = self._by_stage([self._per_label_of_batch(one) for one in sums], late)
            return jnp.sum(losses), losses

        return jax.grad(summed, has_aux=True)(params)

    def _predict(self, params: Params, graph: Graph, targets: Targets) -> Prediction:
        """Of every member, under the last layer of the label source of each structure."""
        if not self.two_sources:
            return self._whole.predict(params, graph)
        assert targets.second is not None
        return self._whole.predict(params.models, graph, SecondSource(params.second, targets.second))

    def models_of(self, params: Params) -> Params:
        """Parameters of the models, out of what the optimiser moves."""
        return params.models if self.two_sources else params

    def _per_label_of_batch(self, sums: Residuals) -> Residuals:
        """The sums of a part of a batch, to be divided by the labels of all parts: a loss is linear in its sums."""
        return sums if self.devices is None else replace(sums, counts=jax.lax.psum(sums.counts, PARTS))

    def _by_model(self, prediction: Prediction) -> Prediction:
        """Members [L * H] as models [L] and their heads [H]."""
        heads = self.ensemble.heads.count

        def apart(values: jax.Array) -> jax.Array:
            return values.reshape(-1, heads, *values.shape[1:])

        return replace(
            prediction,
            energy=apart(prediction.energy),
            forces=apart(prediction.forces),
            virial=apart(prediction.virial),
        )

    @staticmethod
    def _residuals(
        prediction: Prediction, graph: Graph, targets: Targets, weights: jax.Array, loss: LossSettings
    ) -> Residuals:
        """Residuals of every model [L]."""
        return jax.vmap(lambda one, weight: residuals(one, graph, targets, weight, loss))(prediction, weights)

    def _by_stage(self, sums: Sequence[Residuals], late: jax.Array) -> jax.Array:
        """The loss [L] of the stage, from the sums that belong to the loss of each stage."""
        early, *later = (weighted(loss, one) for loss, one in zip(self.settings.losses, sums, strict=True))
        return jnp.where(late, later[0], early) if later else early

    def _update(self, state: State, gradient: Params, total_steps: jax.Array) -> State:
        updates, optimiser = jax.vmap(self._optimiser.update)(gradient, state.optimiser, state.params)
        rate = learning_rate(self.settings, state.step, total_steps, state.plateau.factor)
        alive = jnp.where(state.stopped, 0.0, 1.0).astype(self.dtype)

        def apply(value: jax.Array, update: jax.Array) -> jax.Array:
            return value - rate * alive.reshape((-1,) + (1,) * (value.ndim - 1)) * update

        params = jax.tree.map(apply, state.params, updates)
        moved = optax.incremental_update(params, state.average, 1 - self.settings.ema)
        average = jax.tree.map(
            lambda learned, new, old: new if learned else old, is_learned(params), moved, state.average
        )
        return replace(state, params=params, average=average, optimiser=optimiser, step=state.step + 1)

    def follow_plateau(self, seen: Plateau, loss: jax.Array) -> Plateau:
        """Lets the learning rate fall where the mean of the members' losses [M] has not improved for long enough."""
        mean = jnp.nanmean(loss)  # a member that diverged says nothing about the others
        better = mean < seen.best
        waited = jnp.where(better, 0, seen.waited + 1)
        falls = waited >= self.settings.plateau_patience
        return Plateau(
            factor=jnp.where(falls, seen.factor * self.settings.plateau_factor, seen.factor),
            best=jnp.where(better, mean, seen.best),
            waited=jnp.where(falls, 0, waited),
        )

    def validate(self, params: Params, run: Run) -> tuple[Residuals, ...]:
        """Sums over the validation structures for every model: of squares, and for the loss of each stage."""
        found: tuple[Residuals, ...] = self._shared_out(
            Program._validation_sums, self.models_of(params), run.validation, run.data, run.validation_steps
        )
        return found

    def _validation_sums(
        self, params: Params, plan: BatchPlan, data: PackedDataset, steps: jax.Array
    ) -> tuple[Residuals, ...]:
        """Those of the batches of a plan, or of the parts at hand."""
        kinds = self.settings.losses

        def body(step: jax.Array, sums: tuple[Residuals, ...]) -> tuple[Residuals, ...]:
            """The sums so far with those of the batch of a step."""
            graph, targets = take_batch(data, plan, step)
            ones = jnp.ones((self.ensemble.size, graph.num_structures), self.dtype)
            prediction = self._by_model(self._whole.predict(params, graph))
            mean = jax.vmap(mean_of_heads)(prediction)
            found = (
                self._residuals(mean, graph, unweighted(targets), ones, SQUARES),
                *(self._residuals(prediction, graph, targets, ones, kind) for kind in kinds),
            )
            return jax.tree.map(jnp.add, sums, found)

        none = {name: jnp.zeros((self.ensemble.size,), self.dtype) for name in data.labels}
        return jax.lax.fori_loop(0, steps, body, (Residuals(none, none),) * (1 + len(kinds)))

    def _keep_best(self, state: State, loss: jax.Array) -> tuple[State, jax.Array]:
        """The state once it has seen the losses [L] of its averages, and which models [L] have their best there."""
        better = (loss < state.best_loss) & ~state.stopped

        def choose(new: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where(better.reshape((-1,) + (1,) * (new.ndim - 1)), new, old)

        waited = jnp.where(better, 0, state.waited + 1)
        state = replace(
            state,
            best=jax.tree.map(choose, state.average, state.best),
            best_loss=jnp.where(better, loss, state.best_loss),
            waited=waited,
            stopped=state.stopped | (waited >= self.settings.patience),
        )
        return state, better


def root_mean_squares(squares: Residuals) -> dict[str, jax.Array]:
    """Root mean square errors [L] of what reports name, from sums of squares; NaN where nothing is labelled."""
    found = {}
    for target in declared(squares.sums):
        if target.name in ("energy", "forces") or not target.basic:
            count = squares.counts[target.name]
            none = jnp.where(count > 0, 0.0, jnp.nan)
            found[f"validation_{target.label}_rmse"] = jnp.sqrt(means(squares)[target.name]) + none
    return found


def _side_by_side(function: Callable[[Any], Any], values: Any) -> Any:
    return jax.vmap(function)(values)


def _begin_second_stage(state: State, late: jax.Array, first: jax.Array) -> State:
    """Forgets, at the first validation of the second stage, what was best by another loss; patience waits for it."""
    plateau = replace(
        state.plateau,
        best=jnp.where(first, jnp.inf, state.plateau.best),
        waited=jnp.where(first, 0, state.plateau.waited),
    )
    return replace(
        state,
        best_loss=jnp.where(first, jnp.inf, state.best_loss),
        waited=jnp.where(late & ~first, state.waited, -1),  # counted up to 0 next
        plateau=plateau,
    )


class Compiled(NamedTuple):
    """The functions of `Program` by their names, compiled once for each shape of their arrays.

    Attributes:
        even: ``segment`` of several trainings side by side, whose steps [B] are as many.
        uneven: the same where they are not.
    """

    fresh: Callable[..., Params]
    initial: Callable[..., State]
    segment: Callable[..., tuple[State, dict[str, jax.Array]]]
    validate: Callable[..., tuple[Residuals, ...]]
    even: Callable[..., tuple[State, dict[str, jax.Array]]]
    uneven: Callable[..., tuple[State, dict[str, jax.Array]]]


def compiled(program: Program) -> Compiled:
    """The functions of a program, or of an equal one before it, whichever trainer that belonged to.

    Programs are equal that differ in settings of the host alone: how long they run, and on which data.
    """
    program = replace(program, settings=program.settings.on_device)
    try:
        return _compiled(program)
    except TypeError:  # settings of a user's own that cannot be compared with others
        return _compiled.__wrapped__(program)


@lru_cache(maxsize=_REMEMBERED)
def _compiled(program: Program) -> Compiled:
    segment = program.segment

    shared = program.devices is not None and TRAININGS in program.devices.shape

    def stepping(function: Callable[..., Any]) -> Callable[..., Any]:
        return jax.jit(full_precision(function), donate_argnums=(0,))

    def several(steps: int | None) -> Callable[..., Any]:
        return jax.vmap(segment, in_axes=(0, 0, 0, steps), spmd_axis_name=TRAININGS if shared else None)

    return Compiled(
        fresh=jax.jit(full_precision(program.fresh)),
        initial=jax.jit(full_precision(program.initial)),
        segment=stepping(segment),
        validate=jax.jit(full_precision(program.validate)),
        even=stepping(several(None)),
        # where plans differ in length, a training that is ahead waits in each step, which costs a copy of its state
        uneven=stepping(several(0)),
    )
