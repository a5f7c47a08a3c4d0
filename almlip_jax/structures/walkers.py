"""Neighbour lists of walkers on the device: compiled, batched over walkers, rebuilt inside the loop that moves them.

Small open molecules take all pairs and never rebuild.  Everything else keeps a list with a skin: as soon as any atom of
any walker has moved half the skin since the last build, all walkers rebuild under one scalar condition, before the
list is used; so no edge within the cutoff is ever missed.

A build looks at every pair of atoms and as many images as the thinnest cell needs, which is one (the nearest) where
the planes of the cell lie further apart than twice the list's radius.  Unlike the lists of jax-md (against which it is
tested), it lets cells and periodic directions differ from walker to walker and atoms leave the cell, and it knows the
slots of opposite edges.  Cells may change from step to step: then the skin also pays for the strain since the last
build.  It needs no sort: on a CPU a build takes 8 to 100 times less time than jax-md's dense list
with images (8 walkers of 64 or 216 atoms, 6 to 7 Angstrom).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import ArrayLike

from almlip_jax.errors import InputError
from almlip_jax.structures.graph import Graph
from almlip_jax.structures.neighbors import periodic_cell

_Mapped = TypeVar("_Mapped")

_ALL_PAIRS = 32  # atoms; up to here an open molecule's list is hardly shorter than all its pairs
_HEADROOM = 1.15  # a list's capacity over the largest count when it was made
_ROUNDING = 1e-4  # fraction of a cell; more than float32 loses in fractional coordinates
_BLOCK = 2**27  # candidate edges that a build holds at a time


@struct.dataclass
class Slots:
    """Edges of W walkers of N atoms each (padded), in K slots an atom.

    Attributes:
        neighbors: [W, N, K] int32, atom j within its walker (the atom itself in padding slots).
        shifts: [W, N, K, 3] int32, the edge vector is ``R_j + shift . cell - R_i``.
        mask: [W, N, K] bool, true where the slot holds an edge.
        reverse: [W, N, K] int32, slot at atom j that holds the opposite edge.
    """

    neighbors: jax.Array
    shifts: jax.Array
    mask: jax.Array
    reverse: jax.Array


@struct.dataclass
class WalkerNeighbors:
    """The neighbour list of W walkers with up to N atoms each; made by `walker_neighbors`.

    Attributes:
        slots: the edges of the list: all that were shorter than cutoff plus skin when it was built.
        built_at: [W, N, 3] Angstrom, positions at the last build.
        cells: [W, 3, 3] Angstrom, rows are the cell vectors, those of the last `update`.
        built_cells: [W, 3, 3] Angstrom, cells at the last build.
        pbc: [W, 3] bool.
        atom_mask: [W, N] bool, true for real atoms.
        largest_count: int32 scalar, the most edges an atom had in any build so far.
        too_thin: bool scalar, a cell became so thin that further images than those searched have edges.
        cutoff: Angstrom.
        skin: Angstrom; 0 rebuilds whenever anything moved.
        images: how many further images each cell direction is searched for, to either side.
        all_pairs: true where every pair of atoms has its slots and nothing is ever rebuilt.
    """

    slots: Slots
    built_at: jax.Array
    cells: jax.Array
    built_cells: jax.Array
    pbc: jax.Array
    atom_mask: jax.Array
    largest_count: jax.Array
    too_thin: jax.Array
    cutoff: float = struct.field(pytree_node=False)
    skin: float = struct.field(pytree_node=False)
    images: tuple[int, int, int] = struct.field(pytree_node=False)
    all_pairs: bool = struct.field(pytree_node=False)

    @property
    def capacity(self) -> int:
        """Neighbour slots K of each atom (static)."""
        return self.slots.mask.shape[-1]

    @property
    def overflow(self) -> jax.Array:
        """Bool scalar: a build since construction found more edges than there are slots or images, and lost some."""
        return (self.largest_count > self.capacity) | self.too_thin

    def update(self, positions: jax.Array, cells: jax.Array | None = None) -> WalkerNeighbors:
        """The list for new positions [W, N, 3]: this one, or one rebuilt for all walkers if anything moved too far.

        Positions that are not a number do not trigger a rebuild: they are the gate's business.

        Args:
            positions: [W, N, 3] Angstrom.
            cells: [W, 3, 3] Angstrom, where cells change; a list over fixed cells does not look at them.
        """
        if self.all_pairs:
            return self
        if cells is None:
            return jax.lax.cond(self.holds(positions), lambda: self, lambda: _rebuilt(self, positions))
        strained = dataclasses.replace(self, cells=cells)
        due = jnp.any(_skin_spent(strained, positions))
        return jax.lax.cond(due, lambda: _rebuilt_in_new_cells(strained, positions), lambda: strained)

    def holds(self, positions: jax.Array) -> jax.Array:
        """Whether the list, as it is, has all edges of some positions [W, N, 3] in the same cells; bool scalar."""
        if self.all_pairs:
            return jnp.ones((), bool)
        moved = jnp.sum((positions - self.built_at) ** 2, axis=-1)
        return ~jnp.any(self.atom_mask & (moved > (self.skin / 2) ** 2))

    def graph(self, positions: jax.Array, species: jax.Array) -> Graph:
        """The flat `Graph` of all walkers at some positions: A = W N atoms, S = W structures.

        Args:
            positions: [W, N, 3] Angstrom, those of the last `update`.
            species: [W, N] int, species indices.

        Returns:
            A `Graph` with the edges below the cutoff. An edge whose length is not a number is kept, so that a broken
            walker cannot look like one without neighbours.
        """
        walkers, atoms, slots = self.slots.mask.shape
        shifts = None if self.all_pairs else self.slots.shifts
        vectors = _edge_vectors(positions, self.slots.neighbors, shifts, self.cells)
        edge = self.slots.mask & ~(jnp.sum(vectors**2, axis=-1) >= self.cutoff**2)
        own = jnp.arange(atoms, dtype=jnp.int32)[:, None]
        slot = jnp.arange(slots, dtype=jnp.int32)
        offset = atoms * jnp.arange(walkers, dtype=jnp.int32)[:, None, None]
        flat = (walkers * atoms, slots)
        volume = jnp.abs(jnp.linalg.det(self.cells)).astype(positions.dtype)
        return Graph(
            species=jnp.where(self.atom_mask, species, 0).reshape(-1),
            vectors=jnp.where(edge[..., None], vectors, 0).reshape(*flat, 3),
            neighbors=(jnp.where(edge, self.slots.neighbors, own) + offset).reshape(flat),
            edge_mask=edge.reshape(flat),
            reverse=jnp.where(edge, self.slots.reverse, slot).reshape(flat),
            atom_mask=self.atom_mask.reshape(-1),
            structure=jnp.repeat(jnp.arange(walkers, dtype=jnp.int32), atoms),
            structure_mask=jnp.any(self.atom_mask, axis=1),
            volume=jnp.where(jnp.all(self.pbc, axis=1), volume, 1),
        )

    def grown(self, positions: jax.Array) -> WalkerNeighbors:
        """A list rebuilt on the host with room for what overflowed and what `positions` [W, N, 3] need."""
        if self.all_pairs:
            return self
        images = _images_needed(np.asarray(self.cells, np.float64), np.asarray(self.pbc), self.cutoff + self.skin)
        wide = (max(images[0], self.images[0]), max(images[1], self.images[1]), max(images[2], self.images[2]))
        enough = dataclasses.replace(self, images=wide, too_thin=jnp.asarray(np.zeros((), bool)))
        needed = max(int(self.largest_count), int(_largest_count(enough, positions)))
        return _with_capacity(enough, positions, max(_roomy(needed), self.capacity))


def walker_neighbors(
    positions: ArrayLike,
    cells: ArrayLike,
    pbc: ArrayLike,
    atom_mask: ArrayLike,
    cutoff: float,
    skin: float,
    capacity: int | None = None,
    images: tuple[int, int, int] | None = None,
) -> WalkerNeighbors:
    """Makes the neighbour list of some walkers; called outside of compiled code, once.

    All pairs are taken where no walker is periodic and the molecule is small, or no list would be shorter.

    Args:
        positions: [W, N, 3] Angstrom; their dtype is that of all that follows.
        cells: [W, 3, 3] Angstrom, rows are the cell vectors; anything in directions that are not periodic.
        pbc: [W, 3] bool.
        atom_mask: [W, N] bool, false for padding atoms.
        cutoff: Angstrom.
        skin: Angstrom.
        capacity: slots K of each atom; where not given, the largest count now with some headroom.
        images: further images to search in each direction, at least as many as the cells need (the default). Together
            with `capacity` it keeps the shapes, and so the compiled programs, of an earlier list.

    Raises:
        InputError: shapes that do not fit, a cutoff or skin out of range, or a degenerate cell; names the walker.
    """
    positions = jnp.asarray(positions)
    _check_shapes(positions, np.asarray(cells), np.asarray(pbc), np.asarray(atom_mask))
    if not (np.isfinite(cutoff) and cutoff > 0 and np.isfinite(skin) and skin >= 0):
        raise InputError(f"the cutoff must be positive and the skin not negative, not {cutoff} and {skin} Angstrom.")
    needed = _images_needed(np.asarray(cells, np.float64), np.asarray(pbc, bool), cutoff + skin)
    wanted = needed if images is None else images
    atom_mask = jnp.asarray(np.asarray(atom_mask, bool))
    empty = WalkerNeighbors(
        slots=_empty_slots(atom_mask, 0),
        built_at=positions,
        cells=jnp.asarray(np.asarray(cells, positions.dtype)),
        built_cells=jnp.asarray(np.asarray(cells, positions.dtype)),
        pbc=jnp.asarray(np.asarray(pbc, bool)),
        atom_mask=atom_mask,
        largest_count=jnp.asarray(np.zeros((), np.int32)),
        too_thin=jnp.asarray(np.zeros((), bool)),
        cutoff=float(cutoff),
        skin=float(skin),
        images=(max(needed[0], wanted[0]), max(needed[1], wanted[1]), max(needed[2], wanted[2])),
        all_pairs=False,
    )
    others = positions.shape[1] - 1
    open_molecules = others > 0 and not np.any(pbc)
    if capacity is None:
        small = open_molecules and others < _ALL_PAIRS
        capacity = others if small else _roomy(int(_largest_count(empty, positions)))
    if open_molecules and others <= capacity:
        return _with_all_pairs(empty)
    return _with_capacity(empty, positions, capacity)


@functools.partial(jax.jit, static_argnums=1)
def _empty_slots(atom_mask: jax.Array, capacity: int) -> Slots:
    shape = (*atom_mask.shape, capacity)
    number = jnp.zeros(shape, jnp.int32)
    return Slots(number, jnp.zeros((*shape, 3), jnp.int32), jnp.zeros(shape, bool), number)


@jax.jit
def _with_all_pairs(empty: WalkerNeighbors) -> WalkerNeighbors:
    walkers, atoms = empty.atom_mask.shape
    own = np.arange(atoms, dtype=np.int32)[:, None]
    slot = np.arange(atoms - 1, dtype=np.int32)[None, :]
    other = slot + (slot >= own)  # atom i skips itself
    shape = (walkers, atoms, atoms - 1)
    slots = Slots(
        neighbors=jnp.broadcast_to(other, shape),
        shifts=jnp.zeros((*shape, 3), jnp.int32),
        mask=empty.atom_mask[:, :, None] & empty.atom_mask[:, other],
        reverse=jnp.broadcast_to(own - (own > other), shape),
    )
    return dataclasses.replace(empty, slots=slots, all_pairs=True)


def _with_capacity(template: WalkerNeighbors, positions: jax.Array, capacity: int) -> WalkerNeighbors:
    slots = _empty_slots(template.atom_mask, capacity)
    return _rebuilt(dataclasses.replace(template, slots=slots, largest_count=jnp.zeros((), jnp.int32)), positions)


def _roomy(count: int) -> int:
    """Slots for a count that fluctuates: some headroom, in steps of four."""
    return max(4, 4 * int(np.ceil(_HEADROOM * count / 4)))


def _check_shapes(positions: jax.Array, cells: np.ndarray, pbc: np.ndarray, atom_mask: np.ndarray) -> None:
    walkers, atoms = positions.shape[:2] if positions.ndim == 3 else (0, 0)
    expected = (walkers, atoms, 3), (walkers, 3, 3), (walkers, 3), (walkers, atoms)
    found = positions.shape, cells.shape, pbc.shape, atom_mask.shape
    if found != expected or walkers == 0 or atoms == 0:
        raise InputError(
            "walkers need positions [W, N, 3], cells [W, 3, 3], pbc [W, 3] and atom_mask [W, N], "
            f"not shapes {', '.join(map(str, found))}."
        )


def _images_needed(cells: np.ndarray, pbc: np.ndarray, radius: float) -> tuple[int, int, int]:
    """Images beyond the nearest one that an edge of length `radius` may reach, for the thinnest of the cells."""
    needed = np.zeros(3, int)
    for walker, (cell, periodic) in enumerate(zip(cells, pbc, strict=True)):
        try:
            dual = np.linalg.inv(periodic_cell(cell, periodic))
        except InputError as error:
            raise InputError(f"walker {walker}: {error}") from error
        # The nearest image has |fractional difference| <= 1/2; image s of it lies |f + s| planes away.
        reach = np.ceil(radius * np.linalg.norm(dual, axis=0) - 0.5 + _ROUNDING)
        needed = np.maximum(needed, np.where(periodic, reach, 0).astype(int))
    return int(needed[0]), int(needed[1]), int(needed[2])


@jax.jit
def _rebuilt(neighbors: WalkerNeighbors, positions: jax.Array) -> WalkerNeighbors:
    build = functools.partial(_build, capacity=neighbors.capacity)
    slots, counts = _map_walkers(build, neighbors, positions)
    largest_count = jnp.maximum(neighbors.largest_count, jnp.max(counts))
    return dataclasses.replace(
        neighbors, slots=slots, built_at=positions, built_cells=neighbors.cells, largest_count=largest_count
    )


def _rebuilt_in_new_cells(neighbors: WalkerNeighbors, positions: jax.Array) -> WalkerNeighbors:
    """`_rebuilt`, with a look at whether the images searched still suffice."""
    _, dual = _periodic_and_dual(neighbors.cells, neighbors.pbc)
    reach = (neighbors.cutoff + neighbors.skin) * jnp.sqrt(jnp.sum(dual**2, axis=-1)) - 0.5
    too_thin = jnp.any(neighbors.pbc & (reach > jnp.asarray(neighbors.images)))
    return dataclasses.replace(_rebuilt(neighbors, positions), too_thin=neighbors.too_thin | too_thin)


def _skin_spent(neighbors: WalkerNeighbors, positions: jax.Array) -> jax.Array:
    """Whether an edge may have come within the cutoff that the list does not hold, [W] bool.

    With ``F = inv(h0) h`` the deformation of the cell since the last build, an edge that was longer than cutoff plus
    skin is now longer than ``(cutoff + skin) s - 2 d``: s the least singular value of F (no less than 1 - |F - 1|), d
    the farthest that an atom has moved beyond the deformation.
    """
    periodic, _ = _periodic_and_dual(neighbors.cells, neighbors.pbc)
    _, dual = _periodic_and_dual(neighbors.built_cells, neighbors.pbc)
    across = jnp.sum(dual[:, :, :, None] * periodic[:, :, None, :], axis=1)  # directions without period are left out
    along = jnp.sum(dual[:, :, :, None] * (neighbors.built_cells * neighbors.pbc[..., None])[:, :, None, :], axis=1)
    strain = across - along  # F - 1
    affine = neighbors.built_at + jnp.sum(neighbors.built_at[..., None] * strain[:, None], axis=-2)
    moved = jnp.sqrt(jnp.max(jnp.where(neighbors.atom_mask, jnp.sum((positions - affine) ** 2, -1), 0), axis=1))
    shrunk = jnp.sqrt(jnp.sum(strain**2, axis=(1, 2)))
    return (neighbors.cutoff + neighbors.skin) * (1 - shrunk) - 2 * moved < neighbors.cutoff


def _periodic_and_dual(cells: jax.Array, pbc: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cell vectors of the periodic directions (zero elsewhere), and their dual vectors, both [..., 3, 3] in rows."""
    periodic = jnp.where(pbc[..., None], cells, 0)
    # Through their Gram matrix.  Sums are written out rather than matrix products, which some devices round to fewer
    # digits than float32 has.
    gram = jnp.sum(periodic[..., :, None, :] * periodic[..., None, :, :], axis=-1)
    gram = gram + jnp.eye(3, dtype=cells.dtype) * (1 - pbc.astype(cells.dtype))[..., None, :]
    inverse = jnp.linalg.inv(gram)
    return periodic, jnp.sum(inverse[..., None] * periodic[..., None, :, :], axis=-2)


@jax.jit
def _largest_count(neighbors: WalkerNeighbors, positions: jax.Array) -> jax.Array:
    def count(candidates: _Candidates) -> jax.Array:
        return jnp.max(jnp.sum(candidates.within, axis=(1, 2)))

    return jnp.max(_map_walkers(count, neighbors, positions))


@struct.dataclass
class _Candidates:
    """Every pair (i, j) of one walker's N atoms with each of S images of j.

    Attributes:
        within: [N, S, N] bool, true where image s of atom j is an edge of atom i; if so, image -s of i is one of j.
        nearest: [N, N, 3] int32, lattice translation of j that brings it nearest to i (in fractional coordinates).
        images: [S, 3] int32, further translations; the opposite of row s is row S - 1 - s.
    """

    within: jax.Array
    nearest: jax.Array
    images: jax.Array


def _map_walkers(
    function: Callable[[_Candidates], _Mapped], neighbors: WalkerNeighbors, positions: jax.Array
) -> _Mapped:
    """Maps a function of one walker's candidates over the walkers, as many at a time as memory is meant to hold."""
    radius = neighbors.cutoff + neighbors.skin
    images = _image_table(neighbors.images)

    def of_walker(walker: tuple[jax.Array, jax.Array, jax.Array, jax.Array]) -> _Mapped:
        return function(_candidates(*walker, radius=radius, images=images))

    walkers, atoms = neighbors.atom_mask.shape
    block = max(1, _BLOCK // (atoms * atoms * len(images)))
    arrays = positions, neighbors.cells, neighbors.pbc, neighbors.atom_mask
    if block >= walkers:
        return jax.vmap(of_walker)(arrays)
    return jax.lax.map(of_walker, arrays, batch_size=block)


def _image_table(images: tuple[int, int, int]) -> np.ndarray:
    """All translations [S, 3] of up to `images` cells to either side, in an order that negation reverses."""
    ranges = np.meshgrid(*(np.arange(-n, n + 1, dtype=np.int32) for n in images), indexing="ij")
    return np.stack(ranges, axis=-1).reshape(-1, 3)


def _candidates(
    positions: jax.Array, cell: jax.Array, pbc: jax.Array, atom_mask: jax.Array, radius: float, images: np.ndarray
) -> _Candidates:
    periodic, dual = _periodic_and_dual(cell, pbc)
    between = positions[None, :] - positions[:, None]  # [N, N, 3]
    nearest = -jnp.round(jnp.sum(between[..., None, :] * dual, axis=-1))
    # Half a cell apart, rounding may fall differently from either end: the lower index decides for both.
    decided = jnp.where(np.triu(np.ones(between.shape[:2], bool))[..., None], nearest, 0)
    nearest = decided - jnp.swapaxes(decided, 0, 1)
    closest = between + jnp.sum(nearest[..., None] * periodic, axis=-2)
    translation = jnp.sum(images[..., None] * periodic, axis=-2)  # [S, 3]
    squared = jnp.sum((closest[:, None] + translation[:, None]) ** 2, axis=-1)  # [N, S, N]
    itself = np.eye(len(atom_mask), dtype=bool)[:, None] & ~np.any(images, axis=1)[:, None]
    real = atom_mask[:, None, None] & atom_mask
    allowed = jnp.all(pbc | (images == 0), axis=-1)
    within = (squared < radius**2) & real & allowed[:, None] & ~itself
    # An edge as long as the radius up to rounding could be seen from one end only, and would have no reverse slot.
    within = within & jnp.transpose(within[:, ::-1], (2, 1, 0))
    return _Candidates(within, nearest.astype(jnp.int32), jnp.asarray(images))


def _build(candidates: _Candidates, capacity: int) -> tuple[Slots, jax.Array]:
    """Packs the candidates of one walker into its `Slots`, and counts the edges of each atom [N].

    The slot of an edge is its rank among the edges of its atom, so the running count both finds the candidate of a
    slot (by bisection: neither a sort nor a scatter) and the slot of an opposite edge (by a lookup).
    """
    atoms, num_images, _ = candidates.within.shape
    own = jnp.arange(atoms, dtype=jnp.int32)[:, None]
    slot = jnp.arange(capacity, dtype=jnp.int32)
    rank = jnp.cumsum(candidates.within.reshape(atoms, -1).astype(jnp.int32), axis=1)
    found = jax.vmap(functools.partial(jnp.searchsorted, v=slot + 1))(rank)
    mask = slot < rank[:, -1:]
    image, neighbors = jnp.divmod(jnp.where(mask, found, 0), atoms)
    shifts = candidates.nearest[own, neighbors] + candidates.images[image]
    reverse = rank[neighbors, (num_images - 1 - image) * atoms + own] - 1
    slots = Slots(
        neighbors=jnp.where(mask, neighbors, own),
        shifts=jnp.where(mask[..., None], shifts, 0),
        mask=mask,
        reverse=jnp.where(mask, jnp.minimum(reverse, capacity - 1), slot),
    )
    return slots, rank[:, -1]


def _edge_vectors(positions: jax.Array, neighbors: jax.Array, shifts: jax.Array | None, cells: jax.Array) -> jax.Array:
    """Vectors ``R_j + shift . cell - R_i`` [W, N, K, 3]; no shifts, no periodic images."""
    ends = jax.vmap(lambda of, index: of[index])(positions, neighbors)
    vectors = ends - positions[:, :, None]
    if shifts is None:
        return vectors
    return vectors + jnp.sum(shifts[..., None] * cells[:, None, None], axis=-2)
