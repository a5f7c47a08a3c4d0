"""Quantum ESPRESSO: pw.x, whose namelists are the parameters."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from ase.calculators.espresso import Espresso, EspressoProfile
from ase.io.espresso import Namelist

from almlip_jax.errors import InputError, LabelError
from almlip_jax.oracles.codes.base import Code, Job, configured, declare, said

_SECTIONS = ("control", "system", "electrons", "ions", "cell", "fcp", "rism")
_ELSEWHERE = {
    "calculation": "a label is one calculation of the structure as it is: scf",
    "pseudo_dir": "oracle.data_dir",
    "outdir": "each label has a folder of its own (oracle.scratch)",
    "prefix": "each label has a folder of its own (oracle.scratch)",
    "tot_charge": "system.charge, or the charge of the structure",
    "tot_magnetization": "system.spin, or the multiplicity of the structure",
    "nspin": "follows from multiplicity and magnetic moments (oracle.magnetic_moments)",
    "startingpot": "oracle.reuse",
    "startingwfc": "oracle.reuse",
    "scf_must_converge": "a label that did not converge is a failed one, and pw.x would say that it did",
    "nat": "follows from the structure",
    "ntyp": "follows from the structure",
    "ibrav": "follows from the structure",
}
_CARDS = {"kpts": "oracle.kpts", "kspacing": "oracle.kspacing", "koffset": "oracle.gamma_centred"}
_FURTHER_CARDS = "additional_cards"
_TAKEN_CARDS = ("HUBBARD", "OCCUPATIONS", "SOLVENTS")
"""Cards that do not follow from the structure, the k-points or the pseudopotentials."""
_CARDS_OF_PW = {
    *_TAKEN_CARDS, "ATOMIC_SPECIES", "ATOMIC_POSITIONS", "K_POINTS", "ADDITIONAL_K_POINTS", "CELL_PARAMETERS",
    "CONSTRAINTS", "ATOMIC_VELOCITIES", "ATOMIC_FORCES",
}  # fmt: skip
_READ_FROM = re.compile(r"PseudoPot\..*read from file:\s*(\S+)")


def _namelists(job: Job) -> Namelist:
    parameters = {key: value for key, value in job.parameters.items() if key.lower() != _FURTHER_CARDS}
    given = Namelist(parameters)
    given.to_nested("pw", warn=False)
    known = {key for section in _SECTIONS for key in given.get(section, ())}
    lost = [key for key in parameters if key.lower() not in known.union(_SECTIONS)]
    if lost:
        raise InputError(
            f"oracle.parameters: pw.x has no key '{lost[0]}' that ASE knows; put it below its namelist, as "
            f"system: {{{lost[0]}: ...}}."
        )
    control, system, electrons = (given[name] for name in ("control", "system", "electrons"))
    control["calculation"] = "scf"
    control.setdefault("tprnfor", True)
    control.setdefault("tstress", job.stress)
    if job.charge:
        system["tot_charge"] = job.charge
    if job.polarised:
        system["nspin"] = 2
    if job.unpaired is not None and job.polarised:
        system["tot_magnetization"] = job.unpaired
    if job.restart:
        electrons["startingpot"], electrons["startingwfc"] = "file", "file"
    return given


def _profile(job: Job) -> EspressoProfile:
    folder = str(job.data) if job.data is not None else configured("espresso", "pseudo_dir")
    if folder is None:
        raise InputError("name the folder of pseudopotentials in oracle.data_dir, or in ASE's configuration.")
    command = job.command or configured("espresso", "command") or "pw.x"
    return EspressoProfile(command=command, pseudo_dir=folder)


def _further_cards(job: Job) -> list[str]:
    """Lines of the cards that are parameters."""
    given = said(job.parameters, _FURTHER_CARDS) or []
    lines = [line.strip() for one in ([given] if isinstance(given, str) else given) for line in str(one).splitlines()]
    lines = [line for line in lines if line]
    if not lines:
        return []
    names = [line.split()[0].upper() for line in lines]
    other = next((one for one in names if one in _CARDS_OF_PW and one not in _TAKEN_CARDS), None)
    if names[0] not in _TAKEN_CARDS or other is not None:
        raise InputError(
            f"oracle.parameters.{_FURTHER_CARDS} takes the cards {', '.join(_TAKEN_CARDS)} of pw.x, and has "
            f"'{other or lines[0]}'; what follows from structure, k-points and pseudopotentials is not given here."
        )
    return lines


class _Checked(Espresso):
    """ASE's calculator, which looks at what pw.x read and what it passed over."""

    def __init__(self, job: Job, folder: str, cards: list[str], **settings: Any) -> None:
        super().__init__(directory=job.folder, **({"additional_cards": cards} if cards else {}), **settings)
        self._folder = folder
        self._cards = {line.split()[0].upper() for line in cards} & {*_TAKEN_CARDS}

    def calculate(self, *arguments: Any, **named: Any) -> None:
        """Runs pw.x.

        Raises:
            LabelError: it took a pseudopotential from another folder, as builds of it do where there is none in the
                one that they are told of; or it passed over a card.
        """
        super().calculate(*arguments, **named)
        output = Path(self.directory) / "espresso.pwo"
        text = output.read_text(errors="replace") if output.exists() else ""
        for read in _READ_FROM.findall(text):
            place = os.path.dirname(os.path.join(self.directory, read))
            if not place.endswith(".save") and os.path.realpath(place) != os.path.realpath(self._folder):
                raise LabelError(
                    f"pw.x read the pseudopotential {read}, which is not in {self._folder} (oracle.data_dir); put the "
                    "one that you mean there"
                )
        for card in self._cards:
            if re.search(rf"warning: card {card}.* ignored", text, re.IGNORECASE):
                raise LabelError(f"this version of pw.x has no card {card}, and passed over it; take a newer one")


def _make(job: Job) -> Espresso:
    profile = _profile(job)
    kpts: dict[str, Any] = {}
    if job.grid is not None and job.grid.size != (1, 1, 1):
        kpts = {"kpts": job.grid.size, "koffset": job.grid.shift}
    return _Checked(
        job,
        str(profile.pseudo_dir),
        _further_cards(job),
        profile=profile,
        input_data=_namelists(job),
        pseudopotentials=dict(job.pseudopotentials or {}),
        **kpts,
    )


def _prepare(job: Job) -> Job:
    """The job with moments as pw.x takes them: parts of the valence electrons, which all its versions understand."""
    if not job.polarised or not job.atoms.get_initial_magnetic_moments().any():
        return job
    folder = Path(_profile(job).pseudo_dir)
    valence = {one: _valence(folder / (job.pseudopotentials or {})[one]) for one in job.elements}
    parts = [m / valence[s] for s, m in zip(job.atoms.symbols, job.atoms.get_initial_magnetic_moments(), strict=True)]
    if max(map(abs, parts)) > 1:
        raise LabelError("an initial magnetic moment is larger than the number of valence electrons of its atom")
    atoms = job.atoms.copy()
    atoms.set_initial_magnetic_moments(parts)
    return replace(job, atoms=atoms)


def _valence(path: Path) -> float:
    """Valence electrons of a pseudopotential (UPF, both versions)."""
    try:
        text = path.read_text(errors="replace")
    except OSError as error:
        raise LabelError(f"the pseudopotential {path} cannot be read ({error.strerror})") from error
    found = re.search(r'z_valence\s*=\s*"\s*([-+.\dEeDd]+)', text) or re.search(r"([-+.\dEeDd]+)\s+Z valence", text)
    if found is None:
        raise LabelError(f"the pseudopotential {path} does not say how many valence electrons it has (z_valence)")
    return float(found[1].upper().replace("D", "E"))


def _example(elements: tuple[str, ...]) -> dict[str, Any]:
    return {
        "parameters": {
            "system": {"ecutwfc": 50, "ecutrho": 400, "occupations": "smearing", "smearing": "mv", "degauss": 0.01},
            "electrons": {"conv_thr": 1e-8},
        },
        "command": "pw.x",
        "pseudopotentials": {one: f"{one}.UPF" for one in elements},
        "data_dir": "/usr/share/espresso/pseudo",
    }


ESPRESSO = declare(
    Code(
        name="espresso",
        title="Quantum ESPRESSO",
        make=_make,
        prepare=_prepare,
        set_elsewhere={
            **_ELSEWHERE,
            **{f"{section}.{key}": where for section in _SECTIONS for key, where in _ELSEWHERE.items()},
            **_CARDS,
        },
        command="pw.x",
        cell=True,
        pseudopotentials="required",
        takes_data=True,
        output=("espresso.pwo", "espresso.err", "CRASH"),
        unconverged=("convergence not achieved",),
        finished="job done.",
        density={"pwscf.save": "pwscf.save"},
        example=_example,
    )
)
