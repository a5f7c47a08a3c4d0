"""Extended tight binding (GFN1-xTB, GFN2-xTB, IPEA1-xTB) through tblite, the embedded default label source."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from ase import Atoms
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

    def version(self) -> str:
        """The version of tblite."""
        return f"tblite {package_version('tblite')}"

    def check(self, atoms: Atoms) -> None:
        """Refuses periodicity that tblite does not know, and electrons that do not fit charge and spin."""
        if atoms.pbc.any() and not atoms.pbc.all():
            # tblite would silently treat these as periodic in all three.
            raise LabelError("tblite labels structures that are periodic in 0 or 3 directions, not in 1 or 2")
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
            return Results(result.get("energy") * HARTREE, result.get("gradient") * (-HARTREE / BOHR), stress)

        return label


def _lattice(atoms: Atoms) -> dict[str, Any]:
    if not atoms.pbc.any():
        return {}
    return {"lattice": atoms.cell.array / BOHR, "periodic": np.asarray(atoms.pbc)}
