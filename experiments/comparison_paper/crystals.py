"""Crystals as rows of descriptors, from ``ase.Atoms`` alone: composition, cell, and distances of neighbours.

No descriptor is made of a label.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from ase import Atoms
from ase.data import covalent_radii
from ase.geometry import cell_to_cellpar
from ase.units import _amu as KG_PER_AMU
from vesin import ase_neighbor_list

COMPOSITION = (
    "elements",
    "atomic_number_mean",
    "atomic_number_std",
    "electronegativity_mean",
    "electronegativity_std",
    "covalent_radius_mean",
    "covalent_radius_std",
    "largest_fraction",
)
PROPERTIES = (
    "atoms",
    "volume_per_atom",
    "density",
    "packing_fraction",
    "shortest_length",
    "middle_length",
    "longest_length",
    "smallest_angle",
    "largest_angle",
)
CENTRES = np.linspace(0.8, 2.0, 13)
"""Distances over the sum of the covalent radii, at which pairs are counted."""
WIDTH = 0.1
STRUCTURE = ("coordination_mean", "coordination_std", "nearest_mean", "nearest_std", "nearest_min") + tuple(
    f"pairs_{centre:.1f}" for centre in CENTRES
)
DESCRIPTORS = {"paper": COMPOSITION + PROPERTIES, "structural": COMPOSITION + PROPERTIES + STRUCTURE}
_BOND = 1.15  # atoms nearer than this many sums of covalent radii are counted as bonded


# fmt: off
ELECTRONEGATIVITY = np.array([
    0.00, 2.20, 0.00, 0.98, 1.57, 2.04, 2.55, 3.04, 3.44, 3.98,  # X to F
    0.00, 0.93, 1.31, 1.61, 1.90, 2.19, 2.58, 3.16, 0.00, 0.82,  # Ne to K
    1.00, 1.36, 1.54, 1.63, 1.66, 1.55, 1.83, 1.88, 1.91, 1.90,  # Ca to Cu
    1.65, 1.81, 2.01, 2.18, 2.55, 2.96, 3.00, 0.82, 0.95, 1.22,  # Zn to Y
    1.33, 1.60, 2.16, 1.90, 2.20, 2.28, 2.20, 1.93, 1.69, 1.78,  # Zr to In
    1.96, 2.05, 2.10, 2.66, 2.60, 0.79, 0.89, 1.10, 1.12, 1.13,  # Sn to Pr
    1.14, 1.13, 1.17, 1.20, 1.20, 1.10, 1.22, 1.23, 1.24, 1.25,  # Nd to Tm
    1.10, 1.27, 1.30, 1.50, 2.36, 1.90, 2.20, 2.20, 2.28, 2.54,  # Yb to Au
    2.00, 1.62, 2.33, 2.02, 2.00, 2.20, 2.20, 0.70, 0.90, 1.10,  # Hg to Ac
    1.30, 1.50, 1.38, 1.36, 1.28, 1.30, 1.30, 1.30, 1.30, 1.30,  # Th to Es
    1.30, 1.30, 1.30, 1.30,  # Fm to Lr
])
# fmt: on
"""Pauling's, by atomic number; 0 for elements that have none."""


def electronegativity(number: int) -> float:
    """Pauling's; 0 for elements that have none."""
    return float(ELECTRONEGATIVITY[number]) if number < len(ELECTRONEGATIVITY) else 0.0


def composition(atoms: Atoms) -> list[float]:
    """The eight of `COMPOSITION`: means and deviations over the atoms."""
    numbers, counts = np.unique(atoms.numbers, return_counts=True)
    weights = counts / counts.sum()
    rows = [float(len(numbers))]
    for values in (numbers, np.array([electronegativity(n) for n in numbers]), covalent_radii[numbers]):
        mean = float(weights @ values)
        rows += [mean, float(np.sqrt(weights @ (values - mean) ** 2))]
    return [*rows, float(weights.max())]


def properties(atoms: Atoms) -> list[float]:
    """The nine of `PROPERTIES`: Angstrom, Angstrom^3, g/cm^3, degrees."""
    lengths, angles = np.split(cell_to_cellpar(atoms.cell), 2)
    volume = atoms.get_volume()
    density = atoms.get_masses().sum() * KG_PER_AMU * 1e3 / (volume * 1e-24)
    packed = float(np.sum(4 / 3 * np.pi * covalent_radii[atoms.numbers] ** 3)) / volume
    ends = [float(angles.min()), float(angles.max())]
    return [float(len(atoms)), volume / len(atoms), density, packed, *np.sort(lengths).tolist(), *ends]


def structure(atoms: Atoms) -> list[float]:
    """Those of `STRUCTURE`: distances in sums of covalent radii; pairs are counted by Gaussians, per atom."""
    radii = covalent_radii[atoms.numbers]
    i, j, d = ase_neighbor_list("ijd", atoms, float((CENTRES[-1] + 2 * WIDTH) * 2 * radii.max()))
    ratio = d / (radii[i] + radii[j])
    bonds = np.bincount(i[ratio < _BOND], minlength=len(atoms))
    nearest = np.full(len(atoms), CENTRES[-1])
    np.minimum.at(nearest, i, ratio)
    pairs = np.exp(-0.5 * ((ratio[:, None] - CENTRES) / WIDTH) ** 2).sum(axis=0) / len(atoms)
    return [bonds.mean(), bonds.std(), nearest.mean(), nearest.std(), nearest.min(), *pairs]


def descriptors(frames: Sequence[Atoms], kind: str) -> np.ndarray:
    """[n, d] rows of the descriptors of a kind, in the order of ``DESCRIPTORS[kind]``."""
    parts = (composition, properties) if kind == "paper" else (composition, properties, structure)
    return np.array([[value for part in parts for value in part(atoms)] for atoms in frames], np.float64)
