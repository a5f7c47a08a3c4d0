"""Neighbour lists of walkers on the device: compiled, batched over walkers, rebuilt inside the loop that moves them.

Small open molecules take all pairs and never rebuild.  Everything else keeps a list with a skin: as soon as any atom of
any walker has moved half the skin since the last build, all walkers rebuild under one scalar condition, before the
list is used; so no edge within the cutoff is ever missed.

A build looks at every pair of atoms where these are few (`pair_search`), and else at those in bins next to each other
(`bin_search`).  Unlike the lists of jax-md (against which both are tested), it lets cells and periodic directions
differ from walker to walker and atoms leave the cell, and it knows the slots of opposite edges.  Cells may change from
step to step: then the skin also pays for the strain since the last build.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.typing import ArrayLike

from almlip_jax.errors import InputError
from almlip_jax.precision import full_precision
from almlip_jax.structures.bin_search import Bins, binned_slots, bins_for, largest_binned_count
from almlip_jax.structures.graph import Graph
from almlip_jax.structures.neighbors import periodic_cell
from almlip_jax.structures.pair_search import largest_pair_count, paired_slots
from almlip_jax.structures.slots import Layout, Slots, empty_slots, periodic_and_dual

_ALL_PAIRS = 32  # atoms; up to here an open molecule's list is hardly shorter than all its pairs
_MANY = 512  # atoms of a walker, padding included, from which on bins are searched
_HEADROOM = 1.15  # a list's capacity over the largest count when it was made
_ROUNDING = 1e-4  # fraction of a cell; more than float32 loses in fractional coordinates


@dataclass(frozen=True)
class Room:
    """How much a list holds and how far its builds look: static, and found by measurement.

    Lists of the same room have the same shapes, and so the same compiled programs.

    Attributes:
        capacity: neighbour slots K of each atom.
        images: how many further images each cell direction is searched for, to either side; of a search of all pairs.
        bins: how space is divided where bins are searched, else None.
    """

    capacity: int
    images: tuple[int, int, int] = (0, 0, 0)
    bins: Bins | None = None

    @classmethod
    def of(cls, held: Mapping[str, Any]) -> Room:
        """The room that `as_dict` wrote."""
        bins = held.get("bins")
        one, two, three = held["images"]
        return cls(int(held["capacity"]), (int(one), int(two), int(three)), None if bins is None else Bins.of(bins))

    def as_dict(self) -> dict[str, Any]:
        """Numbers and lists, to be written as JSON."""
        return dataclasses.asdict(self)


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
        unsearched: bool scalar, a build could not look everywhere that edges may lead: a cell became too thin for the
            images or bins that are searched, or a bin too full.
        cutoff: Angstrom.
        skin: Angstrom; 0 rebuilds whenever anything moved.
        images: as in `Room`.
        bins: as in `Room`.
        all_pairs: true where every pair of atoms has its slots and nothing is ever rebuilt.
    """

    slots: Slots
    built_at: jax.Array
    cells: jax.Array
    built_cells: jax.Array
    pbc: jax.Array
    atom_mask: jax.Array
    largest_count: jax.Array
    unsearched: jax.Array
    cutoff: float = struct.field(pytree_node=False)
    skin: float = struct.field(pytree_node=False)
    images: tuple[int, int, int] = struct.field(pytree_node=False)
    bins: Bins | None = struct.field(pytree_node=False)
    all_pairs: bool = struct.field(pytree_node=False)

    @property
    def capacity(self) -> int:
        """Neighbour slots K of each atom (static)."""
        return self.slots.mask.shape[-1]

    @property
    def room(self) -> Room:
        """What the list holds (static)."""
        return Room(self.capacity, self.images, self.bins)

    @property
    def overflow(self) -> jax.Array:
        """Bool scalar: a build since construction found more edges than there is room for, and lost some."""
        return (self.largest_count > self.capacity) | self.unsearched

    def update(self, positions: jax.Array, cells: jax.Array | None = None) -> WalkerNeighbors:
        """The list for new positions [W, N, 3]: this one, or one rebuilt for all walkers if anything moved too far.

        Positions that are not a number do not trigger a rebuild: they are the gate's business.

        Args:
            positions: [W, N, 3] Angstrom.
            cells: [W, 3, 3] Angstrom, where cells change; a list over fixed cells does not look at them.

        Raises:
            InputError: shapes that do not fit.
        """
        for name, given, own in (("positions", positions, self.built_at), ("cells", cells, self.cells)):
            if given is not None and jnp.shape(given) != own.shape:
                raise InputError(f"{name} of this list are {[*own.shape]}, not {[*jnp.shape(given)]}.")
        positions = jnp.asarray(positions, self.built_at.dtype)
        cells = None if cells is None else jnp.asarray(cells, self.cells.dtype)
        if self.all_pairs:
            return self
        if cells is None:
            return jax.lax.cond(self.holds(positions), lambda: self, lambda: _rebuilt(self, positions))
        strained = dataclasses.replace(self, cells=cells)
        due = jnp.any(_skin_spent(strained, positions))
        return jax.lax.cond(due, lambda: _rebuilt_in_new_cells(strained, positions), lambda: strained)

    def holds(self, positions: jax.Array, cells: jax.Array | None = None) -> jax.Array:
        """Whether the list, as it is, has all edges of some positions [W, N, 3] in the same or other cells; a bool."""
        if self.all_pairs:
            return jnp.ones((), bool)
        if cells is not None:
            return ~jnp.any(_skin_spent(dataclasses.replace(self, cells=cells), positions))
        moved = jnp.sum((positions - self.built_at) ** 2, axis=-1)
        return ~jnp.any(self.atom_mask & (moved > (self.skin / 2) ** 2))

    def graph(self, positions: jax.Array, species: jax.Array, charge: jax.Array, spin: jax.Array) -> Graph:
        """The flat `Graph` of all walkers at some positions: A = W N atoms, S = W structures.

        Args:
            positions: [W, N, 3] Angstrom, those of the last `update`.
            species: [W, N] int, species indices.
            charge: [W] e.
            spin: [W], multiplicity 2S+1.

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
            positions=positions.reshape(-1, 3),
            cell=jnp.where(self.pbc[..., None], self.cells, 0),
            charge=charge,
            spin=spin,
        )

    def grown(self, positions: jax.Array) -> WalkerNeighbors:
        """A list rebuilt on the host with room for what overflowed and what `positions` [W, N, 3] need."""
        if self.all_pairs:
            return self
        enough, needed = self, int(self.largest_count)
        # atoms that a full bin lost are counted again; walkers may have gone back from where that was
        for where in (positions,) if self.bins is None else (self.built_at, positions):
            enough = _searching_enough(enough, where)
            needed = max(needed, int(_largest_count(enough, where)))
        return _with_capacity(enough, positions, max(_roomy(needed), self.capacity))


def walker_neighbors(
    positions: ArrayLike,
    cells: ArrayLike,
    pbc: ArrayLike,
    atom_mask: ArrayLike,
    cutoff: float,
    skin: float,
    room: Room | None = None,
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
        room: of an earlier list, whose shapes, and so compiled programs, are kept; it is widened where images or bins
            do not reach far enough for the cells.  Where not given, the largest count now with some headroom.

    Raises:
        InputError: shapes that do not fit, a cutoff or skin out of range, or a degenerate cell; names the walker.
    """
    positions = jnp.asarray(positions)
    _check_shapes(positions, np.asarray(cells), np.asarray(pbc), np.asarray(atom_mask))
    if not (np.isfinite(cutoff) and cutoff > 0 and np.isfinite(skin) and skin >= 0):
        raise InputError(f"the cutoff must be positive and the skin not negative, not {cutoff} and {skin} Angstrom.")
    mask: jax.Array = jax.device_put(np.array(atom_mask, bool))  # copies: what is put there may share its memory
    empty = WalkerNeighbors(
        slots=empty_slots(mask, 0),
        built_at=positions,
        cells=jax.device_put(np.array(cells, positions.dtype)),
        built_cells=jax.device_put(np.array(cells, positions.dtype)),
        pbc=jax.device_put(np.array(pbc, bool)),
        atom_mask=mask,
        largest_count=jax.device_put(np.zeros((), np.int32)),
        unsearched=jax.device_put(np.zeros((), bool)),
        cutoff=float(cutoff),
        skin=float(skin),
        images=(0, 0, 0) if room is None else room.images,
        bins=None if room is None else room.bins,
        all_pairs=False,
    )
    empty = _searching_enough(empty, positions)
    others = positions.shape[1] - 1
    open_molecules = others > 0 and not np.any(pbc)
    if room is not None:
        capacity = room.capacity
    elif open_molecules and others < _ALL_PAIRS:
        capacity = others
    else:
        capacity = _roomy(int(_largest_count(empty, positions)))
    if open_molecules and others <= capacity:
        return _with_all_pairs(dataclasses.replace(empty, bins=None))
    return _with_capacity(empty, positions, capacity)


def neighbors_anew(layout: Layout, cutoff: float, room: Room) -> WalkerNeighbors:
    """The list of walkers wherever they are, in compiled code that knows nothing of them before.

    Args:
        layout: of the atoms.
        cutoff: Angstrom; there is no skin.
        room: what the list holds; `WalkerNeighbors.overflow` says where that is not enough.
    """
    empty = WalkerNeighbors(
        slots=empty_slots(layout.atom_mask, room.capacity),
        built_at=layout.positions,
        cells=layout.cells,
        built_cells=layout.cells,
        pbc=layout.pbc,
        atom_mask=layout.atom_mask,
        largest_count=jnp.zeros((), jnp.int32),
        unsearched=jnp.zeros((), bool),
        cutoff=cutoff,
        skin=0.0,
        images=room.images,
        bins=room.bins,
        all_pairs=False,
    )
    return _rebuilt_in_new_cells(empty, layout.positions)


@jax.jit
@full_precision
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
    slots = empty_slots(template.atom_mask, capacity)
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


def searches_bins(atoms: int) -> bool:
    """Whether walkers with this number of atoms, padding included, are searched through bins."""
    return atoms >= _MANY


def _searching_enough(neighbors: WalkerNeighbors, positions: jax.Array) -> WalkerNeighbors:
    """A list whose next build looks as far as some positions [W, N, 3] and the cells need, and no less than before."""
    radius, nothing = neighbors.cutoff + neighbors.skin, jax.device_put(np.zeros((), bool))
    cells, pbc = np.asarray(neighbors.cells, np.float64), np.asarray(neighbors.pbc)
    images = _images_needed(cells, pbc, radius)  # it refuses degenerate cells
    if searches_bins(positions.shape[1]):
        bins = bins_for(_layout(neighbors, positions), radius, neighbors.bins)
        return dataclasses.replace(neighbors, images=(0, 0, 0), bins=bins, unsearched=nothing)
    one, two, three = (max(pair) for pair in zip(images, neighbors.images, strict=True))
    return dataclasses.replace(neighbors, images=(one, two, three), bins=None, unsearched=nothing)


def _layout(neighbors: WalkerNeighbors, positions: jax.Array) -> Layout:
    return Layout(positions, neighbors.cells, neighbors.pbc, neighbors.atom_mask)


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
@full_precision
def _rebuilt(neighbors: WalkerNeighbors, positions: jax.Array) -> WalkerNeighbors:
    layout, radius = _layout(neighbors, positions), neighbors.cutoff + neighbors.skin
    if neighbors.bins is None:
        slots, counts = paired_slots(layout, radius, neighbors.images, neighbors.capacity)
        largest, unsearched = jnp.max(counts), neighbors.unsearched
    else:
        slots, largest, missed = binned_slots(layout, radius, neighbors.bins, neighbors.capacity)
        unsearched = neighbors.unsearched | missed
    return dataclasses.replace(
        neighbors,
        slots=slots,
        built_at=positions,
        built_cells=neighbors.cells,
        largest_count=jnp.maximum(neighbors.largest_count, largest),
        unsearched=unsearched,
    )


def _rebuilt_in_new_cells(neighbors: WalkerNeighbors, positions: jax.Array) -> WalkerNeighbors:
    """`_rebuilt`, with a look at whether the images searched still suffice."""
    if neighbors.bins is not None:  # which look for themselves
        return _rebuilt(neighbors, positions)
    _, dual = periodic_and_dual(neighbors.cells, neighbors.pbc)
    reach = (neighbors.cutoff + neighbors.skin) * jnp.sqrt(jnp.sum(dual**2, axis=-1)) - 0.5
    too_thin = jnp.any(neighbors.pbc & (reach > jnp.asarray(neighbors.images)))
    return dataclasses.replace(_rebuilt(neighbors, positions), unsearched=neighbors.unsearched | too_thin)


def _skin_spent(neighbors: WalkerNeighbors, positions: jax.Array) -> jax.Array:
    """Whether an edge may have come within the cutoff that the list does not hold, [W] bool.

    With ``F = inv(h0) h`` the deformation of the cell since the last build, an edge that was longer than cutoff plus
    skin is now longer than ``(cutoff + skin) s - 2 d``: s the least singular value of F (no less than 1 - |F - 1|), d
    the farthest that an atom has moved beyond the deformation.
    """
    periodic, _ = periodic_and_dual(neighbors.cells, neighbors.pbc)
    _, dual = periodic_and_dual(neighbors.built_cells, neighbors.pbc)
    across = jnp.sum(dual[:, :, :, None] * periodic[:, :, None, :], axis=1)  # directions without period are left out
    along = jnp.sum(dual[:, :, :, None] * (neighbors.built_cells * neighbors.pbc[..., None])[:, :, None, :], axis=1)
    strain = across - along  # F - 1
    affine = neighbors.built_at + jnp.sum(neighbors.built_at[..., None] * strain[:, None], axis=-2)
    moved = jnp.sqrt(jnp.max(jnp.where(neighbors.atom_mask, jnp.sum((positions - affine) ** 2, -1), 0), axis=1))
    shrunk = jnp.sqrt(jnp.sum(strain**2, axis=(1, 2)))
    return (neighbors.cutoff + neighbors.skin) * (1 - shrunk) - 2 * moved < neighbors.cutoff


@jax.jit
@full_precision
def _largest_count(neighbors: WalkerNeighbors, positions: jax.Array) -> jax.Array:
    layout, radius = _layout(neighbors, positions), neighbors.cutoff + neighbors.skin
    if neighbors.bins is None:
        return largest_pair_count(layout, radius, neighbors.images)
    return largest_binned_count(layout, radius, neighbors.bins)


def _edge_vectors(positions: jax.Array, neighbors: jax.Array, shifts: jax.Array | None, cells: jax.Array) -> jax.Array:
    """Vectors ``R_j + shift . cell - R_i`` [W, N, K, 3]; no shifts, no periodic images."""
    ends = jax.vmap(lambda of, index: of[index])(positions, neighbors)
    vectors = ends - positions[:, :, None]
    if shifts is None:
        return vectors
    return vectors + jnp.sum(shifts[..., None] * cells[:, None, None], axis=-2)
