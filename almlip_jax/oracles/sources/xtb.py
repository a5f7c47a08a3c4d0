"""Extended tight binding (GFN1-xTB, GFN2-xTB, IPEA1-xTB) through tblite, the embedded default label source."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from ase import Atoms
from ase.data import atomic_masses
from pydantic import Field

from almlip_jax.errors import LabelError
from almlip_jax.oracles.base import LabelSource, Results, SourceSettings, check_electrons
from almlip_jax.packages import package_version
from almlip_jax.settings import unit
from almlip_jax.structures.electronic_state import multiplicity, total_charge
from almlip_jax.units import BOHR, HARTREE, KB


class TBLiteSettings(SourceSettings):
    """Extended tight binding through tblite; about a millisecond for a molecule of ten atoms."""

    kind: Literal["tblite"] = "tblite"

    method: Literal["GFN2-xTB", "GFN1-xTB", "IPEA1-xTB"] = "GFN2-xTB"
    """The Hamiltonian."""

    accuracy: float = Field(default=1.0, ge=1e-6, le=1e4)
    """Numerical accuracy, without unit; smaller is tighter (the SCF converges to 1e-6 hartree times this)."""

    electronic_temperature: float = Field(default=300.0, ge=0, le=1e6, json_schema_extra=unit("K"))
    """Electronic temperature of the Fermi smearing, in K."""

    max_iterations: int = Field(default=250, ge=1, le=10**6)
    """SCF iterations after which a label has failed."""

    dipole: bool = False
    """Whether labels of molecules hold the dipole too, e*Angstrom; that of ions is relative to the centre of mass."""

    def gives(self, target: str) -> bool:
        """Dipoles where asked for."""
        return target == "dipole" and self.dipole

    def identity(self) -> dict[str, Any]:
        """The settings that decide what a label is; labels without dipoles are those of versions that had none."""
        settings = super().identity()
        return {name: value for name, value in settings.items() if (name, value) != ("dipole", False)}

    def version(self) -> str:
        """The version of tblite."""
        return f"tblite {package_version('tblite')}"

    def check(self, atoms: Atoms) -> None:
        """Refuses periodicity that tblite does not know, and electrons that do not fit charge and spin."""
        if atoms.pbc.any() and not atoms.pbc.all():
            # tblite would silently treat these as periodic in all three.
            raise LabelError("tblite labels structures that are periodic in 0 or 3 directions, not in 1 or 2")
        if self.dipole and atoms.pbc.any():
            raise LabelError("a dipole belongs to molecules, and this structure is periodic; set oracle.dipole: false")
        check_electrons(atoms)

    def build(self) -> LabelSource:
        """A function that labels with tblite, each structure from scratch."""
        package_version("tblite")
        from tblite.interface import Calculator

        def label(atoms: Atoms) -> Results:
            self.check(atoms)
            # A new calculator for each label, with no density from the last one: 0.15 ms buys labels that do not
            # depend on what was labelled before.
            calculator = Calculator(
                self.method,
                np.asarray(atoms.numbers),
                atoms.positions / BOHR,
                charge=float(total_charge(atoms)),
                uhf=multiplicity(atoms) - 1,
                **_lattice(atoms),
            )
            calculator.set("accuracy", self.accuracy)
            calculator.set("temperature", self.electronic_temperature * KB / HARTREE)
            calculator.set("max-iter", self.max_iterations)
            calculator.set("verbosity", 0)
            result = calculator.singlepoint()
            stress = None
            if atoms.pbc.all():
                virial = result.get("virial") * (HARTREE / atoms.cell.volume)
                stress = virial.ravel()[[0, 4, 8, 5, 2, 1]]
            further = {"dipole": about_centre_of_mass(result.get("dipole") * BOHR, atoms)} if self.dipole else {}
            return Results(result.get("energy") * HARTREE, result.get("gradient") * (-HARTREE / BOHR), stress, further)

        return label


def about_centre_of_mass(dipole: np.ndarray, atoms: Atoms) -> np.ndarray:
    """The dipole [3] of a molecule, e*Angstrom, from that about the origin; the same unless it is an ion."""
    masses = atomic_masses[atoms.numbers]
    return np.asarray(dipole, np.float64) - total_charge(atoms) * (masses @ atoms.positions) / masses.sum()


def _lattice(atoms: Atoms) -> dict[str, Any]:
    if not atoms.pbc.any():
        return {}
    return {"lattice": atoms.cell.array / BOHR, "periodic": np.asarray(atoms.pbc)}
