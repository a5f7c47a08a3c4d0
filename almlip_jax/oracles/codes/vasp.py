"""VASP: tags of INCAR are the parameters, and ASE's recipes of functionals (``xc: pbe``)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ase.calculators.vasp import Vasp
from ase.calculators.vasp.create_input import get_pp_setup
from ase.calculators.vasp.setups import get_default_setups
from ase.config import cfg

from almlip_jax.errors import InputError, meant
from almlip_jax.oracles.codes.base import Code, Job, declare

_BY_ELEMENT = "ldau_luj names elements, as {Fe: {L: 2, U: 4.0, J: 0.0}}; the order of species is that of each structure"
_ELSEWHERE = {
    "ldaul": _BY_ELEMENT,
    "ldauu": _BY_ELEMENT,
    "ldauj": _BY_ELEMENT,
    "nsw": "a label is one calculation of the structure as it is",
    "ibrion": "a label is one calculation of the structure as it is",
    "nelect": "system.charge, or the charge of the structure",
    "charge": "system.charge, or the charge of the structure",
    "net_charge": "system.charge, or the charge of the structure",
    "nupdown": "system.spin, or the multiplicity of the structure",
    "ispin": "follows from multiplicity and magnetic moments (oracle.magnetic_moments)",
    "magmom": "oracle.magnetic_moments, or the moments of the structure",
    "istart": "oracle.reuse",
    "icharg": "oracle.reuse",
    "kpts": "oracle.kpts",
    "gamma": "oracle.gamma_centred",
    "reciprocal": "oracle.kpts",
    "setups": "oracle.pseudopotentials",
    "directory": "oracle.scratch",
    "command": "oracle.command",
    "txt": "each label has a folder of its own (oracle.scratch)",
    "label": "each label has a folder of its own (oracle.scratch)",
}


_LOGICALS = {".TRUE.", ".FALSE.", ".T.", ".F."}


def _setup(symbol: str, name: str) -> str:
    """ASE's suffix of a potential that VASP calls by its whole name, as ``Li_sv``."""
    if name.startswith("_"):
        return name
    if not name.startswith(symbol) or name[len(symbol) : len(symbol) + 1].isalpha():
        raise InputError(
            f"oracle.pseudopotentials: '{name}' is no potential of {symbol}; give its folder, as {symbol}_sv."
        )
    return name.removeprefix(symbol)


def _check_tags(told: dict[str, Any]) -> None:
    """Refuses what looks like a tag with an error in it, which VASP would pass over.

    Raises:
        InputError: says which, and where a tag goes that is meant so.
    """
    calculator = Vasp()
    kinds = ("float", "exp", "string", "int", "bool", "list_bool", "list_int", "list_float", "special", "dict")
    known = {tag for kind in kinds for tag in getattr(calculator, f"{kind}_params")} | {*calculator.input_params}
    for tag in told:
        hint = "" if tag in known else meant(tag, known, cutoff=0.82)
        if hint:
            raise InputError(
                f"oracle.parameters: '{tag}' is no tag of VASP that ASE knows; {hint} If it is a tag all the same, put "
                f"it below custom, as custom: {{{tag}: ...}}."
            )


def _value(given: Any) -> Any:
    """A value of a tag; where it is text that VASP reads as a logical, and ASE need not, as that."""
    return str(given).strip(" .").upper().startswith("T") if str(given).strip().upper() in _LOGICALS else given


def _make(job: Job) -> Vasp:
    told: dict[str, Any] = {str(key).lower(): _value(value) for key, value in job.parameters.items()}
    _check_tags(told)
    if job.charge:
        told["charge"] = job.charge
    if job.polarised:
        turned = next((tag for tag in ("lnoncollinear", "lsorbit") if told.get(tag) in (True, ".TRUE.", "T")), None)
        if turned is not None:
            raise InputError(
                f"oracle.parameters.{turned}: VASP takes three components of each moment then, and moments and "
                "multiplicities are along one axis here; leave it out, or label without moments."
            )
        told["ispin"] = 2
    if job.unpaired is not None and job.polarised:
        told["nupdown"] = job.unpaired
    if job.grid is not None:
        told["kpts"], told["gamma"] = job.grid.size, not any(job.grid.shift)
    elif not job.atoms.pbc.any():
        told["kpts"], told["gamma"] = (1, 1, 1), True
    if job.pseudopotentials:
        told["setups"] = {one: _setup(one, name) for one, name in job.pseudopotentials.items()}
    command = job.command or next((cfg[name] for name in Vasp.env_commands[:2] if name in cfg), None) or "vasp_std"
    return Vasp(directory=str(job.folder), command=command, **told)


def _potcars(job: Job) -> list[Path]:
    """The POTCAR that ASE reads for each element, below the folder of potentials."""
    calculator = _make(job)
    calculator.check_xc()  # which chooses the set, where nothing else does
    given = calculator.input_params
    version = given["pp_version"] or cfg.get(Vasp.VASP_PP_VERSION, "")
    sets = {"lda": f"potpaw_LDA.{version}", "pbe": f"potpaw_PBE.{version}"}
    sets = sets if version else {"lda": "potpaw", "pbe": "potpaw_PBE"}
    chosen = sets.get(given["pp"].lower(), given["pp"])
    suffixes, _ = get_pp_setup(given["setups"])
    return [Path(chosen, f"{one}{suffixes.get(one) or ''}", "POTCAR") for one in job.elements]


def _draft(job: Job, folder: Path) -> tuple[Job, str | None]:
    """The job with names in place of potentials where one is not there; without NELECT, which they would say."""
    data = job.data or Path(cfg.get(Vasp.VASP_PP_PATH, ""))
    potcars = _potcars(job)
    missing = [path for path in potcars if not any((data / f"{path}{end}").is_file() for end in ("", ".Z"))]
    if not missing:
        return job, None
    for path in potcars:
        (folder / path).parent.mkdir(parents=True)
        (folder / path).write_text(f"{data / path}\n")
    electrons = " NELECT follows from them and the charge." if job.charge else ""
    note = (
        f"Not there: {', '.join(str(data / path) for path in missing)}. oracle.data_dir names the folder that holds "
        f"{missing[0].parts[0]}, oracle.pseudopotentials the potential of each element.{electrons}"
    )
    return replace(job, data=folder, charge=0), note


def _own_grid(parameters: Any) -> bool:
    return any(str(key).lower() == "kspacing" for key in parameters)


def _example(elements: tuple[str, ...]) -> dict[str, Any]:
    recommended = get_default_setups()["recommended"]
    return {
        "parameters": {"xc": "pbe", "encut": 500, "ediff": 1e-6, "ismear": 1, "sigma": 0.1, "lreal": False},
        "command": "mpirun -n 16 vasp_std",
        "pseudopotentials": {one: f"{one}{recommended.get(one) or ''}" for one in elements},
        "data_dir": "/opt/vasp/potentials",
    }


VASP = declare(
    Code(
        name="vasp",
        title="VASP",
        make=_make,
        draft=_draft,
        set_elsewhere={**_ELSEWHERE, **{f"custom.{tag}": where for tag, where in _ELSEWHERE.items()}},
        command="vasp_std",
        cell=True,
        own_grid=_own_grid,
        pseudopotentials="optional",
        data="VASP_PP_PATH",
        takes_data=True,
        smeared=True,
        output=("OUTCAR", "vasp.out"),
        unconverged=("ediff was not reached",),
        finished="general timing and accounting",
        density={"WAVECAR": "WAVECAR"},
        example=_example,
    )
)
