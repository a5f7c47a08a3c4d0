"""The `Potential`: a trained ensemble with all it takes to use it again, and the faces it shows to other software."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes
from ase.data import atomic_numbers, chemical_symbols
from ase.stress import full_3x3_to_voigt_6_stress
from pydantic import TypeAdapter

from almlip_jax.ensembles import (
    SCORES,
    AnyEnsemble,
    Committee,
    EnsembleSettings,
    build_ensemble,
    committee_statistics,
    spread_members,
)
from almlip_jax.errors import InputError
from almlip_jax.features import FeatureRequest, feature_factors, feature_maps
from almlip_jax.features.request import FeatureFactors
from almlip_jax.files import PARTIAL, cannot_write, flush_to_disk, make_folder, write_text
from almlip_jax.models import ModelSettings, Params
from almlip_jax.structures.extxyz_reading import read_extxyz
from almlip_jax.structures.neighbors import largest_neighbor_count
from almlip_jax.structures.packing import BatchPlan, BatchShape, PackedDataset, bucket, pack, plan_batches, take_batch
from almlip_jax.structures.remembered import as_text
from almlip_jax.structures.species import SpeciesTable
from almlip_jax.structures.walkers import WalkerNeighbors, walker_neighbors
from almlip_jax.uncertainty import force_calibration

_DESCRIPTION = "potential.json"
_PARAMS = "params"  # of the folder that holds them; a hash of the parameters follows
_REMEMBERED = "remembered"  # of the file that holds remembered structures; a hash of them follows
_OWN = re.compile(
    rf"{_PARAMS}(-[0-9a-f]{{16}})?|{_REMEMBERED}-[0-9a-f]{{16}}\.extxyz"
    rf"|\.({_PARAMS}|{_REMEMBERED})-[0-9a-f]{{16}}\.\d+{re.escape(PARTIAL)}.*"
)
"""Names of what `Potential.save` makes beside the description, finished or not."""

NO_FEATURES = FeatureRequest()
"""Asks for no feature map."""

_FORMAT = 1
_BATCH_ATOMS = 256  # atom slots of an evaluation batch: enough to keep a core busy, small enough for few structures
_BATCH_STRUCTURES = 64
_PER_ATOM = ("force_std", "force_epistemic", "force_total")
_CHUNK_FRAMES = 1024  # frames whose common shape is looked for before their batches are evaluated
_CHUNK_ATOMS = 2**17  # or atoms, where frames are large


@dataclass(frozen=True)
class Evaluated:
    """What a potential says of some structures, on the host and in their order.

    Attributes:
        energy: [n] eV, committee mean, reference energies included, float64.
        forces: for each structure [N, 3] eV/Angstrom, committee mean.
        stress: [n, 6] eV/Angstrom^3, committee mean, ASE sign and Voigt order; NaN where not periodic in 3 directions.
        force_std: for each structure [N] eV/Angstrom, spread s_i of each atom.
        force_epistemic, force_total: the same with what members say of their own errors; see `ensembles.Committee`.
        scores: name -> [n]; every score of `ensembles.SCORES`.
        features: name -> [n, d], where asked for.
    """

    energy: np.ndarray
    forces: list[np.ndarray]
    stress: np.ndarray
    force_std: list[np.ndarray]
    force_epistemic: list[np.ndarray]
    force_total: list[np.ndarray]
    scores: dict[str, np.ndarray]
    features: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Potential:
    """A trained ensemble.

    Attributes:
        settings: of the model.
        species: the elements it knows.
        params: parameters with leading member axis.
        reference_energies: eV by atomic number, added to what the ensemble predicts.
        calibration: of the force uncertainty, by name (`calibrated`); empty where it is not known.
        metadata: whatever the maker wants to keep (versions, dataset size, origin); JSON.
        members: settings of the ensemble; by default as many equal models as the parameters hold.
        isolated: elements whose reference energy is that of the isolated atom, which the potential then gives exactly.
        remembered: a sample of the labelled structures that it was trained on (`structures.remembered`); trainings
            that begin with the potential see them again.
    """

    settings: ModelSettings
    species: SpeciesTable
    params: Params
    reference_energies: Mapping[int, float]
    calibration: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    members: EnsembleSettings | None = None
    isolated: frozenset[int] = frozenset()
    remembered: tuple[Atoms, ...] = ()

    def __repr__(self) -> str:
        symbols = "".join(self.species.symbols)
        parts = [self.settings.kind, symbols, f"cutoff {self.cutoff:g} A", f"{self.ensemble.members} members"]
        size = self.metadata.get("dataset_size")
        if size is not None:
            parts.append(f"trained on {size} structures")
        return f"Potential({', '.join(parts)})"

    @cached_property
    def ensemble(self) -> AnyEnsemble:
        """Models and members."""
        return build_ensemble(self.settings, self.member_settings, self.species, self.isolated)

    @property
    def precision(self) -> str:
        """``float32`` or ``float64``."""
        return str(np.dtype(jax.tree.leaves(self.params)[0].dtype))

    @property
    def member_settings(self) -> EnsembleSettings:
        """Settings of the ensemble; where none are known, as many equal models as the parameters hold."""
        return self.members or EnsembleSettings(size=jax.tree.leaves(self.params)[0].shape[0])

    @property
    def cutoff(self) -> float:
        """Angstrom."""
        return self.ensemble.cutoff

    def reference_energy(self, atoms: Atoms) -> float:
        """Sum of the reference energies of a structure's atoms, eV."""
        return float(sum(self.reference_energies[int(z)] for z in atoms.numbers))

    def calibrated(self, held_out: Sequence[Atoms], *, shape: BatchShape | None = None) -> Potential:
        """The same potential, with a calibration of its force uncertainty.

        Args:
            held_out: structures with forces that it was not trained on; what is said of the uncertainty holds for
                structures like these.
            shape: least room of a batch, as for `evaluate`.

        Returns:
            with ``calibration`` the numbers of `uncertainty.force_calibration` of ``force_total``, and the number of
            ``structures``; without one where fewer than two structures are given, or nothing varies over them.
        """
        frames = [atoms for atoms in held_out if atoms.calc is not None and "forces" in atoms.calc.results]
        if len(frames) < 2:
            return replace(self, calibration={})
        found = self.evaluate(frames, shape=shape)
        errors = np.concatenate(
            [f - a.get_forces(apply_constraint=False) for f, a in zip(found.forces, frames, strict=True)]
        )
        numbers = force_calibration(errors, np.concatenate(found.force_total))
        known = {name: float(value) for name, value in numbers.items() if np.isfinite(value)}
        return replace(self, calibration=known | {"structures": len(frames)} if "slope" in known else {})

    def evaluate(
        self,
        structures: Sequence[Atoms],
        *,
        features: FeatureRequest = NO_FEATURES,
        on_batch: Callable[[int], None] | None = None,
        shape: BatchShape | None = None,
    ) -> Evaluated:
        """Committee mean and spread of structures of any size, in batches of one static shape.

        Args:
            structures: in any number; labels are not looked at.
            features: maps of the structures to be given too.
            on_batch: called with the number of structures of each finished batch.
            shape: least room of a batch, that of `batch_shape` for several sets that are to share a program.

        Raises:
            InputError: a structure holds an element that the potential does not know.
        """
        if not structures:
            raise InputError("there is no structure to evaluate.")
        self.check_elements(structures)
        parts = []
        for batch, found in self.evaluate_stream(structures, features=features, shape=shape):
            parts.append(found)
            if on_batch is not None:
                on_batch(len(batch))
        return _joined(parts)

    def evaluate_stream(
        self,
        frames: Iterable[Atoms],
        *,
        features: FeatureRequest = NO_FEATURES,
        source: str = "structures",
        shape: BatchShape | None = None,
    ) -> Iterator[tuple[list[Atoms], Evaluated]]:
        """What `evaluate` gives, batch after batch and in order, without keeping any of it: for pools of any length.

        Frames are taken up to 1024 at a time.  Batches have the shape that those seen so far need, so that nothing
        compiles again before a frame is larger, or has more neighbours, than there was room for.

        Args:
            frames: in any number; labels are not looked at.
            features: as for `evaluate`.
            source: what to call the frames in messages.
            shape: as for `evaluate`.

        Yields:
            the frames of a batch, and what the potential says of them; the same numbers as `evaluate` gives.

        Raises:
            InputError: a frame holds an element that the potential does not know.
        """
        params = spread_members(self.params)
        factors = feature_factors(features, self.ensemble, params)
        for chunk in _chunks(self._known(frames, source)):
            shape = self._batch_shape(chunk, shape)
            for batch in _batches(chunk, shape):
                yield batch, self._evaluate_batch(params, batch, shape, features, factors)

    def check_elements(self, frames: Iterable[Atoms], source: str = "structures") -> None:
        """Whether all elements of some frames are known.

        Raises:
            InputError: one is not; source, frame and atom are named.
        """
        for _ in self._known(frames, source):
            pass

    def _known(self, frames: Iterable[Atoms], source: str) -> Iterator[Atoms]:
        """The frames, refused where an element is unknown."""
        for number, frame in enumerate(frames):
            try:
                self.species.index(frame.numbers)
            except InputError as error:
                raise InputError(f"{source}, frame {number}: {error}") from error
            yield frame

    def batch_shape(self, structures: Sequence[Atoms]) -> BatchShape:
        """The room that batches of some structures need: given to `evaluate`, it serves for any part of them."""
        return self._batch_shape(structures, None)

    def _batch_shape(self, structures: Sequence[Atoms], before: BatchShape | None) -> BatchShape:
        """The shape that some structures need, no smaller than that of batches before; grows by buckets."""
        largest = max(len(a) for a in structures)
        if largest <= 32 and all(not a.pbc.any() for a in structures):
            neighbors = max(largest - 1, 1)
        else:
            neighbors = bucket(largest_neighbor_count(structures, self.cutoff), 8)
        atoms, alone = bucket(max(_BATCH_ATOMS, largest), 64), bucket(largest, 8)
        if before is not None:
            atoms, alone = max(atoms, before.atoms), max(alone, before.largest)
            neighbors = before.neighbors if neighbors <= before.neighbors else bucket(neighbors, 8)
        return BatchShape(atoms, neighbors, _BATCH_STRUCTURES, alone)

    def atom_features(self, structures: Sequence[Atoms]) -> tuple[np.ndarray, np.ndarray]:
        """Invariant features of every atom, and its species index: what novelty is measured in.

        Args:
            structures: in any number.

        Returns:
            features [L, A, F] of the L models, and species [A] int; atoms of all structures in their order.

        Raises:
            InputError: a structure holds an element that the potential does not know.
        """
        params, shape, parts = spread_members(self.params), None, []
        for chunk in _chunks(self._known(structures, "structures")):
            shape = self._batch_shape(chunk, shape)
            for batch in _batches(chunk, shape):
                data, plan, _ = self._packed(batch, shape)
                found = _atom_features(self.ensemble, params, data, plan)
                parts.append(np.asarray(found)[:, : sum(len(a) for a in batch)])
        return np.concatenate(parts, axis=1), self.species.index(np.concatenate([a.numbers for a in structures]))

    def _packed(self, batch: list[Atoms], shape: BatchShape) -> tuple[PackedDataset, BatchPlan, BatchPlan]:
        """A batch in the shape of an evaluation, the plan that takes it whole, and one that takes each structure."""
        packed = pack(
            batch,
            self.species,
            self.cutoff,
            neighbors=shape.neighbors,
            atoms=shape.atoms + 1,
            slots=shape.structures + 1,
            dtype=jax.tree.leaves(self.params)[0].dtype,
        )
        order = np.arange(len(batch))
        whole, _ = plan_batches(packed, order, shape)
        alone = BatchShape(shape.largest, shape.neighbors, 1)
        return packed.data, whole, plan_batches(packed, order, alone, shape.structures)[0]

    def _evaluate_batch(
        self,
        params: Params,
        batch: list[Atoms],
        shape: BatchShape,
        features: FeatureRequest,
        factors: FeatureFactors,
    ) -> Evaluated:
        same = replace(features, seed=0)  # random numbers are data: seeds share a program
        result = _evaluate(self.ensemble, params, *self._packed(batch, shape), same, factors)
        references = np.array([self.reference_energy(a) for a in batch])
        return _to_host(result, references, batch)

    @property
    def says_errors(self) -> bool:
        """Whether members say something of their own errors, so that total deviations are not the spread."""
        return self.member_settings.likelihood != "none"

    def force_error(self, force_total: np.ndarray) -> np.ndarray | None:
        """Length of the error vector to be expected of each atom, eV/Angstrom; None where nothing was calibrated.

        Args:
            force_total: [N] eV/Angstrom.
        """
        slope = self.calibration.get("slope")
        return None if slope is None else float(slope) * np.asarray(force_total, np.float64)

    def calculator(self) -> PotentialCalculator:
        """An ASE calculator: energy, forces, stress, and the committee's spread as further results."""
        return PotentialCalculator(self)

    def energy_fn(
        self, atoms: Atoms, *, skin: float = 0.5
    ) -> tuple[WalkerNeighbors, Callable[[jax.Array, WalkerNeighbors], jax.Array]]:
        """Energy as a JAX function of positions, for jax-md.

        Args:
            atoms: fixes species, cell, periodic directions and the first neighbour list.
            skin: Angstrom, by which the list reaches beyond the cutoff.

        Returns:
            neighbours for the given positions, to be kept up to date through
            ``neighbors.update(positions[None])``, and ``energy(positions [N, 3], neighbors) -> eV`` (committee mean,
            relative to the reference energies, differentiable; ``jax.grad`` of it is minus the forces).
        """
        dtype = jax.tree.leaves(self.params)[0].dtype
        neighbors = walker_neighbors(
            jnp.asarray(atoms.positions[None], dtype),
            jnp.asarray(atoms.cell.array[None], dtype),
            np.asarray(atoms.pbc)[None],
            np.ones((1, len(atoms)), bool),
            self.cutoff,
            skin,
        )
        species = jnp.asarray(self.species.index(atoms.numbers))[None]
        ensemble, params = self.ensemble, self.params

        def energy(positions: jax.Array, neighbors: WalkerNeighbors) -> jax.Array:
            return jnp.mean(ensemble.energies(params, neighbors.graph(positions[None], species)))

        return neighbors, energy

    def save(self, directory: Path | str) -> None:
        """Writes the potential as a folder: ``potential.json`` to read, parameters and remembered structures beside it.

        At any moment the folder holds the old potential or the new one, whole.  Other files in it are left alone.

        Raises:
            InputError: the folder exists and holds something else than a potential, or cannot be written.
        """
        target = Path(directory).resolve()
        check_place(target)
        arrays = jax.tree.map(np.asarray, self.params)
        place = target / f"{_PARAMS}-{_digest(arrays)}"
        make_folder(target)
        try:
            if not _holds(place, arrays):
                building = target / f".{place.name}.{os.getpid()}{PARTIAL}"
                shutil.rmtree(building, ignore_errors=True)
                with ocp.StandardCheckpointer() as checkpointer:
                    checkpointer.save(building, arrays)
                shutil.rmtree(place, ignore_errors=True)  # damaged
                building.rename(place)
                flush_to_disk(target)
        except OSError as error:
            raise cannot_write(target, error) from error
        names = {_PARAMS: place.name}
        if self.remembered:
            text = as_text(self.remembered)
            names[_REMEMBERED] = f"{_REMEMBERED}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.extxyz"
            write_text(target / names[_REMEMBERED], text)
        write_text(target / _DESCRIPTION, json.dumps(self._description(names), indent=2) + "\n")
        for other in target.iterdir():  # what an older potential, or a kill, has left here
            if other.name not in names.values() and _OWN.fullmatch(other.name):
                if other.is_dir():
                    shutil.rmtree(other, ignore_errors=True)
                else:
                    other.unlink(missing_ok=True)

    def _description(self, names: Mapping[str, str]) -> dict[str, Any]:
        return {
            "format": _FORMAT,
            **names,
            "model": self.settings.model_dump(mode="json"),
            "species": list(self.species.symbols),
            "members": self.ensemble.members,
            "ensemble": self.member_settings.model_dump(mode="json"),
            "dtype": str(jax.tree.leaves(self.params)[0].dtype),
            "reference_energies": {chemical_symbols[z]: e for z, e in self.reference_energies.items()},
            "isolated_atoms": [chemical_symbols[z] for z in sorted(self.isolated)],
            "calibration": dict(self.calibration),
            "versions": {name: version(name) for name in ("jax", "flax", "e3nn-jax", "orbax-checkpoint")},
            "metadata": dict(self.metadata),
        }

    @classmethod
    def load(cls, directory: Path | str) -> Potential:
        """Reads what `save` wrote; no training config is needed.  Remembered structures may have been taken out.

        Raises:
            InputError: the folder is missing, incomplete or damaged.
        """
        source = Path(directory).resolve()
        try:
            return cls._read(source)
        except InputError:  # one that is replaced between two looks takes its parameters with it
            return cls._read(source)

    @classmethod
    def _read(cls, source: Path) -> Potential:
        try:
            text = json.loads((source / _DESCRIPTION).read_text())
            folder = source / (Path(text.get("params", _PARAMS)).name or _PARAMS)
            settings = TypeAdapter(ModelSettings).validate_python(text["model"])
            species = SpeciesTable(tuple(sorted(atomic_numbers[s] for s in text["species"])))
            references = {atomic_numbers[s]: float(e) for s, e in text["reference_energies"].items()}
            isolated = frozenset(atomic_numbers[s] for s in text.get("isolated_atoms", ()))
            calibration, metadata = dict(text["calibration"]), dict(text["metadata"])
            float(calibration.get("slope", 0.0))
            sample = source / Path(text[_REMEMBERED]).name if _REMEMBERED in text else None
            members = EnsembleSettings.model_validate(text.get("ensemble", {"size": int(text["members"])}))
            ensemble = build_ensemble(settings, members, species, isolated)
            shapes = jax.eval_shape(ensemble.init, jax.random.key(0))
            wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(str(text["dtype"]))), shapes)
        except FileNotFoundError as error:
            raise InputError(f"{source} is not a potential: it has no potential.json.") from error
        except Exception as error:  # whatever stands in the place of a description stumbles in its own way
            why = " ".join(f"{type(error).__name__}: {error}".split())
            raise InputError(f"{source}/potential.json is damaged ({why}); take a copy or train again.") from error
        try:
            with ocp.StandardCheckpointer() as checkpointer:
                params = checkpointer.restore(folder, wanted)
        except Exception as error:  # orbax raises many kinds for a damaged checkpoint
            raise InputError(
                f"{folder} cannot be read ({type(error).__name__}); take a copy or train again."
            ) from error
        arrays = jax.tree.map(np.asarray, params)
        try:
            remembered = tuple(read_extxyz(sample)) if sample is not None and sample.exists() else ()
        except InputError as error:
            raise InputError(f"{error} The potential can do without that file: delete it.") from error
        return cls(settings, species, arrays, references, calibration, metadata, members, isolated, remembered)


def check_place(directory: Path | str) -> None:
    """Whether a potential can be saved in a folder.

    Raises:
        InputError: it is a file, or holds something else than a potential.
    """
    target = Path(directory).resolve()
    if target.exists() and not target.is_dir():
        raise InputError(f"{target} is a file; choose another name for the folder of the potential.")
    if target.exists() and not (target / _DESCRIPTION).exists():
        strange = [path.name for path in target.iterdir() if not _OWN.fullmatch(path.name)]
        if strange:
            raise InputError(
                f"{target} exists and is not a potential (it holds {min(strange)}); choose another folder."
            )


def _digest(arrays: Params) -> str:
    """A hash of parameters: those of another potential lie in another folder."""
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(arrays):
        found.update(f"{jax.tree_util.keystr(path)}{leaf.dtype}{leaf.shape}".encode())
        found.update(np.ascontiguousarray(leaf).tobytes())
    return found.hexdigest()[:16]


def _holds(place: Path, arrays: Params) -> bool:
    """Whether a folder holds some parameters, undamaged."""
    if not place.exists():
        return False
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            there = checkpointer.restore(place, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays))
    except Exception:  # orbax raises many kinds for a damaged checkpoint
        return False
    return _digest(jax.tree.map(np.asarray, there)) == _digest(arrays)


class PotentialCalculator(Calculator):
    """ASE calculator of a `Potential`.

    ``results`` also hold ``energy_std``, ``energy_std_per_atom``, ``force_std_mean``, ``force_std_max``,
    ``force_std_rel``, ``max_disagreement`` and the other scores, and ``force_std``, ``force_epistemic`` and
    ``force_total`` [N], as `ensembles.Committee` defines them.  Of a calibrated potential, ``force_error`` [N] is the
    length of the error vector to be expected of each atom: ``force_total`` times the calibration's ``slope``.
    """

    implemented_properties = ["energy", "free_energy", "forces", "stress", "force_error", *_PER_ATOM, *SCORES]

    def __init__(self, potential: Potential) -> None:
        super().__init__()
        self.potential = potential

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = tuple(all_changes),
    ) -> None:
        """Fills ``results`` by one evaluation of the ensemble."""
        super().calculate(atoms, list(properties), list(system_changes))
        found = self.potential.evaluate([self.atoms])
        self.results = {
            "energy": float(found.energy[0]),
            "free_energy": float(found.energy[0]),
            "forces": found.forces[0].astype(np.float64),
            "force_std": found.force_std[0].astype(np.float64),
            "force_epistemic": found.force_epistemic[0].astype(np.float64),
            "force_total": found.force_total[0].astype(np.float64),
            **{name: float(values[0]) for name, values in found.scores.items()},
        }
        error = self.potential.force_error(found.force_total[0])
        if error is not None:
            self.results["force_error"] = error
        if self.atoms.pbc.all():
            self.results["stress"] = found.stress[0]


def _evaluate_on_device(
    ensemble: AnyEnsemble,
    params: Params,
    data: PackedDataset,
    plan: BatchPlan,
    one_by_one: BatchPlan,
    features: FeatureRequest,
    factors: FeatureFactors,
) -> tuple[Committee, jax.Array, dict[str, jax.Array]]:
    """Committee statistics, volumes [S] and features of the only batch of a plan."""
    graph, _ = take_batch(data, plan, 0)
    prediction = ensemble.predict(params, graph)
    alone = None
    if features.structure_by_structure:
        alone = jax.vmap(lambda step: take_batch(data, one_by_one, step)[0])(jnp.arange(graph.num_structures))
    found = feature_maps(features, ensemble, params, prediction, graph, alone, factors)
    return committee_statistics(prediction, graph), graph.volume, found


# The ensemble is compared by value: potentials of one architecture share what was compiled.
_evaluate = jax.jit(_evaluate_on_device, static_argnums=(0, 5))


def _atom_features_on_device(ensemble: AnyEnsemble, params: Params, data: PackedDataset, plan: BatchPlan) -> jax.Array:
    """Features [L, A, F] of the only batch of a plan."""
    graph, _ = take_batch(data, plan, 0)
    return ensemble.predict(params, graph).features


_atom_features = jax.jit(_atom_features_on_device, static_argnums=0)


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


def _batches(structures: Sequence[Atoms], shape: BatchShape) -> Iterator[list[Atoms]]:
    """Runs of structures that fit into a batch, each as long as can be."""
    batch: list[Atoms] = []
    atoms = 0
    for structure in structures:
        if batch and (len(batch) == shape.structures or atoms + len(structure) > shape.atoms):
            yield batch
            batch, atoms = [], 0
        batch.append(structure)
        atoms += len(structure)
    if batch:
        yield batch


def _to_host(
    result: tuple[Committee, jax.Array, dict[str, jax.Array]], references: np.ndarray, batch: Sequence[Atoms]
) -> Evaluated:
    committee, volume, features = jax.device_get(result)
    number = len(batch)
    ends = np.cumsum([len(a) for a in batch])[:-1]
    total = sum(len(a) for a in batch)
    periodic = np.array([a.pbc.all() for a in batch])
    stress = -committee.virial[:number].astype(np.float64) / volume[:number, None, None]
    voigt = np.stack([full_3x3_to_voigt_6_stress(one) for one in stress])
    return Evaluated(
        energy=committee.energy[:number].astype(np.float64) + references,
        forces=np.split(committee.forces[:total], ends),
        stress=np.where(periodic[:, None], voigt, np.nan),
        force_std=np.split(committee.force_std[:total], ends),
        force_epistemic=np.split(committee.force_epistemic[:total], ends),
        force_total=np.split(committee.force_total[:total], ends),
        scores={name: getattr(committee, name)[:number] for name in SCORES},
        features={name: values[:number] for name, values in features.items()},
    )


def _joined(parts: Sequence[Evaluated]) -> Evaluated:
    return Evaluated(
        energy=np.concatenate([p.energy for p in parts]),
        forces=[f for p in parts for f in p.forces],
        stress=np.concatenate([p.stress for p in parts]),
        force_std=[s for p in parts for s in p.force_std],
        force_epistemic=[s for p in parts for s in p.force_epistemic],
        force_total=[s for p in parts for s in p.force_total],
        scores={name: np.concatenate([p.scores[name] for p in parts]) for name in SCORES},
        features={name: np.concatenate([p.features[name] for p in parts]) for name in parts[0].features},
    )
