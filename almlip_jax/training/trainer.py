"""The trainer: all members of an ensemble in one compiled program, an epoch one loop on the device.

`Trainer` holds what is static (model, shapes, settings) and compiles once; `Trainer.train` is called round after
round with a growing dataset and compiles nothing again.  Between two validations the device runs on its own; the host
only draws the order of the structures, packs it into a plan, and reports.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ase import Atoms

from almlip_jax.ensembles import Ensemble, EnsembleSettings, beside_members, spread_members
from almlip_jax.errors import InputError
from almlip_jax.models import Params
from almlip_jax.structures.species import SpeciesTable
from almlip_jax.training import checkpoint as checkpoints
from almlip_jax.training.dataset import Capacity, TrainingSet, bootstrap_weights, split, training_set
from almlip_jax.training.program import Program, Run, State
from almlip_jax.training.settings import TrainingSettings, check_losses


@dataclass(frozen=True)
class EpochReport:
    """Where a training stands, after each validation; L models, whatever heads they have.

    Attributes:
        epoch: passes over the data so far.
        step: optimiser steps so far.
        steps: optimiser steps in all, if nothing stops earlier.
        train_loss: [L] mean loss since the last report (with the models' bootstrap weights).
        validation_loss: [L] loss of the averaged parameters on the validation structures; NaN without any.
        validation_energy_rmse: [L] eV/atom.
        validation_forces_rmse: [L] eV/Angstrom.
        stopped: [L] bool, models that ended early.
        seconds: since the training began.
    """

    epoch: int
    step: int
    steps: int
    train_loss: np.ndarray
    validation_loss: np.ndarray
    validation_energy_rmse: np.ndarray
    validation_forces_rmse: np.ndarray
    stopped: np.ndarray
    seconds: float

    @property
    def forces_rmse(self) -> float:
        """Mean over the models that have one of the validation error of force components, eV/Angstrom; NaN without."""
        known = self.validation_forces_rmse[np.isfinite(self.validation_forces_rmse)]
        return float(known.mean()) if len(known) else float("nan")


@dataclass(frozen=True)
class TrainingResult:
    """What a training gives.

    Attributes:
        params: parameters with a leading axis over models: of each the averaged ones that validated best.
        history: one report a validation.
    """

    params: Params
    history: tuple[EpochReport, ...]


class Trainer:
    """Trains ensembles of one architecture on datasets within one capacity.

    Args:
        ensemble: model and number of members.
        species: the species table.
        capacity: static sizes; see `plan_capacity`.
        settings: of the training.
        members: what makes the members differ.
        dtype: float32 or float64 (the latter needs ``jax_enable_x64``).
        first: position of the first of these models among all that ``members`` speaks of.

    Raises:
        InputError: the loss needs members that say how sure they are, and these do not, or the other way round.
    """

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
        heads = ensemble.heads
        check_losses(settings, heads.count, heads.likelihood)
        self.ensemble = ensemble
        self.species = species
        self.capacity = capacity
        self.settings = settings
        self.members = members or EnsembleSettings(size=ensemble.size)
        self.dtype = dtype
        self.first = first
        self.program = Program(ensemble, settings, dtype)
        self._fresh = jax.jit(self.program.fresh)
        self._initial = jax.jit(self.program.initial)
        self._segment = jax.jit(self.program.segment, donate_argnums=(0,))

    def train(
        self,
        dataset: Sequence[Atoms],
        params: Params | None,
        key: jax.Array,
        *,
        reference_energies: dict[int, float],
        on_epoch: Callable[[EpochReport], None] | None = None,
        steps: int | None = None,
        checkpoint: Path | None = None,
        checkpoint_every: int = 10,
    ) -> TrainingResult:
        """Trains all members on a dataset.

        Args:
            dataset: labelled structures, in an order that stays the same as the dataset grows (the split into
                training and validation, and the bootstrap weights, follow the position of a structure).
            params: parameters to start from, or None for fresh ones.
            key: of this training.
            reference_energies: eV by atomic number, subtracted from the labels.
            on_epoch: called with a report after each validation.
            steps: length in optimiser steps, in place of that of the settings.
            checkpoint: folder to keep the state of the training in.  Where it holds one of the same training (labels,
                settings, first parameters, key) the training goes on there, and ends as if it had never stopped;
                `on_epoch` hears of what is new.  Whoever keeps the result may then `checkpoint.discard` it.
            checkpoint_every: validations between two writings of the checkpoint.

        Returns:
            `TrainingResult`; the same inputs give the same result bit for bit on the same hardware, but for the
            seconds.

        Raises:
            CapacityError: the dataset does not fit.
            InputError: nothing is labelled, or the loss is not finite from the start.
        """
        data = self.training_set(dataset, reference_energies)
        total = steps or self._total_steps(len(data.training), warm=params is not None)
        keeper = None if checkpoint is None else self._keeper(checkpoint, checkpoint_every, data, params, key, total)
        init_key, order_key = jax.random.split(key)
        run = self.prepare(data, total)
        state = self.start(data, params, init_key)
        order = np.random.default_rng(np.asarray(jax.random.key_data(order_key)))
        history: list[EpochReport] = []
        if keeper is not None:
            state, history = keeper.take_up(state, order)
        began = time.monotonic() - (history[-1].seconds if history else 0.0)
        while not is_over(history):
            plan, length, epochs = data.segment(order, self.settings.validate_every)
            epoch = epochs + (history[-1].epoch if history else 0)
            state, raw = self._segment(state, run, plan, jnp.asarray(length, jnp.int32))
            history.append(report_of(raw, epoch, total, time.monotonic() - began))
            if keeper is not None:
                # before anybody hears of it: what may interrupt the training from there finds it kept
                keeper.keep(state, order, history)
            if on_epoch is not None:
                on_epoch(history[-1])
        return TrainingResult(params=jax.device_get(state.best), history=tuple(history))

    def training_set(self, dataset: Sequence[Atoms], reference_energies: dict[int, float]) -> TrainingSet:
        """Structures on the device, split into those that train and those that validate; raises as `train` does."""
        return training_set(
            dataset,
            self.species,
            self.ensemble.cutoff,
            self.capacity,
            reference_energies=reference_energies,
            validation_fraction=self.settings.validation_fraction,
            dtype=self.dtype,
        )

    def prepare(self, data: TrainingSet, total_steps: int) -> Run:
        """What the program of a training needs to know of its data."""
        plan, steps = data.validation_plan()
        mine = slice(self.first, self.first + self.ensemble.size)
        run = Run(
            data=data.packed.data,
            weights=bootstrap_weights(self.members, self.capacity.structures, self.dtype)[mine],
            validation=jax.tree.map(jnp.asarray, plan),
            validation_steps=jnp.asarray(steps, jnp.int32),
            total_steps=jnp.asarray(total_steps, jnp.int32),
        )
        return beside_members(run, self.ensemble.size)  # type: ignore[no-any-return]

    def start(self, data: TrainingSet, params: Params | None, key: jax.Array) -> State:
        """The state before the first step, from given parameters or fresh ones."""
        if params is None:
            sample = jax.tree.map(jnp.asarray, data.sample_plan())
            params = self._fresh(key, data.packed.data, sample, data.energy_scale())
        return _spread(self._initial(spread_members(jax.tree.map(lambda x: jnp.asarray(x, self.dtype), params))))

    def total_steps(self, dataset: Sequence[Atoms], *, warm: bool) -> int:
        """Length of a training on so many structures, in optimiser steps, if nothing ends it earlier."""
        return self._total_steps(len(split(len(dataset), self.settings.validation_fraction)[0]), warm=warm)

    def _total_steps(self, structures: int, *, warm: bool) -> int:
        per_epoch = int(np.ceil(structures / self.settings.batch_size))
        most = (self.settings.warm_steps if warm else None) or self.settings.max_steps
        return min(most, self.settings.max_epochs * per_epoch)

    def _keeper(
        self, folder: Path, every: int, data: TrainingSet, params: Params | None, key: jax.Array, total: int
    ) -> _Keeper:
        words = (
            repr(self.ensemble),
            self.settings.model_dump_json(exclude={"final_steps"}),  # the length is in the total
            self.members.model_dump_json(),
            str(self.first),
            repr(self.capacity),
            "fresh" if params is None else str(jax.tree.structure(params)),
            str(total),
        )
        packed = data.packed
        arrays = (packed.data, packed.counts, jax.random.key_data(key), [] if params is None else params)
        return _Keeper(folder, checkpoints.identity(arrays, *words), every)


@dataclass(frozen=True)
class _Keeper:
    """Keeps the state of one training in a folder."""

    folder: Path
    whose: str
    every: int  # validations between two writings

    def take_up(self, state: State, order: np.random.Generator) -> tuple[State, list[EpochReport]]:
        """State and history as they were kept, the generator set to where it stood; or as they begin."""
        saved = checkpoints.load(self.folder, self.whose)
        if saved is None:
            return state, []
        begun, structure = jax.tree.flatten(state)
        # where those of the beginning lie; an array put there by name is another input where jax may choose the place
        places = [leaf.sharding if leaf.committed else None for leaf in begun]
        leaves = [jax.device_put(leaf, place) for leaf, place in zip(saved.leaves, places, strict=True)]
        order.bit_generator.state = saved.order
        return jax.tree.unflatten(structure, leaves), [_restored(report) for report in saved.history]

    def keep(self, state: State, order: np.random.Generator, history: Sequence[EpochReport]) -> None:
        """Writes the state where it is time to."""
        if not is_over(history) and len(history) % self.every:
            return
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(jax.device_get(state))]
        reports = [asdict(report) for report in history]
        checkpoints.save(self.folder, self.whose, checkpoints.Saved(leaves, order.bit_generator.state, reports))


def is_over(history: Sequence[EpochReport]) -> bool:
    """Whether a training with these reports has ended."""
    return bool(history) and (history[-1].step >= history[-1].steps or bool(history[-1].stopped.all()))


def report_of(raw: dict[str, jax.Array], epoch: int, steps: int, seconds: float) -> EpochReport:
    """What the program said of a segment, as a report.

    Raises:
        InputError: no model's loss is finite.
    """
    values = jax.device_get(raw)
    if not np.isfinite(values["train_loss"]).any():
        raise InputError("the training loss is not finite; check the labels, or lower training.learning_rate.")
    return EpochReport(
        epoch=epoch,
        step=int(values["step"]),
        steps=steps,
        train_loss=values["train_loss"],
        validation_loss=values["validation_loss"],
        validation_energy_rmse=values["validation_energy_rmse"],
        validation_forces_rmse=values["validation_forces_rmse"],
        stopped=values["stopped"],
        seconds=seconds,
    )


def _restored(report: dict[str, Any]) -> EpochReport:
    """A report from its arrays."""
    numbers = {name: int(report[name]) for name in ("epoch", "step", "steps")}
    return EpochReport(**{**report, **numbers, "seconds": float(report["seconds"])})


def _spread(state: State) -> State:
    """The state with all that carries the member axis laid over the devices, as the program's results are.

    With part of it elsewhere the program would be compiled once for the beginning and once more for its own results.
    """
    shared = ("step", "plateau")
    return replace(
        state,
        **{one.name: spread_members(getattr(state, one.name)) for one in fields(state) if one.name not in shared},
    )
