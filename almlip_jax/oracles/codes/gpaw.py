"""GPAW, a package of Python: the parameters are those of its calculator."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np

from almlip_jax.errors import InputError
from almlip_jax.oracles.codes.base import Code, Job, declare

_TXT = "gpaw.txt"


def _arguments(job: Job) -> dict[str, Any]:
    """What the calculator is made with."""
    told = {**job.parameters, "charge": job.charge, "txt": str(job.folder / _TXT)}
    if job.grid is not None:
        gamma = not any(job.grid.shift)
        told["kpts"] = {"size": job.grid.size, "gamma": True} if gamma else {"size": job.grid.size}
    if job.pseudopotentials:
        told["setups"] = dict(job.pseudopotentials)
    if job.polarised:
        told["spinpol"] = True
    if job.unpaired is not None and job.polarised:
        smearing = job.parameters.get("occupations", {"name": "fermi-dirac", "width": 0.0})
        if not isinstance(smearing, dict):
            raise InputError(
                "oracle.parameters.occupations of GPAW must be a section, as {name: fermi-dirac, width: 0.1}."
            )
        told["occupations"] = {**smearing, "fixmagmom": True}
    return told


def _make(job: Job) -> Any:
    if job.earlier is not None:
        return job.earlier
    try:
        gpaw = import_module("gpaw")
    except ImportError as error:
        raise InputError(
            f"GPAW cannot be imported ({error}); pip install gpaw gpaw-data where labels are made."
        ) from error
    if job.data is not None and str(job.data) not in gpaw.setup_paths:
        gpaw.setup_paths.insert(0, str(job.data))
    return gpaw.GPAW(**_arguments(job))


def _prepare(job: Job) -> Job:
    """The job with moments that add up to the number of unpaired electrons, which GPAW takes from them."""
    if job.unpaired is None or not job.polarised or job.atoms.get_initial_magnetic_moments().any():
        return job
    atoms = job.atoms.copy()
    atoms.set_initial_magnetic_moments(np.full(len(atoms), job.unpaired / len(atoms)))
    return replace(job, atoms=atoms)


def _write(job: Job) -> None:
    told = ",\n     ".join(f"{name}={value!r}" for name, value in _arguments(job).items())
    moments = job.atoms.get_initial_magnetic_moments()
    lines = [f"GPAW({told})", *([f"initial magnetic moments {moments.tolist()}"] if moments.any() else [])]
    (job.folder / "gpaw.py").write_text("\n".join(lines) + "\n")


def _example(_: tuple[str, ...]) -> dict[str, Any]:
    return {
        "parameters": {
            "mode": {"name": "pw", "ecut": 500},
            "xc": "PBE",
            "occupations": {"name": "fermi-dirac", "width": 0.1},
            "convergence": {"density": 1e-5},
        }
    }


GPAW = declare(
    Code(
        name="gpaw",
        title="GPAW",
        make=_make,
        write=_write,
        prepare=_prepare,
        set_elsewhere={
            "charge": "system.charge, or the charge of the structure",
            "kpts": "oracle.kpts, oracle.kspacing",
            "setups": "oracle.pseudopotentials",
            "spinpol": "follows from multiplicity and magnetic moments (oracle.magnetic_moments)",
            "magmoms": "oracle.magnetic_moments, or the moments of the structure",
            "hund": "oracle.magnetic_moments, or the moments of the structure",
            "occupations.fixmagmom": "system.spin, or the multiplicity of the structure",
            "txt": "each label has a folder of its own (oracle.scratch)",
        },
        package="gpaw",
        cell=True,
        pseudopotentials="optional",
        takes_data=True,
        smeared=True,
        output=(_TXT,),
        unconverged=("kohnshamconvergenceerror", "did not converge!"),
        keeps_calculator=True,
        example=_example,
    )
)
