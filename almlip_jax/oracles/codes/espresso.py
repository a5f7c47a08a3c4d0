"""Quantum ESPRESSO: pw.x, whose namelists are the parameters."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ase.calculators.espresso import Espresso, EspressoProfile
from ase.data import chemical_symbols
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
_OF_SPECIES = {
    "starting_magnetization", "starting_charge", "starting_ns_eigenvalue", "hubbard_u", "hubbard_j0", "hubbard_alpha",
    "hubbard_beta", "hubbard_j", "angle1", "angle2", "london_c6", "london_rvdw", "solute_lj", "solute_epsilon",
    "solute_sigma",
}  # fmt: skip
"""Keys whose last index is the number of a species."""
_INDEXED = re.compile(r"(?P<name>\w+)\((?P<before>(?:[^,()]+,)*)(?P<last>[^,()]+)\)")
_FORTRAN_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[de][+-]?\d+")
_READ_FROM = re.compile(r"PseudoPot\..*read from file:\s*(\S+)")


def _namelists(job: Job) -> Namelist:
    parameters = {key: value for key, value in job.parameters.items() if key.lower() != _FURTHER_CARDS}
    if any(key.lower() == "input_data" for key in parameters):
        raise InputError("oracle.parameters: what ASE calls input_data stands here itself, as system: {ecutwfc: 40}.")
    given = Namelist({key: _value(value) for key, value in parameters.items()})
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
    if not control["tprnfor"]:
        raise InputError("oracle.parameters.control.tprnfor cannot be false: a label has forces.")
    control.setdefault("tstress", job.stress)
    if job.charge:
        system["tot_charge"] = job.charge
    noncollinear = bool(system.get("noncolin"))
    if job.polarised and not noncollinear:
        system["nspin"] = 2
    if job.unpaired is not None and job.polarised:
        if noncollinear:
            raise InputError(
                "oracle.parameters.system.noncolin: pw.x keeps no number of unpaired electrons then; leave it out, or "
                "label without a multiplicity."
            )
        system["tot_magnetization"] = job.unpaired
    for name in ("system", "rism"):
        if name in given:
            _index_species(given[name], _species(job, split=job.polarised or noncollinear))
    if job.restart:
        electrons["startingpot"], electrons["startingwfc"] = "file", "file"
    return given


def _value(given: Any) -> Any:
    """A value of a namelist, where it is text that Fortran reads as a number or a logical, as that."""
    if isinstance(given, Mapping):
        return {key: _value(value) for key, value in given.items()}
    if not isinstance(given, str):
        return given
    text = given.strip().lower()
    if text in (".true.", ".false.", ".t.", ".f."):
        return text.startswith(".t")
    return float(text.replace("d", "e")) if _FORTRAN_NUMBER.fullmatch(text) else given


def _species(job: Job, *, split: bool) -> list[tuple[str, str]]:
    """Element and name of each species, in the order in which ASE writes them: one for each moment of an element.

    Args:
        job: with moments as pw.x takes them.
        split: whether moments tell species apart.
    """
    moments = job.atoms.get_initial_magnetic_moments() if split else [0.0] * len(job.atoms)
    found: dict[tuple[str, float], str] = {}
    for symbol, moment in zip(job.atoms.symbols, moments, strict=True):
        same = sum(symbol == other for other, _ in found)
        found.setdefault((symbol, float(moment)), f"{symbol}{same or ''}")
    return [(symbol, name) for (symbol, _), name in found.items()]


def _index_species(section: MutableMapping[str, Any], species: Sequence[tuple[str, str]]) -> None:
    """Replaces elements in keys that have a number of a species, as ``hubbard_u(Fe)``, by the numbers of theirs.

    Raises:
        InputError: a number is given, which would be that of another element in another structure.
    """
    for key in list(section):
        found = _INDEXED.fullmatch(key)
        if found is None or found["name"].lower() not in _OF_SPECIES:
            continue
        if found["name"].lower() == "starting_magnetization":
            raise InputError(
                f"oracle.parameters.system.{key} cannot be given here: oracle.magnetic_moments, or the moments of the "
                "structure."
            )
        element = found["last"].strip().capitalize()
        if element not in chemical_symbols[1:]:
            raise InputError(
                f"oracle.parameters: which species has a number in pw.x, as in '{key}', follows from each structure "
                f"and its moments; name the element, as {found['name']}({found['before']}Fe)."
            )
        value = section.pop(key)
        for number, (symbol, _) in enumerate(species, 1):
            if symbol == element:
                section[f"{found['name']}({found['before']}{number})"] = value


def _of_each_species(lines: Sequence[str], species: Sequence[tuple[str, str]]) -> list[str]:
    """Lines of cards, those of HUBBARD once for each species of an element.

    Raises:
        InputError: a line has two elements, one of which is of several species.
    """
    made, card = [], ""
    own = {line.split()[1].split("-")[0] for line in lines if len(line.split()) > 1}
    for line in lines:
        words = line.split()
        if words[0].upper() in _TAKEN_CARDS:
            card = words[0].upper()
        orbitals = [word for word in words[1:] if re.fullmatch(r"[A-Z][a-z]?-\d[spdf].*", word)]
        if card != "HUBBARD" or not orbitals:
            made.append(line)
            continue
        names = [
            [name for symbol, name in species if symbol == one.split("-")[0] and (name == symbol or name not in own)]
            for one in orbitals
        ]
        if len(orbitals) > 1 and max(map(len, names)) > 1:
            raise InputError(
                f"oracle.parameters.{_FURTHER_CARDS}: '{line}' is of pairs of atoms, and moments of the structure make "
                "several species of one of its elements; leave out such lines, or let moments of an element be equal."
            )
        ends = orbitals[0].split("-", 1)[1]
        several = names[0] if len(orbitals) == 1 else names[0][:1]
        made += [" ".join([words[0], f"{name}-{ends}", *words[2:]]) for name in several] if all(names) else []
    return made


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
    return _of_each_species(lines, _species(job, split=job.polarised))


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
