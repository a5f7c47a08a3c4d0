"""Sanity of a frame: contacts, fragments, temperature, forces, and whether anything is still a number."""

from __future__ import annotations

from enum import IntEnum

import jax
import jax.numpy as jnp
import numpy as np
from ase.data import covalent_radii
from flax import struct
from numpy.typing import ArrayLike
from pydantic import Field
from scipy.special import chdtri

from almlip_jax.dynamics.seen import Observables
from almlip_jax.settings import Settings, unit
from almlip_jax.structures.graph import Graph

_MANY_DEGREES = 15  # of freedom, from which on ``max_temperature`` is taken as it is
_BY_CHANCE = 1e-12  # probability of a temperature of six times that of the bath with so many


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


class SanitySettings(Settings):
    """What counts as unphysical: such frames end a walker and are never recorded."""

    closest_contact: float = Field(default=0.5, ge=0, le=2.0)
    """Least distance of two atoms, as a fraction of the sum of their covalent radii."""
    max_temperature: float = Field(default=6.0, gt=0, le=1e15)
    """Highest kinetic temperature, as a multiple of the walker's own; with fewer than 15 degrees of freedom
    (five atoms) it fluctuates more, and the multiple is larger in proportion: 1.9 times for two atoms, 3.3 for one."""
    max_force: float = Field(default=50.0, gt=0, le=1e6, json_schema_extra=unit("eV/Angstrom"))
    """Largest force on an atom, eV/Angstrom."""
    bond_factor: float = Field(default=2.0, gt=0, le=20.0)
    """Atoms nearer than this multiple of the sum of their covalent radii are connected; an open structure that falls
    into more fragments than it began with has dissociated."""
    dissociation: bool = True
    """Whether to look for dissociation, at every step, in open structures; periodic ones are not looked at."""


@struct.dataclass
class SanityLimits:
    """`SanitySettings` as arrays, so that other limits need no other program.

    ``max_temperature`` is a scalar, or [W] where degrees of freedom are known.
    """

    closest_contact: jax.Array
    max_temperature: jax.Array
    max_force: jax.Array
    bond_factor: jax.Array

    @classmethod
    def of(cls, settings: SanitySettings, freedom: ArrayLike = _MANY_DEGREES) -> SanityLimits:
        """The limits that some settings give for some degrees of freedom, a number or [W]."""
        highest = settings.max_temperature * fluctuating(np.asarray(freedom, np.float64))
        return cls(
            closest_contact=jax.device_put(np.float32(settings.closest_contact)),
            max_temperature=jax.device_put(np.asarray(highest, np.float32)),
            max_force=jax.device_put(np.float32(settings.max_force)),
            bond_factor=jax.device_put(np.float32(settings.bond_factor)),
        )


def fluctuating(freedom: np.ndarray) -> np.ndarray:
    """How much higher kinetic temperatures go by chance than with many degrees of freedom [...], 1 for many of them.

    Twice the kinetic energy over kT follows a chi-squared distribution; what is compared is the temperature that it
    exceeds once in 10^12 times, which with 15 degrees of freedom is six times that of the bath.
    """
    few = np.minimum(freedom, _MANY_DEGREES)
    return (chdtri(few, _BY_CHANCE) / few) / (chdtri(_MANY_DEGREES, _BY_CHANCE) / _MANY_DEGREES)


def unphysical_cause(observables: Observables, limits: SanityLimits) -> jax.Array:
    """Which check finds a frame unphysical, [W] int of `Cause`; 0 where none does."""
    checks = [
        (Cause.NOT_FINITE, ~observables.finite),
        (Cause.CLOSE_CONTACT, observables.closest_contact < limits.closest_contact),
        (Cause.LARGE_FORCE, observables.max_force > limits.max_force),
        (Cause.HOT, observables.temperature > limits.max_temperature * observables.bath_temperature),
        (Cause.DISSOCIATED, observables.new_fragments > 0),
    ]
    cause = jnp.zeros(observables.energy.shape, jnp.int32)
    for code, failed in reversed(checks):
        cause = jnp.where(failed, int(code), cause)
    return cause


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
        [W, N, 2] int, each atom and the one that it hangs on; itself for the first atom and for padding.
    """

    def of_one(position: jax.Array, own: jax.Array, mask: jax.Array) -> jax.Array:
        """The tree [N, 2] of one structure."""
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
        parents = jax.lax.fori_loop(0, len(mask) - 1, join, begun)[1].astype(jnp.int32)
        return jnp.stack([atoms.astype(jnp.int32), parents], axis=1)

    return jax.vmap(of_one)(positions, radii[species], atom_mask)


def spanning_tree_of_edges(graph: Graph, walkers: int, radii: jax.Array) -> jax.Array:
    """The `spanning_tree` of structures without periods from the edges of their graph: for many atoms.

    Parts between which there is no edge are joined as well, so it takes the place of the other where bonds are not
    longer than the cutoff.  Source: Boruvka, Prace Mor. Prirodoved. Spol. 3, 37 (1926): every part takes its shortest
    edge to another part, until there is none; log N rounds at most, each of the work of a sum over edges.

    Args:
        graph: W structures of N atoms each.
        walkers: W.
        radii: [number of species] Angstrom.

    Returns:
        [W, N, 2] int, two atoms of each edge; an atom and itself where there is none.
    """
    atoms = graph.atom_mask.shape[0]
    own = jnp.arange(atoms, dtype=jnp.int32)
    ends = jnp.minimum(own[:, None], graph.neighbors), jnp.maximum(own[:, None], graph.neighbors)
    radius = radii[graph.species]
    length = jnp.sum(graph.vectors**2, axis=-1) / (radius[:, None] + radius[graph.neighbors]) ** 2

    def least(values: jax.Array, which: jax.Array, part: jax.Array, nothing: float) -> jax.Array:
        """Of the edges of each part, by the atom that stands for it."""
        return jax.ops.segment_min(jnp.min(jnp.where(which, values, nothing), axis=1), part, atoms)

    def joined(carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Parts and tree once every part has taken its shortest edge, and whether any has."""
        part, tree, _ = carry
        # of equally long edges the one between the first atoms: two parts never choose two edges between them
        which = graph.edge_mask & (part[graph.neighbors] != part[:, None])
        which = which & (length == least(length, which, part, jnp.inf)[part][:, None])
        first = least(ends[0], which, part, atoms)
        which = which & (ends[0] == first[part][:, None])
        second = least(ends[1], which, part, atoms)
        found = first < atoms  # none in parts that are whole, and for atoms that stand for no part any more
        one, other = (part[jnp.minimum(end, atoms - 1)] for end in (first, second))
        parent = jnp.where(found, jnp.where(one == own, other, one), own)
        parent = jnp.where((parent[parent] == own) & (own < parent), own, parent)
        tree = jnp.where((parent != own)[:, None], jnp.stack([first, second], axis=1), tree)
        for _ in range(max(atoms - 1, 1).bit_length()):
            parent = parent[parent]
        return parent[part], tree, jnp.any(found)

    start = own, jnp.stack([own, own], axis=1), jnp.ones((), bool)
    part, tree, _ = jax.lax.while_loop(lambda carry: carry[2], joined, start)
    mask = graph.atom_mask.reshape(walkers, -1)
    size = mask.shape[1]
    begin = size * jnp.arange(walkers, dtype=jnp.int32)[:, None]
    base = begin + jnp.argmax(mask, axis=1).astype(jnp.int32)[:, None]
    apart = (part == own).reshape(mask.shape) & mask & (part[base] != own.reshape(mask.shape))
    tree = tree.reshape(*mask.shape, 2)
    tree = jnp.where(apart[..., None], jnp.stack([tree[..., 0], jnp.broadcast_to(base, mask.shape)], axis=-1), tree)
    return tree - begin[..., None]


def parts_of_tree(
    tree: jax.Array,
    positions: jax.Array,
    species: jax.Array,
    atom_mask: jax.Array,
    radii: jax.Array,
    bond_factor: jax.Array,
) -> jax.Array:
    """One more than the number of edges of a spanning tree that are not bonds, [W] int.

    The number of connected parts where the tree is the `spanning_tree` of these positions; else at least that number:
    nothing has come apart as long as a tree of some step before holds.

    Args:
        tree: [W, N, 2] int, two atoms of each edge; an atom and itself where there is none.
        positions: [W, N, 3] Angstrom.
        species: [W, N] int.
        atom_mask: [W, N] bool.
        radii: [number of species] Angstrom.
        bond_factor: scalar.
    """
    own = radii[species]
    here, there = (jnp.take_along_axis(positions, tree[..., end, None], axis=1) for end in (0, 1))
    squares = jnp.sum((here - there) ** 2, axis=-1)
    longest = bond_factor * sum(jnp.take_along_axis(own, tree[..., end], axis=1) for end in (0, 1))
    return 1 + jnp.sum(atom_mask & ~(squares < longest**2), axis=-1)


def looks_for_fragments(settings: SanitySettings, pbc: np.ndarray, atoms: int) -> bool:
    """Whether dissociation is looked for in any walker; [W, 3] periodic directions, and room for atoms (static)."""
    return settings.dissociation and bool(np.any(~np.any(pbc, axis=1))) and atoms > 1
