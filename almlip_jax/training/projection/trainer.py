"""The trainer by variable projection: passes over the data on the device, small matrices on the host."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from almlip_jax.ensembles import Ensemble, EnsembleSettings, training_devices
from almlip_jax.errors import InputError
from almlip_jax.models import Params
from almlip_jax.structures.species import SpeciesTable
from almlip_jax.training import checkpoint as checkpoints
from almlip_jax.training.dataset import Capacity, TrainingSet
from almlip_jax.training.levels import with_levels
from almlip_jax.training.loss import weighted
from almlip_jax.training.program import Run, compiled, root_mean_squares
from almlip_jax.training.projection.data import Observer, observer
from almlip_jax.training.projection.program import Reduction, reduction, separable_part
from almlip_jax.training.projection.search import advanced, begun, best, starts_left, the_best
from almlip_jax.training.projection.settings import ProjectionSettings
from almlip_jax.training.projection.state import ALONE, MEMBERS, TRIAL, State, leaves, restored
from almlip_jax.training.settings import TrainingSettings
from almlip_jax.training.trainer import EpochReport, Keeper, OnEpoch, Trainer, TrainingResult, is_over, report_of

_LEAST_RIDGE: Final = 1e-10  # decides what data leave open


@dataclass(frozen=True)
class _Task:
    """What one training looks at.

    Attributes:
        observer: of the training structures.
        tried: [C] searches that there is something to begin with for.
        linear: number of linear parameters.
        run: weights of the structures for each model, and what validates.
        steps: passes over the data in all.
    """

    observer: Observer
    tried: np.ndarray
    linear: int
    run: Run
    steps: int


class ProjectionTrainer(Trainer):
    """Trains ensembles of one separable architecture by variable projection, in float64 whatever they are used in.

    Arguments, methods and errors are those of `Trainer`; a step is a pass over the data.
    """

    stacks: ClassVar[bool] = False

    def __init__(
        self,
        ensemble: Ensemble,
        species: SpeciesTable,
        capacity: Capacity,
        settings: TrainingSettings,
        members: EnsembleSettings | None = None,
        dtype: np.dtype | type = np.float32,
        first: int = 0,
    ) -> None:
        one = training_devices(1, 1)  # on which lies what validates
        super().__init__(ensemble, species, capacity, settings, members, np.float64, first, devices=one)
        inner = separable_part(ensemble.model)
        if inner is None:
            raise InputError("training.projection needs a model that is linear in most of its parameters, as kind mtp.")
        self.given, self.inner = np.dtype(dtype), inner
        self._all = Mesh(np.array(jax.devices()), ("parts",))
        self._reduce = reduction(Reduction(ensemble.model, settings.loss, self._all))

    @property
    def projection(self) -> ProjectionSettings:
        """Settings of the search."""
        assert self.settings.projection is not None
        return self.settings.projection

    @property
    def ridge(self) -> float:
        """Penalty on linear parameters; see `ProjectionSettings.ridge`."""
        return self.projection.ridge or self._rounding

    @property
    def _rounding(self) -> float:
        """What rounding adds in the numbers that the potential is used in, or what decides where data leave it open."""
        return max(float(np.finfo(self.given).eps), _LEAST_RIDGE)

    @property
    def own(self) -> bool:
        """Whether each model is searched for by itself."""
        return self.projection.members == "own"

    @property
    def searches(self) -> int:
        """Number C of searches that there is room for."""
        return self.ensemble.size if self.own else max(self.projection.starts, self.ensemble.size)

    @property
    def remark(self) -> str | None:
        """What the user should know of a ridge below what rounding adds; None where it is not."""
        if self.ridge >= self._rounding:
            return None
        return (
            f"training.projection.ridge is {self.ridge:g}, below {self._rounding:.2g}, the rounding of {self.given}: "
            "coefficients may cancel to digits that the potential does not have; leave it out, or compare errors of "
            "precision float32 and float64."
        )

    def train(self, *args: Any, say: Callable[[str], None] | None = None, **options: Any) -> TrainingResult:
        """See `Trainer.train`."""
        if say is not None and self.remark is not None:
            say(self.remark)
        options["say"] = say
        with jax.enable_x64(True):
            result = super().train(*args, **options)
        return replace(result, params=jax.tree.map(lambda x: np.asarray(x, self.given), result.params))

    # -- one training -------------------------------------------------------------------------------------------------

    def _attempt(
        self,
        data: TrainingSet,
        run: Run,
        params: Params | None,
        key: jax.Array,
        total: int,
        keeper: Keeper | None,
        wanted: np.ndarray,
        on_epoch: OnEpoch | None,
        taught: Params | None = None,
    ) -> TrainingResult:
        """See `Trainer._attempt`."""
        first, tried = self._first(data, params, key)
        seen = observer(self._reduce, self.inner, first, data, self._all, summed=self.settings.loss.summed)
        linear = jax.eval_shape(self.inner.separate, jax.tree.map(lambda x: x[0], first))[0].shape[0]
        task = _Task(seen, tried, linear, run, total)
        history: list[EpochReport] = []
        saved = None if keeper is None else checkpoints.load(keeper.folder, keeper.whose)
        if saved is None:
            state = self._begun(task)
        else:
            state = restored(saved.leaves, linear, self.ridge)
            history = [EpochReport.of(report) for report in saved.history]
        began = time.monotonic() - (history[-1].seconds if history else 0.0)
        while not is_over(history, wanted):
            state, raw = self._judged(task, self._advanced(task, state))
            history.append(report_of(raw, state.step, total, time.monotonic() - began))
            if keeper is not None and (is_over(history, wanted) or len(history) % keeper.every == 0):
                checkpoints.save(
                    keeper.folder, keeper.whose, checkpoints.Saved(leaves(state), {}, [x.plain for x in history])
                )
            if on_epoch is not None:
                on_epoch(history[-1])
        kept = seen.params(state.best[:, :linear], state.best[:, linear:], state.best_origins)
        return TrainingResult(params=jax.device_get(kept), history=tuple(history))

    def _first(self, data: TrainingSet, params: Params | None, key: jax.Array) -> tuple[Params, np.ndarray]:
        """Parameters that searches begin with, and which of them [C] are to be tried.

        A shared search goes on from those of models that are there, and tries nothing else.
        """
        count, given = self.searches, 0
        if params is not None:
            given = jax.tree.leaves(params)[0].shape[0]
            params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
            if not self.own:
                place = np.minimum(np.arange(count), given - 1)
                return jax.tree.map(lambda x: x[place], params), np.isin(np.arange(count), self._different(params))
        if given < count:
            fresh = self._fresh(data, key, count)
            params = (
                fresh if params is None else jax.tree.map(lambda x, y: np.concatenate([x, y[given:]]), params, fresh)
            )
        tried = count if self.own else self.projection.starts
        return jax.tree.map(lambda x: x[:count], params), np.arange(count) < tried

    def _different(self, params: Params) -> np.ndarray:
        """Places of models that differ in what is not linear."""
        others = np.asarray(jax.vmap(self.inner.separate)(params)[1])
        return np.sort(np.unique(others, axis=0, return_index=True)[1])

    def _fresh(self, data: TrainingSet, key: jax.Array, count: int) -> Params:
        """Fresh parameters for a number of searches."""
        several = compiled(replace(self.program, ensemble=replace(self.ensemble, size=count)))
        plan, steps = data.training_plan()
        levels = self._levels(data)
        whole, scale = jax.device_put(plan), data.energy_scale(levels)
        fresh = several.fresh(key, data.packed.data, whole, jnp.asarray(steps, jnp.int32), scale)
        return jax.tree.map(np.asarray, with_levels(fresh, levels))

    def _begun(self, task: _Task) -> State:
        """The state before the first step."""
        count, models = len(task.tried), self.ensemble.size
        origins = np.arange(count)
        look = task.observer.look(self._weights(task, MEMBERS if self.own else TRIAL), origins)
        others = np.asarray(jax.vmap(self.inner.separate)(task.observer.first)[1])
        searches = begun(look, others, task.linear, task.tried, self.ridge)
        return State(
            searches=tuple(searches),
            origins=origins,
            part=MEMBERS if self.own else TRIAL,
            step=0,
            best=np.zeros((models, task.linear + others.shape[1])),
            best_origins=np.zeros(models, int),
            best_loss=np.full(models, np.inf),
            waited=np.zeros(models, int),
            stopped=np.zeros(models, bool),
        )

    def _weights(self, task: _Task, part: int) -> np.ndarray:
        """Weights [C, n] of the structures in the searches of a part."""
        own = np.asarray(task.run.weights)
        if part != MEMBERS:
            return np.ones((self.searches, own.shape[1]))
        return np.concatenate([own, np.ones((self.searches - len(own), own.shape[1]))])

    def _advanced(self, task: _Task, state: State) -> State:
        """The state after one more pass over the data."""
        if state.part != MEMBERS and self._members_next(task, state):
            return self._with_members(task, state)
        look = task.observer.look(self._weights(task, state.part), state.origins)
        searches = advanced(look, state.searches, self.ridge, self.projection.tolerance)
        state = replace(state, searches=tuple(searches), step=state.step + 1)
        return self._fewer(task, state) if state.part == TRIAL else state

    def _fewer(self, task: _Task, state: State) -> State:
        """The state with the better half of the searches, as often as leaves one at the end of the trial."""
        left = starts_left(int(task.tried.sum()), state.step / self.projection.trial_iterations)
        return replace(state, searches=the_best(state.searches, left), part=ALONE if left == 1 else TRIAL)

    @property
    def _after(self) -> int:
        """Passes over the data after the shared search."""
        return 0 if self.own or self.ensemble.size == 1 else 1 + self.projection.member_iterations

    def _members_next(self, task: _Task, state: State) -> bool:
        over = state.step >= task.steps - self._after or state.waited.min() >= self.settings.patience
        return self._after > 0 and (over or not any(one.active for one in state.searches))

    def _with_members(self, task: _Task, state: State) -> State:
        """The members after their first pass over the data, each with its own weights, from what was found for all."""
        models, count = self.ensemble.size, len(state.searches)
        active = np.arange(count) < models
        place = np.minimum(np.arange(count), models - 1)
        others, origins = state.best[place, task.linear :], state.best_origins[place]
        look = task.observer.look(self._weights(task, MEMBERS), origins)
        searches = begun(look, others, task.linear, active, self.ridge)
        if not self.projection.member_iterations:
            searches = [replace(one, active=False) for one in searches]
        blank = replace(state, best_loss=np.full(models, np.inf), waited=np.full(models, -1))
        return replace(blank, searches=tuple(searches), origins=origins, part=MEMBERS, step=state.step + 1)

    def _judged(self, task: _Task, state: State) -> tuple[State, dict[str, Any]]:
        """The state once its models have been validated, and the numbers of a report."""
        models = self.ensemble.size
        mine = np.arange(models) if state.part == MEMBERS else np.full(models, best(state.searches))
        chosen = [state.searches[n] for n in mine]
        linear = np.stack([one.point.linear for one in chosen])
        others = np.stack([one.others for one in chosen])
        params = task.observer.params(linear, others, state.origins[mine])
        squares, penalties = self._compiled.validate(params, task.run)
        observed = int(task.run.validation_steps) > 0
        validation = np.asarray(weighted(self.settings.loss, penalties))
        judged = validation if observed else np.full(models, -float(state.step))
        better = (judged < state.best_loss) & ~state.stopped & np.isfinite(linear).all(axis=1)
        waited = np.where(better, 0, state.waited + 1)
        ended = np.array([not one.active for one in chosen]) | (waited >= self.settings.patience)
        if self._after and state.part != MEMBERS:
            ended = np.zeros(models, bool)  # the members are still to come
        state = replace(
            state,
            best=np.where(better[:, None], np.concatenate([linear, others], 1), state.best),
            best_origins=np.where(better, state.origins[mine], state.best_origins),
            best_loss=np.where(better, judged, state.best_loss),
            waited=waited,
            stopped=state.stopped | ended,
        )
        raw = {
            "step": np.asarray(state.step),
            "train_loss": np.array([one.point.loss for one in chosen]),
            "validation_loss": validation if observed else np.full(models, np.nan),
            "stopped": state.stopped,
            "kept": better,
        }
        return state, raw | root_mean_squares(squares)
