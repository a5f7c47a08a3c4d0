"""FHI-aims: keywords of control.in are the parameters."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from ase.calculators.aims import Aims, AimsProfile
from ase.data import atomic_numbers

from almlip_jax.errors import InputError
from almlip_jax.oracles.codes.base import Code, Job, configured, declare

_OVERLAP = "elsi_restart_use_overlap"
_BY_SYMMETRY = ("symmetry_reduced_k_grid_spg", "rlsy_symmetry")
"""Keywords that make the number of k-points, and so the meaning of a file's number, depend on where atoms are."""
_TASKS = ("relax_geometry", "relax_unit_cell", "MD_run", "MD_MB_init", "use_pimd_wrapper")


def _data(job: Job) -> Path | None:
    """The folder of species, where one is named."""
    named = configured("aims", "default_species_directory") or os.environ.get("AIMS_SPECIES_DIR")
    return job.data or (None if named is None else Path(named))


def _draft(job: Job, folder: Path) -> tuple[Job, str | None]:
    """The job with a line in place of the basis functions of each element whose file is not there."""
    data, missing = _data(job), []
    for symbol in job.elements:
        name = f"{atomic_numbers[symbol]:02d}_{symbol}_default"
        path = Path(name) if data is None else data / name
        if data is not None and path.is_file():
            (folder / name).write_text(path.read_text(errors="replace"))
        else:
            missing.append(str(path))
            (folder / name).write_text(f"# species {symbol}: {path}\n")
    if not missing:
        return job, None
    note = f"Not there: {', '.join(missing)}. oracle.data_dir names the folder of the species."
    parameters = {key: value for key, value in job.parameters.items() if key != "tier"}  # it chooses among functions
    return replace(job, data=folder, parameters=parameters), note


def _make(job: Job) -> Aims:
    told: dict[str, Any] = dict(job.parameters)
    if "xc" not in told:
        raise InputError("oracle.parameters.xc names the functional of FHI-aims, as 'pbe'.")
    told.setdefault("compute_forces", True)
    if job.stress:
        told.setdefault("compute_analytical_stress", True)
    if job.charge:
        told["charge"] = job.charge
    if job.polarised:
        told["spin"] = "collinear"
    if job.unpaired is not None and job.polarised:
        told["fixed_spin_moment"] = job.unpaired
    if job.grid is not None:
        told["k_grid"] = job.grid.size
        if any(job.grid.shift):
            told["k_offset"] = tuple(0.5 * s / n for s, n in zip(job.grid.shift, job.grid.size, strict=True))
    if job.leaves:
        _restart(told)
    command = job.command or configured("aims", "command") or "aims.x"
    profile = AimsProfile(command, default_species_directory=None if (data := _data(job)) is None else str(data))
    return Aims(profile=profile, directory=job.folder, **told)


def _restart(told: dict[str, Any]) -> None:
    """Has FHI-aims keep its density matrices, and begin with those that it finds where it runs, if there are any.

    Overlaps tell it how matrices of atoms that were elsewhere become those of the same number of electrons here.

    Raises:
        InputError: matrices of one structure could be taken for those of other k-points.
    """
    if other := next((key for key in _BY_SYMMETRY if key in told), None):
        raise InputError(
            f"oracle.reuse does not go with oracle.parameters.{other}: FHI-aims numbers its density matrices by "
            "k-points, which then differ from structure to structure; leave one of them out."
        )
    told["elsi_restart"] = "read_and_write 1"
    if not told.setdefault(_OVERLAP, True):
        del told[_OVERLAP]  # which older versions do not know


def _example(_: tuple[str, ...]) -> dict[str, Any]:
    return {
        "parameters": {"xc": "pbe", "relativistic": "atomic_zora scalar", "occupation_type": "gaussian 0.1"},
        "command": "mpirun -n 16 aims.x",
        "data_dir": "/opt/aims/species_defaults/defaults_2020/light",
    }


AIMS = declare(
    Code(
        name="aims",
        title="FHI-aims",
        make=_make,
        draft=_draft,
        set_elsewhere={
            **{task: "a label is one calculation of the structure as it is" for task in _TASKS},
            "charge": "system.charge, or the charge of the structure",
            "fixed_spin_moment": "system.spin, or the multiplicity of the structure",
            "spin": "follows from multiplicity and magnetic moments (oracle.magnetic_moments)",
            "k_grid": "oracle.kpts",
            "kpts": "oracle.kpts",
            "k_grid_density": "oracle.kspacing",
            "k_offset": "oracle.gamma_centred",
            "species_dir": "oracle.data_dir",
            **{key: "oracle.reuse" for key in ("elsi_restart", "restart", "restart_read_only", "restart_write_only")},
        },
        command="aims.x",
        takes_data=True,
        output=("aims.out", "aims.err"),
        unconverged=("self-consistency cycle did not converge",),
        finished="have a nice day.",
        density={"*.csc": ""},
        example=_example,
    )
)
