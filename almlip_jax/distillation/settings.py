"""Config of ``almlip distil``: a teacher, the structures that it labels, a student, and what both are held against."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from almlip_jax.campaign.choice import ExplorationChoice
from almlip_jax.campaign.config import ExperimentConfig, PotentialConfig
from almlip_jax.campaign.preparation import paths
from almlip_jax.campaign.settings import (
    InitialSettings,
    LabelMdSettings,
    MdExploration,
    PoolExploration,
    RattleSettings,
    SelectionSettings,
    StoppingSettings,
    SystemSettings,
    TestFileSettings,
    TestSettings,
)
from almlip_jax.campaign.sparse import SparseSettings
from almlip_jax.generation import GeneratorSettings
from almlip_jax.oracles import ExecutorSettings, LocalSettings, SourceSettings
from almlip_jax.selection import RandomSettings
from almlip_jax.settings import Settings
from almlip_jax.structures.labels import LabelKeys

HELD_OUT = "held_out"
"""Test group of the structures that the teacher has labelled and the student is not trained on."""


class TaughtSettings(Settings):
    """Structures that the teacher labels for the student to begin with; start geometries are those of ``system``."""

    structures: Path | tuple[Path, ...] = ()
    """Files of structures that are labelled as they are; labels in them are not looked at."""
    rattle: RattleSettings | None = None
    """Displaced start geometries."""
    generated: tuple[GeneratorSettings, ...] = ()
    """Structures made from the start geometries without dynamics."""
    from_generated: SparseSettings | None = None
    """Of all generated structures, those that are labelled; all of them where not given."""
    md: tuple[LabelMdSettings, ...] = ()
    """Trajectories with the teacher; each of their steps is a call."""

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if not self.files and self.made is None:
            raise ValueError("there is nothing to learn from; give at least one of structures, rattle, generated, md.")
        return self

    @property
    def files(self) -> tuple[Path, ...]:
        """Files of structures that are labelled as they are."""
        return paths(self.structures)

    @property
    def made(self) -> InitialSettings | None:
        """What is made of the start geometries, if anything."""
        if self.rattle is None and not (self.generated or self.from_generated or self.md):
            return None
        return InitialSettings(
            **{name: getattr(self, name) for name in type(self).model_fields if name != "structures"}
        )


class DistilConfig(PotentialConfig):
    """A student, its teacher, and what both are compared on."""

    name: str = "student"
    """Goes into the provenance of every label."""
    system: SystemSettings
    """Start geometries, how files are read, and charge and spin of structures that do not say.  Where no start
    geometries are given, the files of ``initial.structures`` are."""
    teacher: SourceSettings
    """Any label source; its labels are what the student learns."""
    executor: ExecutorSettings = LocalSettings()
    """Where the teacher runs."""
    initial: TaughtSettings
    """Structures that the teacher labels first."""
    held_out: float = Field(default=0.1, gt=0, le=0.5)
    """Share of them that the student is not trained on: of a trajectory its end, of others a random draw."""
    rounds: int = Field(default=0, ge=0, le=100_000)
    """Batches that the teacher labels after that: structures from dynamics of the student, as its members disagree."""
    exploration: ExplorationChoice = MdExploration()
    """Dynamics of the student, where there are rounds."""
    selection: SelectionSettings = SelectionSettings()
    """Which of their structures are labelled."""
    test: tuple[TestFileSettings, ...] = ()
    """Files with labels of what the teacher stands for: student and teacher are compared with them."""

    @model_validator(mode="after")
    def _is_a_campaign(self) -> Self:
        if self.system.named:
            raise ValueError("system.structures with names is for campaigns; give a file, or a list of files.")
        if any(file.group == HELD_OUT for file in self.test):
            raise ValueError(f"the group '{HELD_OUT}' is that of the teacher's own labels; name the test otherwise.")
        self.before_teaching()
        return self

    @property
    def starts(self) -> SystemSettings:
        """The system with start geometries, wherever they are named."""
        return (
            self.system if self.system.structures else self.system.model_copy(update={"structures": self.initial.files})
        )

    def before_teaching(self) -> ExperimentConfig:
        """The campaign as far as it is known before the teacher has said anything."""
        return self.campaign(self.initial.made or InitialSettings(rattle=RattleSettings(count=1)))

    def campaign(self, initial: InitialSettings, *tests: TestFileSettings) -> ExperimentConfig:
        """The campaign whose label source is the teacher.

        Args:
            initial: its first labelled set.
            tests: further groups of its test set.
        """
        shared = {name: getattr(self, name) for name in (*PotentialConfig.model_fields, "name", "executor")}
        exploration, selection = self.exploration, self.selection
        if not self.rounds:  # nothing is explored, so that a single member, which has no spread, will do
            exploration = PoolExploration(files=tuple(path for _, path in self.starts.files))
            selection = SelectionSettings(selector=RandomSettings())
        return ExperimentConfig(
            system=self.starts,
            oracle=self.teacher,
            exploration=exploration,
            selection=selection,
            initial=initial,
            test=TestSettings(files=(*tests, *self.test)),
            stopping=StoppingSettings(max_rounds=self.rounds, share_below=None),
            **shared,
        )


def own_labels(path: Path) -> TestFileSettings:
    """The test group of held-out structures from a file of ours, whatever keys other files have."""
    return TestFileSettings(path=path, group=HELD_OUT, keys=LabelKeys())
