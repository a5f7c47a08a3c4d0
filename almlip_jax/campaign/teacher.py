"""Settings of a teacher: a cheap label source whose dynamics and labels a campaign begins with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Self

from ase import Atoms
from pydantic import Field, model_validator

from almlip_jax.campaign.systems import concerns
from almlip_jax.cluster import ExecutorSettings
from almlip_jax.models import ModelSettings
from almlip_jax.oracles import LocalSettings, MDRun, SourceSettings
from almlip_jax.selection import BaitSettings, SelectorSettings
from almlip_jax.settings import Settings, unit
from almlip_jax.structures.carried import system_of
from almlip_jax.training import TrainingSettings


class OfSystems(Settings):
    """Dynamics with a label source, of all systems or of some."""

    systems: tuple[str, ...] = ()
    """Names of the systems (`system.structures`) at whose start geometries it begins; at those of all where none is
    named."""

    @model_validator(mode="before")
    @classmethod
    def _is_no_walker(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        if isinstance(given.get("temperature"), list | tuple):
            raise ValueError(
                "dynamics with a label source have one temperature each; ramps are for exploration.walkers."
            )
        if idle := [key for key in ("pressure", "count", "bias") if key in given]:
            raise ValueError(
                f"unknown key '{idle[0]}': dynamics with a label source keep their cell, and there is one for each "
                f"start geometry; '{idle[0]}' is for exploration.walkers."
            )
        return given


class TeacherBath(OfSystems):
    """A temperature of a teacher's dynamics, of all systems or of some."""

    temperature: Annotated[float, Field(gt=0, le=1e5)] = Field(json_schema_extra=unit("K"))
    """Temperature, K."""


class _Changes(Settings):
    """What a training has otherwise than section ``training`` says."""

    max_steps: int = Field(ge=1, le=10**9)
    learning_rate: float | None = Field(gt=0, le=1.0)
    batch_size: int | None = Field(default=None, ge=1, le=10_000_000)
    """Structures in a batch; as in ``training`` where not given."""

    def of(self, training: TrainingSettings) -> TrainingSettings:
        """A training with these changes, the same whatever it begins with."""
        given = {"learning_rate": self.learning_rate, "batch_size": self.batch_size}
        changed = {name: value for name, value in given.items() if value is not None}
        return training.model_copy(update={"max_steps": self.max_steps, "warm_steps": None, **changed})


class PretrainingSettings(_Changes):
    """The training on the teacher's labels; what is not given is as in section ``training``."""

    max_steps: int = Field(default=40_000, ge=1, le=10**9)
    """Optimiser steps at most; `training.max_epochs` holds too."""
    learning_rate: float | None = Field(default=None, gt=0, le=1.0)
    """Highest learning rate; as in ``training`` where not given."""


class TuningSettings(_Changes):
    """Trainings of the rounds, which begin with what the teacher taught; what is not given is as in ``training``."""

    max_steps: int = Field(default=8_000, ge=1, le=10**9)
    """Optimiser steps at most; `training.max_epochs` holds too."""
    learning_rate: float | None = Field(default=2e-3, gt=0, le=1.0)
    """Highest learning rate; as in ``training`` where it is null."""


class TeacherSettings(Settings):
    """A cheap label source that a campaign learns from before it pays for a label.

    Langevin dynamics with it, from each start geometry at each temperature, give frames with its labels.  The ensemble
    is trained on these, and the rounds tune what came out on the labels of the oracle.
    """

    source: SourceSettings
    """Any label source that can drive dynamics: semi-empirical, a force field or a foundation model through ASE, a
    function of your own, a saved potential."""
    driver: SourceSettings | None = None
    """A label source that is cheaper still and drives the dynamics, of which ``source`` labels the frames alone;
    ``source`` does both where not given."""
    executor: ExecutorSettings = LocalSettings()
    """Where labels of both are calculated."""
    temperatures: tuple[Annotated[float, Field(gt=0, le=1e5)] | TeacherBath, ...] = Field(
        default=(300.0, 600.0, 900.0), min_length=1, json_schema_extra=unit("K")
    )
    """Temperatures of the dynamics, K; those of some systems alone as ``{temperature: 1500, systems: [metal]}``."""
    frames: int = Field(default=2400, ge=1, le=10**8)
    """Labelled frames in all at most, shared out evenly among trajectories, of each start geometry at each of its
    temperatures (rounded up)."""
    every: int = Field(default=20, ge=1, le=10**9)
    """Steps from one frame to the next."""
    equilibration: int = Field(default=200, ge=0, le=10**9)
    """Steps before the first."""
    timestep: float = Field(default=0.5, gt=0, le=20.0, json_schema_extra=unit("fs"))
    """Time step, fs."""
    friction: float = Field(default=0.01, gt=0, le=10.0, json_schema_extra=unit("1/fs"))
    """Langevin friction, 1/fs."""
    seconds: float | None = Field(default=None, gt=0, le=1e9, json_schema_extra=unit("s"))
    """Seconds that dynamics and labels of frames may take of ``source`` and ``driver`` together: of each trajectory an
    even share.  With a ``driver`` dynamics have half of them, and labels what is left of all; frames that are left out
    are spread evenly over trajectories and time."""
    training: PretrainingSettings = PretrainingSettings()
    """The training on its labels."""
    tuning: TuningSettings = TuningSettings()
    """The trainings of the rounds, of the correction where there is one."""
    replay: float = Field(default=0.0, ge=0, le=1e6)
    """Weight in the loss of the teacher's frames that each tuning is trained on as well (labels of the oracle have 1),
    under a last layer of their own; 0 trains on the oracle's labels alone."""
    replay_share: float = Field(default=0.5, gt=0, lt=1)
    """With ``replay``: share of the teacher's frames among the structures of each pass over the data, which draws them
    at random."""
    correction: ModelSettings | None = None
    """Model of a correction: the rounds keep what the teacher taught as it is, and learn what labels of the oracle
    differ by (delta learning); null: they tune it."""

    @model_validator(mode="after")
    def _replays(self) -> Self:
        if self.replay == 0 and self.replay_share != type(self).model_fields["replay_share"].default:
            raise ValueError(
                "replay_share is of frames that are trained on again; give replay a weight, or leave it out."
            )
        if self.replay and self.correction is not None:
            raise ValueError("a correction leaves what the teacher taught as it is; leave replay out, or correction.")
        return self

    @property
    def baths(self) -> tuple[TeacherBath, ...]:
        """The temperatures, each with the systems that it is for."""
        return tuple(one if isinstance(one, TeacherBath) else TeacherBath(temperature=one) for one in self.temperatures)

    def runs(self, starts: Sequence[Atoms]) -> list[list[MDRun]]:
        """The dynamics from each of some start geometries; none from one that no temperature is for."""
        places = [
            [n for n, bath in enumerate(self.baths) if concerns(bath.systems, system_of(start))] for start in starts
        ]
        trajectories = max(sum(map(len, places)), 1)
        seconds = math.inf if self.seconds is None else self.seconds
        share = (seconds if self.driver is None else seconds / 2) / trajectories  # the rest is for labels of frames
        return [[self._run(n, number, trajectories, share) for n in own] for number, own in enumerate(places)]

    def _run(self, bath: int, start: int, trajectories: int, seconds: float) -> MDRun:
        return MDRun(
            temperature=self.baths[bath].temperature,
            steps=math.ceil(self.frames / trajectories) * self.every,
            timestep=self.timestep,
            friction=self.friction,
            every=self.every,
            equilibration=self.equilibration,
            seconds=seconds,
            name=f"{bath}-{start}",
        )


class FromTeacherSettings(Settings):
    """First labels of the oracle on frames of the teacher."""

    count: int = Field(default=20, ge=1, le=1_000_000)
    """How many; fewer where there are fewer frames."""
    selector: SelectorSettings = BaitSettings()
    """How they are chosen, by what the ensemble sees in them that has learned from the teacher."""
