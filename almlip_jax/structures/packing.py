"""Packing: labelled or unlabelled structures as flat device arrays, and the plans that cut batches out of them.

A dataset lies on the device once, as the atoms of all its structures one after the other.  A batch is a list of atom
indices with static length, so that structures of different size share a batch without waste and every batch has one
shape.  Capacities are fixed beforehand: a dataset that grows within them changes no shape and recompiles nothing.

An edge is kept as six bytes, not as a vector: where its neighbour is (int16), how many cells further (3 x int8), and
the slot of the opposite edge (uint8).  Vectors are made when a batch is taken, as accurate as from float64 (`compact`).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from ase import Atoms
from flax import struct

from almlip_jax.errors import CapacityError
from almlip_jax.structures.compact import edge_vectors, in_two_parts, wrapped
from almlip_jax.structures.electronic_state import electronic_state
from almlip_jax.structures.graph import Graph, Targets
from almlip_jax.structures.neighbors import Edges, find_edges
from almlip_jax.structures.species import SpeciesTable
from almlip_jax.structures.weights import loss_weights
from almlip_jax.targets import Target, has_target, targets, with_further

_GROWTH = 1.25  # ratio of neighbouring bucket sizes


def bucket(size: int, multiple: int = 1) -> int:
    """The smallest bucket that holds a size: multiples of ``multiple`` in a geometric sequence of ratio 1.25."""
    value = max(multiple, 1)
    while value < size:
        value = max(value + multiple, int(np.ceil(value * _GROWTH / multiple)) * multiple)
    return value


@dataclass(frozen=True)
class BatchShape:
    """Static shape of a batch.

    Attributes:
        atoms: atom slots A.
        neighbors: neighbour slots K.
        structures: structure slots S.
        largest: atom slots of a structure on its own, where structures are also looked at one by one.
        parts: batches that are taken at a time, each by a device of its own.
    """

    atoms: int
    neighbors: int
    structures: int
    largest: int = 0
    parts: int = 1


@struct.dataclass
class PackedDataset:
    """Structures and labels as flat arrays with T atom and n structure slots; the last of each is always padding.

    In float32 and with up to 256 neighbour slots that is ``40 + 6 K`` bytes for each atom slot and 136 for each
    structure slot.  Integers are wider where a structure needs it: offsets above 32767 atoms, shifts above 127 cells.

    Attributes:
        species: [T] int.
        positions: [T, 2, 3] Angstrom, coarse and fine part; inside the cell and about the origin.
        neighbor_offset: [T, K] int16, flat index of the neighbour minus that of the atom.
        shifts: [T, K, 3] int8, lattice translation of the neighbour; 0 with offset 0 is a slot without an edge.
        reverse: [T, K] uint8, slot of the opposite edge at the neighbour.
        cell: [n, 3, 2, 3] Angstrom, coarse and fine part of each cell vector; 0 in directions that are not periodic.
        volume: [n] Angstrom^3.
        charge: [n] e.
        spin: [n], multiplicity 2S+1.
        labels: name of a target -> [n, ...], or [T, ...] where it is one of atoms; energies relative to the reference
            energies.
        weights: name -> [n], 0 where there is no label.
        second: [n] 1 for structures whose labels are of a second source; None where there is only one.
    """

    species: jax.Array
    positions: jax.Array
    neighbor_offset: jax.Array
    shifts: jax.Array
    reverse: jax.Array
    cell: jax.Array
    volume: jax.Array
    charge: jax.Array
    spin: jax.Array
    labels: Mapping[str, jax.Array]
    weights: Mapping[str, jax.Array]
    second: jax.Array | None = None


@struct.dataclass
class BatchPlan:
    """Which atoms of a `PackedDataset` make up which batch.

    Attributes:
        atoms: [steps, A] int, flat atom index; padding points at the last slot.
        structure: [steps, A] int, structure slot of each atom.
        ids: [steps, S] int, index of the structure in each slot; padding points at the last one.
    """

    atoms: jax.Array | np.ndarray
    structure: jax.Array | np.ndarray
    ids: jax.Array | np.ndarray


@dataclass(frozen=True)
class Packed:
    """A packed dataset with what the host has to know about it.

    Attributes:
        data: the device arrays.
        counts: [n] atoms of each real structure.
        offsets: [n] flat index of the first atom of each real structure.
    """

    data: PackedDataset
    counts: np.ndarray
    offsets: np.ndarray


def pack(
    structures: Sequence[Atoms],
    species: SpeciesTable,
    cutoff: float,
    *,
    neighbors: int,
    atoms: int | None = None,
    slots: int | None = None,
    reference_energies: Mapping[int, float] | None = None,
    dtype: np.dtype | type = np.float32,
    further: Collection[str] = (),
    edges: Iterable[Edges] | None = None,
) -> Packed:
    """Packs structures with their neighbour lists and whatever labels they carry.

    Args:
        structures: labels are read from an attached calculator's results (energy, forces, stress), where present, and
            the weights of the labels from `info` (see `weights`), as are charge and spin (see `electronic_state`).
        species: the species table.
        cutoff: Angstrom.
        neighbors: neighbour slots K.
        atoms: atom capacity T (padding slot included); by default just enough.
        slots: structure capacity n (padding slot included); by default just enough.
        reference_energies: eV by atomic number, subtracted in float64; 0 where absent.
        dtype: of the floating-point arrays.
        further: names of targets that are packed besides those that every model gives.
        edges: those within the cutoff of each structure, where they are found already.

    Returns:
        `Packed`.

    Raises:
        CapacityError: a capacity is too small.
        InputError: a structure holds an element that the table does not, or a weight, charge or spin that is none.
    """
    counts = np.array([len(a) for a in structures], dtype=np.int64)
    total, number = int(counts.sum()) + 1, len(structures) + 1
    atoms, slots = atoms or total, slots or number
    if total > atoms or number > slots:
        raise CapacityError(f"{total} atoms in {number} structures do not fit into {atoms} and {slots} slots.")
    offsets = np.concatenate([[0], np.cumsum(counts)[:-1]]) if len(counts) else np.zeros(0, np.int64)
    arrays = _Arrays(atoms, neighbors, slots, np.dtype(dtype), targets(with_further(further)))
    edges = (find_edges(structure, cutoff) for structure in structures) if edges is None else edges
    for n, (structure, start, own) in enumerate(zip(structures, offsets, edges, strict=True)):
        arrays.put_geometry(n, int(start), structure, species, own)
        arrays.put_labels(n, int(start), structure, reference_energies or {})
    return Packed(data=arrays.finish(), counts=counts, offsets=offsets)


class _Arrays:
    """Host buffers of a `PackedDataset` under construction, in the types they will have on the device."""

    def __init__(self, atoms: int, neighbors: int, slots: int, dtype: np.dtype, wanted: Sequence[Target]) -> None:
        self.dtype = dtype
        self.targets = wanted
        self.neighbors = neighbors
        self.buffers = {
            "species": _zeros((atoms,), np.int32),
            "positions": _zeros((atoms, 2, 3), dtype),
            "neighbor_offset": _zeros((atoms, neighbors), np.int16),
            "shifts": _zeros((atoms, neighbors, 3), np.int8),
            "reverse": _zeros((atoms, neighbors), np.min_scalar_type(max(neighbors - 1, 0))),
            "cell": _zeros((slots, 3, 2, 3), dtype),
            "volume": _zeros((slots,), dtype),
            "charge": _zeros((slots,), dtype),
            "spin": _zeros((slots,), dtype),
        }
        rows = {"structure": slots, "atom": atoms}
        self.labels = {one.name: _zeros((rows[one.per], *one.shape), dtype) for one in wanted}
        self.weights = {one.name: _zeros((slots,), dtype) for one in wanted}
        self.buffers["volume"][:] = 1
        self.buffers["spin"][:] = 1

    def put_geometry(self, n: int, start: int, structure: Atoms, species: SpeciesTable, edges: Edges) -> None:
        """Species, places, edges, cell and electronic state of structure n, whose atoms begin at a row."""
        places = edges.places(self.neighbors)
        positions, shifts = wrapped(structure, edges)
        rows = slice(start, start + len(structure))
        self.buffers["species"][rows] = species.index(structure.numbers)
        self.buffers["positions"][rows] = in_two_parts(positions, self.dtype)
        self.buffers["reverse"][rows] = np.arange(self.neighbors)
        self._put_edges("reverse", rows, places, edges.reverse)
        for name, integers in (("neighbor_offset", edges.neighbors - edges.centers), ("shifts", shifts)):
            self.buffers[name] = _wide_enough(self.buffers[name], integers)
            self._put_edges(name, rows, places, integers)
        periodic = np.where(np.asarray(structure.pbc)[:, None], structure.cell.array, 0.0)
        self.buffers["cell"][n] = in_two_parts(periodic, self.dtype)
        self.buffers["charge"][n], self.buffers["spin"][n] = electronic_state(structure)
        if structure.pbc.all():
            self.buffers["volume"][n] = structure.cell.volume

    def put_labels(self, n: int, start: int, structure: Atoms, references: Mapping[int, float]) -> None:
        """Labels of structure n and their weights, energies relative to the references."""
        results = structure.calc.results if structure.calc is not None else {}
        weights = loss_weights(structure, f"structure {n}")
        for target in self.targets:
            if target.label not in results or not has_target(structure, target):
                continue
            value = results[target.label]
            if target.name == "energy":
                value = value - sum(references.get(int(z), 0.0) for z in structure.numbers)
            if target.name == "virial":
                xx, yy, zz, yz, xz, xy = value
                value = -np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]]) * structure.cell.volume
            if target.per == "atom":
                self.labels[target.name][start : start + len(structure)] = value
            else:
                self.labels[target.name][n] = value
            self.weights[target.name][n] = weights[target.label]

    def _put_edges(self, name: str, rows: slice, places: np.ndarray, values: np.ndarray) -> None:
        buffer = self.buffers[name][rows]
        buffer.reshape(-1, *buffer.shape[2:])[places] = values  # a view, as rows of a buffer are contiguous

    def finish(self) -> PackedDataset:
        """The arrays on the device; the buffers, which may be the same memory, are given up."""
        buffers, self.buffers = self.buffers | {"labels": self.labels, "weights": self.weights}, {}
        self.labels, self.weights = {}, {}
        return PackedDataset(**jax.device_put(buffers))


def _zeros(shape: tuple[int, ...], dtype: np.dtype | type) -> np.ndarray:
    """Zeros at a multiple of 64 bytes, which a CPU device takes over as they are, without a copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.zeros(size + 64, np.uint8)
    begin = -raw.ctypes.data % 64
    return raw[begin : begin + size].view(dtype).reshape(shape)


def _wide_enough(buffer: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The buffer of signed integers, in a wider type where its own cannot hold the values."""
    widest = min(int(values.min(initial=0)), -int(values.max(initial=0)) - 1)
    needed = np.promote_types(buffer.dtype, np.min_scalar_type(widest))
    return buffer if needed == buffer.dtype else buffer.astype(needed)


def plan_batches(
    packed: Packed, order: np.ndarray, shape: BatchShape, capacity: int | None = None
) -> tuple[BatchPlan, int]:
    """Fills batches greedily in the given order of structures.

    Args:
        packed: the dataset.
        order: indices of structures, each to appear once for each time it is listed.
        shape: of a batch; a batch is closed when the next structure would not fit.
        capacity: steps to allocate; the rest is padding.  By default just enough.

    Returns:
        the plan, as numpy arrays, and the number of steps that hold structures.

    Raises:
        CapacityError: one structure is larger than a batch, or the plan is longer than its capacity.
    """
    return lay_out(packed, fill_batches(packed, order, shape), shape, capacity)


def fill_batches(packed: Packed, order: np.ndarray, shape: BatchShape) -> list[list[int]]:
    """Indices of the structures of each batch, filled greedily in the given order.

    Raises:
        CapacityError: one structure is larger than a batch.
    """
    batches: list[list[int]] = []
    filled = shape.atoms + 1
    for index in order.tolist():
        size = int(packed.counts[index])
        if size > shape.atoms:
            raise CapacityError(f"a structure of {size} atoms does not fit into a batch of {shape.atoms}.")
        if not batches or filled + size > shape.atoms or len(batches[-1]) == shape.structures:
            batches.append([])
            filled = 0
        batches[-1].append(index)
        filled += size
    return batches


def lay_out(
    packed: Packed, batches: Sequence[Sequence[int]], shape: BatchShape, capacity: int | None = None
) -> tuple[BatchPlan, int]:
    """The plan of some batches, and their number; arguments and errors as for `plan_batches`."""
    padding_atom = packed.data.species.shape[0] - 1
    padding_structure = packed.data.volume.shape[0] - 1
    capacity = capacity or max(len(batches), 1)
    if len(batches) > capacity:
        raise CapacityError(f"{len(batches)} batches do not fit into a plan of {capacity}.")
    atoms = np.full((capacity, shape.atoms), padding_atom, np.int32)
    structure = np.zeros((capacity, shape.atoms), np.int32)
    ids = np.full((capacity, shape.structures), padding_structure, np.int32)
    for step, members in enumerate(batches):
        sizes = packed.counts[list(members)]
        places = [np.arange(packed.offsets[i], packed.offsets[i] + packed.counts[i]) for i in members]
        flat = np.concatenate([np.zeros(0, np.int64), *places])
        atoms[step, : len(flat)] = flat
        structure[step, : len(flat)] = np.repeat(np.arange(len(members)), sizes)
        ids[step, : len(members)] = members
    return BatchPlan(atoms=atoms, structure=structure, ids=ids), len(batches)


def share_out(sizes: Sequence[int], parts: int, slots: int) -> list[list[int]]:
    """The structures of a batch shared out among devices: positions, in their order, of those that each takes.

    The largest first, each goes to the part with the fewest atoms so far that has a slot left.

    Args:
        sizes: atoms of each structure.
        parts: number of devices; some take nothing where there are fewer structures.
        slots: structures that one takes at most.

    >>> from almlip_jax.structures.packing import share_out
    >>> share_out([3, 9, 4, 3], parts=2, slots=3)
    [[1], [0, 2, 3]]
    """
    taken: list[list[int]] = [[] for _ in range(parts)]
    filled = [(0, part) for part in range(parts)]
    for place in sorted(range(len(sizes)), key=lambda n: (-sizes[n], n)):
        atoms, part = heapq.heappop(filled)
        taken[part].append(place)
        if len(taken[part]) < slots:
            heapq.heappush(filled, (atoms + sizes[place], part))
    return [sorted(places) for places in taken]


def shape_of_part(batch: BatchShape, largest: int, parts: int) -> BatchShape:
    """The shape that holds whatever `share_out` gives one of several devices of a batch with a shape.

    Args:
        batch: shape of the whole batch: S structures with A atoms.
        largest: atoms of the largest structure.
        parts: number of devices P.

    Returns:
        ``ceil(S / P)`` structures, and as many atoms as the largest ones have; or, where sizes differ so much that
        this is less, S structures, and the atoms that a device can come to: before its last structure it had no more
        than any other, and P structures were at least as large as that one.
    """
    each = -(-batch.structures // parts)
    last = min(largest, batch.atoms // (parts + 1))
    by_size = max(largest, (batch.atoms - last) // parts + last)
    if each * largest <= by_size:
        return BatchShape(each * largest, batch.neighbors, each)
    return BatchShape(by_size, batch.neighbors, batch.structures)


@jax.jit  # one program where it is called on its own, and traced once for each shape
def take_batch(data: PackedDataset, plan: BatchPlan, step: jax.Array | int) -> tuple[Graph, Targets]:
    """Gathers one batch on the device.

    Args:
        data: the dataset.
        plan: the plan.
        step: which batch.

    Returns:
        the `Graph` and its `Targets`; weights are zero for padding.
    """
    atoms, structure, ids = plan.atoms[step], plan.structure[step], plan.ids[step]
    offsets, shifts = data.neighbor_offset[atoms], data.shifts[atoms]
    neighbors = jnp.arange(atoms.shape[0], dtype=jnp.int32)[:, None] + offsets
    positions, cells = data.positions[atoms], data.cell[ids]
    graph = Graph(
        species=data.species[atoms],
        vectors=edge_vectors(positions, cells[structure], neighbors, shifts),
        neighbors=neighbors,
        edge_mask=(offsets != 0) | jnp.any(shifts != 0, axis=-1),
        reverse=data.reverse[atoms].astype(jnp.int32),
        atom_mask=atoms != data.species.shape[0] - 1,
        structure=structure,
        structure_mask=ids != data.volume.shape[0] - 1,
        volume=data.volume[ids],
        positions=jnp.sum(positions, axis=1),
        cell=jnp.sum(cells, axis=2),
        charge=data.charge[ids],
        spin=data.spin[ids],
    )
    rows = {"structure": ids, "atom": atoms}
    labels = {one.name: data.labels[one.name][rows[one.per]] for one in targets(data.labels)}
    second = None if data.second is None else data.second[ids]
    return graph, Targets(labels, {name: weights[ids] for name, weights in data.weights.items()}, second)
