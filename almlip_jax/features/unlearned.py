"""Features of structures before there is a potential: those of maps that look at surroundings alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import jax
import numpy as np
from ase import Atoms

from almlip_jax.features.declared import unlearned_names
from almlip_jax.features.request import FeatureRequest, feature_factors, feature_maps
from almlip_jax.precision import full_precision
from almlip_jax.structures.neighbors import Edges, find_edges
from almlip_jax.structures.packing import BatchPlan, BatchShape, PackedDataset, bucket, pack, plan_batches, take_batch
from almlip_jax.structures.species import SpeciesTable

_ATOMS = 256  # atom slots of a batch
_STRUCTURES = 64


@dataclass(frozen=True)
class Described:
    """Structures as selectors see them before there is a potential: features, and no scores.

    Attributes:
        features: name -> [n, d].
        atom_features: name -> for each structure [N, d].
        scores: none.
    """

    features: dict[str, np.ndarray]
    atom_features: dict[str, list[np.ndarray]]
    scores: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class _Surroundings:
    """What such maps look at in the place of an ensemble."""

    cutoff: float
    species: SpeciesTable


def described(structures: Sequence[Atoms], request: FeatureRequest, cutoff: float, species: SpeciesTable) -> Described:
    """Features of structures of any number and size, in batches of one static shape; in float64 where jax is set to it.

    Args:
        structures: at least one.
        request: names of maps that need no potential (`unlearned_names`).
        cutoff: Angstrom.
        species: every element that occurs.

    Raises:
        ValueError: a map needs a potential.
    """
    learned = sorted({*request.names, *request.atoms} - set(unlearned_names()))
    if learned:
        raise ValueError(f"features '{learned[0]}' need a potential.")
    around = _Surroundings(cutoff, species)
    factors = feature_factors(request, cast(Any, around), {"none": np.zeros((), _dtype())})
    same = replace(request, seed=0)  # random numbers are data: seeds share a program
    edges = [find_edges(atoms, cutoff) for atoms in structures]
    most, largest = max(own.largest_count for own in edges), max(len(atoms) for atoms in structures)
    shape = BatchShape(bucket(max(_ATOMS, largest), 64), bucket(max(most, 1), 8), _STRUCTURES)
    rows: dict[str, list[np.ndarray]] = {name: [] for name in request.names}
    of_atoms: dict[str, list[np.ndarray]] = {name: [] for name in request.atoms}
    for batch in _batches(structures, shape):
        found = _rows(around, same, *_packed(structures, edges, batch, around, shape), factors)
        ends = np.cumsum([len(structures[n]) for n in batch])
        for name, values in found[0].items():
            rows[name].append(np.asarray(values)[: len(batch)])
        for name, values in found[1].items():
            of_atoms[name] += np.split(np.asarray(values)[: ends[-1]], ends[:-1])
    return Described({name: np.concatenate(parts) for name, parts in rows.items()}, of_atoms)


def _dtype() -> np.dtype:
    return jax.dtypes.canonicalize_dtype(np.float64)


def _batches(structures: Sequence[Atoms], shape: BatchShape) -> Iterator[list[int]]:
    """Places of structures that fit into a batch, each run as long as can be."""
    batch: list[int] = []
    atoms = 0
    for n, one in enumerate(structures):
        if batch and (len(batch) == shape.structures or atoms + len(one) > shape.atoms):
            yield batch
            batch, atoms = [], 0
        batch.append(n)
        atoms += len(one)
    yield batch


def _packed(
    structures: Sequence[Atoms], edges: Sequence[Edges], batch: Sequence[int], around: _Surroundings, shape: BatchShape
) -> tuple[PackedDataset, BatchPlan]:
    packed = pack(
        [structures[n] for n in batch],
        around.species,
        around.cutoff,
        neighbors=shape.neighbors,
        atoms=shape.atoms + 1,
        slots=shape.structures + 1,
        dtype=_dtype(),
        edges=[edges[n] for n in batch],
    )
    return packed.data, plan_batches(packed, np.arange(len(batch)), shape)[0]


@partial(jax.jit, static_argnums=(0, 1))
@full_precision
def _rows(
    around: _Surroundings, request: FeatureRequest, data: PackedDataset, plan: BatchPlan, factors: Any
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Features of the structures and of the atoms of the only batch of a plan."""
    graph, _ = take_batch(data, plan, 0)
    nothing: Any = None
    return feature_maps(request, cast(Any, around), nothing, nothing, graph, None, factors)
