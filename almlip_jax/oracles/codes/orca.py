"""ORCA: the line of simple keywords and the blocks of its input are the parameters, by ASE's names for them."""

from __future__ import annotations

import re
from typing import Any

from ase.calculators.orca import ORCA as Calculator
from ase.calculators.orca import OrcaProfile

from almlip_jax.errors import InputError
from almlip_jax.oracles.codes.base import Code, Job, configured, declare

_TAKEN = ("orcasimpleinput", "orcablocks")
_OTHER_TASKS = r"(?<!\S)(\S*opt|\S*opt(ts|h)|md|goat\S*|\S*freq|\S*neb(-\S*)?|irc|scan\w*)(?!\S)"
"""Optimisations have many names (``TightOpt``, ``L-Opt``, ``MECP-Opt``); ``OptRI`` and the like are basis sets."""
_DENSITY = "earlier.gbw"


def _make(job: Job) -> Calculator:
    unknown = sorted(set(job.parameters) - set(_TAKEN))
    if unknown:
        raise InputError(f"oracle.parameters of ORCA has no '{unknown[0]}'; it takes {' and '.join(_TAKEN)}.")
    simple = " ".join(str(job.parameters.get("orcasimpleinput", "")).lstrip("! ").split())
    if not simple:
        raise InputError("oracle.parameters.orcasimpleinput names method and basis, as 'PBE def2-SVP TightSCF'.")
    if other := re.search(_OTHER_TASKS, simple.lower()):
        raise InputError(f"oracle.parameters.orcasimpleinput: '{other[0]}' is no calculation of a structure as it is.")
    if "engrad" not in simple.lower().split() and "numgrad" not in simple.lower().split():
        simple += " EnGrad"
    blocks = str(job.parameters.get("orcablocks", ""))
    if re.search(r"^\s*(%coords|\*\s*(xyz|int|gzmt|xyzfile))", blocks, re.IGNORECASE | re.MULTILINE):
        raise InputError("oracle.parameters.orcablocks holds coordinates, which follow from the structure.")
    if job.restart:
        simple, blocks = f"{simple} MORead", f'%moinp "{_DENSITY}"\n{blocks}'
    profile = OrcaProfile(command=job.command or configured("orca", "command") or "orca")
    return Calculator(
        profile=profile,
        directory=job.folder,
        charge=job.charge,
        mult=1 + (job.unpaired or 0),
        orcasimpleinput=simple,
        orcablocks=blocks,
    )


def _example(_: tuple[str, ...]) -> dict[str, Any]:
    return {
        "parameters": {"orcasimpleinput": "PBE def2-SVP TightSCF", "orcablocks": "%scf MaxIter 300 end"},
        "command": "/opt/orca/orca",
    }


ORCA = declare(
    Code(
        name="orca",
        title="ORCA",
        make=_make,
        set_elsewhere={
            "charge": "system.charge, or the charge of the structure",
            "mult": "system.spin, or the multiplicity of the structure",
        },
        command="orca",
        crystals=False,
        moments=False,
        kpoints=False,
        output=("orca.out", "orca.err"),
        unconverged=("not fully converged", "scf not converged", "wavefunction is not converged"),
        finished="orca terminated normally",
        density={"orca.gbw": _DENSITY},
        example=_example,
    )
)
