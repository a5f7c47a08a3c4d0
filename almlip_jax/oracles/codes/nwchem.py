"""NWChem for molecules: its blocks are the parameters, as ``{theory: dft, dft: {xc: pbe96}, basis: def2-svp}``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from ase.calculators.nwchem import NWChem as Calculator

from almlip_jax.errors import InputError
from almlip_jax.oracles.codes.base import Code, Job, configured, declare

_OPEN = ("nopen", "singlet", "doublet", "triplet", "quartet", "quintet", "sextet", "septet", "octet")
_OF_SPIN = "system.spin, or the multiplicity of the structure"
_PLANE_WAVES = ("pspw", "band", "paw")
_OF_DENSITY = ("dft", "sodft", "tddft")
"""Theories that begin with the orbitals of the block ``dft``; the others begin with those of ``scf``."""
_ORBITALS = "earlier.movecs"


def _prepare(job: Job) -> Job:
    """The job with moments whose sum ASE's calculator takes for the number of unpaired electrons."""
    atoms = job.atoms.copy()
    atoms.set_initial_magnetic_moments(np.r_[float(job.unpaired or 0), np.zeros(len(atoms) - 1)])
    return replace(job, atoms=atoms)


def _make(job: Job) -> Calculator:
    told: dict[str, Any] = dict(job.parameters)
    theory = told.get("theory", "dft")
    if theory in _PLANE_WAVES or "nwpw" in told:
        raise InputError("oracle.parameters: code nwchem is for molecules in Gaussian bases, not for plane waves.")
    if "basis" not in told:
        raise InputError("oracle.parameters.basis names the basis of NWChem, as 'def2-svp'.")
    if job.charge:
        told["charge"] = job.charge
    if job.restart:
        block = "dft" if theory in _OF_DENSITY else "scf"
        own = dict(told.get(block) or {})
        told[block] = {"vectors": {"input": str(job.folder.resolve() / _ORBITALS)}} | own  # whose vectors come first
    command = f"{job.command or configured('nwchem', 'command') or 'nwchem'} PREFIX.nwi > PREFIX.nwo"
    return Calculator(directory=str(job.folder), label="nwchem", command=command, **told)


def _example(_: tuple[str, ...]) -> dict[str, Any]:
    return {
        "parameters": {"theory": "dft", "basis": "def2-svp", "dft": {"xc": "xpbe96 cpbe96", "iterations": 200}},
        "command": "nwchem",
    }


NWCHEM = declare(
    Code(
        name="nwchem",
        title="NWChem",
        make=_make,
        prepare=_prepare,
        set_elsewhere={
            "task": "a label is one calculation of the structure as it is",
            "charge": "system.charge, or the charge of the structure",
            "dft.mult": _OF_SPIN,
            **{f"scf.{key}": _OF_SPIN for key in _OPEN},
            "kpts": "code nwchem is for molecules",
            "perm": "each label has a folder of its own (oracle.scratch)",
            "scratch": "each label has a folder of its own (oracle.scratch)",
            "directory": "each label has a folder of its own (oracle.scratch)",
            "label": "each label has a folder of its own (oracle.scratch)",
            "command": "oracle.command",
        },
        command="nwchem",
        crystals=False,
        kpoints=False,
        data="NWCHEM_BASIS_LIBRARY",
        takes_data=True,
        output=("nwchem.nwo",),
        unconverged=("calculation failed to converge", "scf failed to converge", "scf calculations failed to converge"),
        finished="total times  cpu:",
        density={"nwchem/nwchem.movecs": _ORBITALS},
        example=_example,
    )
)
