"""MaxVol: the active set of rows that spans the largest volume, the extrapolation grade, and selection by both.

A row b is written as ``c A`` with the active set A [m, m].  Where an entry of c exceeds 1 in size, putting the row in
the place of that entry's active row multiplies ``|det A|`` by it; where none does, the row interpolates, and its grade
``gamma = max_j |c_j|`` is at most 1.  Sources: Goreinov et al., Matrix Methods (2010); Podryabinkin and Shapeev,
Comput. Mater. Sci. 140, 171 (2017).
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from flax import struct
from pydantic import Field

from almlip_jax.kernels import unit_diagonal, wide
from almlip_jax.selection.base import ByFeatures, Candidates, LeafSelector, Selection, Selector, memoised
from almlip_jax.selection.rows import arrange, first_best, ties

_TRAINED = 1 + 1e-7  # threshold on the training set


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
    threshold: float = _TRAINED,
    epsilon: float = 1e-5,
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
        epsilon: size of the rows that stand in for what the rows offered do not span, in the unit of the rows.
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
def maxvol(k: int, features: str = "last_layer_gradient", threshold: float = 1.001, epsilon: float = 1e-5) -> Selector:
    """The candidates that enter the active set of the labelled structures.

    The active set is built from the labelled rows, then the pool is offered to it.  What has entered and is still
    there at the end is chosen, the highest grade with respect to the labelled set (``gain``) first: k at most, and
    fewer where fewer extrapolate.

    Args:
        k: largest number of choices.
        features: rows b; scaled to a mean square norm of 1 over the labelled set (over the pool, without one).
        threshold: a candidate enters where an entry exceeds it.
        epsilon: size of the rows that stand in for directions nothing spans.

    >>> import jax
    >>> from almlip_jax.selection import Candidates, maxvol, select
    >>> pool = Candidates.of({"latent": [[0.1, 0.0], [2.0, 0.0], [2.1, 0.0], [0.0, 1.0]]})
    >>> labelled = Candidates.of({"latent": [[1.0, 0.0]]})
    >>> select(maxvol(2, features="latent"), jax.random.key(0), pool, labelled).indices.tolist()
    [3, 2]
    """

    def select(key: jax.Array, pool: Candidates, labelled: Candidates) -> Selection:
        order, rows = arrange(pool, labelled, features)
        scale = unit_diagonal(rows.x, rows.known, rows.counts, rows.usable)
        offered = (scale * rows.x).astype(wide())
        trained = active_set((scale * rows.known).astype(wide()), epsilon=epsilon)
        active = active_set(offered, trained, threshold=threshold)
        n = offered.shape[0]
        entered = jnp.zeros((n + 1,), bool).at[jnp.where(active.rows < 0, n, active.rows)].set(True)[:n]
        grade = jnp.where(entered & rows.usable, extrapolation_grade(trained, offered), -jnp.inf)
        best = jnp.argsort(-grade, stable=True)  # rows are in order of id
        best = jnp.pad(best, (0, max(k - n, 0)))[:k]
        there = (jnp.arange(k) < n) & jnp.isfinite(grade[best])
        return Selection(indices=order[best], valid=there, gain=jnp.where(there, grade[best], jnp.nan))

    return select


def _sizes(entries: jax.Array) -> jax.Array:
    """Largest size in each row, [n]."""
    return jnp.max(jnp.abs(entries), axis=1, initial=0)


def _place(entries: jax.Array, sizes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Row and column of the largest entry; the first row, then the first column among equals."""
    i = first_best(sizes, jnp.ones(sizes.shape, bool))
    size = jnp.abs(entries[i])
    return i, jnp.argmax(size >= sizes[i] * (1 - ties(sizes))).astype(jnp.int32)


class MaxvolSettings(ByFeatures, LeafSelector):
    """What enters the active set of largest volume of everything labelled."""

    kind: Literal["maxvol"] = "maxvol"
    threshold: float = Field(default=1.001, gt=1, le=1e6)
    """Grade above which a candidate enters."""
    epsilon: float = Field(default=1e-5, ge=1e-12, le=1.0)
    """Size of the rows for directions that nothing spans, relative to features of mean square norm 1."""

    def build(self, k: int) -> Selector:
        """See `maxvol`."""
        return maxvol(k, self.features, self.threshold, self.epsilon)
