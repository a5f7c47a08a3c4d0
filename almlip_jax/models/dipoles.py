"""Dipoles of molecules, from charges and dipoles of their atoms."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from ase.data import atomic_masses

from almlip_jax.structures.graph import Graph, atom_counts, sum_over_atoms
from almlip_jax.structures.species import SpeciesTable


def molecular_dipoles(charges: jax.Array, dipoles: jax.Array, graph: Graph, species: SpeciesTable) -> jax.Array:
    """The dipole of each structure relative to its centre of mass, ``sum_i q_i (R_i - R_0) + mu_i``.

    Charges are shifted, all by the same, so that they add up to the charge of the structure.  The dipole of a neutral
    one then has no origin; that of an ion belongs to its centre of mass, of standard atomic masses.

    Args:
        charges: [A] e.
        dipoles: [A, 3] e*Angstrom.
        graph: positions and charges of structures that are not periodic.
        species: the species table.

    Returns:
        [S, 3] e*Angstrom; 0 for padding.
    """
    excess = (sum_over_atoms(charges, graph) - graph.charge) / atom_counts(graph)
    charges = charges - excess[graph.structure]
    mass = jnp.where(graph.atom_mask, jnp.asarray(standard_masses(species), charges.dtype)[graph.species], 0)
    total = jnp.where(graph.structure_mask, sum_over_atoms(mass, graph), 1)
    centre = sum_over_atoms(mass[:, None] * graph.positions, graph) / total[:, None]
    return sum_over_atoms(charges[:, None] * (graph.positions - centre[graph.structure]) + dipoles, graph)


def standard_masses(species: SpeciesTable) -> np.ndarray:
    """Standard atomic masses of the species of a table, [Z] amu."""
    return np.asarray(atomic_masses[np.asarray(species.numbers)], np.float64)
