"""Density functional theory of molecules through PySCF (an optional extra)."""

from __future__ import annotations

from typing import Literal

from ase import Atoms
from pydantic import Field

from almlip_jax.errors import LabelError
from almlip_jax.oracles.base import (
    LabelSource,
    Results,
    SourceSettings,
    check_electrons,
    multiplicity,
    total_charge,
)
from almlip_jax.packages import package_version
from almlip_jax.units import BOHR, HARTREE


class PySCFSettings(SourceSettings):
    """Kohn-Sham density functional theory of molecules with PySCF; seconds for a molecule of ten atoms.

    Restricted for singlets, unrestricted otherwise.  Needs ``pip install "almlip-jax[pyscf]"``.
    """

    kind: Literal["pyscf"] = "pyscf"

    timeout: float = Field(default=3600.0, gt=0)
    """Longest time one label may take, in seconds; then its process is ended and the label has failed."""

    xc: str = "pbe"
    """The exchange-correlation functional, by its PySCF name."""

    basis: str = "def2-svp"
    """The orbital basis, by its PySCF name."""

    density_fit: bool = True
    """Whether electron repulsion is density-fitted (with the auxiliary basis PySCF pairs with the basis)."""

    conv_tol: float = Field(default=1e-9, gt=0)
    """Change of the energy at which the SCF has converged, in hartree."""

    grid_level: int = Field(default=3, ge=0, le=9)
    """Fineness of the integration grid, PySCF's levels 0 to 9."""

    max_cycle: int = Field(default=100, ge=1)
    """SCF cycles after which a label has failed."""

    def version(self) -> str:
        """The version of PySCF."""
        return f"pyscf {package_version('pyscf', 'pyscf')}"

    def build(self) -> LabelSource:
        """A function that labels with PySCF, each structure from scratch."""
        package_version("pyscf", "pyscf")
        from pyscf import dft, gto  # type: ignore[import-untyped]

        def label(atoms: Atoms) -> Results:
            if atoms.pbc.any():
                raise LabelError("the pyscf label source labels molecules; the structure is periodic")
            check_electrons(atoms)
            molecule = gto.M(
                atom=list(zip(atoms.numbers.tolist(), (atoms.positions / BOHR).tolist(), strict=True)),
                unit="Bohr",
                basis=self.basis,
                charge=total_charge(atoms),
                spin=multiplicity(atoms) - 1,
                verbose=0,
            )
            field = dft.RKS(molecule) if multiplicity(atoms) == 1 else dft.UKS(molecule)
            field.xc = self.xc
            field.grids.level = self.grid_level
            field.conv_tol = self.conv_tol
            field.max_cycle = self.max_cycle
            field.chkfile = None
            if self.density_fit:
                field = field.density_fit()
            energy = field.kernel()
            if not field.converged:
                raise LabelError(f"the SCF did not converge in {self.max_cycle} cycles")
            gradient = field.nuc_grad_method()
            # The integration grid moves with the atoms; without its response forces do not sum to zero.
            gradient.grid_response = True
            return Results(energy * HARTREE, gradient.kernel() * (-HARTREE / BOHR))

        return label
