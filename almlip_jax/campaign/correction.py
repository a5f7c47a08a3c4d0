"""Correction: labels around the places where walkers left what the ensemble knows, before a selector has its turn.

A walker that the gate ended says where the potential fails on the way that dynamics take.  Those structures around that
place on which the committee differs most teach it what lies there, and the walker goes on.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Sequence

import numpy as np
from ase import Atoms

from almlip_jax.campaign.rundir import RunDirectory
from almlip_jax.campaign.settings import CorrectionSettings
from almlip_jax.dynamics import Exploration, Status
from almlip_jax.generation.base import apart
from almlip_jax.generation.deformed import displaced
from almlip_jax.potential import Potential
from almlip_jax.scores import names, scores
from almlip_jax.structures.carried import BATH_TEMPERATURE, carried
from almlip_jax.structures.io import read_structures
from almlip_jax.structures.repeats import geometry_key

SPREAD = "force_std_max"
"""The score that structures around a place are ranked by."""

_MARK = "correction"
_CLOSEST = 0.6  # of the sum of two covalent radii; a displaced structure with nearer atoms is left out


def corrections(
    settings: CorrectionSettings,
    exploration: Exploration,
    potential: Potential,
    generator: np.random.Generator,
    known: Collection[bytes],
    held_out: Container[Atoms] = (),
) -> list[Atoms]:
    """The structures around the places where walkers left what the ensemble knows that are to be labelled.

    Args:
        settings: which places, how many structures around them, how many of these are taken.
        exploration: of the round.
        potential: that the walkers ran with.
        generator: source of the displacements.
        known: what identifies structures that must not be taken (`geometry_key`).
        held_out: structures that none may be the same as, however it is written down.

    Returns:
        up to ``count`` structures: of each place in turn, those with the largest spread first, places with large ones
        before others; ``info["correction"]`` is the number of the walker.
    """
    tried = [
        (walker, frame)
        for walker, place in places(settings, exploration).items()
        for frame in _around(settings, place, generator)
        if geometry_key(frame) not in known and frame not in held_out
    ]
    if not tried:
        return []
    found = potential.evaluate([frame for _, frame in tried])
    spread = found.scores[SPREAD]
    ranked: dict[int, list[int]] = {}
    for row in np.argsort(-spread, kind="stable"):
        if np.isfinite(spread[row]):
            ranked.setdefault(tried[row][0], []).append(int(row))
    turns = max((len(rows) for rows in ranked.values()), default=0)
    order = [rows[turn] for turn in range(turns) for rows in ranked.values() if turn < len(rows)]
    chosen = []
    for row in order[: settings.count]:
        walker, frame = tried[row]
        known_scores = (name for name in names(scores(fitted=False)) if name in found.scores)
        frame.info |= {_MARK: walker, "walker": walker}
        frame.info |= {name: float(found.scores[name][row]) for name in known_scores}
        frame.arrays["force_std"] = found.atom_scores["force_std"][row].astype(np.float64)
        chosen.append(frame)
    return chosen


def places(settings: CorrectionSettings, exploration: Exploration) -> dict[int, Atoms]:
    """Where walkers left what the ensemble knows, by walker."""
    ends = {Status.STOPPED: "stop", Status.BEYOND_TRUST: "leave"}
    found = {}
    for walker, status in enumerate(exploration.status):
        if ends.get(status) in settings.on:
            found[walker] = exploration.final[walker]
        elif "departure" in settings.on and exploration.departed_step[walker] >= 0:
            found[walker] = _first_from(exploration, walker, int(exploration.departed_step[walker]))
    return found


def _first_from(exploration: Exploration, walker: int, step: int) -> Atoms:
    """The first frame of a walker's thinned trajectory from a step on; the last one that it came to where none is."""
    later = (frame for frame in exploration.trajectories[walker] if frame.info["step"] >= step)
    return next(later, exploration.final[walker])


def _around(settings: CorrectionSettings, place: Atoms, generator: np.random.Generator) -> list[Atoms]:
    itself = carried(place)
    itself.info |= {key: place.info[key] for key in (BATH_TEMPERATURE,) if key in place.info}
    copies = [displaced(itself.copy(), settings.stdev, generator) for _ in range(settings.around)]
    return [frame for frame in (itself, *copies) if apart(frame, _CLOSEST)]


def marked(frames: Sequence[Atoms]) -> list[int]:
    """Rows of the candidates that stand for a correction."""
    return [row for row, frame in enumerate(frames) if _MARK in frame.info]


def going_on_after(run: RunDirectory, round_index: int, dataset: Sequence[Atoms]) -> dict[int, Atoms]:
    """Last frames of the walkers that the gate ended, and around which labels are new in the dataset of a round.

    These are walkers of the round before, or, where labels come in a round later, of the one before that.
    """
    new = {geometry_key(frame) for frame in dataset if frame.info.get("round") == round_index}
    ended = {Status.STOPPED.name.lower(), Status.BEYOND_TRUST.name.lower()}
    found: dict[int, Atoms] = {}
    for earlier in range(max(round_index - 2, 0), round_index):
        folder = run.round(earlier)
        if not folder.batch.exists():
            continue
        batch = [frame for frame in read_structures(folder.batch) if _MARK in frame.info]
        corrected = {int(frame.info[_MARK]) for frame in batch if geometry_key(frame) in new}
        if corrected:
            frames = enumerate(read_structures(folder.last_frames))
            found |= {n: frame for n, frame in frames if n in corrected and frame.info["status"] in ended}
    return found
