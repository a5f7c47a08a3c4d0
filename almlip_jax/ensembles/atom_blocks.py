"""Many atoms in blocks: on a CPU, what an evaluation of one large structure holds at a time stays within its caches.

Where the energy of an atom depends on its own edges alone (`models.base.Model.local`), a block of atoms is evaluated as
a graph of its own.  It gives the energies of its atoms and the gradient by their edges; forces, for which opposite
edges of different blocks meet, are made of those of all blocks together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from almlip_jax.compilation import backend
from almlip_jax.materialise import materialised
from almlip_jax.structures.graph import Graph

_ATOMS = 256  # of a block
_MANY = 2 * _ATOMS  # atoms from which on there are blocks


def number_of_blocks(graph: Graph, local: bool) -> int:
    """Into how many blocks the atoms of a graph are cut: one where a model is not local, and on accelerators."""
    atoms = graph.atom_mask.shape[0]
    return -(-atoms // _ATOMS) if local and atoms > _MANY and backend() == "cpu" else 1


def apart(
    species: jax.Array,
    at_ends: jax.Array,
    vectors: jax.Array,
    edge_mask: jax.Array,
    atom_mask: jax.Array,
    states: tuple[jax.Array, jax.Array],
    kinds: int,
) -> Graph:
    """A graph in which each of some atoms is a structure: of its neighbours nothing but the species is there.

    Args:
        species: [A] int.
        at_ends: [A, K] int, species of the neighbours.
        vectors: [A, K, 3] Angstrom.
        edge_mask: [A, K] bool.
        atom_mask: [A] bool.
        states: charge and multiplicity of the structure of each atom, [A] both.
        kinds: number of species.

    Returns:
        A graph of A + kinds atoms, of which the last stand for all neighbours of their species.
    """
    atoms, slots = at_ends.shape

    def with_ends(values: jax.Array) -> jax.Array:
        return jnp.pad(values, ((0, kinds),) + ((0, 0),) * (values.ndim - 1))

    own = jnp.arange(atoms + kinds, dtype=jnp.int32)
    charge, spin = states
    return Graph(
        species=jnp.concatenate([species, jnp.arange(kinds, dtype=species.dtype)]),
        vectors=with_ends(vectors),
        neighbors=with_ends(atoms + at_ends),
        edge_mask=with_ends(edge_mask),
        reverse=jnp.zeros((atoms + kinds, slots), jnp.int32),
        atom_mask=with_ends(atom_mask),
        structure=own,
        structure_mask=with_ends(atom_mask),
        volume=jnp.ones(atoms + kinds, vectors.dtype),
        positions=jnp.zeros((atoms + kinds, 3), vectors.dtype),
        cell=jnp.zeros((atoms + kinds, 3, 3), vectors.dtype),
        charge=with_ends(charge),
        spin=with_ends(spin),
    )


def over_blocks(function: Callable[[Any, Graph], Any], params: Any, graph: Graph, blocks: int, kinds: int) -> Any:
    """A function of all atoms, from blocks of them one after the other.

    Args:
        function: of parameters and of a graph in which each atom is a structure, and neighbours have no edges; gives a
            pytree of arrays [M, A, ...].
        params: handed on.
        graph: A atoms.
        blocks: how many.
        kinds: number of species.

    Returns:
        what the function would give for the whole graph.
    """
    atoms = len(graph.species)
    each = -(-atoms // blocks)

    def cut(values: jax.Array) -> jax.Array:
        padded = jnp.pad(values, ((0, blocks * each - atoms),) + ((0, 0),) * (values.ndim - 1))
        return padded.reshape(blocks, each, *values.shape[1:])

    def of_block(block: tuple[jax.Array, ...]) -> Any:
        species, at_ends, vectors, edge_mask, atom_mask, charge, spin = block
        some = apart(species, at_ends, vectors, edge_mask, atom_mask, (charge, spin), kinds)
        found = materialised(function, some.neighbors[0, 0] > 0, params, some)
        return jax.tree.map(lambda x: x[:, :each], found)

    arrays = (
        graph.species,
        graph.species[graph.neighbors],
        graph.vectors,
        graph.edge_mask,
        graph.atom_mask,
        graph.charge[graph.structure],
        graph.spin[graph.structure],
    )
    found = jax.lax.map(of_block, tuple(map(cut, arrays)))

    def joined(values: jax.Array) -> jax.Array:
        together = jnp.moveaxis(values, 0, 1)
        return together.reshape(together.shape[0], blocks * each, *values.shape[3:])[:, :atoms]

    return jax.tree.map(joined, found)
