"""The trainer: all members of an ensemble in one compiled program, an epoch one loop on the device.

`Trainer` holds what is static (model, shapes, settings) and compiles once; `Trainer.train` is called round after
round with a growing dataset and compiles nothing again.  Between two validations the device runs on its own; the host
only draws the order of the structures, packs it into a plan, and reports.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ase import Atoms
from flax import struct

from almlip_jax.ensembles import Ensemble, spread_members
from almlip_jax.errors import CapacityError, InputError
from almlip_jax.models import Params
from almlip_jax.structures.graph import Graph, Targets
from almlip_jax.structures.neighbors import largest_neighbor_count
from almlip_jax.structures.packing import (
    BatchPlan,
    BatchShape,
    Packed,
    PackedDataset,
    bucket,
    pack,
    plan_batches,
    take_batch,
)
from almlip_jax.structures.species import SpeciesTable
from almlip_jax.training import checkpoint as checkpoints
from almlip_jax.training.loss import SQUARES, Residuals, means, residuals
from almlip_jax.training.optimiser import build_optimiser, in_second_stage, learning_rate, loss_weights
from almlip_jax.training.settings import EnsembleSettings, LossSettings, TrainingSettings


@dataclass(frozen=True)
class Capacity:
    """Static sizes of a training, allocated for the largest dataset it will see.

    Attributes:
        batch: shape of a batch.
        atoms: atoms of the whole dataset, the padding slot included.
        structures: structures of the whole dataset, the padding slot included.
        steps: batches in a plan, the longest run between two validations.
    """

    batch: BatchShape
    atoms: int
    structures: int
    steps: int


def plan_capacity(
    structures: Sequence[Atoms], cutoff: float, settings: TrainingSettings, largest_dataset: int | None = None
) -> Capacity:
    """Sizes for datasets of up to ``largest_dataset`` structures like the given ones.

    Args:
        structures: typical structures; a molecule's neighbours are allocated as all of its other atoms, a periodic
            structure's with a quarter to spare.
        cutoff: Angstrom.
        settings: of the training.
        largest_dataset: number of structures to allocate for; that of ``structures`` where not given.
    """
    sizes = np.array([len(a) for a in structures])
    number = max(largest_dataset or 0, len(structures))
    found = largest_neighbor_count(structures, cutoff)
    open_only = all(not a.pbc.any() for a in structures)
    neighbors = int(sizes.max()) - 1 if open_only and sizes.max() <= 32 else bucket(int(1.25 * found) + 1, 8)
    # Batches of equal structures are exactly full; others get the room of the mean, and of the largest one.
    uniform = sizes.min() == sizes.max()
    atoms = settings.batch_size * (int(sizes.max()) if uniform else int(np.ceil(1.05 * sizes.mean())))
    atoms = max(atoms, int(sizes.max()))
    per_epoch = int(np.ceil(number / settings.batch_size)) * (1 if uniform else 2) + 1
    return Capacity(
        batch=BatchShape(atoms=atoms, neighbors=max(neighbors, 1), structures=settings.batch_size),
        atoms=int(number * (sizes.max() if uniform else 1.1 * sizes.mean())) + int(sizes.max()) + 1,
        structures=number + 1,
        steps=per_epoch + settings.validate_every,
    )


@dataclass(frozen=True)
class EpochReport:
    """Where a training stands, after each validation.

    Attributes:
        epoch: passes over the data so far.
        step: optimiser steps so far.
        steps: optimiser steps in all, if nothing stops earlier.
        train_loss: [M] mean loss since the last report (with the members' bootstrap weights).
        validation_loss: [M] loss of the averaged parameters on the validation structures; NaN without any.
        validation_energy_rmse: [M] eV/atom.
        validation_forces_rmse: [M] eV/Angstrom.
        stopped: [M] bool, members that ended early.
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


@dataclass(frozen=True)
class TrainingResult:
    """What a training gives.

    Attributes:
        params: parameters with leading member axis: of each member the averaged ones that validated best.
        history: one report a validation.
    """

    params: Params
    history: tuple[EpochReport, ...]


@struct.dataclass
class _State:
    """Device state of a training; leaves carry the member axis."""

    params: Params
    average: Params
    best: Params
    optimiser: optax.OptState
    best_loss: jax.Array  # [M]
    waited: jax.Array  # [M] validations since the best
    stopped: jax.Array  # [M]
    step: jax.Array  # []
    plateau: _Plateau


@struct.dataclass
class _Plateau:
    """What the schedule ``plateau`` has seen; one for the whole ensemble, which shares its learning rate."""

    factor: jax.Array  # [] of the learning rate
    best: jax.Array  # [] lowest mean loss so far
    waited: jax.Array  # [] validations since then, or since the last fall


@struct.dataclass
class _Run:
    """What one training keeps constant on the device."""

    data: PackedDataset
    weights: jax.Array  # [M, n] bootstrap weights
    validation: BatchPlan
    validation_steps: jax.Array  # []
    total_steps: jax.Array  # []


class Trainer:
    """Trains ensembles of one architecture on datasets within one capacity.

    Args:
        ensemble: model and number of members.
        species: the species table.
        capacity: static sizes; see `plan_capacity`.
        settings: of the training.
        members: what makes the members differ.
        dtype: float32 or float64 (the latter needs ``jax_enable_x64``).
    """

    def __init__(
        self,
        ensemble: Ensemble,
        species: SpeciesTable,
        capacity: Capacity,
        settings: TrainingSettings,
        members: EnsembleSettings | None = None,
        dtype: np.dtype | type = np.float32,
    ) -> None:
        self.ensemble = ensemble
        self.species = species
        self.capacity = capacity
        self.settings = settings
        self.members = members or EnsembleSettings(size=ensemble.size)
        self.dtype = dtype
        self._optimiser = build_optimiser(settings)
        self._fresh = jax.jit(self._fresh_params)
        self._initial = jax.jit(self._initial_state)
        self._segment = jax.jit(self._run_segment, donate_argnums=(0,))

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
        packed = self._pack(dataset, reference_energies)
        training, validation = self._split(len(dataset))
        init_key, order_key = jax.random.split(key)
        total = steps or self._total_steps(len(training), warm=params is not None)
        whose = "" if checkpoint is None else self._identity(packed, params, key, total)
        run = self._prepare(packed, validation, total)
        if params is None:
            sample = jax.tree.map(
                jnp.asarray, plan_batches(packed, training, self.capacity.batch, self.capacity.steps)[0]
            )
            params = self._fresh(init_key, packed.data, sample, self._energy_scale(packed, training))
        state = self._initial(spread_members(jax.tree.map(lambda x: jnp.asarray(x, self.dtype), params)))
        order = np.random.default_rng(np.asarray(jax.random.key_data(order_key)))
        history: list[EpochReport] = []
        saved = None if checkpoint is None else checkpoints.load(checkpoint, whose)
        if saved is not None:
            state = jax.tree.unflatten(jax.tree.structure(state), jax.device_put(list(saved.leaves)))
            state = replace(state, params=spread_members(state.params))  # the rest follows
            order.bit_generator.state = saved.order
            history = [_restored(report) for report in saved.history]
        began = time.monotonic() - (history[-1].seconds if history else 0.0)
        while not history or (history[-1].step < total and not history[-1].stopped.all()):
            plan, length, epochs = self._plan_segment(packed, training, order)
            epoch = epochs + (history[-1].epoch if history else 0)
            state, raw = self._segment(state, run, plan, jnp.asarray(length, jnp.int32))
            history.append(_report(raw, epoch, total, time.monotonic() - began))
            last = history[-1]
            if not np.isfinite(last.train_loss).any():
                raise InputError("the training loss is not finite; check the labels, or lower training.learning_rate.")
            over = last.step >= total or bool(last.stopped.all())
            if checkpoint is not None and (over or len(history) % checkpoint_every == 0):
                # before anybody hears of it: what may interrupt the training from there finds it kept
                leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(jax.device_get(state))]
                reports = [asdict(report) for report in history]
                checkpoints.save(checkpoint, whose, checkpoints.Saved(leaves, order.bit_generator.state, reports))
            if on_epoch is not None:
                on_epoch(last)
        return TrainingResult(params=jax.device_get(state.best), history=tuple(history))

    def _identity(self, packed: Packed, params: Params | None, key: jax.Array, total: int) -> str:
        words = (
            repr(self.ensemble),
            self.settings.model_dump_json(),
            self.members.model_dump_json(),
            repr(self.capacity),
            "fresh" if params is None else str(jax.tree.structure(params)),
            str(total),
        )
        arrays = (packed.data, packed.counts, jax.random.key_data(key), [] if params is None else params)
        return checkpoints.identity(arrays, *words)

    # -- host ---------------------------------------------------------------------------------------------------------

    def _pack(self, dataset: Sequence[Atoms], references: dict[int, float]) -> Packed:
        if not dataset:
            raise InputError("there is nothing to train on; give at least one labelled structure.")
        _refuse_mixed_states(dataset)
        if len(dataset) + 1 > self.capacity.structures:
            raise CapacityError(
                f"{len(dataset)} structures do not fit; training was sized for {self.capacity.structures - 1}."
            )
        return pack(
            dataset,
            self.species,
            self.ensemble.model.cutoff,
            neighbors=self.capacity.batch.neighbors,
            atoms=self.capacity.atoms,
            slots=self.capacity.structures,
            reference_energies=references,
            dtype=self.dtype,
        )

    def _split(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Training and validation indices; spread evenly, and a structure never changes sides as the dataset grows."""
        fraction = self.settings.validation_fraction
        index = np.arange(number)
        # the golden-ratio sequence fills [0, 1) evenly at every length
        held_out = (0.5 + index * 0.6180339887498949) % 1.0 < fraction
        if number < 2 or held_out.all():
            held_out = np.zeros(number, bool)
        return index[~held_out], index[held_out]

    def _total_steps(self, structures: int, *, warm: bool) -> int:
        per_epoch = int(np.ceil(structures / self.settings.batch_size))
        most = (self.settings.warm_steps if warm else None) or self.settings.max_steps
        return min(most, self.settings.max_epochs * per_epoch)

    def _plan_segment(
        self, packed: Packed, training: np.ndarray, order: np.random.Generator
    ) -> tuple[BatchPlan, int, int]:
        """Plan of one or more whole epochs, about `validate_every` steps in all."""
        plans: list[BatchPlan] = []
        steps = 0
        while not plans or steps < self.settings.validate_every:
            # each epoch is filled up to whole batches on its own, so that a structure appears once in it
            plan, length = plan_batches(packed, order.permutation(training), self.capacity.batch)
            plans.append(plan)
            steps += length
            if steps + length > self.capacity.steps:
                break
        epochs = len(plans)
        stacked = jax.tree.map(lambda *x: np.concatenate(x), *plans)
        missing = self.capacity.steps - steps
        padded = jax.tree.map(lambda x: np.pad(x, ((0, missing), (0, 0)), mode="edge"), stacked)
        return padded, steps, epochs

    def _prepare(self, packed: Packed, validation: np.ndarray, total: int) -> _Run:
        plan, steps = plan_batches(packed, validation, self.capacity.batch, self.capacity.steps)
        return _Run(
            data=packed.data,
            weights=self._bootstrap_weights(),
            validation=jax.tree.map(jnp.asarray, plan),
            validation_steps=jnp.asarray(steps, jnp.int32),
            total_steps=jnp.asarray(total, jnp.int32),
        )

    def _bootstrap_weights(self) -> jax.Array:
        """[M, n]; the weight of a structure depends on its position alone, so that it stays as the dataset grows."""
        shape = (self.ensemble.size, self.capacity.structures)
        if self.members.bootstrap == "none" or self.ensemble.size == 1:
            return jnp.ones(shape, self.dtype)
        # one generator for each structure: gamma draws by rejection, and a longer table must begin with the shorter one
        draws = (np.random.default_rng([20, index]) for index in range(shape[1]))
        if self.members.bootstrap == "poisson":
            columns = [draw.poisson(1.0, size=shape[0]).astype(np.float64) for draw in draws]
        else:
            variance = self.members.bootstrap_variance
            columns = [draw.gamma(1 / variance, variance, size=shape[0]) for draw in draws]
        return jnp.asarray(np.stack(columns, axis=1), self.dtype)

    @staticmethod
    def _energy_scale(packed: Packed, training: np.ndarray) -> float:
        """Root mean square force component times 1 Angstrom, as the scale of an atom's energy, eV."""
        rows = np.concatenate([np.arange(packed.offsets[i], packed.offsets[i] + packed.counts[i]) for i in training])
        rms = float(np.sqrt(np.mean(np.asarray(packed.data.forces)[rows].astype(np.float64) ** 2)))
        return rms if rms > 0 else 1.0

    # -- device -------------------------------------------------------------------------------------------------------

    def _fresh_params(self, key: jax.Array, data: PackedDataset, sample: BatchPlan, energy_scale: float) -> Params:
        graph, _ = take_batch(data, sample, 0)
        return self.ensemble.standardise(self.ensemble.init(key), graph, energy_scale)

    def _initial_state(self, params: Params) -> _State:
        members = self.ensemble.size
        return _State(
            params=params,
            average=jax.tree.map(jnp.copy, params),
            best=jax.tree.map(jnp.copy, params),
            optimiser=jax.vmap(self._optimiser.init)(params),
            best_loss=jnp.full((members,), jnp.inf, self.dtype),
            waited=jnp.zeros((members,), jnp.int32),
            stopped=jnp.zeros((members,), bool),
            step=jnp.zeros((), jnp.int32),
            plateau=_Plateau(
                factor=jnp.ones((), self.dtype),
                best=jnp.full((), jnp.inf, self.dtype),
                waited=jnp.zeros((), jnp.int32),
            ),
        )

    def _run_segment(
        self, state: _State, run: _Run, plan: BatchPlan, steps: jax.Array
    ) -> tuple[_State, dict[str, jax.Array]]:
        """Optimiser steps through a plan, then one validation."""

        def body(step: jax.Array, carry: tuple[_State, jax.Array]) -> tuple[_State, jax.Array]:
            current, total = carry
            graph, targets = take_batch(run.data, plan, step)
            weights = run.weights[:, plan.ids[step]]
            terms = loss_weights(self.settings, current.step, run.total_steps)
            gradient, loss = self._loss_gradient(current.params, graph, targets, weights, terms)
            return self._update(current, gradient, run.total_steps), total + loss

        zero = jnp.zeros((self.ensemble.size,), self.dtype)
        began_late = in_second_stage(self.settings, state.step, run.total_steps)
        state, total = jax.lax.fori_loop(0, steps, body, (state, zero))
        squares, penalties = self._validate(state.average, run)
        energy, forces, _ = means(squares)
        loss = _weighted(loss_weights(self.settings, state.step, run.total_steps), means(penalties))
        observed = run.validation_steps > 0
        if self.settings.second_stage is not None:
            late = in_second_stage(self.settings, state.step, run.total_steps)
            state = _begin_second_stage(state, late, late & ~began_late)
        state = self._keep_best(state, jnp.where(observed, loss, -state.step.astype(self.dtype)))
        if self.settings.schedule == "plateau":
            state = replace(
                state, plateau=self._follow_plateau(state.plateau, jnp.where(observed, loss, total / steps))
            )
        nothing = jnp.where(observed, 0.0, jnp.nan)
        report = {
            "step": state.step,
            "train_loss": total / steps,
            "validation_loss": loss + nothing,
            "validation_energy_rmse": jnp.sqrt(energy) + nothing,
            "validation_forces_rmse": jnp.sqrt(forces) + nothing,
            "stopped": state.stopped,
        }
        return state, report

    def _loss_gradient(
        self, params: Params, graph: Graph, targets: Targets, weights: jax.Array, terms: _Terms
    ) -> tuple[Params, jax.Array]:
        """Gradient of each member's loss with respect to its own parameters, and the losses [M].

        ``weights`` [M, S] are those of the structures, ``terms`` those of energy, forces and virial.
        """

        def summed(stacked: Params) -> tuple[jax.Array, jax.Array]:
            sums = self._member_residuals(stacked, graph, targets, weights, self.settings.loss)[0]
            losses = _weighted(terms, means(sums))
            return jnp.sum(losses), losses

        return jax.grad(summed, has_aux=True)(params)

    def _member_residuals(
        self, params: Params, graph: Graph, targets: Targets, weights: jax.Array, *kinds: LossSettings
    ) -> tuple[Residuals, ...]:
        """Residuals [M] under each kind of penalty, all from one evaluation."""
        prediction = self.ensemble.predict(params, graph)

        def penalised(kind: LossSettings) -> Residuals:
            return jax.vmap(lambda one, weight: residuals(one, graph, targets, weight, kind))(prediction, weights)

        return tuple(penalised(kind) for kind in kinds)

    def _update(self, state: _State, gradient: Params, total_steps: jax.Array) -> _State:
        updates, optimiser = jax.vmap(self._optimiser.update)(gradient, state.optimiser, state.params)
        rate = learning_rate(self.settings, state.step, total_steps, state.plateau.factor)
        alive = jnp.where(state.stopped, 0.0, 1.0).astype(self.dtype)

        def apply(value: jax.Array, update: jax.Array) -> jax.Array:
            return value - rate * alive.reshape((-1,) + (1,) * (value.ndim - 1)) * update

        params = jax.tree.map(apply, state.params, updates)
        average = optax.incremental_update(params, state.average, 1 - self.settings.ema)
        return replace(state, params=params, average=average, optimiser=optimiser, step=state.step + 1)

    def _follow_plateau(self, seen: _Plateau, loss: jax.Array) -> _Plateau:
        """Lets the learning rate fall where the mean of the members' losses [M] has not improved for long enough."""
        mean = jnp.nanmean(loss)  # a member that diverged says nothing about the others
        better = mean < seen.best
        waited = jnp.where(better, 0, seen.waited + 1)
        falls = waited >= self.settings.plateau_patience
        return _Plateau(
            factor=jnp.where(falls, seen.factor * self.settings.plateau_factor, seen.factor),
            best=jnp.where(better, mean, seen.best),
            waited=jnp.where(falls, 0, waited),
        )

    def _validate(self, params: Params, run: _Run) -> tuple[Residuals, Residuals]:
        """Sums over the validation structures for every member: of squares, and of what the loss is made of."""
        kinds = (SQUARES,) if self.settings.loss.kind == SQUARES.kind else (SQUARES, self.settings.loss)

        def body(step: jax.Array, sums: tuple[Residuals, ...]) -> tuple[Residuals, ...]:
            graph, targets = take_batch(run.data, run.validation, step)
            ones = jnp.ones((self.ensemble.size, graph.num_structures), self.dtype)
            return jax.tree.map(jnp.add, sums, self._member_residuals(params, graph, targets, ones, *kinds))

        members = (self.ensemble.size,)
        scalar = jnp.zeros(members, self.dtype)
        zero = Residuals(scalar, scalar, scalar, jnp.zeros((*members, 2), self.dtype), scalar)
        sums = jax.lax.fori_loop(0, run.validation_steps, body, (zero,) * len(kinds))
        return sums[0], sums[-1]

    def _keep_best(self, state: _State, loss: jax.Array) -> _State:
        better = (loss < state.best_loss) & ~state.stopped

        def choose(new: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where(better.reshape((-1,) + (1,) * (new.ndim - 1)), new, old)

        waited = jnp.where(better, 0, state.waited + 1)
        return replace(
            state,
            best=jax.tree.map(choose, state.average, state.best),
            best_loss=jnp.where(better, loss, state.best_loss),
            waited=waited,
            stopped=state.stopped | (waited >= self.settings.patience),
        )


def _refuse_mixed_states(dataset: Sequence[Atoms]) -> None:
    """No model of ours sees charge or spin: one composition must come in one electronic state."""
    states: dict[tuple[int, ...], tuple[int, tuple[int, int]]] = {}
    for n, atoms in enumerate(dataset):
        state = (int(atoms.info.get("charge", 0)), int(atoms.info.get("spin", 1)))
        first, known = states.setdefault(tuple(sorted(atoms.numbers.tolist())), (n, state))
        if state != known:
            raise InputError(
                f"structures {first} and {n} ({atoms.get_chemical_formula()}) differ in charge and spin, {known} and "
                f"{state}, which a potential cannot tell apart; train one potential for each."
            )


_Terms = tuple[float | jax.Array, float | jax.Array, float | jax.Array]
"""Weights of energy, forces and virial."""


def _weighted(weights: _Terms, values: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
    return weights[0] * values[0] + weights[1] * values[1] + weights[2] * values[2]


def _begin_second_stage(state: _State, late: jax.Array, first: jax.Array) -> _State:
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


def _report(raw: dict[str, jax.Array], epoch: int, steps: int, seconds: float) -> EpochReport:
    values = jax.device_get(raw)
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
