"""Thresholds of the gate in a round: one rule, whose numbers follow for each named system from its own structures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from ase import Atoms

from almlip_jax.campaign.calibration import calibration_set
from almlip_jax.campaign.round import Round, Trained
from almlip_jax.campaign.settings import MdExploration
from almlip_jax.dynamics import Knowledge
from almlip_jax.dynamics.knowledge import errors_and_scores, structure_scores
from almlip_jax.dynamics.seen import Thresholds
from almlip_jax.dynamics.thresholds import AtomErrors, Resolved
from almlip_jax.scores import needs_no_fit
from almlip_jax.structures.carried import system_of


@dataclass(frozen=True)
class Levels:
    """The thresholds of the walkers of a round.

    Attributes:
        systems: of the walkers; None where systems have no names.
        resolved: thresholds of each system.
    """

    systems: Sequence[str | None]
    resolved: Mapping[str | None, Resolved]

    @property
    def stop(self) -> np.ndarray:
        """[W] stop threshold of each walker."""
        return np.array([self.resolved[name].stop for name in self.systems])

    def thresholds(self, walkers: Sequence[int]) -> Thresholds:
        """Those of some walkers."""
        of_walkers = [self.resolved[self.systems[walker]] for walker in walkers]
        record, stop = (np.array([getattr(one, name) for one in of_walkers]) for name in ("record", "stop"))
        return Thresholds(record=record, stop=stop)  # type: ignore[arg-type]

    def relative(self, walkers: Sequence[int]) -> tuple[Mapping[str, float], ...] | None:
        """Thresholds of elements of some walkers, relative to those; None where the rule knows no elements."""
        if all(one.relative is None for one in self.resolved.values()):
            return None
        return tuple(self.resolved[self.systems[walker]].relative or {} for walker in walkers)

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """What goes into a file: with named systems, thresholds are those of each walker."""
        elements = [*dict.fromkeys(symbol for one in self.resolved.values() for symbol in one.relative or {})]
        if self.systems[0] is None:
            (resolved,) = self.resolved.values()
            record, stop, relative = resolved.record, resolved.stop, [*(resolved.relative or {}).values()]
            named: dict[str, np.ndarray] = {}
        else:
            of_walkers = [self.resolved[name] for name in self.systems]
            record, stop = [one.record for one in of_walkers], [one.stop for one in of_walkers]  # type: ignore[assignment]
            relative = [[(one.relative or {}).get(symbol, 1.0) for symbol in elements] for one in of_walkers]  # type: ignore[misc]
            named = {"walker_system": np.array(self.systems, np.str_)}
        return {
            "gate_record": np.array(record),
            "gate_elements": np.array(elements, np.str_),
            "gate_relative": np.array(relative, np.float64),
            "gate_stop": np.array(stop),
            **named,
        }


def gate_levels(
    settings: MdExploration,
    here: Round,
    dataset: Sequence[Atoms],
    trained: Trained,
    knowledge: Knowledge,
    systems: Sequence[str | None],
) -> Levels:
    """The thresholds of the walkers of a round, in the unit of the gate's score; ``systems`` are those of the walkers.

    Raises:
        InputError: the calibration set says nothing.
    """
    return Levels(
        systems,
        {name: gate_thresholds(settings, here, dataset, trained, knowledge, name) for name in dict.fromkeys(systems)},
    )


def gate_thresholds(
    settings: MdExploration,
    here: Round,
    dataset: Sequence[Atoms],
    trained: Trained,
    knowledge: Knowledge,
    system: str | None = None,
) -> Resolved:
    """The thresholds of a round, in the unit of the gate's score.

    Calibrated and conformal thresholds take the frames that were drawn at random in the rounds before, which no
    potential is trained on, as this one sees them; before there are enough, scores are taken at their face value.

    Those of a system follow from its own structures, where it has any with labels, and enough of those drawn at random;
    else from all.
    """
    rule, score, potential = settings.thresholds, settings.gate.score, trained.potential

    def scores() -> np.ndarray:
        evaluated = trained.evaluate("dataset", dataset) if needs_no_fit(score) else None
        found = structure_scores(score, potential, dataset, knowledge, evaluated)
        own = np.array([system_of(frame) == system for frame in dataset], bool)
        return found[own] if system is not None and own.any() else found

    def errors(atoms: int) -> AtomErrors | None:
        labelled = calibration_set(here.run, here.index)
        own = [frame for frame in labelled if system_of(frame) == system]
        if system is not None and _atoms(own) >= atoms:
            labelled = own
        return errors_and_scores(score, potential, labelled, knowledge) if _atoms(labelled) >= atoms else None

    return rule.resolve(scores, errors)


def _atoms(frames: Sequence[Atoms]) -> int:
    return sum(len(frame) for frame in frames)
