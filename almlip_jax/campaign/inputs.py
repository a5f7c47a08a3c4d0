"""The structures that a campaign is given: each file is read when it is first needed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import jax
import numpy as np
from ase import Atoms

from almlip_jax.campaign.batch import remarks_of
from almlip_jax.campaign.config import ExperimentConfig
from almlip_jax.campaign.making import Made, make, starts_for
from almlip_jax.campaign.preparation import (
    PoolSplit,
    frames_and_atoms,
    labelled_frames,
    pool_frames,
    split_pool,
    start_geometries,
    start_list,
)
from almlip_jax.campaign.rundir import RunDirectory
from almlip_jax.campaign.settings import SystemSettings
from almlip_jax.campaign.sparse import SparseSettings, sparse
from almlip_jax.campaign.systems import name_systems
from almlip_jax.ensembles.build import build_ensemble
from almlip_jax.files import read_json, understood
from almlip_jax.generation import GeneratorSettings
from almlip_jax.keys import named_key, numpy_generator
from almlip_jax.potential import Potential
from almlip_jax.progress import Progress, when_long
from almlip_jax.structures.carried import system_of
from almlip_jax.structures.io import read_structures
from almlip_jax.structures.labels import FileReading
from almlip_jax.structures.likeness import Likeness
from almlip_jax.structures.repeats import geometry_key
from almlip_jax.structures.species import SpeciesTable
from almlip_jax.training import given_references

_AT_A_TIME = 100  # structures that are compared between two reports


class Inputs:
    """What the files of a config hold.

    Args:
        config: of the campaign.
        run: its directory, where it has begun.
    """

    def __init__(self, config: ExperimentConfig, run: RunDirectory | None = None) -> None:
        self._config = config
        self._run = run
        self._like_test: frozenset[int] | None = None

    @property
    def system(self) -> SystemSettings:
        """How files are read, and charge and spin of structures that do not say."""
        return self._config.system

    @cached_property
    def geometries(self) -> list[Atoms]:
        """Start geometries."""
        return start_geometries(self._config.system)

    @cached_property
    def pool(self) -> list[Atoms]:
        """The candidates of a fixed pool; none where they are found otherwise."""
        return pool_frames(self._config.exploration, self._config.system, self.geometries, self.remarks)

    @cached_property
    def remarks(self) -> tuple[str, ...]:
        """Keys of `info` that selectors look at, which datasets and pools therefore keep."""
        return remarks_of(self._config)

    @cached_property
    def pool_keys(self) -> list[bytes]:
        """What identifies the structures of a fixed pool."""
        return [geometry_key(atoms) for atoms in self.pool]

    @cached_property
    def held_out(self) -> Likeness:
        """The structures of the test set, however they are written down; for stages that come after it was made."""
        run = self._run
        return Likeness(read_structures(run.test) if run is not None and run.test.exists() else ())

    def pool_like_test(self, progress: Progress) -> frozenset[int]:
        """Places in a fixed pool of what is the same as a structure of the test set, however it is written down."""
        if self._like_test is None:
            found, number = list[int](), len(self.pool)
            with when_long(progress, "compare with test set", number, "structures") as advance:
                for first in range(0, number, _AT_A_TIME):
                    some = range(first, min(first + _AT_A_TIME, number))
                    found += [place for place in some if self.pool[place] in self.held_out]
                    advance(len(some))
            self._like_test = frozenset(found)
        return self._like_test

    @cached_property
    def pool_split(self) -> PoolSplit:
        """Who gets which structures of a fixed pool."""
        config, run = self._config, self._run
        asked, shares = config.initial.from_pool, config.system.parts
        kept = run is not None and run.initial_pool.exists()
        if run is not None and not kept and run.round(0).dataset.exists():  # an earlier version drew from all systems
            shares = {}
        owners, count = [system_of(frame) for frame in self.pool], config.initial.pool_count
        split = split_pool(len(self.pool), count, config.test.from_pool, config.seed, owners, shares)
        if run is not None and kept:  # whatever selector and shares would say now
            with understood(run.initial_pool):
                return split.with_initial([int(place) for place in read_json(run.initial_pool)["places"]])
        if isinstance(asked, int):
            return split
        free = split.outside_test
        return split.with_initial([free[row] for row in self._sparse(self.of_pool(free), asked, "pool")])

    @property
    def free_of_pool(self) -> tuple[int, ...]:
        """Indices of the structures of a fixed pool that are not for the test set, in their order."""
        return self._first_split.outside_test

    @property
    def test_of_pool(self) -> tuple[int, ...]:
        """Indices of those that are, as they were drawn."""
        return self._first_split.test

    @cached_property
    def _first_split(self) -> PoolSplit:
        """Who gets what where nobody chooses: the test set is the same whoever does."""
        initial, test = self._config.initial.pool_count, self._config.test.from_pool
        owners = [system_of(frame) for frame in self.pool]
        return split_pool(len(self.pool), initial, test, self._config.seed, owners)

    def _sparse(self, frames: Sequence[Atoms], asked: SparseSettings, name: str) -> list[int]:
        """Places of structures that a selector chooses for the initial set, next to a dataset that is given."""
        config, known = self._config, self.known
        cutoff = build_ensemble(config.model, config.ensemble, SpeciesTable.of([*frames, *known])).cutoff
        key = named_key(config.seed, "initial", name)
        with jax.enable_x64(config.precision == "float64"):  # before a campaign begins, jax may be set to the other one
            return sparse(frames, asked, key, cutoff=cutoff, seed=config.seed, known=known, shares=config.system.parts)

    @cached_property
    def known(self) -> list[Atoms]:
        """The structures of the dataset that is given, if there is one."""
        config, given = self._config, self._config.initial.dataset
        return [] if given is None else labelled_frames(given, config.system, config.initial, self.remarks)

    def of_pool(self, indices: Iterable[int]) -> list[Atoms]:
        """Some structures of a fixed pool."""
        return [self.pool[index] for index in indices]

    @cached_property
    def generated(self) -> list[Made]:
        """All structures that are made for the initial set, whether they are to be labelled or not."""
        config, found = self._config, []
        for number, one in enumerate(config.initial.generated):
            drawn = numpy_generator(config.seed, "generated", number, one.kind)
            found += [Made(one.kind, frame) for frame in self.made(one, drawn)]
        return found

    def made(self, settings: GeneratorSettings, drawn: np.random.Generator) -> list[Atoms]:
        """What a generator makes of the start geometries, with random numbers; see `make`."""
        return make(settings, self.geometries, self._config.system, self._config.oracle, drawn)

    def left_out(self, generators: Iterable[GeneratorSettings]) -> list[str]:
        """Sentences on start geometries that generators leave out, each once."""
        said = [starts_for(one, self.geometries).left_out for one in generators]
        return list(dict.fromkeys(sentence for sentence in said if sentence is not None))

    @property
    def generated_to_label(self) -> dict[str, list[Atoms]]:
        """Those that are to be labelled, by the kind of their generator."""
        asked, chosen = self._config.initial.from_generated, self.generated
        if asked is not None and chosen:
            rows = self._sparse([made.frame for made in chosen], asked, "generated")
            chosen = [chosen[row] for row in sorted(rows)]
        found: dict[str, list[Atoms]] = {}
        for made in chosen:
            found.setdefault(made.kind, []).append(made.frame)
        return found

    @cached_property
    def listed(self) -> list[Atoms]:
        """The structures of the file that walkers start at, checked; none where they start elsewhere."""
        config = self._config
        path, given = config.exploration.starts_file, config.initial.dataset
        if path is None:
            return []
        known = [*self.geometries]
        known += [] if given is None else labelled_frames(given, config.system, config.initial)
        sees_state = build_ensemble(config.model, config.ensemble, SpeciesTable.of(known)).sees_state
        listed = start_list(path, config.system, known, sees_state=sees_state)
        return name_systems(listed, self.geometries, str(path))

    @cached_property
    def species(self) -> SpeciesTable:
        """Every element in any input of the campaign, the potential that trainings begin with among them."""
        system, initial = self._config.system, self._config.initial
        given: list[tuple[Path, FileReading]] = [(file.path, file) for file in self._config.test.files]
        given += [(initial.dataset, initial)] if initial.dataset is not None else []
        frames = [frame for path, reading in given for frame in labelled_frames(path, system, reading)]
        made = [one.frame for one in self.generated]
        occurring = SpeciesTable.of([*self.geometries, *self.pool, *made, *frames])
        if self.start is None:
            return occurring
        return SpeciesTable(tuple(sorted({*occurring.numbers, *self.start.species.numbers})))

    @cached_property
    def start(self) -> Potential | None:
        """The potential that trainings begin with, where the config names one."""
        initial = self._config.initial
        types = initial.otherwise(self._config.system).types
        return None if initial.potential is None else Potential.load(initial.potential, types)

    @cached_property
    def isolated(self) -> dict[int, float]:
        """Energies of isolated atoms, eV by atomic number, as the config or the initial dataset gives them."""
        config, given = self._config, self._config.initial.dataset
        energies = {} if given is None else frames_and_atoms(given, config.system, config.initial)[1]
        energies |= given_references(config.training)
        return {z: energies[z] for z in self.species.numbers if z in energies}
