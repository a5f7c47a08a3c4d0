"""Explorations without walkers of ours: what is left of a fixed pool, and what kinds of other packages find."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from ase import Atoms

from almlip_jax.campaign.choice import Beginning, ExplorationChoice, ExplorationInputs
from almlip_jax.campaign.inputs import Inputs
from almlip_jax.campaign.preparation import check_states, state_of
from almlip_jax.campaign.round import Round, Trained
from almlip_jax.campaign.settings import StateReading
from almlip_jax.campaign.systems import name_systems
from almlip_jax.errors import InputError
from almlip_jax.potential import Evaluated
from almlip_jax.scores import mean_score, names, scores
from almlip_jax.structures.carried import carried
from almlip_jax.structures.io import read_structures, write_structures
from almlip_jax.structures.repeats import geometry_key
from almlip_jax.training import is_isolated_atom


def find(settings: ExplorationChoice, given: ExplorationInputs) -> Mapping[str, Any]:
    """Lets a kind find structures, which are scored and written; errors as for `found_by`."""
    here, trained, inputs = given.here, given.trained, given.inputs
    most = settings.most_candidates(len(inputs.pool_split.rest))
    beginning = Beginning(
        trained.potential, inputs.geometries, here.dataset(), here.key("explore"), here.index, given.under_way
    )
    with here.progress.stage("explore"):
        frames = found_by(settings, beginning, inputs.system, given.withheld, most, given.held_out)
    return offer(here, frames, trained)


def offer(here: Round, frames: Sequence[Atoms], trained: Trained) -> Mapping[str, Any]:
    """Scores and writes the candidates of a round; fields of its record."""
    evaluated = _scored(here, frames, trained)
    if evaluated is None:
        return {"candidates": 0}
    return {"candidates": len(frames), "sigma_pool": mean_score(evaluated.scores[trained.monitor])}


def found_by(
    settings: ExplorationChoice,
    given: Beginning,
    system: StateReading,
    withheld: Collection[bytes],
    most: int,
    held_out: Container[Atoms] = (),
) -> list[Atoms]:
    """The structures that a kind finds, with charge and spin, without those that are known already, each once.

    Args:
        settings: of the kind.
        given: what it begins with.
        system: charge and spin of structures that do not say.
        withheld: what identifies structures that must not become candidates.
        most: structures that there may be.
        held_out: structures that none may be the same as, however it is written down.

    Raises:
        InputError: there are more; or something is not a structure, has positions that are not finite, or elements or
            an electronic state that the potential does not know.
    """
    starts = [start.copy() for start in given.starts]  # those of later rounds too, whatever is done with them
    found = settings.explore(replace(given, starts=starts))
    where = f"exploration '{settings.kind}'"
    return fresh(found, given, system, withheld, where, (most, settings.bound), held_out)


def fresh(
    found: Iterable[Any],
    given: Beginning,
    system: StateReading,
    withheld: Collection[bytes],
    where: str,
    most: tuple[int, str],
    held_out: Container[Atoms] = (),
) -> list[Atoms]:
    """Structures with charge and spin, without those that are known already, each once; see `found_by`.

    Args:
        found: the structures.
        given: what is known.
        system: charge and spin of structures that do not say.
        withheld: what identifies structures that must not become candidates.
        where: what found them, for messages.
        most: structures that there may be, and what bounds them.
        held_out: structures that none may be the same as, however it is written down.
    """
    known = [*given.starts, *given.labelled]
    seen = {*withheld, *(geometry_key(frame) for frame in given.labelled)}
    frames: list[Atoms] = []
    for number, one in enumerate(found):
        (frame,) = name_systems([_structure(one, f"{where}, structure {number}", system)], given.starts, where)
        if is_isolated_atom(frame) or geometry_key(frame) in seen or frame in held_out:
            continue
        if len(frames) == most[0]:
            raise InputError(f"{where} finds more structures than the {most[0]} of {most[1]}.")
        seen.add(geometry_key(frame))
        frames.append(frame)
    given.potential.check_elements(frames, where)
    check_states(frames, where, known, sees_state=given.potential.ensemble.sees_state)
    return frames


def _structure(found: Any, where: str, system: StateReading) -> Atoms:
    if not isinstance(found, Atoms):
        raise InputError(f"{where} is a {type(found).__name__}; it should be an ase.Atoms.")
    if not len(found) or not (np.isfinite(found.positions).all() and np.isfinite(found.cell.array).all()):
        raise InputError(f"{where} has no atoms, or numbers in positions or cell that are not finite.")
    frame = carried(found)
    frame.info |= state_of(frame, system)
    return frame


def score_pool(given: ExplorationInputs) -> Mapping[str, Any]:
    """Scores what is left of a fixed pool."""
    left = _left_in_pool(given.here, given.inputs, given.withheld)
    frames = [frame.copy() for frame in given.inputs.of_pool(left)]
    _scored(given.here, frames, given.trained)
    return {"candidates": len(frames)}


def _scored(here: Round, frames: Sequence[Atoms], trained: Trained) -> Evaluated | None:
    """Writes the candidates of a round with their scores; None without any."""
    pool = here.folder.pool
    pool.unlink(missing_ok=True)
    if not frames:
        return None
    with here.progress.stage("explore", len(frames), unit="structures") as advance:
        evaluated = trained.evaluate("candidates", frames, advance)
    for n, frame in enumerate(frames):
        known = (name for name in names(scores(fitted=False)) if name in evaluated.scores)
        frame.info.update({name: float(evaluated.scores[name][n]) for name in known})
        frame.arrays["force_std"] = evaluated.atom_scores["force_std"][n].astype(np.float64)
    write_structures(pool, frames)
    return evaluated


def _left_in_pool(here: Round, inputs: Inputs, withheld: Collection[bytes]) -> list[int]:
    """Indices of the pool that no batch has taken so far and no test structure is like; of those twice in it, one."""
    folders = [here.run.round(earlier) for earlier in range(here.index)]
    batches = [frame for folder in folders if folder.batch.exists() for frame in read_structures(folder.batch)]
    gone = {int(frame.info["pool_index"]) for frame in batches}
    gone.update(inputs.pool_split.initial)
    gone.update(inputs.pool_like_test(here.progress))
    seen = {*withheld, *(inputs.pool_keys[index] for index in gone)}
    left = []
    for index in inputs.pool_split.rest:
        if inputs.pool_keys[index] not in seen:
            seen.add(inputs.pool_keys[index])
            left.append(index)
    return left
