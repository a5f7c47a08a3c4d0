"""The trainer: all members of an ensemble in one compiled program, an epoch one loop on the device.

`Trainer` holds what is static (model, shapes, settings) and compiles once; `Trainer.train` is called round after
round with a growing dataset and compiles nothing again.  Between two validations the device runs on its own; the host
only draws the order of the structures, packs it into a plan, and reports.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Final, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from ase import Atoms
from jax.sharding import Mesh

from almlip_jax.ensembles import Ensemble, EnsembleSettings, laid_over, training_devices
from almlip_jax.ensembles.second_source import last_layer
from almlip_jax.ensembles.sharding import PARTS, TRAININGS
from almlip_jax.errors import InputError
from almlip_jax.keys import named_stream
from almlip_jax.models import Params
from almlip_jax.models.delta import corrects
from almlip_jax.models.electronic import knows_states, taught_states
from almlip_jax.structures.species import SpeciesTable
from almlip_jax.targets import further_targets
from almlip_jax.training import checkpoint as checkpoints
from almlip_jax.training.dataset import Capacity, Order, TrainingSet, bootstrap_weights, drawn, split, training_set
from almlip_jax.training.levels import Levels, with_levels
from almlip_jax.training.program import Program, Run, State, TwoHeaded, compiled
from almlip_jax.training.settings import TrainingSettings, check_losses, check_plain

OnEpoch: TypeAlias = "Callable[[EpochReport], None]"
"""Told of each validation."""


@dataclass(frozen=True)
class EpochReport:
    """Where a training stands, after each validation; L models, whatever heads they have.

    Attributes:
        epoch: passes over the data so far.
        step: optimiser steps so far.
        steps: optimiser steps in all, if nothing stops earlier.
        train_loss: [L] mean loss since the last report (with the models' bootstrap weights).
        validation_loss: [L] loss of the averaged parameters on the validation structures; NaN without any.
        validation_energy_rmse: [L] eV/atom; NaN where no validation structure has an energy.
        validation_forces_rmse: [L] eV/Angstrom over components; likewise.
        stopped: [L] bool, models that ended early.
        kept: [L] bool, models whose averaged parameters of this moment are the best so far; the last of these reports
            speaks of those that the training gives.
        seconds: since the training began.
        further: name -> [L] of the same errors of other `targets` that the model gives besides the energy,
            ``validation_dipole_rmse`` in e*Angstrom over components.
    """

    epoch: int
    step: int
    steps: int
    train_loss: np.ndarray
    validation_loss: np.ndarray
    validation_energy_rmse: np.ndarray
    validation_forces_rmse: np.ndarray
    stopped: np.ndarray
    kept: np.ndarray
    seconds: float
    further: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def models(self) -> dict[str, np.ndarray]:
        """Name -> [L] of every number that each model has, in the order of the columns of ``training.csv``."""
        return {name: getattr(self, name) for name in _OF_MODELS} | dict(self.further)

    def with_models(self, values: Mapping[str, np.ndarray], **others: Any) -> EpochReport:
        """The same report with other `models`, and others of its fields."""
        own: dict[str, Any] = {name: values[name] for name in _OF_MODELS}
        return replace(self, further={name: values[name] for name in self.further}, **own, **others)

    @property
    def plain(self) -> dict[str, Any]:
        """All numbers by name, as `of` takes them."""
        alone = ("epoch", "step", "steps", "stopped", "kept", "seconds")
        return {name: getattr(self, name) for name in alone} | self.models

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> EpochReport:
        """A report from its numbers by name, which may be arrays."""
        own = {one.name: plain[one.name] for one in fields(cls) if one.name != "further"}
        numbers = {name: int(plain[name]) for name in ("epoch", "step", "steps")}
        return cls(**{**own, **numbers, "seconds": float(plain["seconds"]), "further": _further(plain)})

    @property
    def errors(self) -> dict[str, float]:
        """``forces_rmse``, ``dipole_rmse``: each validation error but the energies', NaN where there is none.

        They are means over the models that have one, in the units of what they are means of.
        """
        found = {VALIDATION_ERROR: self.validation_forces_rmse} | dict(self.further)
        return {name.removeprefix("validation_"): _mean(values) for name, values in found.items()}


@dataclass(frozen=True)
class TrainingResult:
    """What a training gives.

    Attributes:
        params: parameters with a leading axis over models: of each the averaged ones that validated best.
        history: one report a validation; of models that were trained twice, those of the second time follow.
        left_out: models that diverged both times, which ``params`` do not hold; numbered architecture by architecture.
    """

    params: Params
    history: tuple[EpochReport, ...]
    left_out: tuple[int, ...] = ()

    def rows(self) -> list[dict[str, int | float]]:
        """The history as a table: step, losses and validation errors of every model, in the units of `EpochReport`."""
        rows = []
        for report in self.history:
            row: dict[str, int | float] = {"epoch": report.epoch, "step": report.step}
            for name, values in report.models.items():
                row.update({f"{name}_{m}": float(value) for m, value in enumerate(values)})
            rows.append(row)
        return rows

    @property
    def errors(self) -> dict[str, float]:
        """As `EpochReport.errors`, of ``params``: each model's errors in the validation that its own are of.

        Empty where nothing was reported.
        """
        if not self.history:
            return {}
        found = {name: np.full(values.shape, np.nan) for name, values in self.history[0].models.items()}
        for report in self.history:
            found = {name: np.where(report.kept, values, found[name]) for name, values in report.models.items()}
        for values in found.values():
            values[list(self.left_out)] = np.nan
        return self.history[-1].with_models(found).errors

    def members(self, settings: EnsembleSettings) -> EnsembleSettings:
        """Settings of the ensemble that came out, from those it was trained with."""
        return settings.without(self.left_out)


@dataclass(frozen=True)
class Again:
    """Structures of a second label source that are trained on again, under a last layer of their own.

    Attributes:
        structures: with its labels, of which each epoch draws a share.
        params: of the potential that learned from them, as those that a training starts from: its last layer is what
            theirs begins with.  None for that of the model.
    """

    structures: Sequence[Atoms]
    params: Params | None


class Trainer:
    """Trains ensembles of one architecture on datasets within one capacity.

    Attributes:
        stacks: whether several trainings can run side by side in one program.

    Args:
        ensemble: model and number of members.
        species: the species table.
        capacity: static sizes; see `plan_capacity`.
        settings: of the training.
        members: what makes the members differ.
        dtype: float32 or float64 (the latter needs ``jax_enable_x64``).
        first: position of the first of these models among all that ``members`` speaks of.
        share: of structures of a second label source in each epoch, which have a last layer of their own; None for data
            of one source.
        devices: those that share the work out, `ensembles.training_devices` where not given, which share batches out
            where members do not fill all; what comes out is the same up to rounding.  With an axis over trainings for
            those that run side by side.

    Raises:
        InputError: the loss needs members that say how sure they are, and these do not, or the other way round; or the
            models cannot have a last layer for each of two sources.
    """

    stacks: ClassVar[bool] = True

    def __init__(
        self,
        ensemble: Ensemble,
        species: SpeciesTable,
        capacity: Capacity,
        settings: TrainingSettings,
        members: EnsembleSettings | None = None,
        dtype: np.dtype | type = np.float32,
        first: int = 0,
        *,
        share: float | None = None,
        devices: Mesh | None = None,
    ) -> None:
        heads = ensemble.heads
        check_losses(settings, heads.count, heads.likelihood)
        self.ensemble = ensemble
        self.species = species
        self.capacity = capacity
        self.settings = settings
        self.members = members or EnsembleSettings(size=ensemble.size)
        self.dtype = dtype
        self.first = first
        self.share = share
        if share is not None:
            check_two_sources(ensemble)
        devices = training_devices(ensemble.size, capacity.batch.structures) if devices is None else devices
        self._parts = devices.shape[PARTS]
        shared = devices if self._parts > 1 else None
        # of several trainings each begins on one device; what they are together is then laid over all
        self._devices = training_devices(1, 1) if TRAININGS in devices.shape else devices
        own_order = self.members.order == "own"
        self.program = Program(ensemble, settings, np.dtype(dtype), own_order, share is not None, shared)
        self._compiled = compiled(self.program)

    def on(self, devices: Mesh) -> Trainer:
        """The same on some devices, with an axis over trainings for one of several side by side."""
        own = self.ensemble, self.species, self.capacity, self.settings, self.members, self.dtype, self.first
        return Trainer(*own, share=self.share, devices=devices)

    def train(
        self,
        dataset: Sequence[Atoms],
        params: Params | None,
        key: jax.Array,
        *,
        reference_energies: dict[int, float],
        on_epoch: Callable[[EpochReport], None] | None = None,
        steps: int | None = None,
        validation: Sequence[Atoms] = (),
        weights_key: jax.Array | None = None,
        say: Callable[[str], None] | None = None,
        checkpoint: Path | None = None,
        checkpoint_every: int = 10,
        again: Again | None = None,
    ) -> TrainingResult:
        """Trains all members on a dataset.

        Args:
            dataset: labelled structures, in an order that stays the same as the dataset grows (the split into
                training and validation, and the bootstrap weights, follow the position of a structure).
            params: parameters to start from, or None for fresh ones; models beyond those that they hold are fresh.
            key: of this training.
            reference_energies: eV by atomic number, subtracted from the labels.
            on_epoch: called with a report after each validation.
            steps: length in optimiser steps, in place of that of the settings.
            validation: structures to validate on, in place of a share of the dataset.
            weights_key: decides the bootstrap weights, which a warm start should find as they were; by default they
                follow from ``key``.
            say: is told about models that diverged.
            checkpoint: folder to keep the state of the training in.  Where it holds one of the same training (labels,
                settings, first parameters, key) the training goes on there, and ends as if it had never stopped;
                `on_epoch` hears of what is new.  Whoever keeps the result may then `checkpoint.discard` it.
            checkpoint_every: validations between two writings of the checkpoint.
            again: structures of a second label source, for a trainer that has a ``share`` for them.

        Returns:
            `TrainingResult`; the same inputs give the same result bit for bit on the same hardware, but for the
            seconds.  Models that diverged are trained once more, from another random stream; those that diverge again
            are left out.

        Raises:
            CapacityError: the dataset does not fit.
            InputError: nothing is labelled, or so many models diverged twice that fewer than two are left.
        """
        data = self.training_set(dataset, reference_energies, validation, () if again is None else again.structures)
        total = steps or self._total_steps(data.epoch, warm=params is not None)
        taught = None if again is None else again.params
        stream = weights_key_of(key) if weights_key is None else weights_key
        run = self.prepare(data, total, stream)

        def attempt(key: jax.Array, place: Path | None, wanted: np.ndarray, tell: OnEpoch | None) -> TrainingResult:
            keeper = None
            if place is not None:
                keeper = self._keeper(place, checkpoint_every, data, (params, taught), (key, stream), total)
            return self._attempt(data, run, params, key, total, keeper, wanted, tell, taught)

        first = attempt(key, checkpoint, np.ones(self.ensemble.size, bool), on_epoch)
        lost = diverged(first.history)
        if not lost.any():
            return first
        if say is not None:
            say(f"{self.named(lost)} diverged, and {'is' if lost.sum() == 1 else 'are'} trained once more.")

        def tell_mended(own: EpochReport) -> None:
            if on_epoch is not None:
                on_epoch(mended_report(first.history[-1], own, lost))

        place = None if checkpoint is None else checkpoint / checkpoints.AGAIN
        return self.settled(first, attempt(again_key(key), place, lost, tell_mended), say)

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
        """One course from the first step to the last, or until all wanted models [L] have ended."""
        init_key, order_key = jax.random.split(key)
        state = self.start(data, params, init_key, taught)
        order = self.order(order_key)
        history: list[EpochReport] = []
        if keeper is not None:
            state, history = keeper.take_up(state, order)
        began = time.monotonic() - (history[-1].seconds if history else 0.0)
        while not is_over(history, wanted):
            done, epoch = (history[-1].step, history[-1].epoch) if history else (0, 0)
            plan, length, epochs = order.segment(data, self.settings.validate_every)
            steps = min(length, total - done)
            state, raw = self._compiled.segment(state, run, plan, jnp.asarray(steps, jnp.int32))
            epoch += round(epochs * steps / length)
            history.append(report_of(raw, epoch, total, time.monotonic() - began))
            if keeper is not None:
                # before it is reported: an interruption from there finds it kept
                keeper.keep(state, order, history, last=is_over(history, wanted))
            if on_epoch is not None:
                on_epoch(history[-1])
        return TrainingResult(params=jax.device_get(self.program.models_of(state.best)), history=tuple(history))

    def order(self, key: jax.Array) -> Order:
        """In which order the structures come."""
        return Order(key, self.ensemble.size if self.program.own_order else None)

    def settled(
        self, first: TrainingResult, second: TrainingResult, say: Callable[[str], None] | None
    ) -> TrainingResult:
        """A training with those models of a second one that had diverged; what diverged again is left out.

        Raises:
            InputError: fewer than two models would be left; whether enough of a committee of architectures are is for
                those to say who train it.
        """
        lost = diverged(first.history)
        gone = lost & diverged(second.history)
        history = (*first.history, *(mended_report(first.history[-1], own, lost) for own in second.history))

        def choose(old: np.ndarray, new: np.ndarray) -> np.ndarray:
            return np.where(lost.reshape((-1,) + (1,) * (old.ndim - 1)), new, old)[~gone]

        if gone.any():
            if self.ensemble.size == self.members.size:
                require_enough(gone, self.named(gone))
            if say is not None:
                say(f"{self.named(gone)} diverged again; the ensemble goes on without.")
        params = jax.tree.map(choose, first.params, second.params)
        return TrainingResult(params, history, tuple(int(n) for n in np.flatnonzero(gone)))

    def named(self, models: np.ndarray) -> str:
        """Some models [L], as messages call them."""
        return named(models, self.first)

    def training_set(
        self,
        dataset: Sequence[Atoms],
        reference_energies: dict[int, float],
        validation: Sequence[Atoms] = (),
        second: Sequence[Atoms] = (),
    ) -> TrainingSet:
        """Structures on the device, split into those that train and those that validate; raises as `train` does."""
        return training_set(
            dataset,
            self.species,
            self.ensemble.cutoff,
            self.capacity,
            reference_energies=reference_energies,
            validation_fraction=self.settings.validation_fraction,
            dtype=self.dtype,
            validation=validation,
            further=self.ensemble.targets,
            sees_state=self.ensemble.sees_state,
            parts=self._parts,
            second=second,
            share=self.share,
        )

    def prepare(self, data: TrainingSet, total_steps: int, weights_key: jax.Array) -> Run:
        """What the program of a training needs to know of its data."""
        plan, steps = data.validation_plan()
        mine = slice(self.first, self.first + self.ensemble.size)
        run = Run(
            data=data.packed.data,
            weights=bootstrap_weights(self.members, self.capacity.structures, self.dtype, weights_key)[mine],
            validation=jax.device_put(plan),
            validation_steps=jnp.asarray(steps, jnp.int32),
            total_steps=jnp.asarray(total_steps, jnp.int32),
        )
        return laid_over(run, self._devices, of_members=False)  # type: ignore[no-any-return]

    def start(self, data: TrainingSet, params: Params | None, key: jax.Array, taught: Params | None = None) -> State:
        """The state before the first step, from given parameters, fresh ones where there are none.

        Parameters of an ensemble that did not see charge and spin get those that it lacks.  The last layer of a second
        source begins as that of ``taught`` parameters, or as that of the model.
        """
        given = 0 if params is None else jax.tree.leaves(params)[0].shape[0]
        untold = params is not None and self.ensemble.sees_state and not knows_states(params)
        if untold:  # a model of a user's own sees charge and spin in a way of its own
            untold = knows_states(jax.eval_shape(self.ensemble.init, key))
        if given < self.ensemble.size and corrects(self.ensemble.model):
            raise InputError(
                "a model of kind 'delta' corrects a trained potential, and none is given for all of its members: begin "
                "with one (`Corrected.of`, teacher.correction, or --from with a potential that has a correction)."
            )
        if given < self.ensemble.size or untold:
            plan, steps = data.training_plan()
            whole = jax.device_put(plan)
            steps_of_plan, levels = jnp.asarray(steps, jnp.int32), self._levels(data)
            scale = data.energy_scale(levels)
            fresh = with_levels(self._compiled.fresh(key, data.packed.data, whole, steps_of_plan, scale), levels)
            if params is not None:
                params = taught_states(params, fresh) if untold else params
                fresh = jax.tree.map(lambda own, new: np.concatenate([own, new[given:]]), params, fresh)
            params = fresh
        own = jax.tree.map(lambda x: jnp.asarray(x, self.dtype), params)
        if self.share is not None:
            own = self._two_headed(own, taught)
        return spread_state(self._compiled.initial(laid_over(own, self._devices, of_members=True)), self._devices)

    def _two_headed(self, own: Params, taught: Params | None) -> TwoHeaded:
        """Models with a last layer for each of two sources, which is their own where none was taught."""
        layers = jax.vmap(lambda one: last_layer(self.ensemble.model, one))
        second = layers(own)
        if taught is not None:
            known = layers(jax.tree.map(lambda x: jnp.asarray(x, self.dtype), taught))
            second = jax.tree.map(lambda old, new: jnp.concatenate([old, new[len(old) :]]), known, second)
        return TwoHeaded(own, second)

    def _levels(self, data: TrainingSet) -> Levels | None:
        """What binds atoms that are counted from isolated ones, and what charges cost; None where neither is asked."""
        isolated: tuple[int, ...] = getattr(self.ensemble.model, "isolated", ())
        if not isolated and not self.ensemble.sees_state:
            return None
        counted = self.species.index(np.asarray(isolated, np.int64)).tolist()
        return data.levels(len(self.species), counted, charges=self.ensemble.sees_state)

    def total_steps(self, dataset: Sequence[Atoms], *, warm: bool, all_train: bool = False, second: int = 0) -> int:
        """Length of a training on a number of structures, in optimiser steps, if nothing ends it earlier.

        Of the dataset a share validates, unless other structures do and ``all_train``.  There are ``second`` structures
        of a second source, of which each epoch draws a share.
        """
        share = 0.0 if all_train else self.settings.validation_fraction
        training = len(split(len(dataset), share)[0])
        return self._total_steps(training + drawn(training, second, self.share), warm=warm)

    def _total_steps(self, structures: int, *, warm: bool) -> int:
        return self.settings.most_steps(structures, warm=warm)

    def _keeper(
        self,
        folder: Path,
        every: int,
        data: TrainingSet,
        params: tuple[Params | None, Params | None],
        keys: tuple[jax.Array, ...],
        total: int,
    ) -> Keeper:
        """Of a training that begins with some parameters, with those of a second source's last layer beside them."""
        own, taught = params
        words = (
            repr(self.ensemble),
            self.settings.model_dump_json(exclude={"final_steps"}),  # the length is in the total
            self.members.model_dump_json(),
            str(self.first),
            repr(self.capacity),
            "fresh" if own is None else str(jax.tree.structure(own)),
            str(total),
            *([] if self.share is None else [str(self.share)]),
        )
        packed = data.packed
        streams = [jax.random.key_data(key) for key in keys]
        arrays = (packed.data, packed.counts, data.training, streams, [] if own is None else own, taught)
        return Keeper(folder, checkpoints.identity(arrays, *words), every)


@dataclass(frozen=True)
class Keeper:
    """Keeps the state of one training in a folder."""

    folder: Path
    whose: str
    every: int  # validations between two writings

    def take_up(self, state: State, order: Order) -> tuple[State, list[EpochReport]]:
        """State and history as they were kept, the order set to where it stood; or as they begin."""
        saved = checkpoints.load(self.folder, self.whose)
        if saved is None:
            return state, []
        begun, structure = jax.tree.flatten(state)
        # where those of the beginning lie; an array put there by name is another input where jax may choose the place
        places = [leaf.sharding if leaf.committed else None for leaf in begun]
        leaves = [jax.device_put(leaf, place) for leaf, place in zip(saved.leaves, places, strict=True)]
        order.restore(saved.order)
        return jax.tree.unflatten(structure, leaves), [EpochReport.of(report) for report in saved.history]

    def keep(self, state: State, order: Order, history: Sequence[EpochReport], *, last: bool) -> None:
        """Writes the state where it is time to, and where the training has ended."""
        if not last and len(history) % self.every:
            return
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(jax.device_get(state))]
        reports = [report.plain for report in history]
        checkpoints.save(self.folder, self.whose, checkpoints.Saved(leaves, order.state, reports))


def check_two_sources(ensemble: Ensemble) -> None:
    """Whether the models of an ensemble can have a last layer for each of two label sources.

    Raises:
        InputError: a model does not say what its last layer has learned, or has further heads.
    """
    check_plain(ensemble.heads.count, ensemble.heads.likelihood)
    model = ensemble.model
    jax.eval_shape(lambda key: last_layer(model, model.init(key)), jax.random.key(0))


VALIDATION_ERROR = "validation_forces_rmse"
"""Name in a potential's metadata of its force error on the structures kept for validation."""

_OF_MODELS: Final = ("train_loss", "validation_loss", "validation_energy_rmse", VALIDATION_ERROR)
"""Fields of a report that hold a number of each model."""


def _mean(values: np.ndarray) -> float:
    """Of those that are numbers; NaN where there is none."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")


def validation_note(result: TrainingResult) -> dict[str, float | None]:
    """The entry of a potential's metadata on the validation of its training.

    Root mean square error of force components of the parameters that it kept, eV/Angstrom, averaged over the models
    that are left; None without structures kept for validation.
    """
    error = result.errors.get(VALIDATION_ERROR.removeprefix("validation_"), float("nan"))
    return {VALIDATION_ERROR: error if np.isfinite(error) else None}


def is_over(history: Sequence[EpochReport], wanted: np.ndarray) -> bool:
    """Whether a training with these reports has ended: its steps are done, or all wanted models [L] are."""
    if not history:
        return False
    ended = history[-1].stopped | diverged(history)
    return history[-1].step >= history[-1].steps or bool(ended[wanted].all())


def diverged(history: Sequence[EpochReport]) -> np.ndarray:
    """Which models [L] have a loss that is no longer a number."""
    return ~np.isfinite(history[-1].train_loss)


def named(models: np.ndarray, first: int = 0) -> str:
    """Some models [L], as messages call them; ``first`` is the number of the first of them."""
    numbers = [str(first + int(n)) for n in np.flatnonzero(models)]
    return f"model{'s' if len(numbers) > 1 else ''} {', '.join(numbers)}"


def require_enough(gone: np.ndarray, name: str) -> None:
    """Refuses an ensemble that lost too many of its models [L], called by a name, in two trainings.

    Raises:
        InputError: fewer than two are left.
    """
    if gone.all():
        raise InputError("the training loss is not finite; check the labels, or lower training.learning_rate.")
    if gone.any() and (~gone).sum() < 2:
        raise InputError(
            f"{name} diverged in two trainings, and the ensemble cannot do without; check the labels, or lower "
            "training.learning_rate."
        )


def mended_report(first: EpochReport, own: EpochReport, lost: np.ndarray) -> EpochReport:
    """A report of models that are trained a second time, with the last one of the others, which keep what they have."""
    before = first.models
    return own.with_models(
        {name: np.where(lost, values, before[name]) for name, values in own.models.items()},
        epoch=first.epoch + own.epoch,
        step=first.step + own.step,
        steps=first.step + own.steps,
        stopped=np.where(lost, own.stopped, first.stopped),
        kept=lost & own.kept,
        seconds=first.seconds + own.seconds,
    )


def weights_key_of(key: jax.Array) -> jax.Array:
    """The stream of bootstrap weights that goes with a training where none is given."""
    return named_stream(key, "bootstrap")


def again_key(key: jax.Array) -> jax.Array:
    """The stream of models that are trained once more."""
    return named_stream(key, "again")


def report_of(raw: dict[str, jax.Array], epoch: int, steps: int, seconds: float) -> EpochReport:
    """What the program returned for a segment, as a report."""
    values = jax.device_get(raw)
    own = {name: values[name] for name in (*_OF_MODELS, "stopped", "kept")}
    step, further = int(values["step"]), _further(values)
    return EpochReport(epoch=epoch, step=step, steps=steps, seconds=seconds, further=further, **own)


def _further(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those among the numbers of a validation that are errors of what the model gives besides the energy."""
    names = (f"validation_{target.label}_rmse" for target in further_targets())
    return {name: values[name] for name in names if name in values}


def spread_state(state: State, devices: Mesh) -> State:
    """The state with all that carries the member axis laid over the devices, as the program's results are.

    With part of it elsewhere the program would be compiled once for the beginning and once more for its own results.
    """
    shared = ("step", "plateau")
    parts = {one.name: getattr(state, one.name) for one in fields(state)}
    return replace(
        state, **{name: laid_over(part, devices, of_members=name not in shared) for name, part in parts.items()}
    )
