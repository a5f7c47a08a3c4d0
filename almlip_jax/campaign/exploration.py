"""Exploration by molecular dynamics as a stage: what the gate compares with, what is run, what is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from ase import Atoms

from almlip_jax.campaign.buckets import Bucket, buckets
from almlip_jax.campaign.calibration import draw_frames, drawn_keys
from almlip_jax.campaign.choice import ExplorationInputs
from almlip_jax.campaign.correction import corrections, going_on_after
from almlip_jax.campaign.gate_levels import Levels, gate_levels
from almlip_jax.campaign.rundir import RoundDirectory
from almlip_jax.campaign.settings import MdExploration
from almlip_jax.campaign.starts import (
    Beginnings,
    further_starts,
    going_on,
    relaxed_starts,
    walker_starts,
    write_starts,
)
from almlip_jax.campaign.systems import systems_of_walkers
from almlip_jax.dynamics import Exploration, Knowledge, relaxing
from almlip_jax.dynamics.side_by_side import side_by_side
from almlip_jax.files import write_npz
from almlip_jax.progress import reaching
from almlip_jax.scores import mean_score
from almlip_jax.structures.io import write_structures
from almlip_jax.structures.repeats import geometry_key


def explore(settings: MdExploration, given: ExplorationInputs) -> Mapping[str, Any]:
    """Runs the walkers of a round, writes what they found, and returns the numbers of the round's record."""
    here, trained, inputs = given.here, given.trained, given.inputs
    dataset, potential = here.dataset(), trained.potential
    knowledge = given.explorers.knowledge(settings, potential, dataset, here.seed, given.under_way)
    systems = systems_of_walkers(inputs.system.parts, settings.walkers_to_deal)
    levels = gate_levels(settings, here, dataset, trained, knowledge, systems)
    programs = buckets(systems, inputs.geometries, inputs.listed, potential.cutoff + settings.skin)
    starts, further = _starts(settings, given, dataset, levels, programs, knowledge)
    exploration = _run(settings, given, (starts, further), levels, programs, knowledge)
    fresh, candidates = offered(settings, given, exploration, dataset)
    write_starts(here.folder, starts, further)
    _write(here.folder, exploration, candidates, settings, levels)
    return {
        "frames_planned": exploration.frames_planned,
        "frames_below": exploration.frames_below,
        "picoseconds": exploration.picoseconds,
        "walkers": dict(Counter(status.name.lower() for status in exploration.status)),
        # frames that were drawn as well count: without them it would seem that nothing was recorded
        "candidates": None if fresh and not candidates else len(candidates),
        "sigma_pool": mean_score(exploration.scores[trained.monitor]),
    }


def offered(
    settings: MdExploration, given: ExplorationInputs, exploration: Exploration, dataset: Sequence[Atoms]
) -> tuple[list[Atoms], list[Atoms]]:
    """What was recorded that is not known, and the candidates: what was not drawn of it, after the corrections.

    Whatever is labelled after a round, drawn frames and corrections too, is no structure of the test set.
    """
    here = given.here
    known = {*given.withheld, *(geometry_key(frame) for frame in dataset), *drawn_keys(here.run, here.index)}
    drawn = _draw(given, exploration, given.budget.drawn(settings.thresholds.frames_drawn), known)
    recorded = [frame for frame in exploration.recorded if geometry_key(frame) not in known]
    fresh = [frame for frame in recorded if frame not in given.held_out]
    withheld = {geometry_key(frame) for frame in drawn}
    candidates = [frame for frame in fresh if geometry_key(frame) not in withheld]
    if settings.correct is not None:
        taken = known | withheld | {geometry_key(frame) for frame in candidates}
        potential, drawn_at = given.trained.potential, here.generator("correction")
        made = corrections(settings.correct, exploration, potential, drawn_at, taken, given.held_out)
        candidates = [*made, *candidates]
    return fresh, candidates


def _starts(
    settings: MdExploration,
    given: ExplorationInputs,
    dataset: Sequence[Atoms],
    levels: Levels,
    programs: Sequence[Bucket],
    knowledge: Knowledge,
) -> tuple[list[Atoms], list[list[Atoms]]]:
    """A start for each walker and where it may begin again, relaxed up to the stop threshold where settings say so."""
    here, inputs = given.here, given.inputs
    final = going_on(here.run, here.index) if settings.continue_walkers else {}
    if settings.correct is not None and settings.correct.go_on:
        final |= going_on_after(here.run, here.index, dataset)
    given_to = Beginnings(
        inputs.geometries,
        inputs.listed,
        dataset,
        settings.temperatures,
        here.seed,
        here.index,
        levels.systems if inputs.system.named else (),
    )
    starts = walker_starts(settings.starts, given_to, final)
    further = further_starts(settings.starts, given_to, settings.further_starts, starts)
    if settings.relaxation is None:
        return starts, further
    stops = np.array([-np.inf if start is final.get(n) else levels.stop[n] for n, start in enumerate(starts)])
    draws = [list(draw) for draw in zip(*further, strict=True)]  # of all walkers at once, as the starts
    known = {bucket: replace(knowledge, relative=levels.relative(bucket.walkers)) for bucket in programs}
    starts = _relaxed(settings, given, starts, stops, known)
    draws = [_relaxed(settings, given, draw, np.asarray(levels.stop), known) for draw in draws]
    return starts, [list(own) for own in zip(*draws, strict=True)]


def _relaxed(
    settings: MdExploration,
    given: ExplorationInputs,
    starts: Sequence[Atoms],
    stops: np.ndarray,
    known: Mapping[Bucket, Knowledge],
) -> list[Atoms]:
    """Structures of all walkers, relaxed with the potential of the round up to a threshold [W], program by program."""
    assert settings.relaxation is not None
    potential, structures = given.trained.potential, list(starts)
    for bucket, knowledge in known.items():
        some = [*bucket.walkers]
        relaxing_these = relaxing(bucket.of(settings), settings.relaxation)
        relaxer = given.explorers.get(bucket.called("relaxer"), relaxing_these, potential, bucket.atoms)
        relaxed = relaxed_starts(
            relaxer, potential.params, [starts[n] for n in some], stops[some], knowledge, given.here.progress
        )
        for n, structure in zip(some, relaxed, strict=True):
            structures[n] = structure
    return structures


def _run(
    settings: MdExploration,
    given: ExplorationInputs,
    beginnings: tuple[Sequence[Atoms], Sequence[Sequence[Atoms]]],
    levels: Levels,
    programs: Sequence[Bucket],
    knowledge: Knowledge,
) -> Exploration:
    """Runs the walkers from their starts, those of one program after those of the other."""
    here, potential, (starts, further) = given.here, given.trained.potential, beginnings
    parts = []
    with here.progress.stage("explore", settings.steps * len(programs), unit="steps") as advance:
        reached = reaching(advance)
        for number, bucket in enumerate(programs):
            done = number * settings.steps

            def on_chunk(step: int, running: int, done: int = done) -> None:
                reached(done + step, running=running)

            explorer = given.explorers.get(bucket.called("explorer"), bucket.of(settings), potential, bucket.atoms)
            found = explorer.run(
                potential.params,
                [starts[walker] for walker in bucket.walkers],
                levels.thresholds(bucket.walkers),
                here.key("explore"),
                on_chunk,
                replace(knowledge, relative=levels.relative(bucket.walkers)),
                bucket.walkers if bucket.systems else None,
                [further[walker] for walker in bucket.walkers] if further else (),
            )
            parts.append((bucket.walkers, found))
    return side_by_side(parts)


def _draw(given: ExplorationInputs, exploration: Exploration, count: int, known: set[bytes]) -> list[Atoms]:
    """Draws the frames of a round from whose labels thresholds come, and writes them."""
    generator, file = given.here.generator("calibration"), given.here.folder.drawn
    drawn = draw_frames(exploration.trajectories, count, generator, known, given.held_out)
    file.unlink(missing_ok=True)
    if drawn:
        write_structures(file, drawn)
    return drawn


def _write(
    folder: RoundDirectory,
    exploration: Exploration,
    candidates: list[Atoms],
    settings: MdExploration,
    levels: Levels,
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
        **levels.arrays,
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
