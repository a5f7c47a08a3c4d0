"""What can be said about labels only when all frames of a set have been seen: mixed energies, stresses in another unit.

Stresses of matter in eV/Angstrom^3 are small numbers (1 is 160 GPa), and in GPa or kbar, read as eV/Angstrom^3, 160 or
1,600 times as large.  Two signs give that away, and neither is ever seen on correct labels:

- half of the frames or more have stresses beyond 400 GPa (beyond 1,000 GPa where frames are few), while shock waves and
  the centres of planets have up to some 300;
- frames of one cell differ in their virials by more than their forces can explain.  Both come from the same
  displacements; the standard deviation of the virial's components, the pressure left out (which the temperature of
  electrons changes too), is some 0.1 to 0.3 times ``F sqrt(N) d``, with the root mean square force component F and the
  distance d of atoms, ``(volume / N)^(1/3)``.  Where the stress also varies by more than 8 GPa, 5 times ``F sqrt(N) d``
  is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ase import Atoms

from almlip_jax.errors import InputError
from almlip_jax.structures.labels import LabelKeys, TakenLabels
from almlip_jax.units import GPA

_PRESSURE = np.array([1.0, 1, 1, 0, 0, 0])
_FEW = 5  # frames
_LARGEST_OF_FEW = 1000 * GPA
_LARGEST_OF_MANY = 400 * GPA
_VARIES = 8 * GPA
_UNEXPLAINED = 5.0  # times what the forces explain
_SURELY_KBAR = 40.0  # a typical number that would be 40 GPa, or 4


@dataclass
class _SameCell:
    """Sums over frames of one composition and cell."""

    atoms: int
    volume: float
    number: int = 0
    stress: np.ndarray = field(default_factory=lambda: np.zeros(6))
    squares: np.ndarray = field(default_factory=lambda: np.zeros(6))
    forces: float = 0.0

    def add(self, stress: np.ndarray, forces: np.ndarray) -> None:
        self.number += 1
        self.stress += stress
        self.squares += stress**2
        self.forces += float(np.mean(forces**2))

    @property
    def variance(self) -> float:
        """Mean variance of the components of the stress."""
        mean = self.stress / self.number
        spread = np.maximum(self.squares / self.number - mean**2, 0).mean()
        return float(spread * self.number / (self.number - 1))

    @property
    def explained(self) -> float:
        """Variance that forces as large would give (0.1 to 0.3) squared times of."""
        spacing = (self.volume / self.atoms) ** (1 / 3)
        return self.forces / self.number * self.atoms * (spacing / self.volume) ** 2


class LabelCensus:
    """Follows the frames of one file, or of several that make up one set.

    Args:
        keys: under which the labels were looked for.
    """

    def __init__(self, keys: LabelKeys) -> None:
        self._keys = keys
        self._energies: dict[str, str] = {}
        self._largest: list[float] = []
        self._where = ""
        self._cells: dict[bytes, _SameCell] = {}

    def add(self, atoms: Atoms, taken: TakenLabels, where: str) -> None:
        """Takes in a frame and its labels.

        Raises:
            InputError: some frames have a free energy, and others another energy.
        """
        if "energy" in taken.values:
            self._energies.setdefault(taken.energies, where)
        if {"free", "plain"} <= set(self._energies):
            raise InputError(
                f"{self._energies['free']} has a free_energy, which is not the same as an energy without "
                f"smearing, and {self._energies['plain']} has only an energy; name the key that all frames have, or "
                "give all of them the free_energy, which belongs to the forces."
            )
        if "stress" in taken.values and atoms.pbc.all():
            self._add_stress(atoms, taken.values)
            self._where = self._where or where

    def _add_stress(self, atoms: Atoms, values: Mapping[str, Any]) -> None:
        self._largest.append(float(np.abs(values["stress"]).max()))
        if "forces" in values:
            key = np.sort(atoms.numbers).tobytes() + np.round(atoms.cell.array, 4).tobytes()
            group = self._cells.setdefault(key, _SameCell(len(atoms), atoms.get_volume()))
            group.add(values["stress"] - np.mean(values["stress"][:3]) * _PRESSURE, values["forces"])

    def finish(self, source: str) -> None:
        """Looks at the whole.

        Raises:
            InputError: stresses of such a size are in another unit.
        """
        if self._keys.stress_unit is not None or not self._largest:
            return
        typical = float(np.median(self._largest))
        if typical > (_LARGEST_OF_FEW if len(self._largest) < _FEW else _LARGEST_OF_MANY):
            reason = f"are mostly beyond {typical / GPA:.0f} GPa if they are in eV/Angstrom^3, as they should be"
        elif self._varies_too_much():
            reason = "vary far more than the forces of the same frames can explain if they are in eV/Angstrom^3"
        else:
            return
        unit = "kbar" if typical > _SURELY_KBAR else "GPa"
        raise InputError(
            f"the stresses of {source} (from {self._where} on) {reason}, and look like numbers in {unit}; convert "
            f"them, or give their unit (--stress-unit, or stress_unit of keys): {unit}, or eV/A^3 if they are right."
        )

    def _varies_too_much(self) -> bool:
        groups = [group for group in self._cells.values() if group.number >= _FEW]
        frames = sum(group.number for group in groups)
        if not frames:
            return False
        variance = sum(group.number * group.variance for group in groups) / frames
        explained = sum(group.number * group.explained for group in groups) / frames
        return variance > _VARIES**2 and variance > _UNEXPLAINED**2 * explained
