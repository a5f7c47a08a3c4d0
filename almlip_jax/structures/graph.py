"""The `Graph`: atoms of any number of structures as one flat batch with dense neighbours.

Every model, score and integrator of the package speaks this one layout.  Atoms of all structures lie one after the
other on the axis A; each atom has K neighbour slots; sums over neighbours are reductions over K and never scatters.
The slot of the opposite edge is stored, so that the force on an atom is a gather over its own edges too.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct


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

    @property
    def num_structures(self) -> int:
        """Number of structure slots S, padding included (static)."""
        return self.structure_mask.shape[0]


@struct.dataclass
class Targets:
    """Labels that belong to a `Graph`, with what is known about each of them.

    Attributes:
        energy: [S] eV, relative to the reference energies of the species.
        forces: [A, 3] eV/Angstrom.
        virial: [S, 3, 3] eV, ``-dE/d(strain)`` = -volume * stress.
        energy_weight: [S], 0 where the structure has no energy (or is padding).
        forces_weight: [S], 0 where the structure has no forces (or is padding).
        virial_weight: [S], 0 where the structure has no stress (or is padding).
    """

    energy: jax.Array
    forces: jax.Array
    virial: jax.Array
    energy_weight: jax.Array
    forces_weight: jax.Array
    virial_weight: jax.Array


def lone_atom() -> Graph:
    """A graph of one atom with one slot for a neighbour that is not there: enough to find the shapes of parameters."""
    return lone_atoms(1, jnp.zeros(()).dtype)


def lone_atoms(number: int, dtype: jnp.dtype) -> Graph:
    """A graph of isolated atoms, one of each of so many species, each a structure of its own."""
    index, flag = jnp.arange(number, dtype=jnp.int32), jnp.ones((number,), bool)
    return Graph(
        species=index,
        vectors=jnp.zeros((number, 1, 3), dtype),
        neighbors=index[:, None],
        edge_mask=jnp.zeros((number, 1), bool),
        reverse=jnp.zeros((number, 1), jnp.int32),
        atom_mask=flag,
        structure=index,
        structure_mask=flag,
        volume=jnp.ones((number,), dtype),
    )


def sum_over_atoms(values: jax.Array, graph: Graph) -> jax.Array:
    """Sums per-atom values [A, ...] within each structure, [S, ...]; padding atoms do not count."""
    shape = (-1,) + (1,) * (values.ndim - 1)
    masked = jnp.where(graph.atom_mask.reshape(shape), values, 0)
    return jax.ops.segment_sum(masked, graph.structure, graph.num_structures)


def atom_counts(graph: Graph) -> jax.Array:
    """Number of real atoms of each structure, [S], at least 1 so that it may divide."""
    counts = jax.ops.segment_sum(graph.atom_mask.astype(graph.vectors.dtype), graph.structure, graph.num_structures)
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


def forces_and_virial(edge_gradient: jax.Array, graph: Graph) -> tuple[jax.Array, jax.Array]:
    """Forces and virial from the gradient of the total energy with respect to the edge vectors.

    With ``g_ik = dE/dv_ik`` the force on atom i is the sum over its slots of ``g_ik - g_rev(ik)`` (moving atom i
    shortens its own edges and lengthens the opposite ones), and the virial of a structure is
    ``-sum_ik v_ik (x) g_ik``, the negative derivative with respect to a symmetric strain.

    Args:
        edge_gradient: [A, K, 3] eV/Angstrom.
        graph: the graph that holds the vectors.

    Returns:
        forces [A, 3] in eV/Angstrom and virial [S, 3, 3] in eV (symmetrised: the energy is rotation invariant).
    """
    gradient = jnp.where(graph.edge_mask[..., None], edge_gradient, 0)
    forces = jnp.sum(gradient - opposite_edges(gradient, graph.neighbors, graph.reverse), axis=1)
    per_atom = -jnp.einsum("aki,akj->aij", graph.vectors, gradient)
    virial = sum_over_atoms(per_atom, graph)
    return forces, 0.5 * (virial + jnp.swapaxes(virial, -1, -2))
