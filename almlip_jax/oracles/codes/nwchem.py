"""NWChem for molecules: its blocks are the parameters, as ``{theory: dft, dft: {xc: pbe96}, basis: def2-svp}``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from ase.calculators.nwchem import NWChem
from ase.units import Bohr, Hartree

from almlip_jax.errors import InputError, LabelError
from almlip_jax.oracles.codes.base import Code, Job, configured, declare, said

_OPEN = ("nopen", "singlet", "doublet", "triplet", "quartet", "quintet", "sextet", "septet", "octet")
_OF_SPIN = "system.spin, or the multiplicity of the structure"
_PLANE_WAVES = ("pspw", "band", "paw")
_OF_FUNCTIONAL = ("dft", "sodft", "tddft")
"""Theories that begin with the orbitals of the block ``dft``; the others begin with those of ``scf``."""
_GUESSED = ("tce", "ccsd", "tddft", "scf", "dft", "direct_mp2", "mp2", "rimp2")
"""Blocks that say which theory is meant, where nothing names it: the first of them, as in ASE."""
_TURNED = "a label has the forces of the structure as it lies, and NWChem turns and moves it to its symmetry's axes"
_ORBITALS = "earlier.movecs"
_NUMBER = r"([-+]?\d+\.\d+)"
_GRADIENT = re.compile(rf"^ +\d+ +\S+ +{_NUMBER} +{_NUMBER} +{_NUMBER}(?: +{_NUMBER}){{3}} *$", re.MULTILINE)
_NUMERICAL = "NWChem Numerical Gradients Module"
_REFERENCE = re.compile(rf"^ *Reference energy +{_NUMBER} *$", re.MULTILINE)


class _Checked(NWChem):
    """ASE's calculator, which looks at where the atoms were, and which energy is theirs."""

    def calculate(self, *arguments: Any, **named: Any) -> None:
        """Runs NWChem.

        Raises:
            LabelError: it calculated another geometry, or its output does not say which.
        """
        super().calculate(*arguments, **named)
        text = (Path(self.directory) / f"{self.prefix}.nwo").read_text(errors="replace")
        rows = _GRADIENT.findall(text.rpartition("ENERGY GRADIENTS")[2])
        where = np.array([[float(one) for one in row[:3]] for row in rows])
        atoms = self.atoms
        if where.shape != (len(atoms), 3) or not np.allclose(where, atoms.positions / Bohr, 1e-6, 1e-5):
            raise LabelError(
                "NWChem calculated another geometry than that of the structure; leave out what moves, turns or scales "
                "it (oracle.parameters.geompar, center, set)"
            )
        if _NUMERICAL in text:  # the last energy is that of atoms moved for the gradient
            found = _REFERENCE.findall(text.rpartition(_NUMERICAL)[2])
            if not found:
                raise LabelError("NWChem does not say which energy its numerical gradient is of")
            self.results |= dict.fromkeys(("energy", "free_energy"), float(found[0]) * Hartree)


def _prepare(job: Job) -> Job:
    """The job with moments whose sum ASE's calculator takes for the number of unpaired electrons."""
    atoms = job.atoms.copy()
    atoms.set_initial_magnetic_moments(np.r_[float(job.unpaired or 0), np.zeros(len(atoms) - 1)])
    return replace(job, atoms=atoms)


def _told(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters with their keys and the theory in lower case, as ASE looks for them; the theory named.

    Raises:
        InputError: a key is there twice, or what they say contradicts itself or is not for molecules.
    """
    told: dict[str, Any] = {}
    for key, value in parameters.items():
        if key.lower() in told:
            raise InputError(f"oracle.parameters.{key} is there twice, in small and in large letters; give it once.")
        told[key.lower()] = value
    guessed = next((one for one in _GUESSED if one in told), "dft")
    theory = told["theory"] = str(told.get("theory", guessed)).lower()
    if theory in _PLANE_WAVES or "nwpw" in told:
        raise InputError("oracle.parameters: code nwchem is for molecules in Gaussian bases, not for plane waves.")
    if "basis" not in told:
        raise InputError("oracle.parameters.basis names the basis of NWChem, as 'def2-svp'.")
    if "xc" in told and theory not in _OF_FUNCTIONAL:
        raise InputError(f"oracle.parameters.xc: theory {theory} has no functional; leave it out, or take theory: dft.")
    for block in ("dft", "scf"):
        own = told.get(block, {})
        if own is not None and not isinstance(own, dict):
            raise InputError(f"oracle.parameters.{block} is a section, as {{iterations: 200}}, not '{own}'.")
        if block == "dft" and "xc" in told and said(own or {}, "xc") is not None:
            raise InputError("oracle.parameters.xc and oracle.parameters.dft.xc both name the functional; give one.")
    return told


def _make(job: Job) -> NWChem:
    told = _told(job.parameters)
    unpaired, theory = job.unpaired or 0, told["theory"]
    spin = {"dft": {"mult": unpaired + 1}, "scf": {"nopen": unpaired}}
    for block in sorted(spin.keys() & {*told, _begins_with(theory), *(spin if theory == "tce" else ())}):
        told[block] = (told.get(block) or {}) | spin[block]  # ASE says it to some theories alone
    if job.charge:
        told["charge"] = job.charge
    if job.restart:
        block = _begins_with(theory)
        told[block] = {"vectors": {"input": str(job.folder.resolve() / _ORBITALS)}} | told[block]
    command = f"{job.command or configured('nwchem', 'command') or 'nwchem'} PREFIX.nwi > PREFIX.nwo 2> PREFIX.err"
    return _Checked(directory=str(job.folder), label="nwchem", command=command, **told)


def _begins_with(theory: str) -> str:
    """The block whose orbitals a theory begins with."""
    return "dft" if theory in _OF_FUNCTIONAL else "scf"


def _example(_: tuple[str, ...]) -> dict[str, Any]:
    return {
        "parameters": {
            "theory": "dft",
            "basis": "def2-svp",
            "basispar": "spherical",
            "dft": {"xc": "xpbe96 cpbe96", "iterations": 200},
        },
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
            "bandpath": "code nwchem is for molecules",
            "geometry": "it follows from the structure",
            "symmetry": _TURNED,
            "autosym": _TURNED,
            "center": "a label is of the structure as it lies",
            "restart_kw": "oracle.reuse begins with the orbitals of the label before",
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
        output=("nwchem.nwo", "nwchem.err"),
        moments=False,
        blamed=r"^ -{60,}\s*\n (\S.*?) +-?\d+ *\n -{60,}",
        unconverged=("calculation failed to converge", "scf failed to converge", "scf calculations failed to converge"),
        finished="total times  cpu:",
        density={"nwchem/nwchem.movecs": _ORBITALS},
        example=_example,
    )
)
