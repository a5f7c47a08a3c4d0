"""Exploration by molecular dynamics as a stage: what the gate compares with, what is run, what is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from ase import Atoms

from almlip_jax.campaign.calibration import calibration_set, draw_frames, drawn_keys
from almlip_jax.campaign.choice import ExplorationInputs
from almlip_jax.campaign.preparation import geometry_key
from almlip_jax.campaign.round import Round, Trained
from almlip_jax.campaign.rundir import RoundDirectory
from almlip_jax.campaign.settings import MdExploration
from almlip_jax.campaign.starts import Beginnings, going_on, relaxed_starts, walker_starts, write_starts
from almlip_jax.dynamics import Exploration, Knowledge, relaxing
from almlip_jax.dynamics.knowledge import errors_and_scores, structure_scores
from almlip_jax.dynamics.thresholds import AtomErrors, Resolved
from almlip_jax.files import write_npz
from almlip_jax.progress import reaching
from almlip_jax.scores import needs_no_fit
from almlip_jax.structures.io import write_structures


def explore(settings: MdExploration, given: ExplorationInputs) -> Mapping[str, Any]:
    """Runs the walkers of a round, writes what they found, and returns the numbers of the round's record."""
    here, trained, explorers = given.here, given.trained, given.explorers
    dataset, potential = here.dataset(), trained.potential
    knowledge = explorers.knowledge(settings, potential, dataset, here.seed)
    thresholds = gate_thresholds(settings, here, dataset, trained, knowledge)
    knowledge = replace(knowledge, relative=thresholds.relative)
    starts = _starts(settings, given, dataset, thresholds.stop, knowledge)
    with here.progress.stage("explore", settings.steps, unit="steps") as advance:
        reached = reaching(advance)

        def on_chunk(step: int, running: int) -> None:
            reached(step, running=running)

        exploration = explorers.get("explorer", settings, potential).run(
            potential.params, starts, thresholds.levels, here.key("explore"), on_chunk, knowledge
        )
    known = {*given.withheld, *(geometry_key(frame) for frame in dataset), *drawn_keys(here.run, here.index)}
    drawn = _draw(here, exploration, given.budget.drawn(settings.thresholds.frames_drawn), known)
    fresh = [frame for frame in exploration.recorded if geometry_key(frame) not in known]
    withheld = {geometry_key(frame) for frame in drawn}
    candidates = [frame for frame in fresh if geometry_key(frame) not in withheld]
    write_starts(here.folder, starts)
    _write(here.folder, exploration, candidates, settings, thresholds)
    return {
        "frames_planned": exploration.frames_planned,
        "frames_below": exploration.frames_below,
        "picoseconds": exploration.picoseconds,
        "walkers": dict(Counter(status.name.lower() for status in exploration.status)),
        # frames that were drawn as well count: without them it would seem that nothing was recorded
        "candidates": None if fresh and not candidates else len(candidates),
        "sigma_pool": _finite_mean(exploration.scores[trained.monitor]),
    }


def gate_thresholds(
    settings: MdExploration, here: Round, dataset: Sequence[Atoms], trained: Trained, knowledge: Knowledge
) -> Resolved:
    """The thresholds of a round, in the unit of the gate's score.

    Calibrated and conformal thresholds take the frames that were drawn at random in the rounds before, which no
    potential is trained on, as this one sees them; before there are enough, scores are taken at their face value.
    """
    rule, score, potential = settings.thresholds, settings.gate.score, trained.potential

    def scores() -> np.ndarray:
        evaluated = trained.evaluate("dataset", dataset) if needs_no_fit(score) else None
        return structure_scores(score, potential, dataset, knowledge, evaluated)

    def errors(atoms: int) -> AtomErrors | None:
        labelled = calibration_set(here.run, here.index)
        enough = sum(len(frame) for frame in labelled) >= atoms
        return errors_and_scores(score, potential, labelled, knowledge) if enough else None

    return rule.resolve(scores, errors)


def _starts(
    settings: MdExploration, given: ExplorationInputs, dataset: Sequence[Atoms], stop: float, knowledge: Knowledge
) -> list[Atoms]:
    """A start for each walker, relaxed up to the stop threshold where the settings say so."""
    here, potential, inputs = given.here, given.trained.potential, given.inputs
    final = going_on(here.run, here.index) if settings.continue_walkers else {}
    given_to = Beginnings(inputs.geometries, inputs.listed, dataset, settings.temperatures, here.seed, here.index)
    starts = walker_starts(settings.starts, given_to, final)
    if settings.relaxation is None:
        return starts
    relaxer = given.explorers.get("relaxer", relaxing(settings, settings.relaxation), potential)
    stops = np.array([-np.inf if walker in final else stop for walker in range(len(starts))])
    return relaxed_starts(relaxer, potential.params, starts, stops, knowledge, here.progress)


def _draw(here: Round, exploration: Exploration, count: int, known: set[bytes]) -> list[Atoms]:
    """Draws the frames of a round from whose labels thresholds come, and writes them."""
    drawn = draw_frames(exploration.trajectories, count, here.generator("calibration"), known)
    file = here.folder.drawn
    file.unlink(missing_ok=True)
    if drawn:
        write_structures(file, drawn)
    return drawn


def _finite_mean(values: np.ndarray) -> float | None:
    finite = values[np.isfinite(values)]
    return float(np.mean(finite, dtype=np.float64)) if finite.size else None


def _write(
    folder: RoundDirectory,
    exploration: Exploration,
    candidates: list[Atoms],
    settings: MdExploration,
    thresholds: Resolved,
) -> None:
    for old in folder.trajectories.glob("*.extxyz"):
        old.unlink()
    folder.pool.unlink(missing_ok=True)
    filled = np.array([frame.pbc.all() for frame in exploration.final])  # others have neither pressure nor volume
    arrays = {
        **exploration.arrays,
        **exploration.scores,
        "temperature": exploration.temperature,
        "energy": exploration.energy,
        "bias": exploration.bias,
        "pressure": np.where(filled, exploration.pressure, np.nan),
        "volume": np.where(filled, exploration.volume, np.nan),
        "walker_final_temperature": np.array([g.temperatures[1] for g in settings.walkers for _ in range(g.count)]),
        "gate_score": np.array(settings.gate.score),
        "gate_record": np.array(thresholds.record),
        "gate_elements": np.array(list(thresholds.relative or {}), np.str_),
        "gate_relative": np.array(list((thresholds.relative or {}).values()), np.float64),
        "gate_stop": np.array(thresholds.stop),
    }
    write_npz(folder.walkers, arrays)
    folder.trajectories.mkdir(exist_ok=True)
    for walker, frames in enumerate(exploration.trajectories):
        if frames:
            write_structures(folder.trajectory(walker), frames)
    for walker, frame in enumerate(exploration.final):
        frame.info.update(walker=walker, status=exploration.status[walker].name.lower())
    write_structures(folder.last_frames, exploration.final)
    if candidates:
        write_structures(folder.pool, candidates)
