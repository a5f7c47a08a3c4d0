"""Config of ``almlip sweep``: labelled pools, the selectors that are compared on them, and what else varies."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from almlip_jax.campaign.consistency import check_adaptive, check_selector
from almlip_jax.cluster import SweepExecutorSettings
from almlip_jax.ensembles import EnsembleSettings, require_target
from almlip_jax.errors import InputError
from almlip_jax.models import ModelSettings, SharedDensitySettings
from almlip_jax.scores import ScoreName
from almlip_jax.selection import SelectorSettings
from almlip_jax.settings import Settings, unit
from almlip_jax.structures.labels import FileReading
from almlip_jax.sweep.crew import ProcessesSettings
from almlip_jax.training import (
    TrainingSettings,
    check_training,
    refuse_idle_judgement,
    refuse_idle_members,
    refuse_idle_warmth,
)

DATA_VARIABLE = "ALMLIP_DATA_DIR"
"""Environment variable that names the folder of data sets."""

_NAME = re.compile(r"[A-Za-z0-9_+.][A-Za-z0-9_+.-]*")


class TestFile(FileReading):
    """A test set of a system; ``keys`` and ``types`` where they are others than those of the system."""

    keeps_relative_paths: ClassVar[bool] = True  # meant from the folder of the sweep

    file: Path
    """Labelled structures."""
    every: int = Field(default=1, ge=1, le=10**9)
    """Only the first frame of the file and every n-th after it are taken."""


class SweepSystem(FileReading):
    """A labelled pool, its test sets, how their files are read, and the model that is trained on it."""

    keeps_relative_paths: ClassVar[bool] = True  # meant from the folder of the sweep

    pool: Path | tuple[Path, ...]
    """File or files with labelled structures to select from.  Those that are also in a test set, or come twice, are
    left out."""
    pool_size: int | None = Field(default=None, ge=1, le=10**9)
    """Structures of the pool that a seed sees (a drawn initial set among them), drawn anew for each; all of them where
    not given."""
    tests: dict[str, TestFile] = Field(min_length=1)
    """Test sets by name: a file, or a file of which only every n-th frame counts."""
    initial: Annotated[int, Field(le=10**8)] | Path = 20
    """The first labelled set: a number of structures drawn from the pool, or a labelled file."""
    model: ModelSettings = SharedDensitySettings()
    """The architecture of the members."""
    ensemble: EnsembleSettings = EnsembleSettings()
    """What makes the members differ; their number is that of ``ensemble_sizes``."""
    training: TrainingSettings = TrainingSettings()
    """How they are trained in each round."""

    @field_validator("tests", mode="before")
    @classmethod
    def _files_alone(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {name: {"file": one} if isinstance(one, str | Path) else one for name, one in given.items()}

    @model_validator(mode="after")
    def _begins_with_something(self) -> Self:
        if isinstance(self.initial, int) and self.initial < 1:
            raise ValueError("initial should be at least 1 structure, or a labelled file.")
        if self.training.warm_start:
            raise ValueError("training.warm_start is not used here; set warm_start of the whole sweep instead.")
        if self.training.final_steps is not None:
            raise ValueError("training.final_steps is not used here; every round of a sweep counts alike.")
        if self.training.replay not in (0, TrainingSettings().replay):
            raise ValueError("training.replay is not used here; the potentials of a sweep remember no structures.")
        return self

    @property
    def readings(self) -> dict[str, Any]:
        """How files are read, where that is said: of the system, and by the name of a test."""
        given: dict[str, FileReading] = {"": self, **self.tests}
        said = {
            name: one.model_dump(mode="json", include={"keys", "types"}, exclude_none=True)
            for name, one in given.items()
        }
        return {name: how for name, how in said.items() if how}

    @property
    def pool_files(self) -> tuple[Path, ...]:
        """The files of the pool."""
        return (self.pool,) if isinstance(self.pool, Path) else self.pool


class SweepConfig(Settings):
    """A study of selectors on labelled pools; its points are all combinations of what varies."""

    folder: Path | None = None
    """Folder from which the files below are meant; by default that of the variable ``ALMLIP_DATA_DIR``, and without it
    that of the config."""
    precision: Literal["float32", "float64"] = "float32"
    """Precision of models and training."""
    systems: dict[str, SweepSystem] = Field(min_length=1)
    """Pools with their tests and models, by name."""
    selectors: dict[str, SelectorSettings] = Field(min_length=1)
    """The selectors that are compared, by name."""
    seeds: Annotated[int, Field(le=100_000)] | tuple[Annotated[int, Field(le=2**32 - 1)], ...] = 8
    """Number of seeds, from 0 on, or the seeds.  A seed decides initial set, pool, first parameters and orders of
    batches, the same for every selector."""
    batch_sizes: tuple[Annotated[int, Field(le=100_000)], ...] = Field(default=(20,), min_length=1)
    """Structures labelled in each round."""
    ensemble_sizes: tuple[Annotated[int, Field(le=256)], ...] = Field(default=(4,), min_length=1)
    """Models in the ensemble."""
    rounds: int = Field(default=6, ge=1, le=100_000)
    """Batches of each point; one training more than batches."""
    warm_start: bool = False
    """Begin each round from the parameters of the round before, for ``training.warm_steps`` steps, instead of from
    fresh ones."""
    monitor: ScoreName = "force_std_mean"
    """Score whose means over batch and pool are written to the table."""
    seconds_per_point: float | None = Field(default=None, gt=0, le=1e9, json_schema_extra=unit("s"))
    """A point that has taken longer than this ends after the round under way; what it did not reach stays empty in the
    table."""
    side_by_side: int = Field(default=1, ge=1, le=4096)
    """Number of points of equal shape that are trained in one program.  It is part of what a point is: another number
    gives results that differ by rounding."""
    executor: SweepExecutorSettings = ProcessesSettings()
    """Where points are worked on: in processes on this machine, or in jobs on a cluster."""
    out: Path | None = None
    """Folder of the sweep; ``runs/`` and the name of the config by default."""

    @model_validator(mode="before")
    @classmethod
    def _processes_have_moved(cls, given: Any) -> Any:
        if isinstance(given, dict) and "processes" in given:
            raise ValueError(
                f"processes is part of executor; write executor: {{kind: local, processes: {given['processes']}}}."
            )
        return given

    @field_validator("systems", "selectors")
    @classmethod
    def _names_make_folders(cls, given: dict[str, Any]) -> dict[str, Any]:
        for name in given:
            if not _NAME.fullmatch(name):
                raise ValueError(f"the name '{name}' should be made of letters, digits and _ + . - only.")
        return given

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        for name, values, least in (
            ("seeds", self.seed_list, 0),
            ("batch_sizes", self.batch_sizes, 1),
            ("ensemble_sizes", self.ensemble_sizes, 1),
        ):
            if not values or min(values) < least or len(set(values)) < len(values):
                raise ValueError(f"{name} should be different numbers, at least one, each {least} or more.")
        for name, system in self.systems.items():
            if self.warm_start and system.training.warm_steps is None:
                raise ValueError(f"warm_start needs systems.{name}.training.warm_steps, fewer than max_steps.")
            if not self.warm_start:
                refuse_idle_warmth(system.training, f"systems.{name}.training.", "warm_start: true of the whole sweep")
            for size in self.ensemble_sizes:
                self._check_members(name, system, size)
        return self

    def _check_members(self, name: str, system: SweepSystem, size: int) -> None:
        if self.side_by_side > 1 and system.ensemble.variants:
            raise ValueError(f"side_by_side trains one architecture; systems.{name}.ensemble has variants.")
        if size < len(system.ensemble.variants):
            raise ValueError(f"ensemble_sizes has {size}, fewer than the variants of systems.{name}.ensemble.")
        if system.ensemble.size not in (EnsembleSettings().size, *self.ensemble_sizes):
            raise ValueError(f"systems.{name}.ensemble.size is not used here; set ensemble_sizes of the whole sweep.")
        require_target(self.monitor, system.model.further, f"monitor on systems.{name}")
        for selector, settings in self.selectors.items():
            check_adaptive(settings, system.training, f"selectors.{selector} on systems.{name}")
            where = f"selectors.{selector} with ensemble_sizes {size}"
            check_selector(settings, members_of(system, size), where, system.model.further)
        try:
            refuse_idle_members(system.ensemble)
            refuse_idle_judgement(system.training)
            check_training(system.model, members_of(system, size), system.training)
        except InputError as error:
            raise ValueError(f"systems.{name}: {error}") from error

    @property
    def seed_list(self) -> tuple[int, ...]:
        """The seeds."""
        return tuple(range(self.seeds)) if isinstance(self.seeds, int) else self.seeds

    def based(self, folder: Path) -> SweepConfig:
        """The config with a folder for its files: its own, that of the variable, or the given one."""
        found = self.folder or os.environ.get(DATA_VARIABLE) or folder
        return self.model_copy(update={"folder": Path(found).resolve()})

    def file(self, path: Path) -> Path:
        """Where a file of the config is."""
        return (self.folder or Path()) / path


def members_of(system: SweepSystem, size: int) -> EnsembleSettings:
    """The ensemble settings of a system with another number of models."""
    return system.ensemble.model_copy(update={"size": size})
