"""The data of a training: how much room they take, what each structure is for, and in which order they come."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np
from ase import Atoms

from almlip_jax.ensembles import EnsembleSettings
from almlip_jax.ensembles.bootstrap import checked_weights
from almlip_jax.errors import CapacityError, InputError
from almlip_jax.structures.electronic_state import electronic_state
from almlip_jax.structures.neighbors import largest_neighbor_count
from almlip_jax.structures.packing import (
    BatchPlan,
    BatchShape,
    Packed,
    bucket,
    fill_batches,
    lay_out,
    pack,
    plan_batches,
    shape_of_part,
    share_out,
)
from almlip_jax.structures.species import SpeciesTable
from almlip_jax.structures.weights import loss_weights
from almlip_jax.targets import Target, has_target, targets, with_further
from almlip_jax.training.levels import Levels
from almlip_jax.training.reference import charge_columns, robust_energies
from almlip_jax.training.settings import TrainingSettings

_MOST_ROOM = 4  # times the atoms that are expected; beyond, to compile again costs less than the memory
_LEAST_ENERGY = 0.05  # eV, scale of the energies of atoms that hardly move


@dataclass(frozen=True)
class Capacity:
    """Static sizes of a training, allocated for the largest dataset it will see.

    Attributes:
        batch: shape of a batch.
        atoms: atoms of the whole dataset, the padding slot included.
        structures: structures of the whole dataset, the padding slot included.
        steps: batches in a plan, the longest run between two validations.
        largest: atoms of the largest structure, from which follows how much room a part of a batch takes; 0 where it
            is not known, and may be as large as the batch.
    """

    batch: BatchShape
    atoms: int
    structures: int
    steps: int
    largest: int = 0

    def part(self, parts: int) -> BatchShape:
        """Shape of a part of a batch that several devices share out."""
        return shape_of_part(self.batch, self.largest or self.batch.atoms, parts)


def plan_capacity(
    structures: Sequence[Atoms],
    cutoff: float,
    settings: TrainingSettings,
    largest_dataset: int | None = None,
    again: Sequence[Atoms] = (),
    room_again: int = 0,
    mean_atoms: float = 0.0,
    most_atoms: int = 0,
) -> Capacity:
    """Sizes for datasets of up to ``largest_dataset`` structures like the given ones, and others beside them.

    Where more structures are given than a dataset can have, as those of a pool, any choice of them fits.

    Args:
        structures: typical structures; a molecule's neighbours are allocated as all of its other atoms, a periodic
            structure's with a quarter to spare.
        cutoff: Angstrom.
        settings: of the training.
        largest_dataset: number of structures to allocate for; that of ``structures`` where not given.
        again: structures that are trained on besides, each as often as the others.
        room_again: how many of them there may be, copies included.
        mean_atoms: of a structure of the largest dataset, where that is more than the mean of the given ones.
        most_atoms: of the largest dataset together, whatever it comes to hold: it gets that room, which takes memory
            alone, where it is not out of all proportion.

    Raises:
        InputError: the cutoff is so short that no atom of any molecule or solid has a neighbour.
    """
    together = [*structures, *again]
    sizes = np.array([len(a) for a in together])
    own = max(float((sizes[: len(structures)] if structures else sizes).mean()), mean_atoms)
    most = len(structures) if largest_dataset is None else largest_dataset
    number = max(most + room_again, min(most, len(structures)) + len(again))
    found = largest_neighbor_count(together, cutoff)
    if found == 0 and sizes.max() > 1:
        raise InputError(
            f"no two atoms of any structure are within the cutoff of {cutoff:g} Angstrom; give a larger model.cutoff."
        )
    open_only = all(not a.pbc.any() for a in together)
    neighbors = int(sizes.max()) - 1 if open_only and sizes.max() <= 32 else bucket(int(1.25 * found) + 1, 8)
    # Batches of equal structures are exactly full; others get the room of the mean, and of the largest one.
    uniform = sizes.min() == sizes.max()
    batch_size = min(settings.batch_size, number)
    # The data may be of other sizes than what comes again, which is known: of one mean for both, rooms would be short.
    apart = (number - most) * (float(sizes[len(structures) :].mean()) if again else own)
    mean = (most * own + apart) / number
    room = batch_size * (int(sizes.max()) if uniform else int(np.ceil(1.05 * mean)))
    batch = BatchShape(atoms=max(room, int(sizes.max())), neighbors=max(neighbors, 1), structures=batch_size)
    chosen = float(np.sort(sizes[: len(structures)])[::-1][:most].sum()) if most < len(structures) else 0.0
    planned = number * sizes.max() if uniform else max(1.1 * most * own, chosen) + apart  # the largest may be chosen
    if not uniform:
        planned = max(planned, min(most_atoms + apart, _MOST_ROOM * planned))
    atoms = int(planned) + int(sizes.max()) + 1
    steps = longest_epoch(number, atoms, batch, uniform=bool(uniform)) + settings.validate_every
    return Capacity(batch=batch, atoms=atoms, structures=number + 1, steps=steps, largest=int(sizes.max()))


def longest_epoch(structures: int, atoms: int, batch: BatchShape, *, uniform: bool) -> int:
    """Batches that a pass over the data may need at most, whatever the order.

    A batch is closed where the next structure does not fit: any two in a row then hold more atoms than there is room.

    Args:
        structures: number of structures.
        atoms: of all of them.
        batch: shape of a batch.
        uniform: all structures are of one size, of which a batch holds as many as it has slots.
    """
    full = -(-structures // batch.structures) + 1
    return full if uniform else min(structures, full + 2 * atoms // batch.atoms)


@dataclass(frozen=True)
class TrainingSet:
    """Packed structures, and which of them train and which validate.

    Attributes:
        packed: structures and labels, within the capacity.
        training: indices of the structures that are trained on.
        validation: indices of the others.
        capacity: static sizes.
        parts: number of devices that share out each batch.
        second: indices of structures with labels of a second source, of which each epoch draws some.
        drawn: how many.
    """

    packed: Packed
    training: np.ndarray
    validation: np.ndarray
    capacity: Capacity
    parts: int = 1
    second: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    drawn: int = 0

    @property
    def epoch(self) -> int:
        """Structures in a pass over the data."""
        return len(self.training) + self.drawn

    def validation_plan(self) -> tuple[BatchPlan, int]:
        """All validation structures once, and the number of batches that hold any; see `laid_out`."""
        batches = fill_batches(self.packed, self.validation, self.capacity.batch)
        return self.laid_out(batches), len(batches)

    def training_plan(self) -> tuple[BatchPlan, int]:
        """All training structures once, and the number of batches that hold any, which nobody shares out."""
        return plan_batches(self.packed, self.training, self.capacity.batch, self.capacity.steps)

    def epochs(self, generator: np.random.Generator, at_least: int) -> tuple[list[list[int]], int]:
        """Batches of whole epochs in random order, at least as many if the capacity allows, and the number of epochs.

        Raises:
            CapacityError: one epoch is longer than the capacity.
        """
        batches: list[list[int]] = []
        epochs = 0
        while not epochs or len(batches) < at_least:
            # each epoch is filled up to whole batches on its own, so that a structure appears once in it
            before = generator.bit_generator.state
            epoch = fill_batches(self.packed, self._shuffled(generator), self.capacity.batch)
            if len(batches) + len(epoch) > self.capacity.steps:
                if not epochs:
                    raise CapacityError(f"{len(epoch)} batches do not fit into a plan of {self.capacity.steps}.")
                generator.bit_generator.state = before  # this epoch comes next
                break
            batches += epoch
            epochs += 1
        return batches, epochs

    def _shuffled(self, generator: np.random.Generator) -> np.ndarray:
        """The structures of an epoch, in random order."""
        if not self.drawn:
            return generator.permutation(self.training)
        others = generator.choice(self.second, self.drawn, replace=False)
        return generator.permutation(np.concatenate([self.training, others]))

    def laid_out(self, batches: Sequence[Sequence[int]]) -> BatchPlan:
        """The plan of some batches, as long as the capacity.

        Where several devices share out each batch, there is a further axis over them: [steps, parts, A] and
        [steps, parts, S], with the shape of a part.
        """
        if self.parts == 1:
            return lay_out(self.packed, batches, self.capacity.batch, self.capacity.steps)[0]
        shape = self.capacity.part(self.parts)
        shared: list[list[int]] = []
        for batch in batches:
            places = share_out(self.packed.counts[list(batch)].tolist(), self.parts, shape.structures)
            shared += [[batch[place] for place in part] for part in places]
        plan, _ = lay_out(self.packed, shared, shape, self.capacity.steps * self.parts)
        return jax.tree.map(lambda x: x.reshape(self.capacity.steps, self.parts, *x.shape[1:]), plan)

    def levels(self, number: int, of: Sequence[int], *, charges: bool) -> Levels:
        """What energies per atom are about, on the average over the training structures.

        Args:
            number: length of the species table.
            of: species whose atoms bind energies that the reference energies do not hold; 0 for the others.
            charges: whether the cost of charges is sought too, where structures differ in charge.
        """
        chosen, energies = self._energies()
        binding, costs = np.zeros(number), np.zeros(2)
        shares, charged = self._shares(chosen, number)[:, list(of)], self._charges(chosen)
        charged = charged if charges else np.zeros_like(charged)
        if shares.any() or charged.any():
            binding[list(of)], costs = robust_energies(energies, shares, charged)
        return Levels(binding, costs)

    def _energies(self) -> tuple[np.ndarray, np.ndarray]:
        """Training structures that have an energy [n], and their energies per atom [n], eV."""
        data, counts = self.packed.data, self.packed.counts
        chosen = self.training[np.asarray(data.weights["energy"])[self.training] > 0]
        return chosen, np.asarray(data.labels["energy"])[chosen].astype(np.float64) / counts[chosen]

    def _shares(self, chosen: np.ndarray, number: int) -> np.ndarray:
        """Shares of the species among the atoms of some structures, [n, number]."""
        species = np.asarray(self.packed.data.species)
        places = [(self.packed.offsets[n], self.packed.counts[n]) for n in chosen]
        held = [np.bincount(species[first : first + count], minlength=number) / count for first, count in places]
        return np.array(held).reshape(-1, number)

    def _charges(self, chosen: np.ndarray) -> np.ndarray:
        """Positive and negative charge per atom of some structures, as `charge_columns`, [n, 2]."""
        held = np.asarray(self.packed.data.charge, np.float64)[chosen]
        return charge_columns(held) / self.packed.counts[chosen][:, None]

    def energy_scale(self, levels: Levels | None = None) -> float:
        """By how much the energy of an atom varies over the training structures, eV.

        Root mean square force component times 1 Angstrom.  Perfect crystals have none: no less than half the range of
        the middle two thirds of the energies per atom, and than a value that disorder exceeds.

        Args:
            levels: of energies, that count as known.
        """
        data, counts = self.packed.data, self.packed.counts
        labelled = self.training[np.asarray(data.weights["forces"])[self.training] > 0]
        rows = [np.arange(self.packed.offsets[n], self.packed.offsets[n] + counts[n]) for n in labelled]
        forces = np.asarray(data.labels["forces"])[np.concatenate(rows)] if rows else np.zeros((1, 3))
        with_energy, energies = self._energies()
        if levels is not None:
            energies = energies - self._shares(with_energy, len(levels.binding)) @ levels.binding
            energies = energies - self._charges(with_energy) @ levels.costs
        spread = 0.5 * float(np.diff(np.quantile(energies, (0.16, 0.84)))[0]) if len(energies) else 0.0
        return max(float(np.sqrt(np.mean(forces.astype(np.float64) ** 2))), spread, _LEAST_ENERGY)


class Order:
    """The order in which structures come: one for all models, or one for each.

    In one of its own a model passes over the data as it would alone: epoch after epoch, each in a random order and with
    every structure once.  What others have not come to when a plan ends comes first in the next one.

    Args:
        key: decides the order.
        models: number of models that have one of their own, or None for one that all share.
    """

    def __init__(self, key: jax.Array, models: int | None = None) -> None:
        seed = np.asarray(jax.random.key_data(key)).tolist()
        more = [] if models is None else [np.random.default_rng([*seed, n]) for n in range(1, models)]
        self._own = models is not None
        self._generators = [np.random.default_rng(seed), *more]
        self._left: list[list[list[int]]] = [[] for _ in self._generators]

    def segment(self, data: TrainingSet, at_least: int) -> tuple[BatchPlan, int, int]:
        """Whole epochs in random order, of at least the given number of steps if the capacity allows.

        Returns:
            the plan, with a leading axis over models where each has an order of its own; its length; and the number of
            epochs in it, those of the first model.

        Raises:
            CapacityError: one epoch is longer than the capacity.
        """
        batches, epochs = data.epochs(self._generators[0], at_least)
        if not self._own:
            return data.laid_out(batches), len(batches), epochs
        plans = [data.laid_out(batches)]
        for generator, left in zip(self._generators[1:], self._left[1:], strict=True):
            while len(left) < len(batches):
                left += data.epochs(generator, 1)[0]
            plans.append(data.laid_out(left[: len(batches)]))
            del left[: len(batches)]
        return jax.tree.map(lambda *x: np.stack(x), *plans), len(batches), epochs

    @property
    def state(self) -> dict[str, Any]:
        """What is needed to go on, as plain data."""
        return {"generators": [one.bit_generator.state for one in self._generators], "left": self._left}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes back to where `state` was read."""
        for generator, one in zip(self._generators, state["generators"], strict=True):
            generator.bit_generator.state = one
        self._left = [[list(batch) for batch in left] for left in state["left"]]


def training_set(
    structures: Sequence[Atoms],
    species: SpeciesTable,
    cutoff: float,
    capacity: Capacity,
    *,
    reference_energies: dict[int, float],
    validation_fraction: float,
    dtype: np.dtype | type,
    validation: Sequence[Atoms] = (),
    further: Collection[str] = (),
    sees_state: bool = False,
    parts: int = 1,
    second: Sequence[Atoms] = (),
    share: float | None = None,
) -> TrainingSet:
    """Packs labelled structures within a capacity and decides which of them validate.

    Where ``validation`` structures are given, these do, and the others are all trained on.  Labels are taken of the
    targets that every model gives, and of ``further`` ones.  Only an ensemble that ``sees_state`` tells structures
    apart that differ in charge and spin alone.  Each batch is for as many devices as there are ``parts``.  Structures
    with labels of a ``second`` source make up a ``share`` of each epoch, which draws them; None without such a source.

    Raises:
        CapacityError: they do not fit.
        InputError: there are none, all of them have weight 0, a composition comes in several electronic states, or
            there is no label of a further target, or a structure that cannot have one.
    """
    if not structures:
        raise InputError("there is nothing to train on; give at least one labelled structure.")
    number, others = len(structures), slice(len(structures), len(structures) + len(second))
    structures = [*structures, *second, *validation]
    if not sees_state:
        refuse_mixed_states(structures)
    _refuse_weightless(structures, further)
    for target in targets(further):
        _require_target(structures, target)
    if len(structures) + 1 > capacity.structures:
        raise CapacityError(
            f"{len(structures)} structures do not fit; training was sized for {capacity.structures - 1}."
        )
    largest, room = max(len(atoms) for atoms in structures), capacity.largest or capacity.batch.atoms
    if parts > 1 and largest > room:
        raise CapacityError(f"a structure of {largest} atoms does not fit; training was sized for {room}.")
    packed = pack(
        structures,
        species,
        cutoff,
        neighbors=capacity.batch.neighbors,
        atoms=capacity.atoms,
        slots=capacity.structures,
        reference_energies=reference_energies,
        dtype=dtype,
        further=further,
    )
    if validation:
        training, held_out = np.arange(number), np.arange(others.stop, len(structures))
    else:
        training, held_out = split(number, validation_fraction)
    packed = _with_relative_weights(packed, training)
    if share is None:
        return TrainingSet(packed, training, held_out, capacity, parts)
    told = np.zeros(capacity.structures, dtype)
    told[others] = 1
    packed = replace(packed, data=replace(packed.data, second=jax.device_put(told)))
    number = drawn(len(training), len(second), share)
    return TrainingSet(packed, training, held_out, capacity, parts, np.arange(others.start, others.stop), number)


def drawn(training: int, second: int, share: float | None) -> int:
    """How many of some structures of a second source an epoch draws, to be a share of it beside those of the first."""
    return 0 if share is None else min(second, math.ceil(share / (1 - share) * training))


def _with_relative_weights(packed: Packed, training: np.ndarray) -> Packed:
    """The weights of structures relative to their mean over those that are trained on and count at all.

    One factor on all weights would scale gradients and nothing else, which clipping would then cut.
    """
    data = packed.data
    kinds = data.weights.values()
    largest = np.max([np.asarray(weights, np.float64)[training] for weights in kinds], axis=0)
    if not (largest > 0).any():
        return packed
    mean = float(largest[largest > 0].mean())
    relative = {name: weights / mean for name, weights in data.weights.items()}
    return replace(packed, data=replace(data, weights=relative))


def split(number: int, validation_fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Training and validation indices; spread evenly, and a structure never changes sides as the dataset grows."""
    index = np.arange(number)
    # the golden-ratio sequence fills [0, 1) evenly at every length
    held_out = (0.5 + index * 0.6180339887498949) % 1.0 < validation_fraction
    if number < 2 or held_out.all():
        held_out = np.zeros(number, bool)
    return index[~held_out], index[held_out]


def validation_part(structures: Sequence[Atoms], validation_fraction: float) -> list[Atoms]:
    """The structures that a training on all of these validates on: no member has learned from them."""
    return [structures[n] for n in split(len(structures), validation_fraction)[1]]


def training_part(structures: Sequence[Atoms], validation_fraction: float) -> list[Atoms]:
    """The others: the structures that a training on all of these learns from."""
    return [structures[n] for n in split(len(structures), validation_fraction)[0]]


def bootstrap_weights(settings: EnsembleSettings, structures: int, dtype: np.dtype | type, key: jax.Array) -> jax.Array:
    """Weight of each structure for each model of an ensemble, [L, structures].

    It depends on the key and the position of the structure alone, so that it stays as the dataset grows.

    Raises:
        InputError: a user's factory, or the kind of a package, gives something else.
    """
    shape = (settings.size, structures)
    if settings.size == 1:
        return jax.device_put(np.ones(shape, dtype))
    seed = tuple(np.asarray(jax.random.key_data(key)).tolist())
    found = settings.bootstrap.weights(settings, structures, seed)
    weights = checked_weights(found, shape, f"ensemble.bootstrap '{settings.bootstrap.kind}'")
    return jax.device_put(weights.astype(dtype))


def _refuse_weightless(dataset: Sequence[Atoms], further: Collection[str]) -> None:
    known = [one.label for one in targets(with_further(further))]
    weights = (loss_weights(atoms, f"structure {n}") for n, atoms in enumerate(dataset))
    if not any(any(one[label] for label in known) for one in weights):
        raise InputError("every structure has weight 0, so that there is nothing to learn from; give some a weight.")


def _require_target(dataset: Sequence[Atoms], target: Target) -> None:
    """Whether a target that a model gives besides the energy can be learned from some structures."""
    for n, atoms in enumerate(dataset):
        if not has_target(atoms, target):
            is_so, owners = "is periodic", "molecules"
            if target.structures == "periodic":
                is_so, owners = "is not periodic in three directions", "structures that are"
            raise InputError(
                f"structure {n} ({atoms.get_chemical_formula()}) {is_so}, but {target.one} belongs to {owners}; leave "
                f"the structure out, or train a model without {target.many}."
            )
    if not any(atoms.calc is not None and target.label in atoms.calc.results for atoms in dataset):
        raise InputError(
            f"the model gives {target.one}, but no structure has one to learn from; label them with {target.many}, or "
            f"take a model without."
        )


def refuse_mixed_states(dataset: Sequence[Atoms], among: str = "") -> None:
    """For a model that does not see charge and spin, one composition must come in one electronic state.

    Args:
        dataset: structures.
        among: what they are, for the message.

    Raises:
        InputError: one comes in several.
    """
    states: dict[tuple[int, ...], tuple[int, tuple[int, int]]] = {}
    for n, atoms in enumerate(dataset):
        state = electronic_state(atoms)
        first, known = states.setdefault(tuple(sorted(atoms.numbers.tolist())), (n, state))
        if state != known:
            raise InputError(
                f"structures {first} and {n}{among} ({atoms.get_chemical_formula()}) differ in charge and spin, "
                f"{known} and {state}, which this model cannot tell apart; set model.electronic_state, or train one "
                "potential for each."
            )
