"""The active set of a potential (D-optimality): the rows that span the largest volume, with their structures.

A row b is the gradient of an energy by parameters: of a structure's energy (configuration mode) or of the energy of an
atom in its surroundings (neighborhood mode); by the linear parameters, which `Model.linear` speaks of, or by all.
Where the last layer of a model has weights of its own for each species, rows of atoms of unlike species share no
column, and the active set falls apart into one for each species; where species share the weights, as in a moment tensor
potential, there is one for all.  Sources: Podryabinkin and Shapeev, Comput. Mater. Sci. 140, 171 (2017); Novikov et
al., Mach. Learn.: Sci. Technol. 2, 025002 (2021).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Self, cast

import jax
import jax.numpy as jnp
import numpy as np
from ase import Atoms
from flax import struct
from pydantic import Field

from almlip_jax.ensembles import Prediction
from almlip_jax.models.base import linear_rows
from almlip_jax.potential.fitted import fitted_kind
from almlip_jax.precision import full_precision
from almlip_jax.selection import ActiveSet, active_set
from almlip_jax.selection.maxvol import Mode, Start
from almlip_jax.settings import Settings
from almlip_jax.structures.electronic_state import stated_state
from almlip_jax.structures.graph import Graph, atom_counts, sum_over_atoms
from almlip_jax.structures.remembered import bare

MOST_COLUMNS = 4096
"""Parameters that an active set is made for, at most: its matrices are square, and held in float64."""

_ROUNDING = 1000.0  # times the machine precision: how far the columns of rows are from what they should be

_PASSES = 20  # over rows that are offered in parts, at most; few are needed
_GROWTH = 1e-6  # of the logarithm of the volume, which a pass has to gain for another one to follow

GRADES = {"neighborhood": "extrapolation_grade", "configuration": "configuration_grade"}
"""Name of the score that the active set of a mode gives."""


class ActiveSetSettings(Settings):
    """What the rows of an active set are, and how it is filled."""

    mode: Mode = "neighborhood"
    """Whether rows are those of atoms in their surroundings, or of whole structures."""
    parameters: Literal["linear", "all"] = "linear"
    """Whether rows are gradients by the linear parameters, or by all; by all, grades are not known in dynamics."""
    per_atom: bool = True
    """Configuration mode: whether rows are divided by the number of atoms, so that the grade of a crystal does not grow
    with the size of its cell."""
    start: Start = "epsilon"
    """What stands in the set for directions that nothing spans: epsilon times the identity, or the identity."""
    epsilon: float = Field(default=1e-5, ge=1e-12, le=1.0)
    """Size of these rows; in float32 no smaller than 1.2e-4 times the root mean square of a column."""
    threshold: float = Field(default=1 + 1e-7, gt=1, le=1e6)
    """Entry above which a row enters when the set is built from the structures trained on."""
    offer_threshold: float = Field(default=1.001, gt=1, le=1e6)
    """Entry above which a row enters when structures are offered to the set as it is."""

    @property
    def score(self) -> str:
        """The score that it gives."""
        return GRADES[self.mode]


@dataclass(frozen=True)
class Rows:
    """Rows of some structures; L models, n rows, m columns.

    Attributes:
        values: [L, n, m] float64.
        block: [n] int, which part of the active set a row belongs to.
        blocks: number of parts.
        structure: [n] int, whose row it is,
        atom: [n] int, and of which of its atoms; -1 of the structure as a whole.
    """

    values: np.ndarray
    block: np.ndarray
    blocks: int
    structure: np.ndarray
    atom: np.ndarray


def rows_from(
    features: np.ndarray,
    code: np.ndarray | None,
    species: np.ndarray,
    counts: Sequence[int],
    num_species: int,
    settings: ActiveSetSettings,
) -> Rows:
    """Rows over the linear parameters.

    Args:
        features: [L, A, F] of the atoms of all structures.
        code: [L, A, Q], see `models.base.linear_rows`; None where species are told apart one by one.
        species: [A] int.
        counts: atoms of each structure.
        num_species: length of the species table.
        settings: of the active set.
    """
    features = features.astype(np.float64)
    atom = np.concatenate([np.arange(count) for count in counts])
    structure = np.repeat(np.arange(len(counts)), counts)
    if settings.mode == "neighborhood":
        if code is None:
            return Rows(features, species.astype(np.int64), num_species, structure, atom)
        values = (code[..., :, None] * features[..., None, :]).reshape(*features.shape[:2], -1)
        return Rows(values, np.zeros(len(atom), np.int64), 1, structure, atom)
    if code is None:
        code = np.broadcast_to(np.eye(num_species)[species], (len(features), len(species), num_species))
    ends = np.cumsum(counts)
    summed = [
        np.einsum("laq,laf->lqf", code[:, end - count : end], features[:, end - count : end])
        / (count if settings.per_atom else 1)
        for count, end in zip(counts, ends.tolist(), strict=True)
    ]
    return rows_of_structures(np.stack(summed, axis=1).reshape(len(features), len(counts), -1))


def rows_of_structures(values: np.ndarray) -> Rows:
    """Rows [L, n, m], one for each structure."""
    n = values.shape[1]
    return Rows(values.astype(np.float64), np.zeros(n, np.int64), 1, np.arange(n), np.full(n, -1))


@struct.dataclass
class Grades:
    """Extrapolation grades from a prediction, in the loop and elsewhere; L models, B parts, m columns.

    Attributes:
        inverse: [L, B, m, m] inverse of each active set.
        of_structures: whether rows are those of structures (static).
        per_atom: whether these are divided by the number of atoms (static).
    """

    inverse: jax.Array
    of_structures: bool = struct.field(pytree_node=False)
    per_atom: bool = struct.field(pytree_node=False)

    def of(self, prediction: Prediction, graph: Graph) -> jax.Array:
        """Grades of atoms [A], 0 for padding, or of structures [S]; the root mean square over models."""
        if self.of_structures:
            species = self.inverse.shape[-1] // prediction.features.shape[-1]
            rows = jax.vmap(lambda one: sum_over_atoms(one, graph))(prediction.linear_rows(graph, species))
            rows = rows / atom_counts(graph)[:, None] if self.per_atom else rows
            return _over_models(jax.vmap(lambda row, inverse: _largest(row @ inverse[0]))(rows, self.inverse))

        def one_model(features: jax.Array, code: jax.Array | None, inverse: jax.Array) -> jax.Array:
            if code is not None:
                return _largest(linear_rows(features, code, graph, 0) @ inverse[0])
            found = jnp.zeros(features.shape[0], features.dtype)
            for z in range(inverse.shape[0]):  # few products of matrices instead of a gather of one for each atom
                found = jnp.where(graph.species == z, _largest(features @ inverse[z]), found)
            return found

        found = _over_models(jax.vmap(one_model)(prediction.features, prediction.code, self.inverse))
        return jnp.where(graph.atom_mask, found, 0)


def _largest(entries: jax.Array) -> jax.Array:
    return jnp.max(jnp.abs(entries), axis=-1)


def _over_models(grades: jax.Array) -> jax.Array:
    return grades[0] if len(grades) == 1 else jnp.sqrt(jnp.mean(grades**2, axis=0))


@fitted_kind
@dataclass(frozen=True)
class ActiveStructures:
    """The active set of a potential; L models, B parts of it, m columns.

    Attributes:
        settings: what its rows are.
        matrix: [L, B, m, m] float64, an active row in each row.
        inverse: [L, B, m, m] float64, of each matrix.
        owner: [L, B, m, 2] int, the structure that a row is of, and its atom (-1: the structure as a whole); -1, -1
            where a row is there from the start.
        structures: those that have rows in it, without labels.
        offered: structures that were offered to it so far.
    """

    kind: ClassVar[str] = "active_set"
    version: ClassVar[int] = 1

    settings: ActiveSetSettings
    matrix: np.ndarray
    inverse: np.ndarray
    owner: np.ndarray
    structures: tuple[Atoms, ...] = field(default=())
    offered: int = 0

    @property
    def filled(self) -> int:
        """Rows of structures in it, of all models and parts."""
        return int(np.sum(self.owner[..., 0] >= 0))

    def grades_on_device(self, precision: str) -> Grades:
        """What gives grades from predictions of some precision; of linear parameters."""
        inverse = cast(jax.Array, self.inverse.astype(precision))  # left on the host, where float64 stays what it is
        return Grades(inverse, self.settings.mode == "configuration", self.settings.per_atom)

    def grades(self, rows: Rows) -> np.ndarray:
        """The grade of each row, [n]: ``max_j |b A^-1|_j``, and the root mean square of it over models."""
        found = np.zeros(rows.values.shape[:2])
        for model, b in np.ndindex(*self.inverse.shape[:2]):
            mine = rows.block == b
            entries = rows.values[model, mine] @ self.inverse[model, b]
            found[model, mine] = np.max(np.abs(entries), axis=-1, initial=0)
        if len(found) == 1:
            return np.asarray(found[0])
        return np.asarray(np.sqrt(np.mean(found**2, axis=0)))

    def offered_rows(
        self, rows: Rows, structures: Sequence[Atoms], *, threshold: float | None = None
    ) -> tuple[Self, list[int]]:
        """The set after rows were offered to it, swap by swap from what it is.

        Args:
            rows: of the structures.
            structures: whose rows these are.
            threshold: entry above which a row enters; that of the settings for offers by default.

        Returns:
            the set, and which of the structures have rows in it.
        """
        return self.offered_in_parts(lambda: (rows,), structures, threshold=threshold)

    def offered_in_parts(
        self, parts: Callable[[], Iterable[Rows]], structures: Sequence[Atoms], *, threshold: float | None = None
    ) -> tuple[Self, list[int]]:
        """As `offered_rows`, of rows that are looked at some at a time, so that memory does not grow with their number.

        Where a part has changed the set, rows of the parts before may enter: they come again until the volume stays.

        Args:
            parts: gives the rows of the structures part after part, each time that it is called; ``structure`` counts
                through all of them.
            structures: whose rows these are.
            threshold: as for `offered_rows`.
        """
        limit = self.settings.offer_threshold if threshold is None else threshold
        matrix, inverse, owner = self.matrix.copy(), self.inverse.copy(), self.owner.copy()
        first = len(self.structures)
        for _ in range(_PASSES):
            before, number = _volume(matrix), 0
            for rows in parts():
                number += 1
                for model, b in np.ndindex(*matrix.shape[:2]):
                    mine = np.flatnonzero(rows.block == b)
                    found = _swapped(rows.values[model, mine], matrix[model, b], limit)
                    entered = np.asarray(found.rows) >= 0
                    if not entered.any():
                        continue
                    matrix[model, b], inverse[model, b] = found.matrix, found.inverse
                    which = mine[np.asarray(found.rows)[entered]]
                    owner[model, b, entered] = np.stack([first + rows.structure[which], rows.atom[which]], axis=-1)
            if number <= 1 or _volume(matrix) - before <= _GROWTH:
                break
        stands = [int(n) - first for n in np.unique(owner[..., 0]) if n >= first]
        count, kept = self.offered + len(structures), _pruned(owner, (*self.structures, *structures))
        return replace(self, matrix=matrix, inverse=inverse, offered=count, **kept), stands

    def arrays(self) -> Mapping[str, np.ndarray]:
        """Matrices, owners and structures."""
        return {"matrix": self.matrix, "inverse": self.inverse, "owner": self.owner} | _packed(self.structures)

    def numbers(self) -> Mapping[str, Any]:
        """Settings and counts."""
        told = {"settings": self.settings.model_dump(mode="json"), "offered": self.offered, "filled": self.filled}
        return {**told, "structures": len(self.structures)}

    @classmethod
    def restored(cls, arrays: Mapping[str, np.ndarray], numbers: Mapping[str, Any]) -> Self:
        """From what was saved."""
        settings = ActiveSetSettings.model_validate(numbers["settings"])
        matrix, inverse, owner = arrays["matrix"], arrays["inverse"], arrays["owner"]
        structures = _unpacked(arrays)
        square = matrix.ndim == 4 and matrix.shape[2] == matrix.shape[3]
        if not square or matrix.shape != inverse.shape or owner.shape != (*matrix.shape[:3], 2):
            raise ValueError("matrix, inverse and owner do not fit each other")
        if owner[..., 0].max(initial=-1) >= len(structures):
            raise ValueError("a row is of a structure that is not there")
        return cls(settings, matrix, inverse, owner, structures, int(numbers["offered"]))


def empty_set(
    parts: Iterable[Rows], settings: ActiveSetSettings, precision: np.dtype | type | str
) -> ActiveStructures:
    """An active set before anything has entered it.

    Args:
        parts: rows that will be offered, at least one part of them: they say how many columns there are, and how large
            these are, in the part where they are largest.
        settings: of the set.
        precision: that rows are computed in; what rounding leaves of a column does not count as a direction that is
            spanned.
    """
    least = _ROUNDING * float(np.finfo(np.dtype(precision)).eps)
    size: np.ndarray | None = None
    for rows in parts:
        if size is None:
            shape = (len(rows.values), rows.blocks, rows.values.shape[-1])
            size = np.full(shape, 1.0 if settings.start == "identity" else settings.epsilon)
        if settings.start == "identity":
            break
        for model, b in np.ndindex(*size.shape[:2]):
            own = rows.values[model, rows.block == b]
            if len(own):
                size[model, b] = np.maximum(size[model, b], least * np.sqrt(np.mean(own**2, axis=0)))
    assert size is not None
    columns = size.shape[-1]
    matrix = size[..., None] * np.eye(columns)
    inverse = np.eye(columns) / size[..., None]
    return ActiveStructures(settings, matrix, inverse, np.full((*size.shape, 2), -1, np.int64))


def built(
    rows: Rows, structures: Sequence[Atoms], settings: ActiveSetSettings, precision: np.dtype | type | str
) -> ActiveStructures:
    """The active set of some structures, from their rows."""
    return empty_set((rows,), settings, precision).offered_rows(rows, structures, threshold=settings.threshold)[0]


def standing(rows: Rows, active: ActiveStructures) -> Rows:
    """Of the rows of an active set's structures, as another potential sees them, those that stand in the set."""
    owners = active.owner.reshape(-1, 2)
    wanted = {(int(s), int(a)) for s, a in owners if s >= 0}
    kept = [n for n, one in enumerate(zip(rows.structure.tolist(), rows.atom.tolist(), strict=True)) if one in wanted]
    return replace(
        rows,
        values=rows.values[:, kept],
        block=rows.block[kept],
        structure=rows.structure[kept],
        atom=rows.atom[kept],
    )


def _volume(matrix: np.ndarray) -> float:
    """Logarithm of the volume that all parts of a set span."""
    return float(np.sum(np.linalg.slogdet(matrix)[1]))


@jax.jit
@full_precision
def _swap(rows: jax.Array, matrix: jax.Array, threshold: jax.Array) -> ActiveSet:
    blank = jnp.full(len(matrix), -1, jnp.int32)
    start = ActiveSet(matrix, matrix, blank, jnp.zeros(()), jnp.zeros((), jnp.int32))
    return active_set(rows, start, threshold=threshold)


def _swapped(rows: np.ndarray, matrix: np.ndarray, threshold: float) -> ActiveSet:
    """`selection.active_set` in float64, with room for a growing number of rows, so that few shapes occur."""
    room = int(2 ** np.ceil(np.log2(max(len(rows), 64))))
    padded = np.zeros((room, matrix.shape[0]))  # rows of zeros never enter
    padded[: len(rows)] = rows
    with jax.enable_x64(True):
        found = _swap(jax.device_put(padded), jax.device_put(matrix), jnp.asarray(threshold))
        return jax.device_get(found)  # type: ignore[no-any-return]


def _pruned(owner: np.ndarray, structures: Sequence[Atoms]) -> dict[str, Any]:
    """Owners and structures, without those that have no row any more."""
    used = np.unique(owner[..., 0])
    used = used[used >= 0]
    place = np.full(len(structures) + 1, -1)
    place[used] = np.arange(len(used))
    moved = np.stack([place[owner[..., 0]], owner[..., 1]], axis=-1)  # the last place, of -1, stays -1
    return {"owner": moved, "structures": tuple(bare(structures[n]) for n in used)}


def _packed(structures: Sequence[Atoms]) -> dict[str, np.ndarray]:
    """Structures as arrays; n of them, A atoms together."""
    states = [stated_state(atoms) for atoms in structures]
    atoms = structures
    return {
        "counts": np.array([len(one) for one in atoms], np.int64),
        "numbers": np.concatenate([np.zeros(0, np.int64), *(one.numbers for one in atoms)]),
        "positions": np.concatenate([np.zeros((0, 3)), *(one.positions for one in atoms)]),
        "cells": np.array([one.cell.array for one in atoms]).reshape(-1, 3, 3),
        "pbc": np.array([one.pbc for one in atoms], bool).reshape(-1, 3),
        "charge": np.array([state.get("charge", 0) for state in states], np.int64),
        "spin": np.array([state.get("spin", 0) for state in states], np.int64),
    }


def _unpacked(arrays: Mapping[str, np.ndarray]) -> tuple[Atoms, ...]:
    counts = arrays["counts"]
    ends = np.cumsum(counts)
    if len(arrays["numbers"]) != counts.sum() or arrays["positions"].shape != (counts.sum(), 3):
        raise ValueError("counts, numbers and positions do not fit each other")
    found = []
    for n, (count, end) in enumerate(zip(counts.tolist(), ends.tolist(), strict=True)):
        atoms = Atoms(
            numbers=arrays["numbers"][end - count : end],
            positions=arrays["positions"][end - count : end],
            cell=arrays["cells"][n],
            pbc=arrays["pbc"][n],
        )
        state = {name: int(arrays[name][n]) for name in ("charge", "spin") if arrays[name][n]}
        atoms.info = dict(state)
        found.append(atoms)
    return tuple(found)
