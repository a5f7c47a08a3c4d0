"""What an exploration knows of the training set: novelty scores, its own scores, and the set as the admission sees it.

Also the scores of structures as its gate would see them, which thresholds are made of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ase import Atoms

from almlip_jax.dynamics.admission import Context
from almlip_jax.dynamics.settings import ExplorationSettings
from almlip_jax.dynamics.thresholds import AtomErrors
from almlip_jax.errors import InputError
from almlip_jax.features import FeatureRequest
from almlip_jax.given import given_settings, given_structures
from almlip_jax.potential import GRADES, ActiveSetSettings, Evaluated, FittedScore, Potential
from almlip_jax.potential.fitted import TRAINING_ROWS
from almlip_jax.potential.novelty import fit_novelty
from almlip_jax.scores import largest_of, needs_no_fit


@dataclass(frozen=True)
class Knowledge:
    """The training set as the present ensemble sees it; made by `know`.

    Attributes:
        novelty: fitted scores by name.
        context: the training set as the admission to the buffer sees it.
        relative: thresholds of elements relative to those of the run, by symbol, on top of those of the gate's
            settings, the same for all walkers or for each; None where none will come in any run, so that the program
            need not tell elements apart.
        scores: name -> [n] scores of the training structures that the potential kept, where these are not there.
    """

    novelty: Mapping[str, FittedScore] = field(default_factory=dict)
    context: Context | None = None
    relative: Mapping[str, float] | Sequence[Mapping[str, float]] | None = None
    scores: Mapping[str, np.ndarray] = field(default_factory=dict)


def know(
    settings: ExplorationSettings | Mapping[str, Any],
    potential: Potential,
    training_set: Sequence[Atoms] | Atoms | None,
    seed: int,
    room: int = 0,
    chosen: Sequence[Atoms] | Atoms = (),
) -> Knowledge:
    """What an exploration with some settings needs to know; nothing is evaluated that it does not ask for.

    Args:
        settings: of the exploration, or a dict of them.
        potential: whose features count.
        training_set: structures; labels are not looked at.  None: what the potential knows of it (`Potential.knowing`).
        seed: decides sketches.
        room: training structures there can be at most, so that a growing set keeps its shape.
        chosen: structures whose labels are under way: the potential has learned nothing from them, but the admission
            need not keep their like.

    Raises:
        InputError: the settings are not valid, a structure holds an element that the potential does not know, or there
            are none and the potential does not know its training set.

    >>> import jax
    >>> from ase.build import molecule
    >>> from almlip_jax.dynamics import know
    >>> from almlip_jax.ensembles import EnsembleSettings, build_ensemble
    >>> from almlip_jax.models import SharedDensitySettings
    >>> from almlip_jax.potential import Potential
    >>> from almlip_jax.structures.species import SpeciesTable
    >>> model, members, species = SharedDensitySettings(size="tiny"), EnsembleSettings(size=2), SpeciesTable((1, 8))
    >>> params = build_ensemble(model, members, species).init(jax.random.key(0))
    >>> potential = Potential(model, species, params, {1: 0.0, 8: 0.0}, members=members)
    >>> settings = {"walkers": [{"temperature": 300}], "monitor": ["latent_distance"]}
    >>> training_set = [molecule("H2O"), molecule("H2O2")]
    >>> list(know(settings, potential, training_set, seed=0).novelty)
    ['latent_distance']
    """
    settings, chosen = given_settings(ExplorationSettings, settings, "settings"), given_structures(chosen, "chosen")
    if training_set is not None:
        training_set = given_structures(training_set, "training_set")
    by_features = settings.admission.looks_at_features
    if training_set is None:
        novelty = _grades(settings.novelty, potential, None)
        kept, fitted = potential.training_set, potential.novelty
        if not set(settings.novelty) <= {*novelty, *fitted} or (kept is None and by_features):
            raise InputError("the potential does not know its training set; give the structures.")
        novelty |= {name: fitted[name] for name in settings.novelty if name not in novelty}
        context = settings.admission.context(kept.rows, seed, room) if by_features and kept is not None else None
        return Knowledge(novelty, context, scores={} if kept is None else kept.scores)
    context = None
    if by_features:
        request = FeatureRequest((TRAINING_ROWS,))
        rows = potential.evaluate([*training_set, *chosen], features=request).features[TRAINING_ROWS]
        context = settings.admission.context(rows, seed, room)
    return Knowledge(fitted_scores(settings.novelty, potential, training_set), context)


def fitted_scores(asked: Sequence[str], potential: Potential, training_set: Sequence[Atoms]) -> dict[str, FittedScore]:
    """Scores fitted to a training set, by name; grades over the potential's own active set where it has one."""
    found = _grades(asked, potential, training_set)
    others = [name for name in asked if name not in found]
    if others:
        found |= fit_novelty(others, *potential.atom_features(training_set), len(potential.species))
    return found


def _grades(asked: Sequence[str], potential: Potential, training_set: Sequence[Atoms] | None) -> dict[str, FittedScore]:
    """Grades that are asked for: over the active set of the potential; of a mode that it lacks, of the training set."""
    active, found = potential.active_set, dict[str, FittedScore]()
    for mode, name in GRADES.items():
        if name not in asked:
            continue
        if active is not None and active.settings.score == name:
            if active.settings.parameters == "all":
                raise InputError(
                    f"the active set of the potential is over all parameters, whose derivatives dynamics do not know: "
                    f"{name} cannot be looked at in a run; make the set with parameters: linear."
                )
            found[name] = potential.novelty[name]
        elif training_set is not None:
            asked_for = ActiveSetSettings.model_validate({"mode": mode})
            found[name] = potential.spanning(training_set, asked_for).novelty[name]
    return found


def structure_scores(
    score: str,
    potential: Potential,
    structures: Sequence[Atoms],
    knowledge: Knowledge,
    evaluated: Evaluated | None = None,
) -> np.ndarray:
    """A score that a gate can look at, of each structure, [n].

    Args:
        score: any declared one.
        potential: whose score it is.
        structures: in any number.
        knowledge: with the novelty score, where it is one.
        evaluated: the structures as the potential evaluates them, where that is known already.
    """
    if needs_no_fit(score):
        return np.asarray((evaluated or potential.evaluate(structures)).scores[score], np.float64)
    return np.asarray(potential.scored(structures, {score: knowledge.novelty[score]}).scores[score], np.float64)


def errors_and_scores(score: str, potential: Potential, labelled: Sequence[Atoms], knowledge: Knowledge) -> AtomErrors:
    """Lengths of the force errors of all atoms, and their scores, in float64.

    Args:
        score: the gate's, one of `scores.with_atoms`; what it is the largest of counts.
        potential: whose errors these are.
        labelled: structures with forces.
        knowledge: with the novelty score, where it is one.
    """
    of_atoms, fitted = largest_of(score), not needs_no_fit(score)
    assert of_atoms is not None  # rules that look at errors ask for a score of atoms
    given = {score: knowledge.novelty[score]} if fitted else {}
    found = potential.scored(labelled, given) if fitted else potential.evaluate(labelled)
    truth = np.concatenate([frame.get_forces(apply_constraint=False) for frame in labelled])
    errors = np.linalg.norm(np.concatenate(found.forces).astype(np.float64) - truth, axis=1)
    sigma = np.concatenate(found.atom_scores[of_atoms])
    numbers = np.concatenate([frame.numbers for frame in labelled])
    return AtomErrors(errors, sigma.astype(np.float64), numbers)
