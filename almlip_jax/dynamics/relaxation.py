"""Relaxed starts: walkers go downhill with the ensemble, all at once, as far as its gate and sanity let them.

A relaxation is an exploration with FIRE: the same compiled loop, score and limits.  It records nothing, and where it
leaves what the ensemble knows, it stays at the frame before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import numpy as np
from ase import Atoms
from numpy.typing import ArrayLike
from pydantic import Field

from almlip_jax.dynamics.explore import Explorer
from almlip_jax.dynamics.gates import AbsoluteGate
from almlip_jax.dynamics.integrators import FireSettings
from almlip_jax.dynamics.knowledge import Knowledge
from almlip_jax.dynamics.seen import Thresholds
from almlip_jax.dynamics.settings import ExplorationSettings
from almlip_jax.dynamics.state import Status
from almlip_jax.models import Params
from almlip_jax.settings import Settings, unit


class RelaxationSettings(Settings):
    """How far structures are relaxed before walkers start at them."""

    fmax: float = Field(default=0.05, gt=0, le=100.0, json_schema_extra=unit("eV/Angstrom"))
    """Largest force on an atom, of the ensemble's mean, at which a structure is relaxed, eV/Angstrom."""
    steps: int = Field(default=200, ge=1, le=10**6)
    """Most steps of FIRE; a structure that needs more is taken as it then is."""
    cell: Literal["fixed", "isotropic", "full"] = "fixed"
    """Whether the cell relaxes too, to 0.05 GPa of the pressure of its walker."""


@dataclass(frozen=True)
class Relaxed:
    """What became of some structures.

    Attributes:
        structures: relaxed as far as they may be; everything but positions and cell is as it was.
        status: [W] ``CONVERGED``, ``COMPLETED`` where the steps did not suffice; where a structure stayed at the frame
            before, ``STOPPED`` by the gate or ``UNPHYSICAL``.
    """

    structures: list[Atoms]
    status: tuple[Status, ...]


def relaxing(settings: ExplorationSettings, relaxation: RelaxationSettings) -> ExplorationSettings:
    """The exploration that relaxes the starts of another one: its walkers, score, sanity and chunks, and no buffer.

    >>> from almlip_jax.dynamics import ExplorationSettings, RelaxationSettings, relaxing
    >>> dynamics = ExplorationSettings.model_validate({"walkers": [{"temperature": 300, "count": 4}], "steps": 1000})
    >>> settings = relaxing(dynamics, RelaxationSettings(fmax=0.02, steps=100))
    >>> settings.integrator.kind, settings.steps, len(settings.temperatures)
    ('fire', 100, 4)
    """
    fixed = relaxation.cell == "fixed"
    chunk = min(settings.chunk, relaxation.steps)
    groups = [
        group.model_copy(
            update={
                "temperature": group.temperatures[0],
                "pressure": 0.0 if fixed else group.pressures[0],
                "bias": 1.0,
            }
        )
        for group in settings.walkers
    ]
    return ExplorationSettings(
        walkers=tuple(groups),
        steps=relaxation.steps,
        integrator=FireSettings(cell=relaxation.cell, largest_force=relaxation.fmax),
        gate=AbsoluteGate(score=settings.gate.score, species=settings.gate.species),
        sanity=settings.sanity,
        buffer=1,
        when_full="go_on",
        chunk=chunk,
        trace_every=chunk,
        trajectory_every=chunk,
        skin=settings.skin,
    )


def relax(
    relaxer: Explorer,
    params: Params,
    structures: Sequence[Atoms],
    stop: ArrayLike,
    knowledge: Knowledge,
    on_chunk: Callable[[int, int], None] | None = None,
) -> Relaxed:
    """Relaxes the start structures of walkers; draws no random numbers.

    Args:
        relaxer: an explorer with settings that `relaxing` made.
        params: of the ensemble.
        structures: one for each walker.
        stop: threshold of the gate's score, of each walker or the same for all; a walker with ``-inf`` stays as it is.
        knowledge: of the training set, where the gate looks at a novelty score, and thresholds of elements.
        on_chunk: called after each chunk with steps done and number of structures that still move.

    Raises:
        InputError: as `Explorer.run`.

    >>> import jax
    >>> from ase.build import molecule
    >>> from almlip_jax.dynamics import ExplorationSettings, Explorer, Knowledge, RelaxationSettings, relax, relaxing
    >>> from almlip_jax.ensembles import EnsembleSettings, build_ensemble
    >>> from almlip_jax.models import SharedDensitySettings
    >>> from almlip_jax.potential import Potential
    >>> from almlip_jax.structures.species import SpeciesTable
    >>> model, members, species = SharedDensitySettings(size="tiny"), EnsembleSettings(size=2), SpeciesTable((1, 8))
    >>> params = build_ensemble(model, members, species).init(jax.random.key(0))
    >>> potential = Potential(model, species, params, {1: 0.0, 8: 0.0}, members=members)
    >>> dynamics = ExplorationSettings.model_validate({"walkers": [{"temperature": 300}], "steps": 100})
    >>> settings = relaxing(dynamics, RelaxationSettings(steps=5))
    >>> relaxer = Explorer(potential.ensemble.predict, potential.species, potential.cutoff, settings)
    >>> found = relax(relaxer, potential.params, [molecule("H2O")], float("inf"), Knowledge())
    >>> len(found.structures), found.structures[0].get_chemical_formula()
    (1, 'H2O')
    """
    stops = np.broadcast_to(np.asarray(stop, np.float64), (len(structures),))
    thresholds = Thresholds(record=np.full(len(structures), np.inf), stop=stops)  # type: ignore[arg-type]
    # what is known for an admission by features is of no use here
    known = Knowledge(knowledge.novelty, relative=knowledge.relative)
    # numbers of walkers say that these may be some of many: where no cell of them relaxes, others' may
    found = relaxer.run(params, structures, thresholds, jax.random.key(0), on_chunk, known, range(len(structures)))
    moves_cell = relaxer.settings.integrator.moves_cell
    relaxed = []
    for structure, final in zip(structures, found.final, strict=True):
        one = structure.copy()
        if moves_cell:
            one.set_cell(final.cell)
        one.set_positions(final.positions, apply_constraint=False)
        relaxed.append(one)
    return Relaxed(relaxed, found.status)


def relaxation_summary(status: Sequence[Status]) -> str:
    """A sentence on relaxations that ended before their forces were small; empty where none did.

    >>> from almlip_jax.dynamics import Status, relaxation_summary
    >>> relaxation_summary([Status.CONVERGED, Status.COMPLETED, Status.STOPPED])
    '2 of 3 relaxations ended early: 1 by the gate, 1 as their steps were done.'
    """
    reasons = {
        Status.STOPPED: "by the gate",
        Status.UNPHYSICAL: "before an unphysical frame",
        Status.COMPLETED: "as their steps were done",
    }
    counts = {why: list(status).count(code) for code, why in reasons.items()}
    parts = [f"{count} {why}" for why, count in counts.items() if count]
    if not parts:
        return ""
    return f"{sum(counts.values())} of {len(status)} relaxations ended early: {', '.join(parts)}."
