"""Exploration without walkers: structures are generated, some of them relaxed with the ensemble, and scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ase import Atoms

from almlip_jax.campaign.choice import Beginning, ExplorationInputs
from almlip_jax.campaign.offers import fresh, offer
from almlip_jax.campaign.settings import GeneratedExploration
from almlip_jax.dynamics import (
    ExplorationSettings,
    Knowledge,
    RelaxationSettings,
    Status,
    relax,
    relaxation_summary,
    relaxing,
)
from almlip_jax.generation import GeneratorSettings
from almlip_jax.generation.base import apart

_TOGETHER = 8  # structures that are relaxed side by side


def explore(settings: GeneratedExploration, given: ExplorationInputs) -> Mapping[str, Any]:
    """Generates structures, relaxes some with the ensemble, and scores those that are not known yet."""
    here, inputs, trained = given.here, given.inputs, given.trained
    frames: list[Atoms] = []
    for number, one in enumerate(settings.of):
        made = inputs.made(one, here.generator("generated", str(number), one.kind))
        if one.relaxation is not None:
            relaxed = _relaxed(number, one.relaxation, made, given)
            drawn, made = made, [after for before, after in zip(made, relaxed, strict=True) if sane(before, after, one)]
            if len(made) < len(drawn):
                here.progress.message(
                    f"{len(drawn) - len(made)} of {len(drawn)} relaxed structures are left out: their atoms came too "
                    "close, or their volume left half to twice what it was."
                )
        frames += made
    beginning = Beginning(
        trained.potential, inputs.geometries, here.dataset(), here.key("explore"), here.index, given.under_way
    )
    most = settings.most_candidates(0), "its counts"
    return offer(
        here,
        fresh(frames, beginning, inputs.system, given.withheld, "exploration 'generated'", most, given.held_out),
        trained,
    )


def sane(before: Atoms, after: Atoms, settings: GeneratorSettings) -> bool:
    """Whether a relaxation left atoms apart as they should be, and the volume of a crystal between half and twice
    what it was.
    """
    is_crystal = before.pbc.all()
    return apart(after, settings.closest) and (not is_crystal or 0.5 <= after.get_volume() / before.get_volume() <= 2)


def _relaxed(
    number: int, settings: RelaxationSettings, frames: Sequence[Atoms], given: ExplorationInputs
) -> list[Atoms]:
    """Structures relaxed with the potential of the round, a few side by side."""
    walkers = ExplorationSettings.model_validate({"walkers": [{"temperature": 300, "count": _TOGETHER}]})
    potential, progress = given.trained.potential, given.here.progress
    relaxer = given.explorers.get(f"generator {number}", relaxing(walkers, settings), potential)
    found: list[Atoms] = []
    status: list[Status] = []
    with progress.stage("relax", len(frames), unit="structures") as advance:
        for first in range(0, len(frames), _TOGETHER):
            some = list(frames[first : first + _TOGETHER])
            filled = some + some[-1:] * (_TOGETHER - len(some))
            relaxed = relax(relaxer, potential.params, filled, float("inf"), Knowledge())
            found += relaxed.structures[: len(some)]
            status += relaxed.status[: len(some)]
            advance(len(some))
    if ended_early := relaxation_summary(status):
        progress.message(ended_early)
    return found
