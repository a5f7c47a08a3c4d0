"""Sanity of a frame: contacts, fragments, temperature, forces, and whether anything is still a number."""

from __future__ import annotations

from enum import IntEnum

import jax
import jax.numpy as jnp
import numpy as np
from ase.data import covalent_radii
from flax import struct

from almlip_jax.dynamics.settings import SanitySettings
from almlip_jax.structures.graph import Graph


class Cause(IntEnum):
    """Which check called a frame unphysical; the first in this order where several do."""

    NONE = 0
    NOT_FINITE = 1
    CLOSE_CONTACT = 2
    LARGE_FORCE = 3
    HOT = 4
    DISSOCIATED = 5

    @property
    def sentence(self) -> str:
        """For people."""
        return {
            Cause.NONE: "nothing",
            Cause.NOT_FINITE: "positions, energy or forces are not finite",
            Cause.CLOSE_CONTACT: "two atoms came too close",
            Cause.LARGE_FORCE: "a force became too large",
            Cause.HOT: "the temperature ran away",
            Cause.DISSOCIATED: "the structure fell apart",
        }[self]


@struct.dataclass
class SanityLimits:
    """`SanitySettings` as arrays, so that other limits need no other program."""

    closest_contact: jax.Array
    max_temperature: jax.Array
    max_force: jax.Array
    bond_factor: jax.Array

    @classmethod
    def of(cls, settings: SanitySettings) -> SanityLimits:
        """The limits that some settings give."""
        return cls(
            closest_contact=jnp.asarray(np.float32(settings.closest_contact)),
            max_temperature=jnp.asarray(np.float32(settings.max_temperature)),
            max_force=jnp.asarray(np.float32(settings.max_force)),
            bond_factor=jnp.asarray(np.float32(settings.bond_factor)),
        )


def species_radii(numbers: tuple[int, ...]) -> np.ndarray:
    """Covalent radii of a species table, Angstrom."""
    return covalent_radii[np.asarray(numbers)]


def closest_contact(graph: Graph, radii: jax.Array, walkers: int) -> jax.Array:
    """Shortest edge of each walker as a fraction of the sum of the covalent radii, [W]; infinite without edges."""
    distance = jnp.sqrt(jnp.sum(graph.vectors**2, axis=-1))
    sums = radii[graph.species][:, None] + radii[graph.species[graph.neighbors]]
    ratio = jnp.where(graph.edge_mask, distance / sums, jnp.inf)
    return jnp.min(ratio.reshape(walkers, -1), axis=-1)


def spanning_tree(positions: jax.Array, species: jax.Array, atom_mask: jax.Array, radii: jax.Array) -> jax.Array:
    """The tree over all atoms of each structure whose edges are the shortest, relative to their covalent radii.

    Its longest edges are those between the connected parts, whatever length a bond may have.  Source: Prim, Bell Syst.
    Tech. J. 36, 1389 (1957); N steps of N pairs each, and no array of all pairs.

    Args:
        positions: [W, N, 3] Angstrom.
        species: [W, N] int.
        atom_mask: [W, N] bool.
        radii: [number of species] Angstrom.

    Returns:
        [W, N] int, the atom that each one hangs on; itself for the first atom and for padding.
    """

    def of_one(position: jax.Array, own: jax.Array, mask: jax.Array) -> jax.Array:
        atoms = jnp.arange(len(mask))

        def ratios(atom: jax.Array) -> jax.Array:  # squares of distances over sums of radii
            return jnp.sum((position - position[atom]) ** 2, axis=-1) / (own + own[atom]) ** 2

        def join(_: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
            nearest, parent, outside = carry
            atom = jnp.argmin(jnp.where(outside, nearest, jnp.inf))
            outside = outside.at[atom].set(False)
            found = ratios(atom)
            closer = outside & (found < nearest)
            return jnp.where(closer, found, nearest), jnp.where(closer, atom, parent), outside

        first = jnp.argmax(mask)
        outside = mask & (atoms != first)
        begun = ratios(first), jnp.where(mask, first, atoms), outside
        return jax.lax.fori_loop(0, len(mask) - 1, join, begun)[1].astype(jnp.int32)

    return jax.vmap(of_one)(positions, radii[species], atom_mask)


def parts_of_tree(
    tree: jax.Array,
    positions: jax.Array,
    species: jax.Array,
    atom_mask: jax.Array,
    radii: jax.Array,
    bond_factor: jax.Array,
) -> jax.Array:
    """One more than the edges of a spanning tree that are no bonds, [W] int.

    The number of connected parts where the tree is the `spanning_tree` of these positions; else at least that number:
    nothing has come apart as long as a tree of some step before holds.

    Args:
        tree: [W, N] int, the atom that each one hangs on.
        positions: [W, N, 3] Angstrom.
        species: [W, N] int.
        atom_mask: [W, N] bool.
        radii: [number of species] Angstrom.
        bond_factor: scalar.
    """
    own = radii[species]
    there = jnp.take_along_axis(positions, tree[..., None], axis=1)
    squares = jnp.sum((positions - there) ** 2, axis=-1)
    longest = bond_factor * (own + jnp.take_along_axis(own, tree, axis=1))
    return 1 + jnp.sum(atom_mask & ~(squares < longest**2), axis=-1)


def looks_for_fragments(settings: SanitySettings, pbc: np.ndarray, atoms: int) -> bool:
    """Whether dissociation is looked for in any walker; [W, 3] periodic directions, and room for atoms (static)."""
    return settings.dissociation and bool(np.any(~np.any(pbc, axis=1))) and atoms > 1
