"""Labelled pools: what is read from files, what belongs to no test, and who begins with what."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from ase import Atoms

from almlip_jax.campaign.batch import remarks_of
from almlip_jax.campaign.preparation import check_states, frames_and_atoms
from almlip_jax.campaign.settings import SystemSettings
from almlip_jax.ensembles import build_ensemble
from almlip_jax.errors import InputError
from almlip_jax.keys import numpy_generator
from almlip_jax.structures.io import read_structures
from almlip_jax.structures.labels import hint_of_keys, label_difference
from almlip_jax.structures.likeness import Likeness
from almlip_jax.structures.repeats import geometry_key
from almlip_jax.structures.species import SpeciesTable
from almlip_jax.sweep.settings import SweepConfig, SweepSystem, members_of
from almlip_jax.training import (
    Capacity,
    TrainingSettings,
    doubts,
    find_references,
    given_references,
    longest_epoch,
    plan_capacity,
    without_isolated_atoms,
)


@dataclass(frozen=True)
class Split:
    """What a seed begins with.

    Attributes:
        initial: places in the pool of the initial set; none where that is a file.
        pool: places of the candidates, in their order.
    """

    initial: tuple[int, ...]
    pool: tuple[int, ...]


@dataclass(frozen=True)
class LabelledPool:
    """The structures of a system.

    Attributes:
        name: of the system.
        frames: the pool as it lies in the files; places in it are what picks are written as.
        usable: places of structures that are in no test set nor in a given initial set, each structure once.
        tests: the test sets one after the other, ``info["group"]`` the name of each.
        given: the initial set where it is a file.
        files: hash of the content of every file.
        isolated: energies of isolated atoms, eV by atomic number, as settings or files give them.
        notes: what the user should know of labels that contradict each other or are doubtful.
        atoms_in_tests: isolated atoms that were left out of the test sets.
        tests_in_given: structures of the test sets that were left out of the initial set where it is a file.
    """

    name: str
    frames: list[Atoms]
    usable: tuple[int, ...]
    tests: list[Atoms]
    given: list[Atoms]
    files: tuple[str, ...]
    isolated: dict[int, float]
    notes: tuple[str, ...] = ()
    atoms_in_tests: int = 0
    tests_in_given: int = 0

    @cached_property
    def species(self) -> SpeciesTable:
        """Every element that occurs."""
        return SpeciesTable.of([*self.frames, *self.tests, *self.given])

    @cached_property
    def uniform(self) -> bool:
        """Whether all structures that can be trained on have the same number of atoms."""
        return len({len(atoms) for atoms in [*self.frames, *self.given]}) == 1

    def split(self, settings: SweepSystem, seed: int) -> Split:
        """What a seed begins with; selectors, batches and ensembles do not matter."""
        order = numpy_generator(seed, "sweep", self.name, "pool").permutation(self.usable)[: settings.pool_size]
        initial = settings.initial if isinstance(settings.initial, int) else 0
        return Split(tuple(order[:initial].tolist()), tuple(sorted(order[initial:].tolist())))

    def initial_set(self, split: Split) -> list[Atoms]:
        """The structures of the first training."""
        return [*self.given, *(self.frames[index] for index in split.initial)]


def read_pool(config: SweepConfig, name: str) -> LabelledPool:
    """Reads the files of a system.

    Raises:
        InputError: a file cannot be read or lacks labels, or the pool is too small for the sweep.
    """
    settings, remarks = config.systems[name], remarks_of(config)
    files = [config.file(path) for path in settings.pool_files]
    frames, isolated = frames_and_atoms(files, SystemSettings(), settings, remarks)
    tests, atoms_in_tests = _tests(config, settings)
    files += [config.file(test.file) for test in settings.tests.values()]
    given: list[Atoms] = []
    if isinstance(settings.initial, Path):
        files.append(config.file(settings.initial))
        given, atoms = frames_and_atoms(files[-1], SystemSettings(), settings, remarks)
        isolated |= atoms
    isolated |= given_references(settings.training)
    species = SpeciesTable.of([*frames, *given])
    sees_state = build_ensemble(settings.model, members_of(settings, config.ensemble_sizes[0]), species).sees_state
    if sees_state:
        check_states(tests, f"the test sets of {name}", [*frames, *given], sees_state=True)
    told = _as_told if sees_state else _bare
    likeness = Likeness(told(frame) for frame in tests)
    apart = [frame for frame in given if told(frame) not in likeness]
    tests_in_given, given = len(given) - len(apart), apart
    if tests_in_given and not given:
        raise InputError(f"{settings.initial} holds no structure that is in no test set of {name}; name another file.")
    usable, notes = _fresh(frames, [*tests, *given], geometry_key if sees_state else _geometry)
    usable, tested = _no_test(frames, usable, likeness, told)
    notes = (*notes, *tested)
    if (doubt := _doubt(frames, isolated)) is not None:
        notes = (*notes, doubt)
    if atoms_in_tests:
        notes = (*notes, f"{atoms_in_tests} isolated atoms are left out of the test sets, as they are in training.")
    if tests_in_given:
        notes = (*notes, f"{tests_in_given} structures of the initial set are left out, as they are in test sets.")
    hashes = tuple(_hash(path) for path in files)
    pool = LabelledPool(name, frames, usable, tests, given, hashes, isolated, notes, atoms_in_tests, tests_in_given)
    _check_size(pool, config)
    return pool


def _tests(config: SweepConfig, settings: SweepSystem) -> tuple[list[Atoms], int]:
    """The test sets one after the other, and how many isolated atoms were left out of them.

    Raises:
        InputError: a file cannot be read, or has no labels.
    """
    tests: list[Atoms] = []
    left_out = 0
    for group, test in settings.tests.items():
        file = config.file(test.file)
        read = read_structures(file, **test.otherwise(settings).arguments)[:: test.every]
        chosen = without_isolated_atoms(read)
        left_out += len(read) - len(chosen)
        for frame in chosen:
            frame.info["group"] = group
        if not any(frame.calc is not None for frame in chosen):
            raise InputError(f"{file} has no labels, and cannot test anything; {hint_of_keys((chosen or read)[0])}.")
        tests += chosen
    return tests, left_out


def _doubt(frames: Sequence[Atoms], isolated: Mapping[int, float]) -> str | None:
    """A sentence on structures of a pool whose energies are far from what the others suggest."""
    doubt = doubts(frames, find_references(frames, SpeciesTable.of(frames), isolated=isolated))
    return None if doubt is None else f"in the pool, {doubt}"


def _fresh(
    frames: Sequence[Atoms], known: Sequence[Atoms], key: Callable[[Atoms], bytes]
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Places of structures that are not known, each structure once, and what is left out with another label."""
    seen, places, notes = {key(frame): frame for frame in known}, [], []
    for place, frame in enumerate(frames):
        same = seen.setdefault(key(frame), frame)
        if same is frame:
            places.append(place)
        elif (apart := label_difference(same, frame)) is not None:
            notes.append(f"structure {place} of the pool is left out: it came before with another label ({apart}).")
    more = [f"{len(notes) - 1} further structures are left out for the same reason."] if len(notes) > 1 else []
    return tuple(places), (*notes[:1], *more)


def _no_test(
    frames: Sequence[Atoms], places: Sequence[int], likeness: Likeness, told: Callable[[Atoms], Atoms]
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Those of some places that no test structure stands in, turned or shifted, and a sentence on the others."""
    left = tuple(place for place in places if told(frames[place]) not in likeness)
    if not (lost := len(places) - len(left)):
        return left, ()
    return left, (
        f"{lost} structures of the pool are left out: they are test structures, turned, shifted or with atoms in "
        "another order.",
    )


def _as_told(frame: Atoms) -> Atoms:
    return frame


def _bare(frame: Atoms) -> Atoms:
    """A structure as it is to a potential that is not told charge and spin."""
    return Atoms(numbers=frame.numbers, positions=frame.positions, cell=frame.cell, pbc=frame.pbc)


def _geometry(frame: Atoms) -> bytes:
    """What identifies a structure to such a potential."""
    return geometry_key(_bare(frame))


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _check_size(pool: LabelledPool, config: SweepConfig) -> None:
    settings = config.systems[pool.name]
    drawn = settings.initial if isinstance(settings.initial, int) else 0
    needed = drawn + config.rounds * max(config.batch_sizes)
    there = min(len(pool.usable), settings.pool_size or len(pool.usable))
    if needed > there:
        raise InputError(
            f"the pool of {pool.name} has {there} structures that are in no other set, fewer than the {needed} of the "
            "initial set and all batches; take fewer rounds, smaller batches or a larger pool."
        )


def plan_for_budget(pool: LabelledPool, cutoff: float, training: TrainingSettings, largest_dataset: int) -> Capacity:
    """Sizes that hold any choice of a number of structures of a pool, even the largest ones.

    Args:
        pool: structures that can be trained on.
        cutoff: Angstrom.
        training: settings of the training.
        largest_dataset: structures at the end, those of the initial set among them.
    """
    structures = [*pool.given, *pool.frames]
    planned = plan_capacity(structures, cutoff, training)
    atoms = int(np.sort([len(frame) for frame in structures])[-largest_dataset:].sum())
    slots = min(training.batch_size, largest_dataset)
    batch = replace(planned.batch, atoms=min(planned.batch.atoms, atoms), structures=slots)
    steps = longest_epoch(largest_dataset, atoms, batch, uniform=pool.uniform) + training.validate_every
    return replace(planned, batch=batch, atoms=atoms + 1, structures=largest_dataset + 1, steps=steps)
