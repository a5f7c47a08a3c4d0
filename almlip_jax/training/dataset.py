"""The data of a training: how much room they take, what each structure is for, and in which order they come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from ase import Atoms

from almlip_jax.ensembles import EnsembleSettings
from almlip_jax.errors import CapacityError, InputError
from almlip_jax.structures.neighbors import largest_neighbor_count
from almlip_jax.structures.packing import BatchPlan, BatchShape, Packed, bucket, pack, plan_batches
from almlip_jax.structures.species import SpeciesTable
from almlip_jax.structures.weights import loss_weights
from almlip_jax.training.settings import TrainingSettings


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

    Raises:
        InputError: the cutoff is so short that no atom of any molecule or solid has a neighbour.
    """
    sizes = np.array([len(a) for a in structures])
    number = max(largest_dataset or 0, len(structures))
    found = largest_neighbor_count(structures, cutoff)
    if found == 0 and sizes.max() > 1:
        raise InputError(
            f"no two atoms of any structure are within the cutoff of {cutoff:g} Angstrom; give a larger model.cutoff."
        )
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
class TrainingSet:
    """Packed structures, and which of them train and which validate.

    Attributes:
        packed: structures and labels, within the capacity.
        training: indices of the structures that are trained on.
        validation: indices of the others.
        capacity: static sizes.
    """

    packed: Packed
    training: np.ndarray
    validation: np.ndarray
    capacity: Capacity

    def validation_plan(self) -> tuple[BatchPlan, int]:
        """All validation structures once, and the number of batches that hold any."""
        return plan_batches(self.packed, self.validation, self.capacity.batch, self.capacity.steps)

    def sample_plan(self) -> BatchPlan:
        """Training structures in their order; the first batch serves as a sample."""
        return plan_batches(self.packed, self.training, self.capacity.batch, self.capacity.steps)[0]

    def segment(self, order: np.random.Generator, at_least: int) -> tuple[BatchPlan, int, int]:
        """Whole epochs in random order, at least so many steps of them if the capacity allows.

        Returns:
            the plan, padded to the capacity, its steps and its epochs.
        """
        plans: list[BatchPlan] = []
        steps = 0
        while not plans or steps < at_least:
            # each epoch is filled up to whole batches on its own, so that a structure appears once in it
            plan, length = plan_batches(self.packed, order.permutation(self.training), self.capacity.batch)
            plans.append(plan)
            steps += length
            if steps + length > self.capacity.steps:
                break
        stacked = jax.tree.map(lambda *x: np.concatenate(x), *plans)
        missing = self.capacity.steps - steps
        return jax.tree.map(lambda x: np.pad(x, ((0, missing), (0, 0)), mode="edge"), stacked), steps, len(plans)

    def energy_scale(self) -> float:
        """Root mean square force component times 1 Angstrom, as the scale of an atom's energy, eV."""
        starts, counts = self.packed.offsets[self.training], self.packed.counts[self.training]
        rows = np.concatenate([np.arange(start, start + n) for start, n in zip(starts, counts, strict=True)])
        rms = float(np.sqrt(np.mean(np.asarray(self.packed.data.forces)[rows].astype(np.float64) ** 2)))
        return rms if rms > 0 else 1.0


def training_set(
    structures: Sequence[Atoms],
    species: SpeciesTable,
    cutoff: float,
    capacity: Capacity,
    *,
    reference_energies: dict[int, float],
    validation_fraction: float,
    dtype: np.dtype | type,
) -> TrainingSet:
    """Packs labelled structures within a capacity and decides which of them validate.

    Raises:
        CapacityError: they do not fit.
        InputError: there are none, all of them have weight 0, or a composition comes in several electronic states.
    """
    if not structures:
        raise InputError("there is nothing to train on; give at least one labelled structure.")
    _refuse_mixed_states(structures)
    _refuse_weightless(structures)
    if len(structures) + 1 > capacity.structures:
        raise CapacityError(
            f"{len(structures)} structures do not fit; training was sized for {capacity.structures - 1}."
        )
    packed = pack(
        structures,
        species,
        cutoff,
        neighbors=capacity.batch.neighbors,
        atoms=capacity.atoms,
        slots=capacity.structures,
        reference_energies=reference_energies,
        dtype=dtype,
    )
    return TrainingSet(packed, *split(len(structures), validation_fraction), capacity)


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


def bootstrap_weights(settings: EnsembleSettings, structures: int, dtype: np.dtype | type) -> jax.Array:
    """Weight of each structure for each model of an ensemble, [L, structures].

    It depends on the position of the structure alone, so that it stays as the dataset grows.
    """
    shape = (settings.size, structures)
    if settings.bootstrap == "none" or settings.size == 1:
        return jnp.ones(shape, dtype)
    # one generator for each structure: gamma draws by rejection, and a longer table must begin with the shorter one
    draws = (np.random.default_rng([20, index]) for index in range(structures))
    if settings.bootstrap == "poisson":
        columns = [draw.poisson(1.0, size=settings.size).astype(np.float64) for draw in draws]
    else:
        variance = settings.bootstrap_variance
        columns = [draw.gamma(1 / variance, variance, size=settings.size) for draw in draws]
    return jnp.asarray(np.stack(columns, axis=1), dtype)


def _refuse_weightless(dataset: Sequence[Atoms]) -> None:
    if not any(any(loss_weights(atoms, f"structure {n}")) for n, atoms in enumerate(dataset)):
        raise InputError("every structure has weight 0, so that there is nothing to learn from; give some a weight.")


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
