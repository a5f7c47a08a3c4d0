"""Runs that survive any interruption: first the outputs are made durable, then a state that knows how long they are.

A run that is started again in the same folder goes on from its last state, and ends with the same files as one that was
never interrupted.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ase import Atoms
from numpy.typing import ArrayLike

from almlip_jax.dynamics import (
    Exploration,
    ExplorationSettings,
    Explorer,
    Knowledge,
    Session,
    dealt_further,
    know,
    relax,
    relaxation_summary,
    relaxing,
)
from almlip_jax.dynamics.biases import build_bias
from almlip_jax.dynamics.judging import check_exploration
from almlip_jax.dynamics.knowledge import errors_and_scores, structure_scores
from almlip_jax.dynamics.state import Traces
from almlip_jax.dynamics.thresholds import AtomErrors, Resolved
from almlip_jax.errors import InputError
from almlip_jax.files import damaged, read_json, understood, write_json, write_npz
from almlip_jax.keys import named_key
from almlip_jax.kinds import check_user_code
from almlip_jax.potential import Potential
from almlip_jax.progress import Progress, reaching
from almlip_jax.run_log import logged
from almlip_jax.simulation.averages import Averages, Line, averages, table_averages
from almlip_jax.simulation.folder import SimulationDirectory
from almlip_jax.simulation.free_energy import hills_of
from almlip_jax.simulation.h5md import H5mdTrajectory
from almlip_jax.simulation.outputs import ExtxyzTrajectories, Output, Thermo, TraceLog
from almlip_jax.simulation.quantities import Quantities
from almlip_jax.simulation.settings import ExploreConfig, MdConfig, SimulationConfig
from almlip_jax.simulation.summary import read_summary, summarise
from almlip_jax.structures.io import read_structures, write_structures
from almlip_jax.work_directory import write_versions


def run_exploration(
    config: ExploreConfig, folder: Path, potential: Potential, progress: Progress, explorer: Explorer | None = None
) -> dict[str, Any]:
    """Explores with a potential, or goes on with an exploration that was interrupted.

    Args:
        config: what to do.
        folder: of the run.
        potential: that of the config.
        progress: tells the user.
        explorer: compiled for these settings and this potential, where there is one.

    Returns:
        the summary; see `summary.summarise`.

    Raises:
        InputError: an input cannot be used, or the folder holds another run.
    """
    return _Exploration(config, folder, potential, progress, explorer).run()


def run_md(
    config: MdConfig, folder: Path, potential: Potential, progress: Progress, explorer: Explorer | None = None
) -> dict[str, Any]:
    """Runs production dynamics, or goes on with a run that was interrupted; as `run_exploration`."""
    return _Md(config, folder, potential, progress, explorer).run()


class _Run(ABC):
    """What both commands share."""

    config: SimulationConfig

    def __init__(
        self,
        config: SimulationConfig,
        folder: Path,
        potential: Potential,
        progress: Progress,
        explorer: Explorer | None,
    ) -> None:
        self.config, self.potential, self.progress = config, potential, progress
        self.settings: ExplorationSettings = config.dynamics
        check_user_code(config)
        try:
            check_exploration(
                self.settings,
                potential.member_settings,
                gated=config.rule is not None,
                further=potential.ensemble.targets,
            )
        except ValueError as error:
            raise InputError(f"{config.potential}: {error}") from error
        asking = [f"the novelty score {name}" for name in self.settings.novelty if name not in potential.novelty]
        asking += [] if potential.training_set is not None else [*config.compared]
        if asking and config.training_set is None:
            raise InputError(
                f"training_set is missing, which is needed for {asking[0]}; {config.potential} does not know its own "
                "(know_training_set)."
            )
        self.place = SimulationDirectory(folder)
        self.dtype = np.dtype(jax.tree.leaves(potential.params)[0].dtype)
        self.explorer = explorer or Explorer(
            potential.ensemble.predict, potential.species, potential.cutoff, self.settings, dtype=self.dtype
        )

    def run(self) -> dict[str, Any]:
        """From wherever the folder stands to the end."""
        self.place.refuse_others()
        with self.place.lock(), logged(self.progress, self.place.log) as self.progress:
            begun = self.place.settle(self.config)
            if self.place.summary.exists():
                self.progress.message(f"{self.place.path} holds this run, which is over; nothing is left to do.")
                return read_summary(self.place.summary)
            if said := write_versions(self.place):
                self.progress.message(said)
            session = self.session(begun)
            outputs = self.outputs()
            with ExitStack() as stack:
                for output in outputs:
                    stack.callback(output.close)
                notes = session.restore(self.place.state) if begun else {}
                for output in outputs:
                    if begun and output.name not in notes:
                        raise damaged(self.place.state, f"it does not say how far {output.name} had come")
                    output.open(notes.get(output.name))
                self.advance(session, outputs)
            return self.finish(session)

    # -- before -------------------------------------------------------------------------------------------------------

    @cached_property
    def frames(self) -> list[Atoms]:
        """The structures of the file that walkers begin at."""
        path = self.config.structures
        frames = self.bare_structures(path)
        for number, frame in enumerate(frames):
            try:
                self.potential.species.index(frame.numbers)
            except InputError as error:
                raise InputError(f"{path}, frame {number}: {error}") from error
            if (strange := self.potential.strange_state(frame)) is not None:
                raise InputError(f"{path}, frame {number}: {strange}")
        return frames

    @cached_property
    def starts(self) -> list[Atoms]:
        """Start structure of each walker: the frames of the file in turn."""
        return [self.frames[w % len(self.frames)] for w in range(len(self.settings.temperatures))]

    @cached_property
    def further(self) -> list[list[Atoms]]:
        """Structures that each walker may begin again at: other frames of the file."""
        return dealt_further(self.frames, len(self.starts), self.settings.further_starts)

    @cached_property
    def references(self) -> list[float]:
        """Reference energy of each walker, eV."""
        return [self.potential.reference_energy(start) for start in self.starts]

    @cached_property
    def training_set(self) -> list[Atoms] | None:
        """Structures that the potential was trained on; none where nothing asks for them, or it knows them itself."""
        given, asking = self.config.training_set, self.config.asks_for_training_set
        return self.bare_structures(given) if given is not None and asking else None

    def bare_structures(self, path: Path) -> list[Atoms]:
        """The structures of a file without their labels."""
        return read_structures(path, ignore_labels=True, type_numbers=self.config.arguments["type_numbers"])

    def session(self, begun: bool) -> Session:
        """The run before its first step."""
        asked = self.config.asks_for_training_set
        known = know(self.settings, self.potential, self.training_set, self.config.seed) if asked else Knowledge()
        resolved = self.thresholds(known, begun)
        known, thresholds = replace(known, relative=resolved.relative), resolved.levels
        key = named_key(self.config.seed, "explore")
        starts, further = self.beginnings(thresholds, known)
        return self.explorer.begin(self.potential.params, starts, thresholds, key, known, further=further)

    def beginnings(self, thresholds: tuple[float, float], known: Knowledge) -> tuple[list[Atoms], list[list[Atoms]]]:
        """Where walkers begin, and begin again: at their start structures, or at something made of them."""
        return self.starts, self.further

    def thresholds(self, known: Knowledge, begun: bool) -> Resolved:
        """Those of the gate; an interrupted run has them already."""
        rule, score = self.config.rule, self.settings.gate.score
        if rule is None:
            return Resolved(math.inf, math.inf)
        if begun:
            kept = read_json(self.place.thresholds)
            with understood(self.place.thresholds):
                record, stop = (math.inf if kept[name] is None else float(kept[name]) for name in ("record", "stop"))
                relative = kept.get("relative")
                return Resolved(record, stop, None if relative is None else {k: float(v) for k, v in relative.items()})

        def errors(_: int) -> AtomErrors:
            assert self.config.calibration_set is not None
            labelled = read_structures(self.config.calibration_set, require_labels=True, **self.config.arguments)
            return errors_and_scores(score, self.potential, labelled, known)

        def of_training_set() -> np.ndarray:
            if self.training_set is None:
                return known.scores[score]
            return structure_scores(score, self.potential, self.training_set, known)

        resolved = rule.resolve(of_training_set, errors)
        content = {"record": resolved.record, "stop": resolved.stop, "relative": resolved.relative, "score": score}
        write_json(self.place.thresholds, content)
        return resolved

    @abstractmethod
    def outputs(self) -> Sequence[Output]:
        """What is written while walkers run."""

    # -- the run ------------------------------------------------------------------------------------------------------

    def advance(self, session: Session, outputs: Sequence[Output]) -> None:
        """To the last step; an interruption keeps what is whole."""
        written, kept = session.step, time.monotonic()
        with self.progress.stage(self.stage, self.settings.steps, unit="steps") as advance:
            reached = reaching(advance)
            try:
                for part in session.chunks():
                    begin, end = written, session.step
                    written = -1  # outputs and state differ from here
                    for output in outputs:
                        output.write(part, begin, end)
                    written = end
                    reached(end, walkers=session.running, **self.largest(part))
                    if time.monotonic() - kept >= self.config.checkpoint_every:
                        self.keep(session, outputs)
                        kept = time.monotonic()
            except KeyboardInterrupt:
                if session.step == written:
                    self.keep(session, outputs)
                raise
        self.keep(session, outputs)

    def keep(self, session: Session, outputs: Sequence[Output]) -> None:
        """Outputs to the disk, and then a state that knows how far they were written."""
        notes = {output.name: output.flush() for output in outputs}
        for number, hills in hills_of(self.settings.biases, session.state.bias).items():
            write_npz(self.place.hills(number), vars(hills))
        session.save(self.place.state, notes)

    def largest(self, part: Traces) -> dict[str, float]:
        """The largest score of the gate in a chunk, for the display."""
        values = part.scores[self.settings.gate.score]
        finite = values[np.isfinite(values)]
        return {self.settings.gate.score: float(finite.max())} if finite.size else {}

    @property
    @abstractmethod
    def stage(self) -> str:
        """Name of the command."""

    # -- after --------------------------------------------------------------------------------------------------------

    def finish(self, session: Session) -> dict[str, Any]:
        """Writes what the run found; the summary comes last, and says that it is over."""
        exploration = session.result([])
        if exploration.recorded:
            write_structures(self.place.candidates, exploration.recorded)
        for walker, frame in enumerate(exploration.final):
            frame.info.update(walker=walker, status=exploration.status[walker].name.lower())
        write_structures(self.place.final, exploration.final)
        self.write_more(exploration)
        gated = self.config.rule is not None
        summary = summarise(
            self.stage, exploration, self.place.path, self.settings, gated=gated, averages=self.averages()
        )
        write_json(self.place.summary, summary)
        self.clean()
        return read_json(self.place.summary)

    def write_more(self, exploration: Exploration) -> None:
        """Writes what one command has and the other has not."""
        return

    @abstractmethod
    def averages(self) -> list[Averages]:
        """Mean, fluctuation and drift of each walker's quantities over the run."""

    def clean(self) -> None:
        """Removes what only an unfinished run needs."""
        return


class _Exploration(_Run):
    config: ExploreConfig
    stage = "explore"

    def beginnings(self, thresholds: tuple[float, float], known: Knowledge) -> tuple[list[Atoms], list[list[Atoms]]]:
        """The start structures, relaxed where asked for; an interrupted run relaxes them again, to the same bits."""
        if self.config.relax is None:
            return self.starts, self.further
        settings = relaxing(self.settings, self.config.relax)
        potential = self.potential
        relaxer = Explorer(potential.ensemble.predict, potential.species, potential.cutoff, settings, dtype=self.dtype)

        def relaxed(structures: Sequence[Atoms]) -> list[Atoms]:
            """One structure of each walker, relaxed side by side."""
            with self.progress.stage("relax", settings.steps, unit="steps") as advance:
                reached = reaching(advance)

                def on_chunk(step: int, running: int) -> None:
                    reached(step, running=running)

                found = relax(relaxer, potential.params, structures, thresholds[1], known, on_chunk)
            self.progress.message(relaxation_summary(found.status) or "all start structures are relaxed.")
            return found.structures

        draws = [relaxed(draw) for draw in zip(*self.further, strict=True)]
        return relaxed(self.starts), [list(own) for own in zip(*draws, strict=True)]

    @cached_property
    def trajectories(self) -> ExtxyzTrajectories:
        return ExtxyzTrajectories(self.place.trajectories, self.settings, self.starts)

    @cached_property
    def traces(self) -> TraceLog:
        names = self.settings.scores
        place = self.place
        return TraceLog(place.traces, self.settings, names, len(self.starts), self.dtype, place.exploration)

    def outputs(self) -> Sequence[Output]:
        return [self.trajectories, self.traces]

    def write_more(self, exploration: Exploration) -> None:
        """Writes the traces, and where the gate stood."""
        arrays: dict[str, ArrayLike] = {
            **exploration.arrays,
            **self.traces.read(),
            "gate_score": np.array(self.settings.gate.score),
            "gate_record": exploration.thresholds.record,
            "gate_stop": exploration.thresholds.stop,
        }
        write_npz(self.place.exploration, arrays)

    def averages(self) -> list[Averages]:
        """Of the traces of each walker, as far as it has any."""
        traces = self.traces.read()
        times = self.settings.timestep / 1000 * self.settings.trace_every * np.arange(1, 1 + len(traces["energy"]))
        units = {name: unit for name, unit in self.units.items() if np.isfinite(traces[name]).any()}
        walkers: list[Averages] = []
        for w in range(len(self.starts)):
            walkers.append({})
            for name, unit in units.items():
                line = Line()
                line.add(times, traces[name][:, w])
                if line.number:
                    walkers[w][name] = averages(line, unit)
        return walkers

    @property
    def units(self) -> dict[str, str]:
        """Unit of each trace that has averages."""
        kinetic = {"kinetic": "eV", "temperature": "K"} if self.settings.thermal else {}
        return {"energy": "eV", **kinetic, "bias": "eV"} | build_bias(self.settings.biases).quantities

    def clean(self) -> None:
        self.place.traces.unlink(missing_ok=True)
        self.trajectories.discard_empty()


class _Md(_Run):
    config: MdConfig
    stage = "md"

    @cached_property
    def trajectory(self) -> ExtxyzTrajectories | H5mdTrajectory:
        """The file of the trajectory, in the format that was asked for."""
        wanted = self.config.trajectory
        choice = {"forces": wanted.forces, "momenta": wanted.momenta}
        if wanted.format == "extxyz":
            return ExtxyzTrajectories(self.place.trajectories, self.settings, self.starts, self.references, **choice)
        return H5mdTrajectory(
            self.place.h5md,
            self.quantities,
            moving_cells=self.settings.integrator.moves_cell,
            dtype=self.dtype,
            **choice,
        )

    def outputs(self) -> Sequence[Output]:
        return [self.trajectory, Thermo(self.place.thermo, self.quantities)]

    @cached_property
    def quantities(self) -> Quantities:
        """What the table holds."""
        return Quantities(self.settings, self.starts, self.references)

    def averages(self) -> list[Averages]:
        return table_averages(self.place.thermo, self.quantities.units, len(self.starts))

    def clean(self) -> None:
        if isinstance(self.trajectory, ExtxyzTrajectories):
            self.trajectory.discard_empty()
