"""Active sets of potentials: the rows of structures, the set they build, its renewal after a training, offers to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import numpy as np
from ase import Atoms

from almlip_jax.ensembles import AnyEnsemble, Ensemble
from almlip_jax.errors import InputError
from almlip_jax.features.gradients import parameter_rows
from almlip_jax.models.base import Params
from almlip_jax.models.constants import learned_leaves
from almlip_jax.potential.active_set import (
    MOST_COLUMNS,
    ActiveSetSettings,
    ActiveStructures,
    Rows,
    built,
    rows_from,
    rows_of_structures,
    standing,
)

if TYPE_CHECKING:
    from almlip_jax.potential.potential import Potential


@dataclass(frozen=True)
class Offer:
    """What came of offering structures to an active set.

    Attributes:
        active: the set afterwards.
        entered: of the structures, those that have rows in it, the largest grade first.
        grades: [n] of each structure over the set before, the largest of its rows.
    """

    active: ActiveStructures
    entered: tuple[int, ...]
    grades: np.ndarray


def rows_of(potential: Potential, structures: Sequence[Atoms], settings: ActiveSetSettings) -> Rows:
    """Rows of structures as an active set takes them.

    Raises:
        InputError: an element is not known, or there are more parameters than an active set is made for.
    """
    if settings.parameters == "all":
        return _rows_by_all(potential, structures, settings)
    features, code, species = potential.atom_rows(structures)
    width = features.shape[-1] * (1 if code is None else code.shape[-1])
    if code is None and settings.mode == "configuration":
        width *= len(potential.species)
    _check_columns(width, settings)
    return rows_from(features, code, species, [len(one) for one in structures], len(potential.species), settings)


def built_from(potential: Potential, structures: Sequence[Atoms], settings: ActiveSetSettings) -> ActiveStructures:
    """The active set of structures that a potential was trained on; errors as for `rows_of`."""
    return built(rows_of(potential, structures, settings), structures, settings, potential.precision)


def renewed(potential: Potential, before: ActiveStructures, structures: Sequence[Atoms]) -> ActiveStructures:
    """The active set of an earlier potential as this one sees it, after structures were offered to it.

    Rows are gradients, and change with the parameters.  Those that stood in the set are computed again, and fill a new
    one first; then the structures are offered, so that one takes the place of another only where the volume grows.

    Args:
        potential: with other parameters than the set was made with.
        before: the set.
        structures: everything that the potential was trained on.
    """
    settings, held = before.settings, before.structures
    if not held:
        return built_from(potential, structures, settings)
    first = built(standing(rows_of(potential, held, settings), before), held, settings, potential.precision)
    return first.offered_rows(rows_of(potential, structures, settings), structures)[0]


def offered(potential: Potential, active: ActiveStructures, structures: Sequence[Atoms]) -> Offer:
    """Offers structures to an active set of the same potential; errors as for `rows_of`."""
    rows = rows_of(potential, structures, active.settings)
    grades = np.zeros(len(structures))
    np.maximum.at(grades, rows.structure, active.grades(rows))
    after, entered = active.offered_rows(rows, structures)
    return Offer(after, tuple(sorted(entered, key=lambda n: (-grades[n], n))), grades)


def grades_of(
    potential: Potential, active: ActiveStructures, structures: Sequence[Atoms]
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Grades of structures [n], and in neighborhood mode of their atoms [N], computed from rows in float64."""
    rows = rows_of(potential, structures, active.settings)
    values, of_all = active.grades(rows), np.zeros(len(structures))
    np.maximum.at(of_all, rows.structure, values)
    if active.settings.mode == "configuration":
        return of_all, []
    return of_all, np.split(values, np.cumsum([len(one) for one in structures])[:-1])


def check_spannable(ensemble: AnyEnsemble, settings: ActiveSetSettings) -> None:
    """Refuses, before anything is trained, an active set over all parameters that an ensemble cannot have.

    Raises:
        InputError: its members are of several architectures or have several heads, or it has too many parameters.
    """
    if settings.parameters == "all":
        _check_all(ensemble, jax.eval_shape(ensemble.init, jax.random.key(0)), settings)


def _check_all(ensemble: AnyEnsemble, params: Params, settings: ActiveSetSettings) -> Ensemble:
    if not isinstance(ensemble, Ensemble) or ensemble.heads.count > 1:
        raise InputError(
            "an active set over all parameters needs members of one architecture with one head each; "
            "take parameters: linear."
        )
    _check_columns(sum(leaf.size for leaf in learned_leaves(params)) // ensemble.size, settings)
    return ensemble


def _rows_by_all(potential: Potential, structures: Sequence[Atoms], settings: ActiveSetSettings) -> Rows:
    params = potential.params
    ensemble = _check_all(potential.ensemble, params, settings)
    of_atoms = settings.mode == "neighborhood"
    parts = []
    for atoms, graph in zip(structures, potential.graphs(structures), strict=True):
        found = np.asarray(parameter_rows(ensemble, params, graph, of_atoms=of_atoms), np.float64)
        parts.append(found[:, : len(atoms)] if of_atoms else found / (len(atoms) if settings.per_atom else 1))
    values = np.concatenate(parts, axis=1)
    if not of_atoms:
        return rows_of_structures(values)
    counts = [len(atoms) for atoms in structures]
    places = np.concatenate([np.arange(count) for count in counts])
    return Rows(values, np.zeros(len(places), np.int64), 1, np.repeat(np.arange(len(counts)), counts), places)


def _check_columns(columns: int, settings: ActiveSetSettings) -> None:
    if columns > MOST_COLUMNS:
        other = "linear" if settings.parameters == "all" else "neighborhood"
        key = "parameters" if settings.parameters == "all" else "mode"
        raise InputError(
            f"an active set of {columns} columns is too large (at most {MOST_COLUMNS}); take {key}: {other}, "
            "or a smaller model."
        )
