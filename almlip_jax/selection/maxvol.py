"""MaxVol: the active set of rows that spans the largest volume, the extrapolation grade, and selection by both.

A row b is written as ``c A`` with the active set A [m, m].  Where an entry of c exceeds 1 in size, putting the row in
the place of that entry's active row multiplies ``|det A|`` by it; where none does, the row interpolates, and its grade
``gamma = max_j |c_j|`` is at most 1.  Sources: Goreinov et al., Matrix Methods (2010); Podryabinkin and Shapeev,
Comput. Mater. Sci. 140, 171 (2017).
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Self, TypeAlias

import jax
import jax.numpy as jnp
from flax import struct
from pydantic import Field, model_validator

from almlip_jax.errors import InputError
from almlip_jax.feature_names import AtomFeatureName, FeatureName, atom_feature_names
from almlip_jax.kernels import unit_diagonal, wide
from almlip_jax.selection.base import ByFeatures, Candidates, LeafSelector, Selection, Selector, memoised
from almlip_jax.selection.rows import arrange, first_best, ties
from almlip_jax.selection.scores import column

Mode: TypeAlias = Literal["configuration", "neighborhood"]
"""Whether structures have a row each, or their atoms."""
Start: TypeAlias = Literal["epsilon", "identity"]
"""What stands in a set for directions that nothing spans."""

_TRAINED = 1 + 1e-7  # threshold on the training set
_ENTRIES = 2**26  # of rows that are looked at together: half a gigabyte in float64, of which there are several copies
_PASSES = 20  # over rows in several blocks, at most; few are needed
_GROWTH = 1e-6  # of the logarithm of the volume, which a pass has to gain for another one to follow


@struct.dataclass
class ActiveSet:
    """m rows of m columns, and where they come from.

    Attributes:
        matrix: [m, m] A, an active row in each row.
        inverse: [m, m] A^-1.
        rows: [m] int, which of the offered rows stands there; -1 for a row that was there from the start.
        largest: [] largest |entry| of ``rows A^-1`` over the offered rows.
        swaps: [] how many rows were put in.
    """

    matrix: jax.Array
    inverse: jax.Array
    rows: jax.Array
    largest: jax.Array
    swaps: jax.Array


def active_set(
    rows: jax.Array,
    start: ActiveSet | None = None,
    *,
    threshold: float | jax.Array = _TRAINED,
    epsilon: float | jax.Array = 1e-5,
    max_swaps: int | None = None,
) -> ActiveSet:
    """Puts rows into an active set, the largest entry of ``rows A^-1`` first, until none exceeds a threshold.

    Each swap changes inverse and entries by a rank-one (Sherman-Morrison) step; both are computed afresh after every m
    swaps and at the end, and swapping goes on if that shows an entry above the threshold.  Use float64: with rows of
    size epsilon in the set, float32 has no digits left.

    Args:
        rows: [n, m]; rows of zeros or of values that are not finite never enter.
        start: the active set to offer them to; epsilon times the identity by default.
        threshold: above 1; 1 + 1e-7 to build a set from training rows, 1.001 to 1.1 to offer it new ones.
        epsilon: size of the rows that stand in for what the rows offered do not span, in the unit of the rows; [m] for
            each column its own.  At 1 these are the rows of the identity, which smaller rows do not replace.
        max_swaps: the most swaps; 100 m by default.

    Returns:
        the new `ActiveSet`, whose ``rows`` and ``largest`` speak of the rows offered here.

    >>> import jax.numpy as jnp
    >>> from almlip_jax.selection import active_set
    >>> active = active_set(jnp.asarray([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [3.0, 0.0]]))
    >>> sorted(active.rows.tolist())  # the rows that span the largest volume
    [1, 3]
    """
    n, m = rows.shape
    most = 100 * m if max_swaps is None else max_swaps
    rows = jnp.where(jnp.all(jnp.isfinite(rows), axis=1, keepdims=True), rows, 0)
    matrix = epsilon * jnp.eye(m, dtype=rows.dtype) if start is None else start.matrix
    nobody = jnp.full((m,), -1, jnp.int32)

    def afresh(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
        inverse = jnp.linalg.inv(matrix)
        return inverse, rows @ inverse

    def swap(carry: tuple) -> tuple:
        matrix, inverse, entries, places, sizes, swaps = carry
        i, j = _place(entries, sizes)
        change = entries[i].at[j].add(-1) / entries[i, j]
        inverse = inverse - inverse[:, j, None] * change
        entries = entries - entries[:, j, None] * change
        return matrix.at[j].set(rows[i]), inverse, entries, places.at[j].set(i), _sizes(entries), swaps + 1

    def unfinished(carry: tuple, limit: int | jax.Array = most) -> jax.Array:
        return (jnp.max(carry[4], initial=0) > threshold) & (carry[5] < jnp.minimum(limit, most))

    def swap_many(carry: tuple) -> tuple:
        limit = carry[5] + m
        matrix, _, _, places, _, swaps = jax.lax.while_loop(lambda one: unfinished(one, limit), swap, carry)
        inverse, entries = afresh(matrix)
        return matrix, inverse, entries, places, _sizes(entries), swaps

    inverse, entries = afresh(matrix)
    carry = (matrix, inverse, entries, nobody, _sizes(entries), jnp.zeros((), jnp.int32))
    matrix, inverse, _, places, sizes, swaps = jax.lax.while_loop(unfinished, swap_many, carry)
    return ActiveSet(matrix, inverse, places, jnp.max(sizes, initial=0), swaps)


def extrapolation_grade(active: ActiveSet, rows: jax.Array) -> jax.Array:
    """How far rows [..., m] lie outside an active set: ``gamma = max_j |b A^-1|_j``, [...]; interpolation up to 1.

    >>> import jax.numpy as jnp
    >>> from almlip_jax.selection import active_set, extrapolation_grade
    >>> active = active_set(jnp.asarray([[1.0, 0.0], [0.0, 1.0]]))
    >>> extrapolation_grade(active, jnp.asarray([[0.5, 0.5], [2.0, 0.0]])).round(2).tolist()
    [0.5, 2.0]
    """
    return jnp.max(jnp.abs(rows @ active.inverse), axis=-1)


@memoised
def maxvol(
    k: int,
    features: str = "last_layer_gradient",
    threshold: float = 1.001,
    epsilon: float = 1e-5,
    mode: Mode = "configuration",
) -> Selector:
    """The candidates that enter the active set of the labelled structures.

    The active set is built from the labelled rows, then the pool is offered to it.  What has entered and is still
    there at the end is chosen, the highest grade with respect to the labelled set (``gain``) first: k at most, and
    fewer where fewer extrapolate.

    Args:
        k: largest number of choices.
        features: rows b; scaled to a mean square norm of 1 over the labelled set (over the pool, without one).
        threshold: a candidate enters where an entry exceeds it.
        epsilon: size of the rows that stand in for directions nothing spans; 1 takes the rows of the identity.
        mode: whether rows are those of structures (``configuration``), or of their atoms (``neighborhood``): a
            structure is then chosen where one of its atoms is in the set, and its grade is the largest of an atom.

    >>> import jax
    >>> from almlip_jax.selection import Candidates, maxvol, select
    >>> pool = Candidates.of({"latent": [[0.1, 0.0], [2.0, 0.0], [2.1, 0.0], [0.0, 1.0]]})
    >>> labelled = Candidates.of({"latent": [[1.0, 0.0]]})
    >>> select(maxvol(2, features="latent"), jax.random.key(0), pool, labelled).indices.tolist()
    [3, 2]
    """
    shown = _structures if mode == "configuration" else _atoms

    def select(key: jax.Array, pool: Candidates, labelled: Candidates) -> Selection:
        """The candidates that enter and stay, the largest grade first."""
        order, offered, known = shown(pool, labelled, features)
        scale = unit_diagonal(offered.norms, known.norms, known.place >= 0, offered.place >= 0)
        first = epsilon * jnp.eye(known.raw.shape[1], dtype=wide())
        trained, _ = _offered(known.blocks(scale), first, _TRAINED)
        blocks = offered.blocks(scale)
        _, places = _offered(blocks, trained, threshold)
        n = order.shape[0]
        owner = jnp.where(offered.place >= 0, offered.owner, n)
        stands = jnp.where(places < 0, n, owner[places])
        entered = jnp.zeros((n + 1,), bool).at[stands].set(True)[:n]
        grade = jnp.zeros((n + 1,), wide()).at[owner].max(_grades(blocks, trained)[: owner.shape[0]])[:n]
        grade = jnp.where(entered, grade, -jnp.inf)
        best = jnp.argsort(-grade, stable=True)  # structures are in order of id
        best = jnp.pad(best, (0, max(k - n, 0)))[:k]
        there = (jnp.arange(k) < n) & jnp.isfinite(grade[best])
        return Selection(indices=order[best], valid=there, gain=jnp.where(there, grade[best], jnp.nan))

    return select


class _Blocks(NamedTuple):
    """Rows as they are looked at, some at a time: the raw ones [t, d], places [blocks, r] in them, and their factor."""

    raw: jax.Array
    places: jax.Array
    scale: jax.Array

    def block(self, number: jax.Array | int) -> jax.Array:
        """Rows [r, d] of one block, in the widest precision; zeros where there is none."""
        places = self.places[number]
        return jnp.where(places[:, None] >= 0, self.scale * self.raw[places].astype(wide()), 0)


class _Offered(NamedTuple):
    """Rows in some order: where in the raw ones [t, d] they stand [r] (-1: none), and whose they are [r].

    Never all of them together in that order: there may be many.
    """

    raw: jax.Array
    place: jax.Array
    owner: jax.Array

    @property
    def norms(self) -> jax.Array:
        """Their norms [r, 1]; 0 where there is none."""
        squares = jnp.sum(self.raw**2, axis=1)[self.place]
        return jnp.sqrt(jnp.where(self.place >= 0, squares, 0))[:, None]

    def blocks(self, scale: jax.Array) -> _Blocks:
        """All at once where they are few."""
        number, columns = self.place.shape[0], self.raw.shape[1]
        count = -(-number // max(_ENTRIES // columns, 1))
        room = -(-number // max(count, 1))
        places = jnp.pad(self.place, (0, count * room - number), constant_values=-1)
        return _Blocks(self.raw, places.reshape(count, room), scale)


def _offered(blocks: _Blocks, matrix: jax.Array, threshold: float) -> tuple[jax.Array, jax.Array]:
    """The active set [m, m] after rows were offered to one, and which of them stands in each place [m], -1 for none.

    Where a block has changed the set, rows of the blocks before may enter: they come again until the volume stays.
    """
    room, blank = blocks.places.shape[1], jnp.zeros((), jnp.int32)

    def of_block(number: jax.Array | int, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        matrix, places = carry
        start = ActiveSet(matrix, matrix, places, jnp.zeros(()), blank)
        found = active_set(blocks.block(number), start, threshold=threshold)
        return found.matrix, jnp.where(found.rows >= 0, found.rows + number * room, places)

    nobody = (matrix, jnp.full(matrix.shape[:1], -1, jnp.int32))
    if len(blocks.places) == 1:
        return of_block(0, nobody)

    def once(carry: tuple) -> tuple:
        found, before, _, passes = carry
        found = jax.lax.fori_loop(0, len(blocks.places), of_block, found)
        volume = jnp.linalg.slogdet(found[0])[1]
        return found, volume, volume - before > _GROWTH, passes + 1

    def unfinished(carry: tuple) -> jax.Array:
        return carry[2] & (carry[3] < _PASSES)

    volume = jnp.linalg.slogdet(matrix)[1]
    return jax.lax.while_loop(unfinished, once, (nobody, volume, jnp.asarray(True), blank))[0]  # type: ignore[no-any-return]


def _grades(blocks: _Blocks, matrix: jax.Array) -> jax.Array:
    """Grade of each row over an active set, [blocks * r]."""
    inverse = jnp.linalg.inv(matrix)
    return jax.lax.map(lambda number: _sizes(blocks.block(number) @ inverse), jnp.arange(len(blocks.places))).ravel()


def _structures(pool: Candidates, labelled: Candidates, features: str) -> tuple[jax.Array, _Offered, _Offered]:
    """Rows of structures: the order [n] that candidates are taken in, their rows, and those of the labelled set."""
    order, rows = arrange(pool, labelled, features)
    numbers, of_known = jnp.arange(len(rows.x)), jnp.arange(len(rows.known))
    of_pool = _Offered(rows.x, jnp.where(rows.usable, numbers, -1), numbers)
    return order, of_pool, _Offered(rows.known, jnp.where(rows.counts, of_known, -1), of_known)


def _atoms(pool: Candidates, labelled: Candidates, features: str) -> tuple[jax.Array, _Offered, _Offered]:
    """The same of their atoms; where a row of one is not finite, its structure is no candidate."""
    order, of_pool = _atoms_of(pool, features)
    return order, of_pool, _atoms_of(labelled, features)[1]


def _atoms_of(some: Candidates, features: str) -> tuple[jax.Array, _Offered]:
    environments = some.environments
    if environments is None:
        raise InputError(f"candidates have no rows of atoms '{features}': they were made without environments.")
    rows, members = column(environments.rows, features, "rows of atoms"), environments.members
    finite = jnp.all(jnp.isfinite(rows), axis=1)
    usable = some.valid & jnp.all(jnp.where(members >= 0, finite[members], True), axis=1)
    order = jnp.lexsort((some.id, ~usable)).astype(jnp.int32)
    place = jnp.where(usable[order][:, None], members[order], -1)
    owner = jnp.broadcast_to(jnp.arange(len(order))[:, None], place.shape)
    return order, _Offered(rows, place.reshape(-1), owner.reshape(-1))


def _sizes(entries: jax.Array) -> jax.Array:
    """Largest size in each row, [n]."""
    return jnp.max(jnp.abs(entries), axis=1, initial=0)


def _place(entries: jax.Array, sizes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Row and column of the largest entry; the first row, then the first column among equals."""
    i = first_best(sizes, jnp.ones(sizes.shape, bool))
    size = jnp.abs(entries[i])
    return i, jnp.argmax(size >= sizes[i] * (1 - ties(sizes))).astype(jnp.int32)


class MaxvolSettings(ByFeatures, LeafSelector):
    """What enters the active set of largest volume of everything labelled: ``select-add`` of MLIP-2."""

    kind: Literal["maxvol"] = "maxvol"
    mode: Mode = "configuration"
    """Whether structures have a row each, or their atoms: of the features of atoms, then."""
    threshold: float = Field(default=1.001, gt=1, le=1e6)
    """Grade above which a candidate enters."""
    start: Start = "epsilon"
    """What stands in the set for directions that nothing spans: epsilon times the identity, or the identity."""
    epsilon: float = Field(default=1e-5, ge=1e-12, le=1.0)
    """Size of these rows, relative to features of mean square norm 1."""

    @model_validator(mode="after")
    def _rows_of_atoms(self) -> Self:
        if self.mode == "neighborhood" and self.features not in atom_feature_names():
            known = ", ".join(atom_feature_names())
            raise ValueError(f"mode neighborhood needs features of atoms ({known}), not {self.features}.")
        return self

    @property
    def feature_names(self) -> tuple[FeatureName, ...]:
        """Those of structures, if it looks at these."""
        return (self.features,) if self.mode == "configuration" else ()

    @property
    def atom_feature_names(self) -> tuple[AtomFeatureName, ...]:
        """Those of atoms, likewise."""
        return (self.features,) if self.mode == "neighborhood" else ()

    def build(self, k: int) -> Selector:
        """See `maxvol`."""
        epsilon = 1.0 if self.start == "identity" else self.epsilon
        return maxvol(k, self.features, self.threshold, epsilon, self.mode)
