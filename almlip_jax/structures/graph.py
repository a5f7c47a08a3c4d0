"""The `Graph`: atoms of any number of structures as one flat batch with dense neighbours.

Every model, score and integrator of the package uses this one layout.  Atoms of all structures lie one after the
other on the axis A; each atom has K neighbour slots; sums over neighbours are reductions over K and never scatters.
The slot of the opposite edge is stored, so that the force on an atom is a gather over its own edges too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from almlip_jax.errors import InputError


@struct.dataclass
class Graph:
    """Structures as flat atoms [A] with dense neighbour slots [A, K], padded to static shapes.

    Attributes:
        species: [A] int, index into the species table (0 for padding atoms).
        vectors: [A, K, 3] Angstrom, ``R_j + shift . cell - R_i`` (one edge for each image within the cutoff).
            Padding slots hold zeros.
        neighbors: [A, K] int, flat index of atom j (the atom itself in padding slots).
        edge_mask: [A, K] bool, true where the slot holds an edge.
        reverse: [A, K] int, slot at atom j that holds the opposite edge (j -> i with the opposite shift).
        atom_mask: [A] bool, true for real atoms.
        structure: [A] int, index of the structure an atom belongs to (padding atoms: any valid index).
        structure_mask: [S] bool, true for real structures.
        volume: [S] Angstrom^3, cell volume; 1 where a structure is not periodic in three directions.
        positions: [A, 3] Angstrom, about any origin and in any image of the cell (padding atoms: anywhere).
        cell: [S, 3, 3] Angstrom, rows are the cell vectors; 0 in directions that are not periodic.
        charge: [S] e, total charge.
        spin: [S], multiplicity 2S+1.

    Positions and cell are there for what no list of neighbours holds, charges and dipoles that act on all of a
    structure; a model says by `Model.long_range` that it reads them.
    """

    species: jax.Array
    vectors: jax.Array
    neighbors: jax.Array
    edge_mask: jax.Array
    reverse: jax.Array
    atom_mask: jax.Array
    structure: jax.Array
    structure_mask: jax.Array
    volume: jax.Array
    positions: jax.Array
    cell: jax.Array
    charge: jax.Array
    spin: jax.Array

    @property
    def num_structures(self) -> int:
        """Number of structure slots S, padding included (static)."""
        return self.structure_mask.shape[0]


@jax.tree_util.register_pytree_node_class
class Hidden:
    """Stands for places that must not be read; it holds nothing, and whoever looks at it is told why.

    Energies are differentiated by places through a model's geometry alone: what another part of it made of them would
    be missing in the forces.
    """

    def tree_flatten(self) -> tuple[tuple[()], None]:
        """No arrays."""
        return (), None

    @classmethod
    def tree_unflatten(cls, _aux: None, _children: tuple[()]) -> Hidden:
        """One like any other."""
        return cls()

    def _refuse(self, *_: Any) -> Any:
        raise InputError(
            "a model reads the vectors, positions or cell of its graph in `apply`, which forces would not follow; let "
            "`geometry` make what it needs of them."
        )

    def __getattr__(self, name: str) -> Any:
        """Whatever an array has is refused, also what `jax.numpy` looks for; other protocols of Python are absent."""
        if name.startswith("__") and name not in ("__jax_array__", "__array__"):
            raise AttributeError(name)
        return self._refuse()

    __getitem__ = __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _refuse
    __pow__ = __neg__ = __matmul__ = __rmatmul__ = __iter__ = __len__ = _refuse


@struct.dataclass
class Places:
    """What of a `Graph` changes where atoms move or the cell is strained, or derivatives with respect to it.

    Attributes:
        vectors: [A, K, 3] Angstrom.
        positions: [A, 3] Angstrom; None where nothing reads them.
        cell: [S, 3, 3] Angstrom; None where nothing reads it.
    """

    vectors: jax.Array
    positions: jax.Array | None = None
    cell: jax.Array | None = None

    def of(self, graph: Graph) -> Graph:
        """A graph that is the same but for its places; without positions and cell where these are None."""
        return graph.replace(vectors=self.vectors, positions=self.positions, cell=self.cell)  # type: ignore[attr-defined, no-any-return]


@struct.dataclass
class Targets:
    """Labels that belong to a `Graph`, by the names of `targets`.

    Attributes:
        values: name -> [S, ...] of structures or [A, ...] of atoms: energies relative to the reference energies, the
            virial ``-dE/d(strain)`` = -volume * stress.
        weights: name -> [S], 0 where a structure does not have that label (or is padding).
        second: [S] 1 for structures whose labels are of a second source; None where there is only one.
    """

    values: Mapping[str, jax.Array]
    weights: Mapping[str, jax.Array]
    second: jax.Array | None = None


def lone_atom() -> Graph:
    """A graph of one atom with one slot for a neighbour that is not there: enough to find the shapes of parameters."""
    return lone_atoms(1, jnp.zeros(()).dtype)


def lone_atoms(species: int, dtype: jnp.dtype, spins: jax.Array | None = None) -> Graph:
    """A graph of isolated neutral atoms, each a structure of its own: one of each of a number of species.

    With ``spins`` [n], one of each species for each of these multiplicities in turn; else all are singlets.
    """
    number = species if spins is None else species * len(spins)
    index, flag = jnp.arange(number, dtype=jnp.int32), jnp.ones((number,), bool)
    return Graph(
        species=index % species,
        vectors=jnp.zeros((number, 1, 3), dtype),
        neighbors=index[:, None],
        edge_mask=jnp.zeros((number, 1), bool),
        reverse=jnp.zeros((number, 1), jnp.int32),
        atom_mask=flag,
        structure=index,
        structure_mask=flag,
        volume=jnp.ones((number,), dtype),
        positions=jnp.zeros((number, 3), dtype),
        cell=jnp.zeros((number, 3, 3), dtype),
        charge=jnp.zeros((number,), dtype),
        spin=jnp.ones((number,), dtype) if spins is None else jnp.repeat(spins, species),
    )


def sum_over_atoms(values: jax.Array, graph: Graph) -> jax.Array:
    """Sums per-atom values [A, ...] within each structure, [S, ...]; padding atoms do not count."""
    shape = (-1,) + (1,) * (values.ndim - 1)
    masked = jnp.where(graph.atom_mask.reshape(shape), values, 0)
    return jax.ops.segment_sum(masked, graph.structure, graph.num_structures)


def atom_counts(graph: Graph) -> jax.Array:
    """Number of real atoms of each structure, [S], at least 1 so that it may divide."""
    counts = jax.ops.segment_sum(graph.atom_mask.astype(graph.volume.dtype), graph.structure, graph.num_structures)
    return jnp.maximum(counts, 1)


@jax.custom_vjp
def opposite_edges(values: jax.Array, neighbors: jax.Array, reverse: jax.Array) -> jax.Array:
    """Values of the opposite edges: a permutation of the slots that is its own inverse.

    Its transpose is therefore the same gather; left to itself, differentiation would turn it into a scatter.

    Args:
        values: [A, K, C], zero in padding slots (which may point anywhere).
        neighbors: [A, K] int.
        reverse: [A, K] int.
    """
    return values[neighbors, reverse]


def _opposite_forward(
    values: jax.Array, neighbors: jax.Array, reverse: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return values[neighbors, reverse], (neighbors, reverse)


def _opposite_backward(slots: tuple[jax.Array, jax.Array], cotangent: jax.Array) -> tuple[jax.Array, None, None]:
    return cotangent[slots], None, None


opposite_edges.defvjp(_opposite_forward, _opposite_backward)


def values_at_neighbors(values: jax.Array, graph: Graph) -> jax.Array:
    """Values [A, C] of the atom at the other end of each edge, [A, K, C]; 0 in padding slots.

    Each atom hands its values to all of its slots, and opposite edges exchange theirs: the derivative is the same
    exchange and a sum over slots, without a scatter.
    """
    mask = graph.edge_mask[..., None]
    spread = jnp.where(mask, values[:, None], 0)
    return jnp.where(mask, opposite_edges(spread, graph.neighbors, graph.reverse), 0)


def without_places(graph: Graph) -> Graph:
    """The graph as the parts of a model that hold parameters see it: where atoms lie is hidden from them."""
    return graph.replace(vectors=Hidden(), positions=Hidden(), cell=Hidden())  # type: ignore[attr-defined, no-any-return]


def places(graph: Graph, long_range: bool) -> Places:
    """What of a graph energies are differentiated by: edge vectors, and positions and cell where these are read."""
    return Places(graph.vectors, graph.positions, graph.cell) if long_range else Places(graph.vectors)


def displacement(graph: Graph, moves: jax.Array, long_range: bool) -> Places:
    """How places change while atoms move along ``moves`` [A, 3], Angstrom, which are 0 for padding atoms."""
    vectors = jnp.where(graph.edge_mask[..., None], values_at_neighbors(moves, graph) - moves[:, None], 0)
    return Places(vectors, moves, jnp.zeros_like(graph.cell)) if long_range else Places(vectors)


def atom_virials(by_edge: jax.Array, graph: Graph) -> jax.Array:
    """What the edges of each atom add to the virial, [A, 3, 3] eV: ``-sum_k v_ik (x) g_ik``, not symmetrised.

    Args:
        by_edge: [A, K, 3] eV/Angstrom, gradient of the energy with respect to the vectors; 0 in padding slots.
        graph: whose edges they are.
    """
    return -jnp.einsum("aki,akj->aij", graph.vectors, by_edge)


def _virials(by_edge: jax.Array, graph: Graph) -> jax.Array:
    """The sums of `atom_virials` over structures, [S, 3, 3]."""
    if graph.num_structures > 1:
        return sum_over_atoms(atom_virials(by_edge, graph), graph)
    # of all edges in one product: on a CPU members of 64 atoms take 24 us so, and 62 us atom by atom
    return -jnp.einsum("ei,ej->ij", graph.vectors.reshape(-1, 3), by_edge.reshape(-1, 3))[None]


def forces_and_virial(gradient: Places, graph: Graph) -> tuple[jax.Array, jax.Array]:
    """Forces and virial from the gradient of the total energy with respect to the places.

    With ``g_ik = dE/dv_ik`` the force on atom i is the sum over its slots of ``g_ik - g_rev(ik)`` (moving atom i
    shortens its own edges and lengthens the opposite ones), and the virial of a structure is
    ``-sum_ik v_ik (x) g_ik``, the negative derivative with respect to a symmetric strain.  What the energy does with
    positions R and cell vectors c directly is added to both: ``-dE/dR_i``, and ``-sum_i R_i (x) dE/dR_i - sum_d c_d (x)
    dE/dc_d``.

    Args:
        gradient: eV/Angstrom; of vectors alone where the energy reads nothing else.
        graph: the graph that holds the places.

    Returns:
        forces [A, 3] in eV/Angstrom and virial [S, 3, 3] in eV (symmetrised: the energy is rotation invariant).
    """
    by_edge = jnp.where(graph.edge_mask[..., None], gradient.vectors, 0)
    forces = jnp.sum(by_edge - opposite_edges(by_edge, graph.neighbors, graph.reverse), axis=1)
    virial = _virials(by_edge, graph)
    if gradient.positions is not None:
        by_position = jnp.where(graph.atom_mask[:, None], gradient.positions, 0)
        forces = forces - by_position
        virial = virial - sum_over_atoms(graph.positions[:, :, None] * by_position[:, None, :], graph)
    if gradient.cell is not None:
        virial = virial - jnp.einsum("sdi,sdj->sij", graph.cell, gradient.cell)
    return forces, 0.5 * (virial + jnp.swapaxes(virial, -1, -2))
