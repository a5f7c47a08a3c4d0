"""Structures of any number and size through an ensemble, in batches of one static shape, and what comes back."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from ase import Atoms
from ase.stress import full_3x3_to_voigt_6_stress

from almlip_jax.ensembles import (
    AnyEnsemble,
    Committee,
    Prediction,
    batches_at_a_time,
    committee_statistics,
    side_by_side,
    spread_members,
)
from almlip_jax.errors import InputError
from almlip_jax.features import Described, FeatureRequest, feature_factors, feature_maps
from almlip_jax.features.request import FeatureFactors
from almlip_jax.models import Params
from almlip_jax.potential.novelty import FittedScore
from almlip_jax.potential.states import strange_state
from almlip_jax.precision import full_precision
from almlip_jax.scores import Score, atom_scores, largest_of, scores
from almlip_jax.structures.electronic_state import electronic_state
from almlip_jax.structures.graph import Graph
from almlip_jax.structures.neighbors import Edges, find_edges, largest_neighbor_count, shortest_edge
from almlip_jax.structures.packing import (
    BatchPlan,
    BatchShape,
    PackedDataset,
    bucket,
    pack,
    plan_batches,
    take_batch,
)
from almlip_jax.targets import has_target, targets

_BATCH_ATOMS = 256  # atom slots of an evaluation batch: enough to keep a core busy, small enough for few structures
_BATCH_STRUCTURES = 64
_ACCELERATED = 8  # times as many of both keep an accelerator busy
_ALL_PAIRS = 32  # atoms of molecules that get a slot for every other atom, near or not
_CHUNK_FRAMES = 1024  # frames whose common shape is looked for before their batches are evaluated
_CHUNK_ATOMS = 2**17  # or atoms, where frames are large
_CONTACT = 1e-3  # Angstrom; atoms that are nearer are in one place
_SEARCH = 2.0  # Angstrom; the search for them divides space into boxes of this size, so it should not be tiny


@dataclass(frozen=True)
class Evaluated:
    """What a potential predicts for some structures, on the host and in their order.

    Attributes:
        energy: [n] eV, committee mean, reference energies included, float64.
        forces: for each structure [N, 3] eV/Angstrom, committee mean.
        stress: [n, 6] eV/Angstrom^3, committee mean, ASE sign and Voigt order; NaN where not periodic in 3 directions.
        scores: name -> [n]; every declared score (`scores`), those of novelty where they are fitted.
        atom_scores: name -> for each structure [N]; the scores of its atoms.
        features: name -> [n, d], where asked for.
        atom_features: name -> for each structure [N, d], likewise.
        further: name -> [n, ...], or for each structure [N, ...] where it is one of atoms, what the models give besides
            the energy (`targets`), committee mean; the ``dipole`` [n, 3] in e*Angstrom, of ions about their centre of
            mass.  NaN where a structure has none.
    """

    energy: np.ndarray
    forces: list[np.ndarray]
    stress: np.ndarray
    scores: dict[str, np.ndarray]
    atom_scores: dict[str, list[np.ndarray]]
    features: dict[str, np.ndarray] = field(default_factory=dict)
    atom_features: dict[str, list[np.ndarray]] = field(default_factory=dict)
    further: dict[str, np.ndarray | list[np.ndarray]] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluator:
    """An ensemble and its parameters, as far as evaluations need them.

    Attributes:
        ensemble: models and members.
        params: parameters with leading member axis.
        references: reference energies in eV by atomic number.
        novelty: fitted scores by name.
        states: electronic states that they have learned of, where these are known.
    """

    ensemble: AnyEnsemble
    params: Params
    references: Mapping[int, float]
    novelty: Mapping[str, FittedScore] = field(default_factory=dict)
    states: frozenset[tuple[int, int]] = frozenset()

    def stream(
        self, frames: Iterable[Atoms], features: FeatureRequest, source: str, shape: BatchShape | None
    ) -> Iterator[tuple[list[Atoms], Evaluated]]:
        """Frames in order, batch after batch, and their predictions; see `Potential.evaluate_stream`."""
        number, told = 0, False
        for batch, evaluated in self._stream(frames, features, source, shape):
            told = told or _tell_coinciding(batch, evaluated, source, number)
            number += len(batch)
            yield batch, evaluated

    def _stream(
        self, frames: Iterable[Atoms], features: FeatureRequest, source: str, shape: BatchShape | None
    ) -> Iterator[tuple[list[Atoms], Evaluated]]:
        params = spread_members(self.params)
        factors = feature_factors(features, self.ensemble, self.params)
        for structures in _chunks(self.known(frames, source)):
            under_way = _UnderWay([], None)
            chunk, shape = self._searched(structures, shape)
            batches = list(_batches(chunk, shape))
            for first in range(0, len(batches), shape.parts):
                some = batches[first : first + shape.parts]
                # the device works on these while the host looks at the ones before, and packs the next
                begun = self._begun(params, some, shape, features, factors)
                yield from self._ended(under_way)
                under_way = begun
            yield from self._ended(under_way)

    def known(self, frames: Iterable[Atoms], source: str) -> Iterator[Atoms]:
        """The frames; with a warning of each electronic state that nothing was learned of.

        Raises:
            InputError: an element is unknown; source, frame and atom are named.
        """
        told: set[tuple[int, int]] = set()
        for frame in self.of_known_elements(frames, source):
            if self.states and (state := electronic_state(frame)) not in self.states | told:
                strange = strange_state(frame, self.states, sees_state=self.ensemble.sees_state)
                if strange is not None:
                    warnings.warn(strange, stacklevel=2)  # a selection may be after such structures
                    told.add(state)
            yield frame

    def of_known_elements(self, frames: Iterable[Atoms], source: str) -> Iterator[Atoms]:
        """The frames.

        Raises:
            InputError: an element is unknown; source, frame and atom are named.
        """
        for number, frame in enumerate(frames):
            try:
                self.ensemble.species.index(frame.numbers)
            except InputError as error:
                raise InputError(f"{source}, frame {number}: {error}") from error
            yield frame

    def batch_shape(self, structures: Sequence[Atoms], before: BatchShape | None = None) -> BatchShape:
        """The shape that some structures need, no smaller than that of batches before; grows by buckets."""
        most = None if _small_molecules(structures) else largest_neighbor_count(structures, self.ensemble.cutoff)
        return self._shape([_Frame(a, None) for a in structures], most, before)

    def _searched(self, structures: Sequence[Atoms], before: BatchShape | None) -> tuple[list[_Frame], BatchShape]:
        """Structures with their edges, each of which is searched once, and the shape that `batch_shape` gives them."""
        if _small_molecules(structures):  # those are searched when they are packed
            frames = [_Frame(a, None) for a in structures]
            return frames, self._shape(frames, None, before)
        edges = [find_edges(a, self.ensemble.cutoff) for a in structures]
        frames = [_Frame(a, own) for a, own in zip(structures, edges, strict=True)]
        return frames, self._shape(frames, max(own.largest_count for own in edges), before)

    def _shape(self, frames: Sequence[_Frame], most: int | None, before: BatchShape | None) -> BatchShape:
        """The shape for frames with that many neighbours at most; with all other atoms, where no number is given."""
        largest = max(len(frame.atoms) for frame in frames)
        neighbors = max(largest - 1, 1) if most is None else bucket(most, 8)
        times = 1 if jax.default_backend() == "cpu" else _ACCELERATED
        atoms, alone = bucket(max(times * _BATCH_ATOMS, largest), 64), bucket(largest, 8)
        if before is not None:
            atoms, alone = max(atoms, before.atoms), max(alone, before.largest)
            neighbors = before.neighbors if neighbors <= before.neighbors else bucket(neighbors, 8)
        whole = BatchShape(atoms, neighbors, times * _BATCH_STRUCTURES, alone)
        parts = batches_at_a_time(self.params, sum(1 for _ in _batches(frames, whole)))
        return replace(whole, parts=max(parts, 1 if before is None else before.parts))

    def atom_rows(self, structures: Sequence[Atoms]) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
        """Features [L, A, F], codes [L, A, Q] and species [A] of all atoms; see `Potential.atom_rows`."""
        params, shape, parts = spread_members(self.params), None, []
        for chunk in _chunks(self.known(structures, "structures")):
            frames, shape = self._searched(chunk, shape)
            for batch in _batches(frames, shape):
                data, plan, _ = self._packed(batch, shape)
                found = _atom_features(self.ensemble, params, data, plan)
                total = sum(len(frame.atoms) for frame in batch)
                parts.append(jax.tree.map(lambda x, total=total: np.asarray(x)[:, :total], found))
        species = self.ensemble.species.index(np.concatenate([a.numbers for a in structures]))
        features, code = jax.tree.map(lambda *x: np.concatenate(x, axis=1), *parts)
        return features, code, species

    def graphs(self, structures: Sequence[Atoms]) -> Iterator[Graph]:
        """A graph of each structure alone, in as few shapes as there may be."""
        for chunk in _chunks(self.known(structures, "structures")):
            frames, shape = self._searched(chunk, None)
            for batch in _batches(frames, shape):
                data, _, alone = self._packed(batch, shape)
                yield from (take_batch(data, alone, n)[0] for n in range(len(batch)))

    def _packed(self, batch: list[_Frame], shape: BatchShape) -> tuple[PackedDataset, BatchPlan, BatchPlan]:
        """A batch in the shape of an evaluation, the plan that takes it whole, and one that takes each structure."""
        found = [find_edges(a, self.ensemble.cutoff) if edges is None else edges for a, edges in batch]
        packed = pack(
            [frame.atoms for frame in batch],
            self.ensemble.species,
            self.ensemble.cutoff,
            neighbors=shape.neighbors,
            atoms=shape.atoms + 1,
            slots=shape.structures + 1,
            dtype=jax.tree.leaves(self.params)[0].dtype,
            edges=found,
        )
        order = np.arange(len(batch))
        whole, _ = plan_batches(packed, order, shape)
        alone = BatchShape(shape.largest, shape.neighbors, 1)
        return packed.data, whole, plan_batches(packed, order, alone, shape.structures)[0]

    def _begun(
        self,
        params: Params,
        frames: list[list[_Frame]],
        shape: BatchShape,
        features: FeatureRequest,
        factors: FeatureFactors,
    ) -> _UnderWay:
        """Has devices look at as many batches as the shape has parts, or fewer; ``params`` are the spread ones."""
        packed = [self._packed(batch, shape) for batch in frames]
        batches = [[frame.atoms for frame in batch] for batch in frames]  # their edges are not needed any more
        same, novelty = replace(features, seed=0), dict(self.novelty)  # random numbers are data: seeds share a program
        declared = (*scores(fitted=False), *atom_scores(fitted=False))  # a program gives those that it was made for
        if shape.parts == 1:
            given, programs = packed[0], (_evaluate, _describe)
        else:
            packed += packed[:1] * (shape.parts - len(packed))  # their results are not used
            given, programs = jax.tree.map(lambda *x: np.stack(x), *packed), (_evaluate_apart, _describe_apart)
            params = self.params
        evaluate, describe = programs
        if not same.of_prediction:
            results, _ = evaluate(self.ensemble, params, given, same, factors, novelty, declared)
        else:  # evaluations with such maps and without share the larger program
            results, prediction = evaluate(self.ensemble, params, given, FeatureRequest(), {}, novelty, declared)
            if same.names or same.atoms:
                found = describe(self.ensemble, params, given, prediction, same, factors)
                results = results._replace(features=found)
        return _UnderWay(batches, results, side_by_side=shape.parts > 1)

    def _ended(self, under_way: _UnderWay) -> Iterator[tuple[list[Atoms], Evaluated]]:
        """Batches, and the results of the devices for them."""
        results = jax.device_get(under_way.results)
        for n, batch in enumerate(under_way.batches):
            own = jax.tree.map(lambda x, n=n: x[n], results) if under_way.side_by_side else results
            references = np.array([reference_energy(self.references, a) for a in batch])
            yield batch, _evaluated(own, references, batch)


class _Frame(NamedTuple):
    """A structure of a chunk; and its edges, where the shape of the batches depends on them."""

    atoms: Atoms
    edges: Edges | None


@dataclass(frozen=True)
class _UnderWay:
    """What devices work on: batches and their results, with an axis over the batches where side by side."""

    batches: list[list[Atoms]]
    results: _OnDevice | None
    side_by_side: bool = False


def _tell_coinciding(batch: Sequence[Atoms], evaluated: Evaluated, source: str, first: int) -> bool:
    """Warns of a structure that has no energy since two of its atoms are in one place; whether there is one.

    Args:
        batch: structures.
        evaluated: what is predicted for them.
        source: what to call them.
        first: number of the first of them.
    """
    for n in np.flatnonzero(~np.isfinite(evaluated.energy)).tolist():
        if shortest_edge(batch[n], _SEARCH) < _CONTACT:
            warnings.warn(
                f"{source}, frame {first + n} ({batch[n].get_chemical_formula()}): two atoms are in one place, where "
                "energy and forces are no numbers; correct the positions or the cell.",
                stacklevel=2,
            )
            return True
    return False


def reference_energy(references: Mapping[int, float], atoms: Atoms) -> float:
    """Sum of reference energies (eV by atomic number) over a structure's atoms, eV."""
    return float(sum(references[z] for z in atoms.numbers.tolist()))


_Packed: TypeAlias = tuple[PackedDataset, BatchPlan, BatchPlan]
_Arrays: TypeAlias = dict[str, jax.Array]


class _OnDevice(NamedTuple):
    """What devices find: statistics, volumes [S], features of structures and atoms, fitted scores."""

    committee: Committee
    volume: jax.Array
    features: tuple[_Arrays, _Arrays]
    fitted: _Arrays


def _evaluate_on_device(
    ensemble: AnyEnsemble,
    params: Params,
    packed: _Packed,
    features: FeatureRequest,
    factors: FeatureFactors,
    novelty: dict[str, FittedScore],
    declared: tuple[Score, ...],
) -> tuple[_OnDevice, Prediction]:
    """What is asked for of a batch, and the prediction that it is made of."""
    graph, _ = take_batch(packed[0], packed[1], 0)
    prediction = ensemble.predict(params, graph)
    found = _describe_on_device(ensemble, params, packed, prediction, features, factors)
    fitted = {name: one.of(prediction, graph) for name, one in novelty.items()}
    return _OnDevice(committee_statistics(prediction, graph), graph.volume, found, fitted), prediction


def _describe_on_device(
    ensemble: AnyEnsemble,
    params: Params,
    packed: _Packed,
    prediction: Prediction,
    features: FeatureRequest,
    factors: FeatureFactors,
) -> tuple[_Arrays, _Arrays]:
    """Features of the structures and atoms of a batch, from a prediction for it."""
    data, whole, one_by_one = packed
    graph, _ = take_batch(data, whole, 0)
    alone = None
    if features.structure_by_structure:
        alone = jax.vmap(lambda step: take_batch(data, one_by_one, step)[0])(jnp.arange(graph.num_structures))
    return feature_maps(features, ensemble, params, prediction, graph, alone, factors)


# The ensemble is compared by value: potentials of one architecture share what was compiled.
_evaluate = jax.jit(full_precision(_evaluate_on_device), static_argnums=(0, 3, 6))
_describe = jax.jit(full_precision(_describe_on_device), static_argnums=(0, 4))


@partial(jax.jit, static_argnums=(0, 3, 6))
@full_precision
def _evaluate_apart(
    ensemble: AnyEnsemble,
    params: Params,
    packed: _Packed,
    features: FeatureRequest,
    factors: FeatureFactors,
    novelty: dict[str, FittedScore],
    declared: tuple[Score, ...],
) -> tuple[_OnDevice, Prediction]:
    """The same of as many batches as there are devices, with a leading axis over these."""

    def on_one(common: tuple[Params, FeatureFactors, dict[str, FittedScore]], own: _Packed) -> Any:
        return _evaluate_on_device(ensemble, common[0], own, features, *common[1:], declared)

    return side_by_side(on_one, (params, factors, novelty), packed)  # type: ignore[no-any-return]


@partial(jax.jit, static_argnums=(0, 4))
@full_precision
def _describe_apart(
    ensemble: AnyEnsemble,
    params: Params,
    packed: _Packed,
    prediction: Prediction,
    features: FeatureRequest,
    factors: FeatureFactors,
) -> tuple[_Arrays, _Arrays]:
    """Likewise."""

    def on_one(common: tuple[Params, FeatureFactors], own: tuple[_Packed, Prediction]) -> Any:
        return _describe_on_device(ensemble, common[0], *own, features, common[1])

    return side_by_side(on_one, (params, factors), (packed, prediction))  # type: ignore[no-any-return]


def _atom_features_on_device(
    ensemble: AnyEnsemble, params: Params, data: PackedDataset, plan: BatchPlan
) -> tuple[jax.Array, jax.Array | None]:
    """Features [L, A, F] and codes [L, A, Q] of the only batch of a plan."""
    graph, _ = take_batch(data, plan, 0)
    found = ensemble.predict(params, graph)
    return found.features, found.code


_atom_features = jax.jit(full_precision(_atom_features_on_device), static_argnums=0)


def _chunks(frames: Iterable[Atoms]) -> Iterator[list[Atoms]]:
    """Runs of frames that are looked at together, few enough to be held in memory whatever their size."""
    chunk: list[Atoms] = []
    atoms = 0
    for frame in frames:
        chunk.append(frame)
        atoms += len(frame)
        if len(chunk) == _CHUNK_FRAMES or atoms >= _CHUNK_ATOMS:
            yield chunk
            chunk, atoms = [], 0
    if chunk:
        yield chunk


def _small_molecules(structures: Sequence[Atoms]) -> bool:
    """Whether each atom may have a slot for every other one, near or not, so that none need be counted."""
    return max(len(a) for a in structures) <= _ALL_PAIRS and all(not a.pbc.any() for a in structures)


def _batches(frames: Sequence[_Frame], shape: BatchShape) -> Iterator[list[_Frame]]:
    """Runs of frames that fit into a batch, each as long as can be."""
    batch: list[_Frame] = []
    atoms = 0
    for frame in frames:
        if batch and (len(batch) == shape.structures or atoms + len(frame.atoms) > shape.atoms):
            yield batch
            batch, atoms = [], 0
        batch.append(frame)
        atoms += len(frame.atoms)
    if batch:
        yield batch


def _evaluated(result: Any, references: np.ndarray, batch: Sequence[Atoms]) -> Evaluated:
    committee, volume, (features, rows_of_atoms), fitted = result  # as numpy arrays
    number = len(batch)
    ends = np.cumsum([len(a) for a in batch])[:-1]
    total = sum(len(a) for a in batch)
    alone = {name: values[:number] for name, values in fitted.items() if largest_of(name) is None}
    novelty = {name: np.split(values[:total], ends) for name, values in fitted.items() if name not in alone}
    split = {name: np.split(values[:total], ends) for name, values in committee.atom_scores.items()} | novelty
    of_all = {name: values[:number] for name, values in committee.scores.items()} | alone
    for told, declared in ((of_all, scores()), (split, atom_scores())):
        for score in declared:
            if score.target is not None and score.name in told:
                told[score.name] = _where_there(score.target, told[score.name], batch)
    of_all |= {name: np.array([np.max(one) for one in atoms]) for name, atoms in novelty.items()}
    periodic = np.array([a.pbc.all() for a in batch])
    stress = -committee.virial[:number].astype(np.float64) / volume[:number, None, None]
    voigt = np.stack([full_3x3_to_voigt_6_stress(one) for one in stress])
    return Evaluated(
        energy=committee.energy[:number].astype(np.float64) + references,
        forces=np.split(committee.forces[:total], ends),
        stress=np.where(periodic[:, None], voigt, np.nan),
        scores={one.name: of_all[one.name] for one in scores() if one.name in of_all},
        atom_scores={one.name: split[one.name] for one in atom_scores() if one.name in split},
        features={name: values[:number] for name, values in features.items()},
        atom_features={name: np.split(values[:total], ends) for name, values in rows_of_atoms.items()},
        further={
            one.name: _where_there(one.name, values[:number] if one.per == "structure" else parts, batch)
            for one in targets(committee.further)
            for values in (committee.further[one.name],)
            for parts in (np.split(values[:total], ends),)
        },
    )


def _where_there(name: str, values: Any, batch: Sequence[Atoms]) -> Any:
    """Values [n, ...] that belong to a target, or [N, ...] of each structure; NaN where a structure has none."""
    (target,) = targets((name,))
    there = [has_target(atoms, target) for atoms in batch]
    if isinstance(values, list):
        return [one if has else np.full_like(one, np.nan) for one, has in zip(values, there, strict=True)]
    return np.where(np.reshape(there, (-1, *(values.ndim - 1) * (1,))), values, np.nan)


def _end_to_end(parts: Sequence[Any]) -> Any:
    """Values of structures [n, ...], or lists of those of their atoms, one after the other."""
    return [one for part in parts for one in part] if isinstance(parts[0], list) else np.concatenate(parts)


_Known = TypeVar("_Known", Evaluated, Described, Evaluated | Described)


def rows_of(evaluated: _Known, rows: Sequence[int]) -> _Known:
    """What is known of some of the structures."""

    def some(values: Any) -> Any:
        if isinstance(values, dict):
            return {name: some(value) for name, value in values.items()}
        return [values[row] for row in rows] if isinstance(values, list) else values[list(rows)]

    return replace(evaluated, **{one.name: some(getattr(evaluated, one.name)) for one in fields(evaluated)})


def joined(parts: Sequence[Evaluated]) -> Evaluated:
    """The evaluations of several sets of structures as one."""
    return Evaluated(
        energy=np.concatenate([p.energy for p in parts]),
        forces=[f for p in parts for f in p.forces],
        stress=np.concatenate([p.stress for p in parts]),
        scores={name: np.concatenate([p.scores[name] for p in parts]) for name in parts[0].scores},
        features={name: np.concatenate([p.features[name] for p in parts]) for name in parts[0].features},
        atom_features={name: [x for p in parts for x in p.atom_features[name]] for name in parts[0].atom_features},
        further={name: _end_to_end([p.further[name] for p in parts]) for name in parts[0].further},
        atom_scores={name: [one for p in parts for one in p.atom_scores[name]] for name in parts[0].atom_scores},
    )
