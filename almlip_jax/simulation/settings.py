"""Configs of ``almlip explore`` and ``almlip md``."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from almlip_jax.dynamics import ExplorationSettings, RelaxationSettings
from almlip_jax.dynamics.seen import MOST_STEPS
from almlip_jax.dynamics.thresholds import FRAMES, RelativeThresholds, ThresholdSettings
from almlip_jax.settings import Settings, unit
from almlip_jax.structures.labels import FileReading

_LONGEST_STRIDE = 20_000  # steps; a chunk is at least as long, and nothing is written before it is over


class SimulationConfig(FileReading, ABC):
    """What both commands take; `keys` are for the calibration set, `types` for all files of structures and ``.mtp``."""

    potential: Path
    """Folder of a saved potential, or an ``.mtp`` file of MLIP-2 (with ``types``)."""
    structures: Path
    """File with the start structures; they are dealt out to the walkers in turn."""
    training_set: Path | None = None
    """Structures that the potential was trained on; relative thresholds, novelty scores and admissions by features
    compare with them.  Not needed where the potential knows them (`know_training_set` of its config); grades are
    measured over the active set of the potential, where it has one."""
    calibration_set: Path | None = None
    """Labelled structures that it was not trained on, for calibrated and conformal thresholds."""
    exploration: ExplorationSettings
    """Walkers and what moves them, gate, sanity, what is recorded."""
    seed: int = Field(default=0, ge=0, le=2**32 - 1)
    """All random numbers follow from it."""
    out: Path | None = None
    """Folder of the run; ``runs/`` and the name of the config by default."""
    checkpoint_every: float = Field(default=60.0, ge=0, le=1e6, json_schema_extra=unit("s"))
    """Seconds between two states from which an interrupted run goes on; at 0 every chunk ends with one."""

    @property
    @abstractmethod
    def rule(self) -> ThresholdSettings | None:
        """Where the gate's thresholds come from; none where nothing is gated."""

    @property
    def dynamics(self) -> ExplorationSettings:
        """What the compiled loop is made from."""
        return self.exploration

    @property
    def asks_for_training_set(self) -> bool:
        """Whether anything is compared with the training set."""
        return bool(self.compared or self.exploration.novelty)

    @property
    def compared(self) -> tuple[str, ...]:
        """What is compared with the training set besides scores that were fitted to it, in words."""
        admission, rule = self.exploration.admission, self.rule
        asking = [f"{rule.kind} thresholds"] if rule is not None and rule.looks_at_training_set else []
        asking += [f"admission '{admission.kind}'"] if admission.looks_at_features else []
        return tuple(asking)

    @model_validator(mode="after")
    def _sets_are_given(self) -> Self:
        if self.rule is None:
            return self
        self.rule.check(self.exploration.gate.score)
        if self.rule.frames_drawn not in (0, FRAMES):
            raise ValueError("thresholds.frames are drawn in campaigns only; here calibration_set gives the frames.")
        if self.rule.frames_drawn and self.calibration_set is None:
            raise ValueError(
                f"calibration_set is missing, which is needed for {self.rule.kind} thresholds: labelled structures "
                "that the potential was not trained on."
            )
        return self


class ExploreConfig(SimulationConfig):
    """Gated exploration with a trained potential: ``almlip explore``."""

    thresholds: ThresholdSettings = RelativeThresholds()
    """What the gate compares its score with."""
    relax: RelaxationSettings | None = None
    """Whether and how far the start structures are relaxed first, with the same gate and sanity."""

    @property
    def rule(self) -> ThresholdSettings:
        """The thresholds."""
        return self.thresholds


class TrajectorySettings(Settings):
    """The trajectories of a production run."""

    format: Literal["extxyz", "h5md"] = "extxyz"
    """One extended XYZ file for each walker, or one HDF5 file (H5MD 1.1) for all."""
    every: int = Field(default=100, ge=1, le=MOST_STEPS)
    """Steps between two frames."""
    forces: bool = True
    """Whether frames have forces."""
    momenta: bool = True
    """Whether frames have momenta (velocities in H5MD)."""


class ThermoSettings(Settings):
    """The table of energies, temperatures and the like."""

    every: int = Field(default=100, ge=1, le=MOST_STEPS)
    """Steps between two rows."""


class ProductionDynamics(ExplorationSettings):
    """The same settings; strides of traces and frames are those of the outputs, and chunks are made to suit them."""

    pressure: bool = True
    """Whether the table holds the internal pressure, which costs the virial; it does wherever the cell moves."""
    conserved: bool = True
    """Whether the table holds the conserved energy, which costs a second look at the biases in every step; cells that
    move, biases together with swaps, relaxation and ascent have none."""

    @model_validator(mode="after")
    def _whole_strides(self) -> Self:
        return self

    @model_validator(mode="after")
    def _strides_fit_into_the_run(self) -> Self:
        return self


class MdConfig(SimulationConfig):
    """Production molecular dynamics with a trained potential: ``almlip md``."""

    exploration: ProductionDynamics
    """Walkers and what moves them; gate and buffer only count where there are thresholds."""
    thresholds: ThresholdSettings | None = None
    """What a gate compares its score with; without them no uncertainty ends a walker, and nothing is recorded."""
    trajectory: TrajectorySettings = TrajectorySettings()
    """How frames are written."""
    thermo: ThermoSettings = ThermoSettings()
    """How energies and the like are written."""

    @property
    def rule(self) -> ThresholdSettings | None:
        """The thresholds, where there are any."""
        return self.thresholds

    @property
    def dynamics(self) -> ExplorationSettings:
        """The exploration with the strides of the outputs, chunks to suit them, and no buffer where none is used."""
        stride = self._stride
        changes = {
            "trace_every": self.thermo.every,
            "trajectory_every": self.trajectory.every,
            "chunk": stride * max(1, round(self.exploration.chunk / stride)),
        }
        if self.thresholds is None:
            changes["buffer"] = 1
        # What holds for strides that users give to an exploration does not hold here; the rest has been checked.
        return ExplorationSettings.model_construct(**(dict(self.exploration) | changes))

    @property
    def _stride(self) -> int:
        return math.lcm(self.thermo.every, self.trajectory.every)

    @model_validator(mode="after")
    def _one_place_for_strides(self) -> Self:
        if self._stride > max(_LONGEST_STRIDE, self.thermo.every, self.trajectory.every):
            raise ValueError(
                f"thermo.every {self.thermo.every} and trajectory.every {self.trajectory.every} have no common "
                f"multiple up to {_LONGEST_STRIDE}; choose one that divides the other."
            )
        for name, section in (("trace_every", "thermo"), ("trajectory_every", "trajectory")):
            given, meant = getattr(self.exploration, name), getattr(self, section).every
            if given not in (ExplorationSettings.model_fields[name].default, meant):
                raise ValueError(f"exploration.{name} is not used here; set {section}.every instead.")
        return self

    @model_validator(mode="after")
    def _writes_something(self) -> Self:
        steps = self.exploration.steps
        if min(self.thermo.every, self.trajectory.every) > steps:
            raise ValueError(
                f"thermo.every {self.thermo.every} and trajectory.every {self.trajectory.every} are more than "
                f"exploration.steps {steps}, so that nothing after the start would be written."
            )
        for name, section in (("thermo", self.thermo), ("trajectory", self.trajectory)):
            usual = type(section).model_fields["every"].default
            if section.every > steps and section.every != usual:  # defaults allow short runs
                raise ValueError(
                    f"{name}.every {section.every} is more than exploration.steps {steps}, so that it would write "
                    "nothing after the start; lower it, or leave it out."
                )
        return self
