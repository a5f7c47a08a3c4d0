"""The energy of one structure as a function for jax-md, and for any other program in JAX.

Whatever jax-md's spaces do with positions is understood: it may bring atoms back into the cell, keep them in fractional
coordinates, change the box, or strain it to see a pressure.  Where a list of neighbours lost edges, or atoms went where
it knows nothing of, the energy and its derivatives are not a number: nothing of this is wrong in silence.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from ase import Atoms
from jax.typing import ArrayLike

from almlip_jax.compilation import check_name
from almlip_jax.errors import InputError
from almlip_jax.given import given_structures
from almlip_jax.potential.following import in_type
from almlip_jax.precision import full_precision
from almlip_jax.structures.electronic_state import electronic_state
from almlip_jax.structures.slots import periodic_and_dual
from almlip_jax.structures.walkers import WalkerNeighbors, walker_neighbors

if TYPE_CHECKING:
    from almlip_jax.compilation import Precision
    from almlip_jax.potential.potential import Potential

_ROUNDING = 1e-3  # Angstrom, of positions in float32

EnergyFunction: TypeAlias = Callable[..., jax.Array]
"""``energy(positions [N, 3], neighbors, *, box=None, perturbation=None, kT=None)``; see `Potential.energy_fn`."""


def energy_function(
    potential: Potential,
    atoms: Atoms,
    *,
    skin: float,
    reference_energies: bool,
    members: bool,
    fractional_coordinates: bool,
    precision: Precision | None,
) -> tuple[WalkerNeighbors, EnergyFunction]:
    """The neighbours of a structure, and its energy; see `Potential.energy_fn`."""
    given = given_structures(atoms, "atoms")
    if len(given) != 1:
        raise InputError(f"an energy function is of one structure, not of {len(given)}; make one of each.")
    (atoms,) = given
    if len(atoms) == 0:
        raise InputError("there is no atom to evaluate.")
    dtype = _type_of(potential, precision)
    species = jnp.asarray(potential.species.index(atoms.numbers))[None]
    charge, spin = jnp.asarray(np.array(electronic_state(atoms), dtype)[:, None])
    strange = potential.strange_state(atoms)
    if strange is not None:
        warnings.warn(strange, stacklevel=3)
    whole = np.ones((1, len(atoms)), bool)
    placed = np.asarray(atoms.positions[None], dtype), np.asarray(atoms.cell.array[None], dtype)
    first = walker_neighbors(*placed, np.asarray(atoms.pbc)[None], whole, potential.cutoff, skin)
    ensemble, params = potential.ensemble, jax.tree.map(lambda x: in_type(x, dtype), potential.params)
    constant = np.asarray(potential.reference_energy(atoms) if reference_energies else 0.0, dtype)

    @full_precision
    def energy(
        positions: ArrayLike,
        neighbors: WalkerNeighbors,
        *,
        box: ArrayLike | None = None,
        perturbation: ArrayLike | None = None,
        kT: ArrayLike | None = None,
    ) -> jax.Array:
        """See `EnergyFunction`."""
        del kT
        where = jnp.asarray(positions, dtype)
        if where.shape != (len(atoms), 3):
            raise InputError(f"positions of {len(atoms)} atoms are [{len(atoms)}, 3], not {[*where.shape]}.")
        if box is not None:
            neighbors = dataclasses.replace(neighbors, cells=jnp.swapaxes(_matrix(box, dtype), 0, 1)[None])
        if fractional_coordinates:
            where = _in_space(where, neighbors.cells[0])
        where, known = _as_listed(neighbors, where)
        if perturbation is not None:
            strain = jnp.swapaxes(_matrix(perturbation, dtype), 0, 1)
            where, neighbors = where @ strain, dataclasses.replace(neighbors, cells=neighbors.cells @ strain)
        found = ensemble.energies(params, neighbors.graph(where[None], species, charge, spin))[:, 0]
        found = jnp.where(known, 1, jnp.nan).astype(dtype) * found  # so that its derivatives are no numbers either
        return (found if members else jnp.mean(found)) + constant

    return first, energy


def _type_of(potential: Potential, precision: Precision | None) -> np.dtype:
    """What to compute in.

    Raises:
        InputError: there is no such precision, or jax is not told to compute in it.
    """
    chosen = precision or potential.precision
    check_name(chosen)
    if chosen == "float64" and not jax.config.values["jax_enable_x64"]:
        raise InputError(
            "jax computes in float32 where it is not told otherwise: call jax.config.update('jax_enable_x64', True) at "
            "the beginning, or ask for energy_fn(..., precision='float32')."
        )
    return np.dtype(chosen)


def _matrix(given: ArrayLike, dtype: np.dtype) -> jax.Array:
    """A box of jax-md as a matrix [3, 3], whose columns are the cell vectors: a length, three, or the matrix.

    Raises:
        InputError: it has another shape.
    """
    box = jnp.asarray(given, dtype)
    if box.shape not in ((), (3,), (3, 3)):
        raise InputError(f"a box is one length, three, or a matrix [3, 3] of columns, not an array {[*box.shape]}.")
    return box if box.ndim == 2 else box * jnp.eye(3, dtype=dtype)


def _in_space(fractional: jax.Array, cell: jax.Array) -> jax.Array:
    """Positions [N, 3] from fractional ones, as jax-md has it: a derivative by them is one by positions in space."""
    here = jax.lax.stop_gradient(fractional)
    return here @ cell + (fractional - here)


def _as_listed(neighbors: WalkerNeighbors, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Positions [N, 3] in the images in which a list knows the atoms, and whether it knows them there at all.

    A list whose atoms moved up to half the skin holds every edge.  A step may begin there and end a little beyond;
    twice as far on, it was not brought up to date.
    """
    if neighbors.all_pairs:
        return positions, jnp.ones((), bool)
    (cell,), (periodic,), (pbc,) = neighbors.cells, neighbors.built_cells, neighbors.pbc
    lattice, dual = periodic_and_dual(jax.lax.stop_gradient(cell), pbc)
    before, old_dual = periodic_and_dual(periodic, pbc)
    (built,), here = neighbors.built_at, jax.lax.stop_gradient(positions)
    deformation = jnp.einsum("ki,kj->ij", old_dual, lattice - before)  # F - 1
    moved = here - built - built @ deformation
    jumps = jnp.where(pbc, jnp.round(moved @ dual.T), 0)
    moved = moved - jumps @ lattice
    farthest = jnp.sqrt(jnp.max(jnp.sum(moved**2, axis=-1)))
    least = 1 - jnp.sqrt(jnp.sum(deformation**2))
    reach = (neighbors.cutoff + neighbors.skin) * least - 2 * farthest
    lost = neighbors.overflow | (reach < neighbors.cutoff - neighbors.skin - _ROUNDING)
    return positions - jumps @ jnp.where(pbc[:, None], cell, 0), ~lost

