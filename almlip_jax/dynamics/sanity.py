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

_LARGEST_FRAGMENTED = 128  # atoms; the search for fragments multiplies N x N matrices at each step


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


def fragments(
    positions: jax.Array, species: jax.Array, atom_mask: jax.Array, radii: jax.Array, bond_factor: jax.Array
) -> jax.Array:
    """Number of connected parts of each open structure, [W].

    Atoms are connected where they are nearer than ``bond_factor`` times the sum of their covalent radii; the closure of
    that relation comes from repeated squaring of its matrix.

    Args:
        positions: [W, N, 3] Angstrom.
        species: [W, N] int.
        atom_mask: [W, N] bool.
        radii: [number of species] Angstrom.
        bond_factor: scalar.
    """
    squares = jnp.sum((positions[:, :, None] - positions[:, None, :]) ** 2, axis=-1)
    own = radii[species]
    bonded = squares < (bond_factor * (own[:, :, None] + own[:, None, :])) ** 2
    pair = atom_mask[:, :, None] & atom_mask[:, None, :]
    size = positions.shape[1]
    reach = ((bonded & pair) | jnp.eye(size, dtype=bool)).astype(positions.dtype)
    for _ in range(max(int(np.ceil(np.log2(max(size, 2)))), 1)):
        reach = jnp.minimum(reach @ reach, 1)
    # the first atom of a part is the one that reaches no atom before itself
    earlier = jnp.sum(jnp.where(reach > 0, jnp.tri(size, k=-1, dtype=positions.dtype), 0), axis=-1)
    return jnp.sum(atom_mask & (earlier == 0), axis=-1)


def looks_for_fragments(settings: SanitySettings, pbc: np.ndarray, atoms: int) -> bool:
    """Whether dissociation is looked for in walkers with these periodic directions and this many atoms (static)."""
    return settings.dissociation and not np.any(pbc) and 1 < atoms <= _LARGEST_FRAGMENTED
