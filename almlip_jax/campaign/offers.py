"""Explorations without walkers of ours: what is left of a fixed pool, and what kinds of other packages find."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from ase import Atoms

from almlip_jax.campaign.choice import Beginning, ExplorationChoice
from almlip_jax.campaign.preparation import geometry_key
from almlip_jax.errors import InputError
from almlip_jax.keys import named_key
from almlip_jax.potential import Evaluated, Potential
from almlip_jax.scores import names, scores
from almlip_jax.structures.carried import carried
from almlip_jax.structures.io import read_structures, write_structures

if TYPE_CHECKING:
    from almlip_jax.campaign.workshop import Workshop


def find(settings: ExplorationChoice, workshop: Workshop, round_index: int, potential: Potential) -> Mapping[str, Any]:
    """Lets a kind find structures; those that nobody knows yet, each once, are the candidates.

    Raises:
        InputError: there are more than the kind said there could be.
    """
    dataset = workshop.dataset(round_index)
    key = named_key(workshop.config.seed, "explore", round_index)
    with workshop.progress.stage("explore"):
        found = settings.explore(Beginning(potential, workshop.geometries, dataset, key, round_index))
    seen = {*workshop.test_keys, *(geometry_key(frame) for frame in dataset)}
    frames = []
    for frame in found:
        if geometry_key(frame) not in seen:
            seen.add(geometry_key(frame))
            frames.append(carried(frame))
    if len(frames) > workshop.pool_capacity:
        raise InputError(
            f"exploration of kind '{settings.kind}' found {len(frames)} structures, more than the "
            f"{workshop.pool_capacity} that its most_candidates allows."
        )
    evaluated = _offer(workshop, round_index, frames, potential)
    if evaluated is None:
        return {"candidates": 0}
    monitored = evaluated.scores[workshop.config.stopping.monitor]
    return {"candidates": len(frames), "sigma_pool": float(np.mean(monitored, dtype=np.float64))}


def score_pool(workshop: Workshop, round_index: int, potential: Potential) -> Mapping[str, Any]:
    """Scores what is left of a fixed pool."""
    frames = [workshop.pool[i].copy() for i in _left_in_pool(workshop, round_index)]
    _offer(workshop, round_index, frames, potential)
    return {"candidates": len(frames)}


def _offer(workshop: Workshop, round_index: int, frames: Sequence[Atoms], potential: Potential) -> Evaluated | None:
    """Writes the candidates of a round with their scores; None without any."""
    folder = workshop.run.round(round_index)
    folder.pool.unlink(missing_ok=True)
    if not frames:
        return None
    with workshop.progress.stage("explore", len(frames), unit="structures") as advance:
        evaluated = workshop.evaluated_once(round_index, "candidates", frames, potential, advance)
    for n, frame in enumerate(frames):
        known = (name for name in names(scores(fitted=False)) if name in evaluated.scores)
        frame.info.update({name: float(evaluated.scores[name][n]) for name in known})
        frame.arrays["force_std"] = evaluated.atom_scores["force_std"][n].astype(np.float64)
    write_structures(folder.pool, frames)
    return evaluated


def _left_in_pool(workshop: Workshop, round_index: int) -> list[int]:
    """Indices of the pool that no batch has taken so far; of structures that occur twice, one at most."""
    folders = [workshop.run.round(earlier) for earlier in range(round_index)]
    batches = [frame for folder in folders if folder.batch.exists() for frame in read_structures(folder.batch)]
    gone = {int(frame.info["pool_index"]) for frame in batches}
    gone.update(workshop.pool_split.initial)
    seen = {workshop.pool_keys[index] for index in gone} | workshop.test_keys
    left = []
    for index in workshop.pool_split.rest:
        if workshop.pool_keys[index] not in seen:
            seen.add(workshop.pool_keys[index])
            left.append(index)
    return left
