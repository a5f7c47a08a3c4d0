"""CP2K, whose sections are the parameters: ``FORCE_EVAL: {DFT: {MGRID: {CUTOFF: 400}}}``.

A keyword holds a value, or a list where it is given several times; ``_`` holds the parameter of a section; sections
that come once for each of some names (``KIND``) are sections of a section with these names.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

import numpy as np
from ase.calculators.cp2k import CP2K as Shell

from almlip_jax.errors import InputError, LabelError
from almlip_jax.oracles.codes.base import Code, Grid, Job, configured, declare, said

_NAME = "cp2k"
_PARAMETER = "_"
_NAMED = ("KIND",)
_NO_METALS = {"H", "B", "C", "N", "O", "F", "Si", "P", "S", "Cl", "Ge", "As", "Se", "Br", "I"}
"""Elements whose molecules and crystals have a gap, mostly; the example of others is one of a metal."""
_Section = dict[str, Any]


class _FromText(Shell):
    """ASE's calculator with an input that is complete: it adds nothing."""

    def __init__(self, text: str, **settings: Any) -> None:
        self._text = text
        super().__init__(**settings)

    def _generate_input(self) -> str:
        return self._text


def _in_capitals(given: Mapping[str, Any], named: bool = False) -> _Section:
    """Sections and keywords in capitals, as CP2K means them; names of kinds as they are."""
    made = {}
    for key, value in given.items():
        name = str(key) if named else str(key).upper()
        made[name] = _in_capitals(value, name in _NAMED) if isinstance(value, Mapping) else value
    return made


def _lines(section: Mapping[str, Any], depth: int = 0) -> list[str]:
    """A section as CP2K reads it."""
    indent = "  " * depth
    lines = []
    for key, value in section.items():
        if key == _PARAMETER:
            continue
        if not isinstance(value, Mapping):
            lines += [f"{indent}{key} {_word(one)}".rstrip() for one in (value if isinstance(value, list) else [value])]
            continue
        several = value.items() if key in _NAMED else [(_word(value.get(_PARAMETER, "")), value)]
        for name, inner in several:
            if not isinstance(inner, Mapping):
                raise InputError(f"oracle.parameters: {key} of CP2K holds sections by name, as {key}: {{Si: {{...}}}}.")
            lines += [f"{indent}&{key} {name}".rstrip(), *_lines(inner, depth + 1), f"{indent}&END {key}"]
    return lines


def _word(value: Any) -> str:
    return f".{str(value).upper()}." if isinstance(value, bool) else str(value)


def _set(root: _Section, path: str, value: Any, *, anyway: bool = False) -> None:
    """Sets a keyword where nothing is said of it, or anyway."""
    *sections, last = path.split("/")
    for name in sections:
        root = root.setdefault(name, {})
    if anyway or last not in root:
        root[last] = value


def input_text(job: Job) -> str:
    """The whole input of a job.

    Raises:
        LabelError: the magnetic moments would not be what they are meant to be, or electrons are left over.
    """
    root = _in_capitals(job.parameters)
    _set(root, "GLOBAL/PROJECT", _NAME)
    _set(root, "GLOBAL/RUN_TYPE", "ENERGY_FORCE")
    _set(root, "GLOBAL/PRINT_LEVEL", "LOW")
    _set(root, "FORCE_EVAL/METHOD", "QUICKSTEP")
    if job.stress:
        _set(root, "FORCE_EVAL/STRESS_TENSOR", "ANALYTICAL")
    if job.charge:
        _set(root, "FORCE_EVAL/DFT/CHARGE", job.charge)
    if job.polarised:
        _set_spins(root, job)
    elif _odd(job) and said(root, "FORCE_EVAL.DFT.SCF.SMEAR") is None:
        raise LabelError(
            f"{job.atoms.get_chemical_formula()} with charge {job.charge} has an odd number of electrons; give CP2K a "
            "SMEAR section where it is a metal, or else a multiplicity (system.spin)"
        )
    if job.grid is not None and job.grid.size != (1, 1, 1):
        _set(root, "FORCE_EVAL/DFT/KPOINTS", {"SCHEME": _scheme(job.grid)})
    if job.restart:
        _set(root, "FORCE_EVAL/DFT/SCF/SCF_GUESS", "RESTART", anyway=True)
    _set_structure(root, job)
    return "\n".join(_lines(root)) + "\n"


def _scheme(grid: Grid) -> str:
    """Monkhorst and Pack's grids lie off Gamma where the number is even; MacDonald's are moved from there."""
    moves = [
        (0.0 if n % 2 else 0.5 / n) if not shift else (0.5 / n if n % 2 else 0.0)
        for n, shift in zip(grid.size, grid.shift, strict=True)
    ]
    size = " ".join(map(str, grid.size))
    if not any(moves):
        return f"MONKHORST-PACK {size}"
    return f"MACDONALD {size} {' '.join(f'{move:.10g}' for move in moves)}"


def _odd(job: Job) -> bool:
    """Whether the number of electrons is odd; pseudopotentials take them away in pairs."""
    return bool((int(job.atoms.numbers.sum()) - job.charge) % 2)


def _set_spins(root: _Section, job: Job) -> None:
    total = float(job.atoms.get_initial_magnetic_moments().sum())
    smear = said(root, "FORCE_EVAL.DFT.SCF.SMEAR")
    unpaired = job.unpaired
    if unpaired is None:
        if smear is None and abs(total - round(total)) > 0.01:
            raise LabelError(
                f"CP2K keeps the number of unpaired electrons where there is no SMEAR section; the initial magnetic "
                f"moments add up to {total:g}, so give a multiplicity (system.spin), or SMEAR"
            )
        unpaired = abs(round(total))
        if unpaired % 2 != _odd(job) and smear is not None:
            unpaired += 1  # where the smearing begins; it finds the moment
    elif smear is not None:
        smear["FIXED_MAGNETIC_MOMENT"] = float(unpaired)
    _set(root, "FORCE_EVAL/DFT/UKS", True)
    _set(root, "FORCE_EVAL/DFT/MULTIPLICITY", unpaired + 1)


def _set_structure(root: _Section, job: Job) -> None:
    """Cell, atoms, and kinds of atoms: elements, or elements with a magnetic moment."""
    atoms = job.atoms
    periodic = "".join(axis for axis, repeats in zip("XYZ", atoms.pbc, strict=True) if repeats) or "NONE"
    if periodic != "XYZ":
        _set(root, "FORCE_EVAL/DFT/POISSON/PERIODIC", periodic)
        _set(root, "FORCE_EVAL/DFT/POISSON/POISSON_SOLVER", "MT" if periodic == "NONE" else "ANALYTIC")
    cell = {axis: _numbers(vector) for axis, vector in zip("ABC", atoms.cell.array, strict=True)}
    moments = atoms.get_initial_magnetic_moments()
    given = said(root, "FORCE_EVAL.SUBSYS.KIND") or {}
    names: dict[tuple[str, float], str] = {}
    for symbol, moment in zip(atoms.symbols, moments, strict=True):
        same = sum(symbol == other for other, _ in names)
        names.setdefault((symbol, moment), f"{symbol}{same + 1}" if moments.any() else symbol)
    kinds = {name: _kind(given, job, symbol, moment) for (symbol, moment), name in names.items()}
    of_atoms = [names[one] for one in zip(atoms.symbols, moments, strict=True)]
    coordinates = [f"{name} {_numbers(place)}" for name, place in zip(of_atoms, atoms.positions, strict=True)]
    _set(root, "FORCE_EVAL/SUBSYS/CELL", {**cell, "PERIODIC": periodic})
    _set(root, "FORCE_EVAL/SUBSYS/KIND", kinds, anyway=True)
    _set(root, "FORCE_EVAL/SUBSYS/COORD", {"": coordinates})


def _kind(given: Mapping[str, Any], job: Job, symbol: str, moment: float) -> _Section:
    kind = {"ELEMENT": symbol, **given.get(symbol, {})}
    if symbol in (job.pseudopotentials or {}):
        kind["POTENTIAL"] = (job.pseudopotentials or {})[symbol]
    return {**kind, "MAGNETIZATION": moment} if moment else kind


def _numbers(values: np.ndarray) -> str:
    return " ".join(f"{value:.16e}" for value in values)


def _make(job: Job) -> _FromText:
    command = job.command or configured("cp2k", "cp2k_shell") or "cp2k.psmp"
    if not {"-s", "--shell"} & set(command.split()) and "cp2k_shell" not in command:
        command += " -s"
    # The program writes into the folder that it is started in, whatever the names of its files.
    command = f"cd {shlex.quote(str(job.folder.absolute()))} && exec {command}"
    return _FromText(input_text(job), command=command, label=_NAME)


def _write(job: Job) -> None:
    (job.folder / f"{_NAME}.inp").write_text(input_text(job))


def _example(elements: tuple[str, ...]) -> dict[str, Any]:
    scf: dict[str, Any] = {"EPS_SCF": 1e-7, "MAX_SCF": 100}
    if not {*elements} <= _NO_METALS:
        scf |= {
            "MAX_SCF": 200,
            "ADDED_MOS": "-1 -1",  # all that there are, of both spins: a number would belong to a size
            "SMEAR": {"_": True, "METHOD": "FERMI_DIRAC", "ELECTRONIC_TEMPERATURE": "[K] 1000"},
            "MIXING": {"METHOD": "BROYDEN_MIXING", "ALPHA": 0.2, "NBROYDEN": 8},
        }
    dft = {
        "BASIS_SET_FILE_NAME": "BASIS_MOLOPT",
        "POTENTIAL_FILE_NAME": "GTH_POTENTIALS",
        "MGRID": {"CUTOFF": 500, "REL_CUTOFF": 60},
        "SCF": scf,
        "XC": {"XC_FUNCTIONAL": {"_": "PBE"}},
    }
    kinds = {one: {"BASIS_SET": "DZVP-MOLOPT-SR-GTH", "POTENTIAL": "GTH-PBE"} for one in elements}
    parameters = {"FORCE_EVAL": {"DFT": dft, "SUBSYS": {"KIND": kinds}}}
    return {"parameters": parameters, "command": "cp2k.psmp", "data_dir": "/usr/share/cp2k"}


CP2K = declare(
    Code(
        name="cp2k",
        title="CP2K",
        make=_make,
        write=_write,
        set_elsewhere={
            "GLOBAL.PROJECT": "each label has a folder of its own (oracle.scratch)",
            "GLOBAL.RUN_TYPE": "a label is one calculation of the structure as it is",
            "MOTION": "a label is one calculation of the structure as it is",
            "FORCE_EVAL.DFT.CHARGE": "system.charge, or the charge of the structure",
            "FORCE_EVAL.DFT.MULTIPLICITY": "system.spin, or the multiplicity of the structure",
            "FORCE_EVAL.DFT.SCF.SMEAR.FIXED_MAGNETIC_MOMENT": "system.spin, or the multiplicity of the structure",
            **{
                f"FORCE_EVAL.DFT.{key}": "follows from multiplicity and magnetic moments (oracle.magnetic_moments)"
                for key in ("UKS", "UNRESTRICTED_KOHN_SHAM", "LSD", "SPIN_POLARIZED")
            },
            "FORCE_EVAL.DFT.WFN_RESTART_FILE_NAME": "oracle.reuse",
            "FORCE_EVAL.SUBSYS.COORD": "follows from the structure",
            "FORCE_EVAL.SUBSYS.CELL": "follows from the structure",
        },
        command="cp2k.psmp",
        cell=True,
        own_grid=lambda parameters: said(parameters, "FORCE_EVAL.DFT.KPOINTS") is not None,
        pseudopotentials="optional",
        data="CP2K_DATA_DIR",
        takes_data=True,
        output=(f"{_NAME}.out",),
        unconverged=("scf run not converged",),
        density={name: name for name in (f"{_NAME}-RESTART.wfn", f"{_NAME}-RESTART.kp")},
        example=_example,
    )
)
