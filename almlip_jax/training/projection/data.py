"""The data of a training by projection: blocks of structures, and what searches are told of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from almlip_jax.models import Params
from almlip_jax.models.separable import Separable
from almlip_jax.structures.packing import BatchPlan, BatchShape, PackedDataset, bucket, fill_batches, lay_out
from almlip_jax.targets import targets
from almlip_jax.training.dataset import Capacity, TrainingSet, longest_epoch

_BLOCK: Final = 64  # atoms that are looked at together: larger arrays leave the caches of a CPU
_FACTORS: Final = (1.0, 4 / 3, 2.0)  # larger blocks that are tried, for structures that fill these better


@dataclass(frozen=True)
class Observer:
    """Answers of the data to searches; see `search.Look`.

    Attributes:
        reduce: the compiled `program.Reduction.reduced`.
        model: the separable model.
        first: first parameters, with a leading axis, whose constants stay.
        data: structures and labels.
        plan: batches, [devices, steps, ...].
        steps: [devices] how many of these hold structures.
        counts: by target what the sum of its penalties is divided by.
    """

    reduce: Callable[..., jax.Array]
    model: Separable
    first: Params
    data: PackedDataset
    plan: BatchPlan
    steps: jax.Array
    counts: Mapping[str, float]

    def params(self, linear: np.ndarray, others: np.ndarray, origins: np.ndarray) -> Params:
        """Parameters with a leading axis, from linear ones [C, N], others [C, P] and places in the first ones [C]."""
        there = jax.tree.map(lambda x: jnp.asarray(x)[origins], self.first)
        return jax.vmap(self.model.put_together)(there, jnp.asarray(linear), jnp.asarray(others))

    def look(self, weights: np.ndarray, origins: np.ndarray) -> Callable[..., np.ndarray]:
        """The function that searches ask, for weights [C, n] of the structures."""

        def asked(others: np.ndarray, linear: np.ndarray, active: np.ndarray) -> np.ndarray:
            where = self.params(linear, others, origins)
            given = where, jnp.asarray(weights), jnp.asarray(active), self.data, self.plan, self.steps, self.counts
            return np.asarray(self.reduce(*given))

        return asked


def observer(
    reduce: Callable[..., jax.Array],
    model: Separable,
    first: Params,
    data: TrainingSet,
    devices: Mesh,
    *,
    summed: bool,
) -> Observer:
    """What searches are told of the training structures."""
    plan, steps = _blocks(data, devices.size)
    return Observer(reduce, model, first, _trimmed(data.packed.data), plan, steps, _counts(data, summed=summed))


def _counts(data: TrainingSet, *, summed: bool) -> dict[str, float]:
    """What sums of penalties over all training structures are divided by; see `loss.Residuals`."""
    found = {}
    for target in targets(data.packed.data.weights):
        labelled = np.asarray(data.packed.data.weights[target.name])[data.training] > 0
        atoms = data.packed.counts[data.training]
        count = len(labelled) if summed else (atoms[labelled].sum() if target.per == "atom" else labelled.sum())
        found[target.name] = float(max(count, 1))
    return found


def _blocks(data: TrainingSet, devices: int) -> tuple[Any, jax.Array]:
    """The training structures in blocks, shared out among devices: plans [devices, steps, ...] and their lengths."""
    order = data.training[np.argsort(data.packed.counts[data.training], kind="stable")]
    shapes = [_shape(data.capacity, factor) for factor in _FACTORS]
    filled = [fill_batches(data.packed, order, shape) for shape in shapes]
    best = int(np.argmin([len(batches) * shape.atoms for batches, shape in zip(filled, shapes, strict=True)]))
    shape, batches = shapes[best], filled[best]
    room = longest_epoch(data.capacity.structures, data.capacity.atoms, shape, uniform=False)
    each = -(-max(room, len(batches)) // devices)
    plans = [lay_out(data.packed, batches[n::devices], shape, each) for n in range(devices)]
    stacked = jax.tree.map(lambda *x: jax.device_put(np.stack(x)), *[plan for plan, _ in plans])
    return stacked, jnp.asarray([steps for _, steps in plans], jnp.int32)


def _shape(capacity: Capacity, factor: float) -> BatchShape:
    """Of a block: `factor` times the largest structure, or some atoms of smaller ones."""
    largest = capacity.largest or capacity.batch.atoms
    atoms = int(np.ceil(factor * max(largest, min(_BLOCK, capacity.atoms - 1))))
    of_batch, of_all = capacity.batch.atoms / capacity.batch.structures, capacity.atoms / capacity.structures
    mean = min(of_batch, of_all)  # either may have room for more than comes
    return BatchShape(atoms, capacity.batch.neighbors, min(atoms, int(np.ceil(1.5 * atoms / mean))))


def _trimmed(data: PackedDataset) -> PackedDataset:
    """The dataset without slots for neighbours that no atom needs, but for a few."""
    offsets, shifts = np.asarray(data.neighbor_offset), np.asarray(data.shifts)
    used = ((offsets != 0) | shifts.any(axis=-1)).any(axis=0)
    room = min(bucket(int(np.flatnonzero(used).max(initial=0)) + 1, 4), len(used))
    kept = {name: getattr(data, name)[:, :room] for name in ("neighbor_offset", "shifts", "reverse")}
    return replace(data, **kept)
