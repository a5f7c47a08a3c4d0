"""Density functional theory of molecules through PySCF (an optional extra)."""

from __future__ import annotations

import functools
import warnings
from typing import Any, Literal

from ase import Atoms
from ase.data import chemical_symbols
from pydantic import Field

from almlip_jax.errors import InputError, LabelError
from almlip_jax.oracles.base import LONGEST_LABEL, LabelSource, Results, SourceSettings, check_electrons
from almlip_jax.packages import package_version
from almlip_jax.settings import unit
from almlip_jax.structures.electronic_state import multiplicity, total_charge
from almlip_jax.units import BOHR, HARTREE

_KRYPTON = 36
"""Basis sets beyond this element leave the core to a potential, unless they say otherwise."""

_BARE_PSEUDOPOTENTIAL_BASES = ("gth",)
"""Bases made for pseudopotentials of plane-wave codes, which this source does not take."""


class PySCFSettings(SourceSettings):
    """Kohn-Sham density functional theory of molecules with PySCF; seconds for a molecule of ten atoms.

    Restricted for singlets, unrestricted otherwise; initial magnetic moments count as total spin only.  Needs ``pip
    install "almlip-jax[pyscf]"``.
    """

    kind: Literal["pyscf"] = "pyscf"

    timeout: float = Field(default=3600.0, gt=0, le=LONGEST_LABEL, json_schema_extra=unit("s"))
    """Longest time one label may take, in seconds; then its process is ended and the label has failed."""

    xc: str = "pbe"
    """The exchange-correlation functional, by its PySCF name."""

    basis: str = "def2-svp"
    """The orbital basis, by its PySCF name."""

    ecp: str = "basis"
    """Effective core potentials: ``basis``, those that belong to the basis (def2 has them from Rb on, lanl2dz from Na
    on); the PySCF name of others; or ``none`` where the basis describes all electrons."""

    density_fit: bool = True
    """Whether electron repulsion is density-fitted (with the auxiliary basis PySCF pairs with the basis)."""

    conv_tol: float = Field(default=1e-9, ge=1e-14, le=0.01, json_schema_extra=unit("hartree"))
    """Change of the energy at which the SCF has converged, in hartree."""

    grid_level: int = Field(default=3, ge=0, le=9)
    """Fineness of the integration grid, PySCF's levels 0 to 9."""

    max_cycle: int = Field(default=100, ge=1, le=10**6)
    """SCF cycles after which a label has failed."""

    def version(self) -> str:
        """The version of PySCF."""
        return f"pyscf {package_version('pyscf', 'pyscf')}"

    def identity(self) -> dict[str, Any]:
        """The settings that decide what a label is; potentials of the basis are named by `particulars`."""
        settings = super().identity()
        return {name: value for name, value in settings.items() if (name, value) != ("ecp", "basis")}

    def particulars(self, atoms: Atoms) -> dict[str, Any]:
        """The effective core potentials of the structure's elements, where the basis brings them."""
        potentials = self.core_potentials(atoms) if self.ecp == "basis" else {}
        return {"ecp": potentials} if potentials else {}

    def core_potentials(self, atoms: Atoms) -> dict[str, str]:
        """The effective core potential of each element that has one, by symbol; see `ecp`.

        Raises:
            InputError: PySCF is not installed.
        """
        package_version("pyscf", "pyscf")
        names = {"basis": _potentials_of(self.basis), "none": ()}.get(self.ecp, (self.ecp,))
        found = {}
        for number in sorted(set(atoms.numbers.tolist())):
            name = next((name for name in names if _has_potential(name, chemical_symbols[number])), None)
            if name is not None:
                found[chemical_symbols[number]] = name
        return found

    def check(self, atoms: Atoms) -> None:
        """Refuses crystals, electrons that do not fit charge and spin, and heavy elements without their potentials."""
        if atoms.pbc.any():
            raise LabelError("the pyscf label source labels molecules; the structure is periodic")
        check_electrons(atoms)
        if self.basis.lower().startswith(_BARE_PSEUDOPOTENTIAL_BASES):
            raise LabelError(
                f"basis '{self.basis}' is made for pseudopotentials, which this label source does not take; "
                "choose another"
            )
        heavy = {chemical_symbols[number] for number in atoms.numbers.tolist() if number > _KRYPTON}
        if self.ecp == "none" or not heavy:
            return
        missing = sorted(heavy - set(self.core_potentials(atoms)))
        if missing:
            source = f"basis '{self.basis}'" if self.ecp == "basis" else f"oracle.ecp '{self.ecp}'"
            raise LabelError(
                f"{source} has no effective core potential for {', '.join(missing)}; name one in oracle.ecp, or set it "
                "to none where the basis describes all electrons"
            )

    def build(self) -> LabelSource:
        """A function that labels with PySCF, each structure from scratch."""
        package_version("pyscf", "pyscf")
        if self.ecp not in ("basis", "none") and not any(_has_potential(self.ecp, s) for s in chemical_symbols[1:104]):
            raise InputError(f"PySCF knows no effective core potentials '{self.ecp}'; correct oracle.ecp.")
        from pyscf import dft, gto  # type: ignore[import-untyped]

        def label(atoms: Atoms) -> Results:
            self.check(atoms)
            molecule = gto.M(
                atom=list(zip(atoms.numbers.tolist(), (atoms.positions / BOHR).tolist(), strict=True)),
                unit="Bohr",
                basis=self.basis,
                ecp=self.core_potentials(atoms),
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


@functools.cache
def _potentials_of(basis: str) -> tuple[str, ...]:
    """Names under which PySCF may know the potentials that a basis is made for."""
    plain = basis.lower().replace("-", "").replace("_", "").replace(" ", "")
    # Those of the ccECP family stand in files apart from their bases (ccecp-cc-pvdz needs ccecp).
    families = [name for name in ("ccecphe", "ccecpreg", "ccecp28", "ccecp36", "ccecp") if plain.startswith(name)]
    return (*families[:1], basis)


@functools.cache
def _has_potential(name: str, symbol: str) -> bool:
    from pyscf.gto import basis  # type: ignore[import-untyped]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that other packages may know more
        try:
            return bool(basis.load_ecp(name, symbol))
        except Exception:  # PySCF raises whatever its parsers stumble over where there is none
            return False
