"""Reference energies of the species: given, or by least squares over labelled structures, always in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from ase import Atoms

from almlip_jax.errors import InputError
from almlip_jax.structures.species import SpeciesTable


def reference_energies(
    structures: Sequence[Atoms], species: SpeciesTable, given: Mapping[int, float] | None = None
) -> dict[int, float]:
    """Energy of each species, eV, such that their sums come close to the energies of the structures.

    Args:
        structures: labelled structures; those without an energy do not count.
        species: the species table.
        given: energies of isolated atoms by atomic number; where given, all species must be there.

    Returns:
        eV by atomic number.  Without given values, the least-squares solution of smallest norm about the mean energy
        per atom, which is well defined also where every structure has the same composition.

    Raises:
        InputError: given values lack a species, or no structure has an energy.
    """
    if given:
        missing = [symbol for z, symbol in zip(species.numbers, species.symbols, strict=True) if z not in given]
        if missing:
            raise InputError(f"reference energies lack {', '.join(missing)}; give every species or none.")
        return {z: float(given[z]) for z in species.numbers}
    labelled = [a for a in structures if a.calc is not None and "energy" in a.calc.results]
    if not labelled:
        raise InputError("no structure has an energy; training needs labelled structures.")
    counts = np.array([[np.sum(a.numbers == z) for z in species.numbers] for a in labelled], dtype=np.float64)
    energies = np.array([a.calc.results["energy"] for a in labelled], dtype=np.float64)
    mean = energies.sum() / counts.sum()
    excess, *_ = np.linalg.lstsq(counts, energies - mean * counts.sum(axis=1), rcond=1e-10)
    return {z: float(mean + e) for z, e in zip(species.numbers, excess, strict=True)}
