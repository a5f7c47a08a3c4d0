"""The search for neighbours through bins: for many atoms, with work and memory in proportion to their number.

Space is divided into bins no thinner than the radius of the search, and each atom is held against those in the bins
about its own.  Bins are slices of the cell along periodic directions, whatever its shape, and the images of atoms come
from counting bins past its borders; along open directions they are slices across it, between which gaps wider than the
radius are closed, so that an atom that flies away needs no bins on its way.  Walkers may differ in cell and periodic
directions; they share the number of bins.

The slot of an edge is its rank among those candidates of its atom that are close enough, which are kept as the bits of
a word for each bin.  The place of an atom in its bin and the way from bin to bin say which bit is that of the opposite
edge, so its slot is a matter of counting bits: nothing is compared with anything for it.

The cell list of jax-md puts atoms into bins as well.  It wants periodic directions with three bins or more and no
padding, its neighbour list on top upper triangular cells and one cell for all, and neither tells opposite slots.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from almlip_jax.compilation import backend
from almlip_jax.materialise import materialised
from almlip_jax.precision import full_precision
from almlip_jax.structures.slots import Layout, Slots, periodic_and_dual

_ROUNDING = 1e-4  # of the radius; more than float32 loses in the coordinates of bins
_FARTHEST = 1e9  # Angstrom; what is farther from the origin, or is not a number, has no edges
_HEADROOM = 1.25  # of a bin's room over the fullest when it was made
_BINS_AN_ATOM = 4  # at most, of the atoms of a walker
_BITS = 32  # of a word
_BLOCK = {True: 2**18, False: 2**24}  # candidate edges that a build holds at a time, on a CPU and elsewhere


@dataclass(frozen=True)
class Bins:
    """How space is divided; static.

    Attributes:
        grid: number of bins along each direction of the cell.
        reach: how many bins to either side the radius reaches.
        room: atoms that a bin holds.
        open: directions in which some walker is not periodic.
    """

    grid: tuple[int, int, int]
    reach: tuple[int, int, int]
    room: int
    open: tuple[bool, ...]

    @classmethod
    def of(cls, held: Mapping[str, Any]) -> Bins:
        """Those that were kept as numbers and lists."""
        return cls(_three(held["grid"]), _three(held["reach"]), int(held["room"]), tuple(map(bool, held["open"])))

    @property
    def number(self) -> int:
        """Of bins of one walker."""
        return int(np.prod(self.grid))

    @property
    def words(self) -> int:
        """Of bits for the places of a bin."""
        return -(-self.room // _BITS)


def bins_for(layout: Layout, radius: float, before: Bins | None = None) -> Bins:
    """Bins for some walkers, made on the host.

    Args:
        layout: of the atoms.
        radius: Angstrom.
        before: bins that were used until now, which are kept where they serve; else the new ones are no thinner, reach
            no less far and hold no less.
    """
    pbc, wide = np.asarray(layout.pbc, bool), radius * (1 + _ROUNDING)
    is_open = tuple(not bool(one) for one in np.all(pbc, axis=0))
    if before is not None and _serve(before, layout, radius):
        return before
    thinness, spans = (np.asarray(x, np.float64) for x in _extents(layout, radius, is_open))
    grid = np.floor(spans / wide) + 2
    with np.errstate(divide="ignore"):
        most = np.floor(1 / (wide * thinness))
    grid = np.where(pbc.any(axis=0), np.maximum(most, 1), grid).astype(int)
    if before is not None:
        grid = np.where(pbc.any(axis=0), np.minimum(grid, before.grid), np.maximum(grid, before.grid))
    while np.prod(grid) > max(_BINS_AN_ATOM * layout.atom_mask.shape[1], 27):
        grid[np.argmax(grid)] -= 1 + grid.max() // 16
    reach = np.where(pbc.any(axis=0), np.ceil(wide * thinness * grid), grid > 1).astype(int)
    if before is not None:
        reach = np.maximum(reach, before.reach)
    empty = Bins(_three(grid), _three(reach), 1, is_open)
    room = int(np.ceil(_HEADROOM * int(_state(layout, radius, empty)[0])))
    return replace(empty, room=max(room, 1 if before is None else before.room))


def _serve(bins: Bins, layout: Layout, radius: float) -> bool:
    """Whether all edges of some walkers are found in bins."""
    known = set(np.flatnonzero(~np.asarray(layout.pbc).all(axis=0))) <= set(np.flatnonzero(bins.open))
    if not known:
        return False
    fullest, too_thin = _state(layout, radius, bins)
    return int(fullest) <= bins.room and not bool(too_thin)


def binned_slots(layout: Layout, radius: float, bins: Bins, capacity: int) -> tuple[Slots, jax.Array, jax.Array]:
    """The edges of walkers, in a number of slots for each atom.

    Args:
        layout: of the atoms.
        radius: Angstrom, below which two atoms have an edge.
        bins: how space is divided.
        capacity: slots K; further edges of an atom are lost.

    Returns:
        the slots, the most edges that an atom has, and whether some may have been missed: a bin was too full, or a cell
        too thin for its bins.
    """
    walkers, atoms = layout.atom_mask.shape
    filled = _filled(layout, radius, bins)
    close = _close(layout, filled, radius, bins)
    before = jnp.cumsum(jax.lax.population_count(close).astype(jnp.int32), axis=1)
    counts = before[:, -1]
    before = jnp.pad(before[:, :-1], ((0, 0), (1, 0)))  # edges of the words before each
    own, slot = jnp.arange(walkers * atoms, dtype=jnp.int32)[:, None], jnp.arange(capacity, dtype=jnp.int32)

    def places_in_bins(counts: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        there = slot < counts[:, None]
        word = jnp.where(there, jnp.sum(before[:, None] <= slot[:, None], axis=-1) - 1, 0)  # the last that begins there
        step, part = jnp.divmod(word, bins.words)
        at = _nth_bit(jnp.take_along_axis(close, word, axis=1), slot - jnp.take_along_axis(before, word, axis=1))
        return there, step, jnp.minimum(part * _BITS + at, bins.room - 1)

    some = counts[0] >= 0
    there, step, at = materialised(places_in_bins, some, counts)
    bin, passed = materialised(lambda step: _reached(layout, filled, bins, own, step), some, step)
    neighbors = materialised(lambda bin, at: jnp.where(there, filled.table[bin, at], own), some, bin, at)
    reverse, seen = _opposite(close, before, filled, bins, step, neighbors)
    # an edge as long as the radius up to rounding could be seen from one end only
    mask = there & seen & (reverse < capacity)
    found = Slots(
        neighbors=jnp.where(mask, neighbors, own) - own // atoms * atoms,
        shifts=jnp.where(mask[..., None], passed + filled.home[:, None] - filled.home[neighbors], 0),
        mask=mask,
        reverse=jnp.where(mask, reverse, slot),
    )
    slots = jax.tree.map(lambda x: x.reshape(walkers, atoms, *x.shape[1:]), found)
    return slots, jnp.max(counts), (filled.fullest > bins.room) | _too_thin(layout, radius, bins)


def largest_binned_count(layout: Layout, radius: float, bins: Bins) -> jax.Array:
    """The most edges that an atom has, a scalar; arguments as for `binned_slots`."""
    close = _close(layout, _filled(layout, radius, bins), radius, bins)
    return jnp.max(jnp.sum(jax.lax.population_count(close).astype(jnp.int32), axis=1))


# -- where atoms lie in bins -------------------------------------------------------------------------------------------


class _Coordinates(NamedTuple):
    """Where atoms lie along the directions of their cell.

    Attributes:
        along: [W, N, 3], fractions of a period, from 0 to 1; along open directions Angstrom from the first atom, wide
            gaps closed.
        home: [W, N, 3] int32, periods that an atom was brought back by.
        present: [W, N] bool, real atoms at layout that are numbers.
    """

    along: jax.Array
    home: jax.Array
    present: jax.Array


def _coordinates(layout: Layout, radius: float, is_open: tuple[bool, ...]) -> _Coordinates:
    periodic, dual = periodic_and_dual(layout.cells, layout.pbc)
    present = layout.atom_mask & jnp.all(jnp.abs(layout.positions) < _FARTHEST, axis=-1)
    positions = jnp.where(present[..., None], layout.positions, 0)
    fractions = jnp.sum(positions[:, :, None] * dual[:, None], axis=-1)
    home = jnp.where(layout.pbc[:, None], jnp.floor(fractions), 0)
    along = fractions - home
    if any(is_open):
        normals = _normals(periodic, dual, layout.pbc)
        across = jnp.sum(positions[:, :, None] * normals[:, None], axis=-1)
        close = jax.vmap(jax.vmap(functools.partial(_gaps_closed, radius=radius), (1, None), 1))
        along = jnp.where(layout.pbc[:, None], along, close(across, present))
    return _Coordinates(along, home.astype(jnp.int32), present)


def _gaps_closed(values: jax.Array, present: jax.Array, radius: float) -> jax.Array:
    """Coordinates [N] from the least of those that are present, without what gaps are wider than the radius.

    No two atoms within the radius have such a gap between them.
    """
    values = jnp.where(present, values, jnp.min(jnp.where(present, values, jnp.inf)))
    values = jnp.where(jnp.isfinite(values), values, 0)
    order = jnp.argsort(values)
    gaps = jnp.diff(values[order], prepend=jnp.min(values))
    return jnp.zeros_like(values).at[order].set(jnp.cumsum(jnp.minimum(gaps, radius)), unique_indices=True)


def _normals(periodic: jax.Array, dual: jax.Array, pbc: jax.Array) -> jax.Array:
    """Unit vectors normal to the periodic directions and to each other, [W, 3, 3] in rows; for open directions."""
    left = jnp.eye(3, dtype=periodic.dtype) - jnp.sum(periodic[..., :, None] * dual[..., None, :], axis=1)
    found = []
    for direction in range(3):
        longest = jnp.argmax(jnp.sum(left**2, axis=-1), axis=-1)
        row = jnp.take_along_axis(left, longest[:, None, None], axis=1)[:, 0]
        row = row * jax.lax.rsqrt(jnp.maximum(jnp.sum(row**2, axis=-1, keepdims=True), 1e-12))
        row = jnp.where(pbc[:, direction, None], 0, row)
        left = left - row[:, :, None] * jnp.sum(row[:, :, None] * left, axis=1)[:, None]
        found.append(row)
    return jnp.stack(found, axis=1)


class _Filled(NamedTuple):
    """Bins with the atoms in them; A = W N atoms of all walkers, G bins of a walker.

    Attributes:
        table: [W G + 1, room] int32, the atoms of each bin, A where there is none; nothing is in the last one.
        bin: [A, 3] int32, number of an atom's bin along each direction.
        place: [A] int32, of an atom in its bin.
        home: [A, 3] int32, periods that an atom was brought back by.
        wrapped: [A, 3] Angstrom, where it then is.
        present: [A] bool.
        fullest: int32 scalar, the most atoms that a bin should hold.
    """

    table: jax.Array
    bin: jax.Array
    place: jax.Array
    home: jax.Array
    wrapped: jax.Array
    present: jax.Array
    fullest: jax.Array


def _filled(layout: Layout, radius: float, bins: Bins) -> _Filled:
    walkers, atoms = layout.atom_mask.shape
    total, everywhere = walkers * atoms, walkers * bins.number
    found = _coordinates(layout, radius, bins.open)
    grid = jnp.asarray(bins.grid, jnp.int32)
    scale = jnp.where(layout.pbc, grid.astype(found.along.dtype), 1 / (radius * (1 + _ROUNDING)))
    bin = jnp.clip((found.along * scale[:, None]).astype(jnp.int32), 0, grid - 1).reshape(total, 3)
    present = found.present.reshape(total)
    walker = jnp.repeat(jnp.arange(walkers, dtype=jnp.int32), atoms)
    key = jnp.where(present, _flat(bin, bins) + walker * bins.number, everywhere)
    order = jnp.argsort(key).astype(jnp.int32)
    first = jnp.searchsorted(key[order], jnp.arange(everywhere + 1, dtype=jnp.int32)).astype(jnp.int32)
    rank = jnp.zeros(total, jnp.int32).at[order].set(jnp.arange(total, dtype=jnp.int32), unique_indices=True)
    row = first[:-1, None] + jnp.arange(bins.room, dtype=jnp.int32)
    table = jnp.where(row < first[1:, None], order[jnp.minimum(row, total - 1)], total)
    back = jnp.sum(found.home[..., None] * periodic_and_dual(layout.cells, layout.pbc)[0][:, None], axis=-2)
    return _Filled(
        table=jnp.concatenate([table, jnp.full((1, bins.room), total, jnp.int32)]),
        bin=bin,
        place=rank - first[key],
        home=found.home.reshape(total, 3),
        wrapped=(layout.positions - back).reshape(total, 3),
        present=present,
        fullest=jnp.max(jnp.diff(first)),
    )


def _flat(bin: jax.Array, bins: Bins) -> jax.Array:
    """The number of a bin [..., 3] among all of its walker."""
    return (bin[..., 0] * bins.grid[1] + bin[..., 1]) * bins.grid[2] + bin[..., 2]


# -- what atoms see of them --------------------------------------------------------------------------------------------


def _close(layout: Layout, filled: _Filled, radius: float, bins: Bins) -> jax.Array:
    """Which of the atoms in the bins about its own an atom has edges with, [A, S words] uint32, a bit a place."""
    walkers, atoms = layout.atom_mask.shape
    total, steps, words = walkers * atoms, _steps(bins), bins.words
    positions = jnp.concatenate([filled.wrapped, jnp.full((1, 3), jnp.inf, filled.wrapped.dtype)])
    boxes = jnp.swapaxes(positions[filled.table], 1, 2)  # [bins, 3, room]
    periodic = jnp.where(layout.pbc[..., None], layout.cells, 0)
    bit = jnp.left_shift(jnp.uint32(1), jnp.arange(_BITS, dtype=jnp.uint32))
    own_bit = jnp.left_shift(jnp.uint32(1), (filled.place % _BITS).astype(jnp.uint32))

    def ways(own: jax.Array) -> tuple[jax.Array, jax.Array]:
        bin, passed = _reached(layout, filled, bins, own[:, None], jnp.arange(len(steps)))
        translation = jnp.sum(passed[..., None] * periodic[own // atoms][:, None], axis=-2)
        return bin, translation - filled.wrapped[own][:, None]

    def of_atoms(own: jax.Array) -> jax.Array:
        """Bits that say which places of the bins around some atoms hold neighbours of theirs."""
        bin, way = materialised(ways, own[0] < total, own)
        near = materialised(lambda bin: boxes[bin], own[0] < total, bin)
        within = jnp.sum((near + way[..., None]) ** 2, axis=2) < radius**2  # [B, S, room]
        within = jnp.pad(within, ((0, 0), (0, 0), (0, words * _BITS - bins.room)))
        packed = jnp.sum(jnp.where(within.reshape(len(own), -1, _BITS), bit, 0), axis=-1, dtype=jnp.uint32)
        itself = len(steps) // 2 * words + filled.place[own] // _BITS
        packed = packed & ~jnp.where(jnp.arange(len(steps) * words) == itself[:, None], own_bit[own][:, None], 0)
        return jnp.where(filled.present[own][:, None], packed, 0)

    block = min(total, max(1, _BLOCK[backend() == "cpu"] // (len(steps) * bins.room)))
    rows = jnp.minimum(jnp.arange(-(-total // block) * block, dtype=jnp.int32), total - 1).reshape(-1, block)
    return jax.lax.map(of_atoms, rows).reshape(-1, len(steps) * words)[:total]


def _reached(
    layout: Layout, filled: _Filled, bins: Bins, own: jax.Array, step: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The bins that steps lead to from those of atoms, rows of the table, and the periods passed, [..., 3]."""
    walker = own // layout.atom_mask.shape[1]
    to = filled.bin[own] + jnp.asarray(_steps(bins))[step]
    passed = _passed(to, bins)
    exists = jnp.all(layout.pbc[walker] | (passed == 0), axis=-1)
    bin = _flat(to - passed * jnp.asarray(bins.grid, jnp.int32), bins) + walker * bins.number
    return jnp.where(exists, bin, filled.table.shape[0] - 1), passed


def _opposite(
    close: jax.Array, before: jax.Array, filled: _Filled, bins: Bins, step: jax.Array, neighbors: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Slots [A, K] of the opposite edges at the other ends, and whether there is such an edge."""
    place = jnp.minimum(filled.place, bins.room - 1)[:, None]
    word = (len(_steps(bins)) - 1 - step) * bins.words + place // _BITS
    bits, position = close[neighbors, word], (place % _BITS).astype(jnp.uint32)
    seen = jnp.right_shift(bits, position) & 1 == 1
    return before[neighbors, word] + _bits_below(bits, position), seen


def _bits_below(bits: jax.Array, position: jax.Array) -> jax.Array:
    """How many bits below a position are set."""
    below = jnp.left_shift(jnp.uint32(1), position) - 1
    return jax.lax.population_count(bits & below).astype(jnp.int32)


def _nth_bit(bits: jax.Array, n: jax.Array) -> jax.Array:
    """Position of the n-th set bit, counted from 0, by bisection; any position where there is none."""
    position = jnp.zeros(n.shape, jnp.uint32)
    for half in (16, 8, 4, 2, 1):
        higher = position + half
        position = jnp.where(_bits_below(bits, higher) <= n, higher, position)
    return position.astype(jnp.int32)


def _steps(bins: Bins) -> np.ndarray:
    """The ways [S, 3] to the bins that are looked at; the opposite of row s is row S - 1 - s."""
    ranges = np.meshgrid(*(np.arange(-n, n + 1, dtype=np.int32) for n in bins.reach), indexing="ij")
    return np.stack(ranges, axis=-1).reshape(-1, 3)


def _passed(bin: jax.Array, bins: Bins) -> jax.Array:
    """How often bins [..., 3], counted on past the border of the cell, have passed it."""
    grid, many = np.asarray(bins.grid, np.int32), np.asarray(bins.reach, np.int32)  # one bin at least
    return (bin + many * grid) // grid - many


def _thinness(layout: Layout) -> jax.Array:
    """One over the distance between the lattice planes of periodic directions, 0 for open ones, [W, 3] 1/Angstrom."""
    return jnp.sqrt(jnp.sum(periodic_and_dual(layout.cells, layout.pbc)[1] ** 2, axis=-1))


def _too_thin(layout: Layout, radius: float, bins: Bins) -> jax.Array:
    reach = radius * (1 + _ROUNDING / 2) * _thinness(layout) * jnp.asarray(bins.grid)
    return jnp.any(reach > jnp.asarray(bins.reach))


@functools.partial(jax.jit, static_argnums=(1, 2))
@full_precision
def _state(layout: Layout, radius: float, bins: Bins) -> tuple[jax.Array, jax.Array]:
    """The most atoms that a bin should hold, and whether a cell is too thin for its bins."""
    return _filled(layout, radius, bins).fullest, _too_thin(layout, radius, bins)


@functools.partial(jax.jit, static_argnums=(1, 2))
@full_precision
def _extents(layout: Layout, radius: float, is_open: tuple[bool, ...]) -> tuple[jax.Array, jax.Array]:
    """Of each direction [3] the largest thinness of a cell, and how far atoms lie apart where it is open, Angstrom."""
    along = jnp.where(layout.pbc[:, None], 0, _coordinates(layout, radius, is_open).along)
    return jnp.max(_thinness(layout), axis=0), jnp.max(along, axis=(0, 1))


def _three(numbers: Iterable[int]) -> tuple[int, int, int]:
    first, second, third = (int(n) for n in numbers)
    return first, second, third
