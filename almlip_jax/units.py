"""Units and physical constants: eV, Angstrom, fs, amu throughout; nothing else in the package holds a conversion.

Energies are in eV, lengths in Angstrom, temperatures in K, times at every interface in fs, masses in amu and
charges in units of e.  Integrators work in the derived time unit ``Angstrom * sqrt(amu / eV)``, in which
force / mass needs no factor; `FEMTOSECOND` converts to it.  Values are CODATA 2014, as in ASE.
"""

from __future__ import annotations

from typing import Final

from ase import units as _ase

KB: Final[float] = float(_ase.kB)
"""Boltzmann constant in eV/K."""

FEMTOSECOND: Final[float] = float(_ase.fs)
"""One femtosecond in units of Angstrom * sqrt(amu / eV)."""

HARTREE: Final[float] = float(_ase.Hartree)
"""One hartree in eV."""

BOHR: Final[float] = float(_ase.Bohr)
"""One bohr in Angstrom."""

GPA: Final[float] = float(_ase.GPa)
"""One gigapascal in eV/Angstrom^3."""

KCAL_PER_MOL: Final[float] = float(_ase.kcal / _ase.mol)
"""One kilocalorie per mole in eV."""

KJ_PER_MOL: Final[float] = float(_ase.kJ / _ase.mol)
"""One kilojoule per mole in eV."""
