"""The power spectrum of the atoms' surroundings: what tells structures apart before anything is known of energies."""

from __future__ import annotations

from typing import TypeAlias

import jax
import jax.numpy as jnp

from almlip_jax.ensembles.mixed import AnyEnsemble
from almlip_jax.features.declared import Evaluation, FeatureMap
from almlip_jax.features.sketch import COLUMNS, Factors, random_factors
from almlip_jax.models.base import Params
from almlip_jax.models.shared_density import SharedDensity, SharedDensitySettings
from almlip_jax.structures.graph import Graph, atom_counts, sum_over_atoms
from almlip_jax.structures.species import SpeciesTable

RADIAL = 6
"""Radial Bessel functions of the density."""
L_MAX = 4
"""Highest degree of its spherical harmonics."""

ATOM_COLUMNS = 256
"""Columns of the sketch of an atom's spectrum, at most: there are many atoms."""

SpectrumFactors: TypeAlias = tuple[Factors, jax.Array]
"""Random factors of the two densities, [l, p, F] for all degrees, and signs of the central species, [p, species]."""


def density_of(cutoff: float, species: SpeciesTable) -> SharedDensity:
    """Where the density of the power spectrum comes from: the parameter-free part of the shared-density model."""
    return SharedDensity(SharedDensitySettings(cutoff=cutoff, radial=RADIAL, l_max=L_MAX), species)


def spectrum_factors(
    density: SharedDensity, key: jax.Array, size: int = COLUMNS, dtype: jnp.dtype | type = jnp.float32
) -> SpectrumFactors:
    """Random factors that `power_spectrum` is sketched with.

    Args:
        density: what `density_of` gives.
        key: decides the factors.
        size: columns p of the sketch.
        dtype: of the factors.
    """
    for_density, for_centre = jax.random.split(key)
    width = min(len(density.species), density.settings.species_channels) * density.settings.radial
    signs = jax.random.rademacher(for_centre, (size, len(density.species)), dtype)
    return random_factors(for_density, (L_MAX + 1, width, width), size, dtype), signs


def power_spectrum(density: SharedDensity, graph: Graph, factors: SpectrumFactors) -> jax.Array:
    """Mean over the atoms of the power spectrum of their surroundings, central species apart, sketched.

    The scalar product of two structures is on average that of their mean spectra, summed over the central species.

    Args:
        density: what `density_of` gives.
        graph: the structures.
        factors: what `spectrum_factors` gives.

    Returns:
        [S, p].
    """
    return sum_over_atoms(_spectra(density, graph, factors), graph) / atom_counts(graph)[:, None]


def atom_spectra(density: SharedDensity, graph: Graph, factors: SpectrumFactors) -> jax.Array:
    """Power spectrum of the surroundings of each atom, sketched to `ATOM_COLUMNS`; arguments as `power_spectrum`.

    Returns:
        [A, p]; of equal length and direction for atoms of one element in equal surroundings.
    """
    (left, right), signs = factors
    return _spectra(density, graph, ((left[:, :ATOM_COLUMNS], right[:, :ATOM_COLUMNS]), signs[:ATOM_COLUMNS]))


def _spectra(density: SharedDensity, graph: Graph, factors: SpectrumFactors) -> jax.Array:
    """Sketched power spectrum of each atom, [A, p].

    The density of atom i is expanded in A_nlm(i), n over radial functions and neighbour species; its power spectrum is
    ``p_nn'l = sum_m A_nlm A_n'lm / sqrt(2l + 1)`` (Bartok, Kondor and Csanyi, Phys. Rev. B 87, 184115 (2013)).
    """
    (left, right), signs = factors
    values = density.geometry(graph).values  # [(l_max + 1)^2, A, F]
    found = jnp.zeros((values.shape[1], signs.shape[0]), values.dtype)
    for l in range(L_MAX + 1):
        block = values[l * l : (l + 1) ** 2]
        found = found + jnp.sum((block @ left[l].T) * (block @ right[l].T), axis=0) / (2 * l + 1) ** 0.5
    return found * signs.T[graph.species] / signs.shape[0] ** 0.5


def _factors(ensemble: AnyEnsemble, params: Params, key: jax.Array, columns: int) -> SpectrumFactors:
    dtype = jax.tree.leaves(params)[0].dtype
    return spectrum_factors(density_of(ensemble.cutoff, ensemble.species), key, columns, dtype)


def _rows(seen: Evaluation, factors: SpectrumFactors) -> jax.Array:
    return power_spectrum(density_of(seen.ensemble.cutoff, seen.ensemble.species), seen.graph, factors)


def _atom_rows(seen: Evaluation, factors: SpectrumFactors) -> jax.Array:
    return atom_spectra(density_of(seen.ensemble.cutoff, seen.ensemble.species), seen.graph, factors)


FeatureMap(
    "power_spectrum",
    "power spectrum of the atoms' surroundings, sketched",
    _rows,
    _factors,
    atoms=_atom_rows,
    learned=False,
)
