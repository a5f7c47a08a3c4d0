"""Active sets of potentials: the rows of structures, the set they build, its renewal after a training, offers to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
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
    empty_set,
    rows_from,
    rows_of_structures,
    standing,
)

if TYPE_CHECKING:
    from almlip_jax.potential.potential import Potential


_ENTRIES = 2**26
"""Entries of rows that are looked at together: half a gigabyte in float64, of which there are several copies."""
_FEW = 2**14
"""Atoms whose rows are no more than that, of one model, however long they are."""


@dataclass(frozen=True)
class Offer:
    """What came of offering structures to an active set.

    Attributes:
        active: the set afterwards.
        entered: of the structures, those that have rows in it, the largest grade first.
        grades: [n] of each structure over the set before, the largest of its rows.
        atom_grades: of those that entered, in this order, the grades [N] of their atoms over the set before; none in
            configuration mode.
    """

    active: ActiveStructures
    entered: tuple[int, ...]
    grades: np.ndarray
    atom_grades: tuple[np.ndarray, ...] = ()


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
    parts = _in_parts(potential, structures, settings)
    empty = empty_set(parts(), settings, _computed_in(potential))
    return empty.offered_in_parts(parts, structures, threshold=settings.threshold)[0]


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
    found = _together([standing(rows, before) for rows in _in_parts(potential, held, settings)()])
    parts = _in_parts(potential, structures, settings)
    empty = empty_set(chain((found,), parts()), settings, _computed_in(potential))
    return empty.offered_rows(found, held, threshold=settings.threshold)[0].offered_in_parts(parts, structures)[0]


def offered(potential: Potential, active: ActiveStructures, structures: Sequence[Atoms]) -> Offer:
    """Offers structures, or none, to an active set of the same potential; errors as for `rows_of`."""
    if not structures:
        return Offer(active, (), np.zeros(0))
    parts = _in_parts(potential, structures, active.settings)
    found = [(rows.structure, active.grades(rows)) for rows in parts()]
    owner, of_rows = (np.concatenate(one) for one in zip(*found, strict=True))
    grades = np.zeros(len(structures))
    np.maximum.at(grades, owner, of_rows)
    after, entered = active.offered_in_parts(parts, structures)
    first = tuple(sorted(entered, key=lambda n: (-grades[n], n)))
    of_atoms = tuple(of_rows[owner == n] for n in first) if active.settings.mode == "neighborhood" else ()
    return Offer(after, first, grades, of_atoms)


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


def _in_parts(
    potential: Potential, structures: Sequence[Atoms], settings: ActiveSetSettings
) -> Callable[[], Iterable[Rows]]:
    """The rows of structures as `ActiveStructures.offered_in_parts` takes them: all at once where they are few.

    Parts of many are computed anew each time that they are asked for, and not kept.
    """
    ends, cuts = np.cumsum([len(atoms) for atoms in structures]), [0, len(structures)]
    if len(ends) > 1 and ends[-1] > _FEW:
        one = rows_of(potential, structures[:1], settings).values
        part = (ends - 1) // max(_ENTRIES // (one.shape[0] * one.shape[-1]), 1)
        cuts = [0, *(np.flatnonzero(np.diff(part)) + 1).tolist(), len(structures)]
    if len(cuts) == 2:
        whole = (rows_of(potential, structures, settings),)
        return lambda: whole

    def parts() -> Iterator[Rows]:
        for start, end in pairwise(cuts):
            rows = rows_of(potential, structures[start:end], settings)
            yield replace(rows, structure=rows.structure + start)

    return parts


def _together(parts: Sequence[Rows]) -> Rows:
    """Rows of several parts as those of one."""
    if len(parts) == 1:
        return parts[0]
    names = ("block", "structure", "atom")
    block, structure, atom = (np.concatenate([getattr(x, name) for x in parts]) for name in names)
    return Rows(np.concatenate([x.values for x in parts], axis=1), block, parts[0].blocks, structure, atom)


def _computed_in(potential: Potential) -> np.dtype:
    """The precision that rows are computed in: that of the potential, unless jax knows float32 alone here."""
    return np.dtype(jax.dtypes.canonicalize_dtype(np.dtype(potential.precision)))


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
