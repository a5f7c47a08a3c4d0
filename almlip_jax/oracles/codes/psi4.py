"""Psi4, a package of Python: ``method`` and ``basis`` are parameters, and so is each of its options."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import Any

from ase.calculators.psi4 import Psi4 as Calculator

from almlip_jax.errors import InputError
from almlip_jax.oracles.codes.base import Code, Job, declare

_OF_ASE = ("method", "basis", "memory", "num_threads", "reference")
"""Parameters that ASE's calculator passes on; it drops others."""


class _WithOptions(Calculator):
    """ASE's calculator, which sets further options."""

    def __init__(self, options: dict[str, Any], **settings: Any) -> None:
        self._options = options
        super().__init__(**settings)

    def set_psi4(self, atoms: Any = None) -> None:
        """Sets what ASE does, and the options."""
        super().set_psi4(atoms)
        self.psi4.set_options(self._options)


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
    return told, {name: value for name, value in job.parameters.items() if name not in _OF_ASE}


def _make(job: Job) -> _WithOptions:
    try:
        import_module("psi4")
    except ImportError as error:
        raise InputError(f"Psi4 cannot be imported ({error}); install it where labels are made.") from error
    told, options = _arguments(job)
    return _WithOptions(options, label="psi4", directory=str(job.folder), **told)


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
        kpoints=False,
        output=("psi4.dat",),
        unconverged=("could not converge scf",),
        example=_example,
    )
)
