"""Psi4, a package of Python: ``method`` and ``basis`` are parameters, and so is each of its options."""

from __future__ import annotations

import shutil
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator as AnyCalculator
from ase.calculators.calculator import all_changes
from ase.calculators.psi4 import Psi4 as Calculator
from ase.units import Bohr, Hartree

from almlip_jax.errors import InputError
from almlip_jax.oracles.codes.base import Code, Job, declare

_OF_ASE = ("method", "basis", "memory", "num_threads", "reference")
"""Parameters that ASE's calculator passes on; it drops others."""
_ORBITALS, _EARLIER = "psi4.orbitals.npy", "earlier.orbitals.npy"
_FILE = 180  # Psi4's number of the file with orbitals


class _WithOptions(Calculator):
    """ASE's calculator, which sets further options, those of the label before being forgotten, and keeps orbitals.

    Args:
        options: of Psi4.
        earlier: the file with the orbitals to begin with, if any.
        orbitals: the file that they are left in, if any.
    """

    def __init__(self, options: dict[str, Any], earlier: Path | None, orbitals: Path | None, **settings: Any) -> None:
        self._options, self._earlier, self._orbitals = options, earlier, orbitals
        super().__init__(**settings)

    def set_psi4(self, atoms: Any = None) -> None:
        """Sets what ASE does, and the options; Psi4 has them for its whole process."""
        self.psi4.core.clean_options()
        super().set_psi4(atoms)
        self.psi4.set_options(self._options)

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Any = ("energy",),
        system_changes: Any = all_changes,
        symmetry: Any = "c1",
    ) -> None:
        """Energy and forces; as ASE's (which has no use for ``symmetry`` either), but orbitals come and go."""
        AnyCalculator.calculate(self, atoms, properties, system_changes)
        self.set_psi4(atoms=self.atoms)
        core = self.psi4.core
        core.set_output_file(f"{self.label}.dat", False)  # says where orbitals are looked for
        if self._earlier is not None:
            orbitals = core.Wavefunction.from_file(str(self._earlier))
            orbitals.to_file(orbitals.get_scratch_filename(_FILE))
        method = f"{self.parameters['method']}/{self.parameters['basis']}"
        gradient, found = self.psi4.driver.gradient(method, molecule=self.molecule, return_wfn=True)
        self.results["energy"] = found.energy() * Hartree
        self.results["forces"] = -np.array(gradient) * Hartree / Bohr
        written = Path(f"{found.get_scratch_filename(_FILE)}.npy")
        if self._orbitals is not None and written.is_file():
            shutil.move(written, self._orbitals)  # so that no other label finds them


def _prepare(job: Job) -> Job:
    """The job without magnetic moments: ASE would forget the multiplicity for them."""
    atoms = job.atoms.copy()
    atoms.set_initial_magnetic_moments(None)
    return replace(job, atoms=atoms)


def _arguments(job: Job) -> tuple[dict[str, Any], dict[str, Any]]:
    """What ASE's calculator is made with, and further options of Psi4."""
    for name in ("method", "basis"):
        if name not in job.parameters:
            raise InputError(f"oracle.parameters.{name} of Psi4 is missing, as {{method: pbe, basis: def2-svp}}.")
    told = {name: value for name, value in job.parameters.items() if name in _OF_ASE}
    told |= {"charge": job.charge, "multiplicity": 1 + (job.unpaired or 0)}
    if job.unpaired:
        told.setdefault("reference", "uhf")
    options = {name: value for name, value in job.parameters.items() if name not in _OF_ASE}
    if job.restart:  # a smaller basis to begin with would be refused beside it
        options = {name: value for name, value in options.items() if name.lower() not in ("guess", "basis_guess")}
        options["guess"] = "read"
    return told, options


def _make(job: Job) -> _WithOptions:
    try:
        import_module("psi4")
    except ImportError as error:
        raise InputError(f"Psi4 cannot be imported ({error}); install it where labels are made.") from error
    told, options = _arguments(job)
    folder = job.folder.resolve()
    earlier, orbitals = folder / _EARLIER if job.restart else None, folder / _ORBITALS if job.leaves else None
    return _WithOptions(options, earlier, orbitals, label="psi4", directory=str(folder), **told)


def _write(job: Job) -> None:
    told, options = _arguments(job)
    lines = [f"{name} = {value!r}" for name, value in told.items()]
    lines += [f"set_options({options!r})"] if options else []
    (job.folder / "psi4.txt").write_text("\n".join(lines) + "\n")


def _example(_: tuple[str, ...]) -> dict[str, Any]:
    return {"parameters": {"method": "pbe", "basis": "def2-svp", "scf_type": "df", "e_convergence": 1e-8}}


PSI4 = declare(
    Code(
        name="psi4",
        title="Psi4",
        make=_make,
        write=_write,
        prepare=_prepare,
        set_elsewhere={
            "charge": "system.charge, or the charge of the structure",
            "multiplicity": "system.spin, or the multiplicity of the structure",
            "PSI_SCRATCH": "oracle.scratch",
            "directory": "each label has a folder of its own (oracle.scratch)",
            "label": "each label has a folder of its own (oracle.scratch)",
            "atoms": "follows from the structure",
            "symmetry": "symmetry is not used: forces would be those of another orientation",
        },
        package="psi4",
        crystals=False,
        moments=False,
        kpoints=False,
        output=("psi4.dat",),
        unconverged=("could not converge scf",),
        density={_ORBITALS: _EARLIER},
        example=_example,
    )
)
