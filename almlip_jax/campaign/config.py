"""The config of a campaign: the settings of every room put together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from almlip_jax.campaign.choice import ExplorationChoice
from almlip_jax.campaign.consistency import (
    check_adaptive,
    check_executor,
    check_judges,
    check_labels,
    check_named,
    check_plateau,
    check_selector,
    check_share,
    check_target,
    check_walkers,
)
from almlip_jax.campaign.continuity import with_earlier_defaults
from almlip_jax.campaign.settings import (
    CampaignSettings,
    InitialSettings,
    MdExploration,
    SelectionSettings,
    StateReading,
    StoppingSettings,
    SystemSettings,
    TestSettings,
)
from almlip_jax.campaign.teacher import TeacherSettings
from almlip_jax.config import load_settings
from almlip_jax.models import DeltaSettings, ModelSettings, SharedDensitySettings
from almlip_jax.oracles import ExecutorSettings, LocalSettings, SourceSettings
from almlip_jax.potential.active_set import GRADES, ActiveSetSettings
from almlip_jax.saved_potential import SavedPotential
from almlip_jax.settings import Settings
from almlip_jax.training import (
    EnsembleSettings,
    TrainingSettings,
    check_training,
    refuse_idle_judgement,
    refuse_idle_members,
    refuse_idle_warmth,
)


class PotentialConfig(Settings):
    """What a potential is made with."""

    seed: int = Field(default=0, ge=0, le=2**32 - 1)
    """All random numbers follow from it."""
    precision: Literal["float32", "float64"] = "float32"
    """Precision of models, training and dynamics; energies are relative to reference energies, and labels always
    float64."""
    model: ModelSettings = SharedDensitySettings()
    """The architecture of the members."""
    ensemble: EnsembleSettings = EnsembleSettings()
    """How many members there are, and what makes them differ."""
    training: TrainingSettings = TrainingSettings()
    """How they are trained."""
    know_training_set: bool = False
    """Whether potentials keep what comparisons with their training set need: novelty scores (among them the
    extrapolation grade) fitted to it, its scores and last-layer features.  Their evaluations then hold
    novelty scores, and simulations need no `training_set`."""
    active_set: ActiveSetSettings | None = None
    """The active set that potentials keep, over which grades of extrapolation are measured; null: none, except where
    exploration looks at a grade, or with `know_training_set`, which make one of the mode that is needed."""

    @model_validator(mode="after")
    def _members_can_be_trained(self) -> Self:
        refuse_idle_members(self.ensemble)
        given = {"model", "ensemble"} <= self.model_fields_set
        if given or not self._may_begin:  # or else `as_of` checks, with what it takes
            check_training(self.model, self.ensemble, self.training)
        return self

    @model_validator(mode="after")
    def _rows_are_as_they_are_said_to_be(self) -> Self:
        given = self.active_set
        if given is not None and given.start == "identity" and given.epsilon != ActiveSetSettings().epsilon:
            raise ValueError("active_set.epsilon counts with start 'epsilon' only; leave it out, or take that.")
        if given is not None and given.mode == "neighborhood" and not given.per_atom:
            raise ValueError(
                "active_set.per_atom counts with mode 'configuration' only; rows of atoms need no such key: leave it "
                "out, or take that."
            )
        return self

    @property
    def _may_begin(self) -> bool:
        """Whether model and ensemble may be those of a potential to begin with, where they are not given."""
        return False


class ExperimentConfig(PotentialConfig):
    """A whole campaign, or the part of it that a command needs."""

    name: str = "campaign"
    """Goes into the provenance of every label."""
    system: SystemSettings
    """What the potential is for."""
    oracle: SourceSettings
    """Where labels come from."""
    executor: ExecutorSettings = LocalSettings()
    """Where label calculations run."""
    teacher: TeacherSettings | None = None
    """A cheap label source to learn from before any label is paid for; none by default."""
    initial: InitialSettings
    """The first labelled set."""
    test: TestSettings = TestSettings()
    """The test set."""
    exploration: ExplorationChoice = MdExploration()
    """Where candidates come from."""
    selection: SelectionSettings = SelectionSettings()
    """Which candidates are labelled."""
    stopping: StoppingSettings = StoppingSettings()
    """When the campaign ends."""
    campaign: CampaignSettings = CampaignSettings()
    """How its stages follow each other."""

    @model_validator(mode="after")
    def _sections_serve_each_other(self) -> Self:
        check_sections(self)
        return self

    @property
    def beginning(self) -> SavedPotential | None:
        """What the potential says that trainings begin with, where there is one.

        Raises:
            InputError: there is none where it should be, or it is damaged.
        """
        initial = self.initial
        if initial.potential is None:
            return None
        return SavedPotential.read(initial.potential, initial.otherwise(self.system).types)

    @property
    def _may_begin(self) -> bool:
        return self.initial.potential is not None

    @property
    def spanned(self) -> ActiveSetSettings | None:
        """The active set that the potentials of rounds have; None where nothing asks for one."""
        if self.active_set is not None:
            return self.active_set
        asked = [mode for mode, name in GRADES.items() if name in self.exploration.novelty]
        return ActiveSetSettings.model_validate({"mode": asked[0]}) if asked else None


def check_active_set(config: ExperimentConfig) -> None:
    """Refuses an exploration by grades that the active set does not give; raises ValueError."""
    given = config.active_set
    asked = [name for name in GRADES.values() if name in config.exploration.novelty]
    if given is None:
        return
    others = [(mode, name) for mode, name in GRADES.items() if name in asked and name != given.score]
    if others:
        mode, name = others[0]
        raise ValueError(
            f"exploration looks at {name}, which the active set of active_set.mode '{given.mode}' does not give; "
            f"set active_set.mode: {mode}, or look at {given.score}."
        )
    if not asked:
        return
    if given.parameters == "all":
        raise ValueError(
            f"exploration looks at {given.score}, which dynamics know over the linear parameters alone; set "
            "active_set.parameters: linear."
        )


def check_sections(config: ExperimentConfig) -> None:
    """Refuses sections that do not serve each other; raises ValueError."""
    further, teacher = config.model.further, config.teacher is not None
    check_judges(config.exploration, config.selection, config.stopping, config.ensemble, further, teacher=teacher)
    check_labels(config.model.further, config.oracle)
    check_executor(config.oracle, config.executor)
    check_adaptive(config.selection.selector, config.training, "selection.selector")
    check_plateau(config.stopping, config.selection)
    check_target(config.stopping, config.test, config.model.further, tuple(config.system.named))
    check_share(config.stopping, config.exploration)
    check_walkers(config.exploration, config.system.parts)
    check_named(config, tuple(config.system.named))
    check_active_set(config)
    check_teacher(config)
    refuse_idle_judgement(config.training)
    if config.initial.potential is None:  # with one, all trainings start warm
        refuse_idle_warmth(config.training)
        if isinstance(config.model, DeltaSettings):
            raise ValueError(
                "a model of kind 'delta' corrects a trained potential: begin with one (initial.potential), or let "
                "teacher.correction make it."
            )


def check_teacher(config: ExperimentConfig) -> None:
    """Refuses a teacher that could not serve, and what asks for one that is not there; raises ValueError."""
    teacher, chosen = config.teacher, config.initial.from_teacher
    if chosen is not None:
        if teacher is None:
            raise ValueError("initial.from_teacher takes frames of a teacher; give section teacher, or leave it out.")
        if chosen.selector.asks_teacher:
            raise ValueError(
                "initial.from_teacher.selector compares frames of the teacher with the teacher (filter agreement), "
                "from which the ensemble has just learned; leave the filter out."
            )
        check_selector(
            chosen.selector, config.ensemble, "initial.from_teacher.selector", config.model.further, labelled=False
        )
    if teacher is None:
        return
    if teacher.correction is not None and (config.ensemble.heads > 1 or not config.ensemble.likelihood.silent):
        raise ValueError("teacher.correction needs plain members; leave ensemble.heads and ensemble.likelihood out.")
    if teacher.correction is not None and (config.ensemble.variants or config.model.further):
        raise ValueError(
            "teacher.correction corrects energies of members of one architecture; leave ensemble.variants and what "
            "models give besides the energy out."
        )
    if teacher.correction is not None:
        try:
            DeltaSettings(base=config.model, correction=teacher.correction)
        except ValidationError as error:
            raise ValueError(f"teacher.correction: {error.errors()[0]['ctx']['error']}") from None
    asked = _settings_of(config.oracle)
    for key, source in {"source": teacher.source, "driver": teacher.driver}.items():
        if source is None:
            continue
        if not source.drives_dynamics:
            raise ValueError(
                f"teacher.{key} of kind '{source.kind}' cannot drive dynamics; take one that labels any structure."
            )
        for part in _calculating(source):
            if _settings_of(part) == asked:
                what = "is the oracle itself" if part is source else "asks the oracle itself for a part of its mean"
                raise ValueError(f"teacher.{key} {what}, whose labels are paid for; take a cheaper source.")
        check_executor(source, teacher.executor)
    if teacher.driver is not None and _settings_of(teacher.driver) == _settings_of(teacher.source):
        raise ValueError(
            "teacher.driver is teacher.source itself, which would calculate each frame twice; leave driver out."
        )
    if config.initial.potential is not None and teacher.correction is not None:
        raise ValueError(
            "a correction leaves what the teacher taught as it is, and would have to learn anew from labels alone "
            "what initial.potential knows of the oracle; leave teacher.correction out, or the potential."
        )
    if config.training.projection is not None:
        raise ValueError(
            "with a teacher trainings are by gradients, as long as teacher says; leave training.projection out."
        )
    if config.training.warm_steps is not None:
        raise ValueError("with a teacher the length of trainings is teacher.tuning.max_steps; leave warm_steps out.")
    check_labels(config.model.further, teacher.source, "teacher.source")


def _calculating(source: SourceSettings) -> Iterator[SourceSettings]:
    """A label source, and those that it asks."""
    yield source
    for part in source.asks():
        yield from _calculating(part)


def _settings_of(source: SourceSettings) -> dict[str, Any]:
    """What tells a label source from others: not how it is called and watched."""
    return source.model_dump(exclude=set(SourceSettings.model_fields))


_OF_CAMPAIGNS = frozenset(SystemSettings.model_fields) - frozenset(StateReading.model_fields)


class TrainConfig(PotentialConfig):
    """Config of `almlip train`; the other sections of a campaign may be there too, and are not looked at."""

    system: StateReading = StateReading()
    """How files are read, and charge and spin of structures that do not say; of the section of a campaign nothing else
    counts."""

    @model_validator(mode="before")
    @classmethod
    def _leave_what_campaigns_need(cls, given: Any) -> Any:
        return _own_sections(cls, given)

    @property
    def _may_begin(self) -> bool:
        return True  # with --from


class LabelConfig(Settings):
    """Config of `almlip label`; the other sections of a campaign may be there too, and are not looked at."""

    name: str = "campaign"
    """Goes into the provenance of every label."""
    system: StateReading = StateReading()
    """How files are read, and charge and spin of structures that do not say; of the section of a campaign nothing else
    counts."""
    oracle: SourceSettings
    """Where labels come from."""
    executor: ExecutorSettings = LocalSettings()
    """Where label calculations run."""

    @model_validator(mode="before")
    @classmethod
    def _leave_what_campaigns_need(cls, given: Any) -> Any:
        return _own_sections(cls, given)

    @model_validator(mode="after")
    def _labels_are_calculated_where_they_can_be(self) -> Self:
        check_executor(self.oracle, self.executor)
        return self


class SelectConfig(Settings):
    """Config of `almlip select`; the other sections of a campaign may be there too, and are not looked at."""

    seed: int = Field(default=0, ge=0, le=2**32 - 1)
    """All random numbers follow from it."""
    system: StateReading = StateReading()
    """How files are read, and charge and spin of structures that do not say; of the section of a campaign nothing else
    counts."""
    selection: SelectionSettings = SelectionSettings()
    """How structures are chosen; the command is told how many."""

    @model_validator(mode="before")
    @classmethod
    def _leave_what_campaigns_need(cls, given: Any) -> Any:
        return _own_sections(cls, given)


def _own_sections(kind: type[Settings], given: Any) -> Any:
    """What a config that may be a campaign's holds for a command that needs a part of it."""
    if not isinstance(given, dict):
        return given
    others = set(ExperimentConfig.model_fields) - set(kind.model_fields)
    left = {key: value for key, value in given.items() if key not in others}
    if isinstance(left.get("system"), dict):
        left["system"] = {k: v for k, v in left["system"].items() if k not in _OF_CAMPAIGNS}
    return left


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Reads the config of a campaign; arguments and errors as for `load_settings`."""
    return load_settings(ExperimentConfig, path, overrides)


def load_run_config(run_dir: Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Reads the config in a run directory, where keys of later versions mean what held when the run began."""
    return load_settings(ExperimentConfig, run_dir / "config.yaml", overrides, prepare=with_earlier_defaults)
