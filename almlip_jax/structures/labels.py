"""Labels as files hold them: under which keys they stand, in which unit, and what is taken where several are given.

A virial is ``-volume * stress`` in eV, as extended XYZ, MLIP-2 and most codes have it, and becomes a stress.  Of a
``free_energy`` and an ``energy`` (which ASE extrapolates to no smearing) the free energy is taken: forces and stress
are its derivatives.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from ase import Atoms
from ase.data import atomic_numbers
from pydantic import AfterValidator, Field, ValidationError, model_validator

from almlip_jax.errors import InputError
from almlip_jax.settings import Settings
from almlip_jax.structures.validation import checked_label
from almlip_jax.target_settings import ByTarget
from almlip_jax.targets import Target, further_targets, has_target, label_names, target_named
from almlip_jax.units import GPA

StressUnit = Literal["eV/A^3", "GPa", "kbar"]
"""Units that stresses in files may have, in ASE's sign (tension is positive)."""

LABEL_ERROR = "label_error"
"""Key of `info` that says why a frame of a labelled file has no labels."""

_UNITS: dict[StressUnit, float] = {"eV/A^3": 1.0, "GPa": GPA, "kbar": 0.1 * GPA}
_VIRIALS = ("virial", "virials", "REF_virial", "REF_virials")
_WORDS = {"energy": re.compile("energy|etot|e_tot|toten", re.I), "forces": re.compile("force|grad", re.I)}
_GRADIENT = re.compile("^(?!.*force).*grad", re.I)
_NO_FORCES = frozenset(("positions", "momenta", "velocities", "vel", "velo", "initial_magmoms", "predicted_forces"))
"""Arrays of vectors that are no forces."""
_SAME_LABEL = 1e-4  # eV, eV/Angstrom
_SAME_ENERGY = 1e-6  # eV; what rounding in a file leaves between two names of one energy


def _known_elements(types: tuple[str, ...]) -> tuple[str, ...]:
    for symbol in types:
        if symbol not in atomic_numbers:
            raise ValueError(f"'{symbol}' is not an element; give one symbol for each type, from type 0 on, as Si, O.")
    return types


ElementTypes = Annotated[tuple[str, ...], AfterValidator(_known_elements)]
"""Element of each type of an MLIP-2 file, from type 0 on; X for a number that no atom has."""


class LabelKeys(ByTarget):
    """Names of the labels in files, where they are not those that are known anyway."""

    energy: str | None = None
    """Key of energies (eV); by default a calculator's ``free_energy`` or ``energy``, or ``REF_energy``."""
    forces: str | None = None
    """Key of forces (eV/Angstrom); by default a calculator's ``forces``, or ``REF_forces``."""
    stress: str | None = None
    """Key of stresses (ASE's sign); by default a calculator's ``stress``, or ``REF_stress``."""
    virial: str | None = None
    """Key of virials (-volume * stress, eV); by default ``virial``, ``virials``, ``REF_virial`` or ``REF_virials``."""
    stress_unit: StressUnit | None = None
    """Unit of stresses; eV/A^3 by default.  Where it is given, no stress is too large to be believed."""

    @classmethod
    def keys_of(cls, target: Target) -> Iterator[tuple[str, Any, Any]]:
        """The key."""
        of = f"{target.many}{f' ({target.written})' if target.unit else ''}{target.meaning and f': {target.meaning}'}"
        said = f"Key of {of}; by default a calculator's ``{target.label}``, or ``REF_{target.label}``."
        kind: Any = str | None
        yield target.label, kind, Field(default=None, description=said)

    @classmethod
    def named(cls, **names: str | None) -> Self:
        """Keys by field.

        Raises:
            InputError: they cannot be what they are named as.
        """
        try:
            return cls.model_validate(names)
        except ValidationError as error:
            problems = [
                ": ".join([*map(str, one["loc"]), str(one["msg"]).removeprefix("Value error, ")])
                for one in error.errors()
            ]
            raise InputError("; ".join(problems)) from error

    @model_validator(mode="after")
    def _names_say_what_it_is(self) -> Self:
        if self.forces is not None and _GRADIENT.search(self.forces):
            raise ValueError(
                f"the key of the forces is '{self.forces}', which by its name holds gradients of the energy, minus the "
                "forces; write these into the file under another name."
            )
        if self.stress is not None and "virial" in self.stress.lower():
            raise ValueError(
                f"the key of the stress is '{self.stress}', which by its name is a virial (-volume * stress); "
                "name it as the key of the virial."
            )
        if self.virial is not None and "stress" in self.virial.lower():
            raise ValueError(
                f"the key of the virial is '{self.virial}', which by its name is a stress; name it as the key of the "
                "stress."
            )
        return self


class FileReading(Settings):
    """How files of structures are read: where their labels are, and what the types of MLIP-2 files stand for."""

    keys: LabelKeys | None = None
    """Keys of the labels, as ``{energy: dft_energy, forces: dft_forces}``."""
    types: ElementTypes | None = None
    """Element of each type of ``.cfg`` files, from type 0 on, as ``[Si, O]``."""

    def with_keys(self, **names: str | None) -> FileReading:
        """The same with some keys named, in place of those that are there; raises as `LabelKeys.named`."""
        said = {name: key for name, key in names.items() if key is not None}
        known = {} if self.keys is None else self.keys.model_dump()
        return FileReading(keys=LabelKeys.named(**known | said) if said else self.keys, types=self.types)

    def otherwise(self, default: FileReading) -> FileReading:
        """What is given here, and for the rest what another one says."""
        return FileReading(
            keys=default.keys if self.keys is None else self.keys,
            types=default.types if self.types is None else self.types,
        )

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `read_structures`."""
        return {"keys": self.keys, "type_numbers": None if self.types is None else type_numbers(self.types)}


def parse_types(text: str) -> tuple[str, ...]:
    """Element symbols from text such as ``Si,O``.

    Raises:
        InputError: one is not an element.
    """
    try:
        return _known_elements(tuple(text.replace(",", " ").split()))
    except ValueError as error:
        raise InputError(str(error)) from error


def type_numbers(types: Sequence[str]) -> list[int]:
    """Atomic numbers of the element symbols of types; 0 for X."""
    return [atomic_numbers[symbol] for symbol in types]


def required_types(path: Path | str, types: Sequence[str] | None) -> list[int]:
    """Atomic numbers of the types of a file of MLIP-2.

    Raises:
        InputError: they are not given, or one is not an element.
    """
    if types is None:
        raise InputError(
            f"{path} is an MLIP-2 file; say which element each of its types is, from type 0 on (--types Si,O, or "
            "types in a config)."
        )
    return type_numbers(parse_types(",".join(types)))


@dataclass(frozen=True)
class TakenLabels:
    """The labels of a frame.

    Attributes:
        values: name of `label_names` -> value, as `checked_label` gives it.
        virial: whether there was a virial among them.
        energies: which energies the frame had: ``free`` where a free energy stands alone or next to another energy that
            differs, ``plain`` where there is none, ``both`` where they are the same number.
    """

    values: dict[str, Any]
    virial: bool
    energies: Literal["free", "plain", "both"]


def take_labels(atoms: Atoms, keys: LabelKeys, where: str) -> TakenLabels:
    """Labels of a structure; those that stood in `info` or arrays leave them.

    A virial becomes a stress where the structure has a volume (three periodic directions), and stays in `info`
    otherwise.  There a stress that is not finite, which calculators write for molecules, says nothing and is left out.

    Raises:
        InputError: two different values are given for one label, or one is not what it must be.
    """
    values: dict[str, Any] = {}
    energies = _kind_of_energy(atoms, keys)
    for name in label_names():
        target = target_named(name)
        if target is not None and not has_target(atoms, target):  # what codes write for slabs is no label of a molecule
            continue
        given = _given(atoms, name, keys.said(name), bare=target is not None)
        if name == "stress" and not atoms.pbc.all():
            given = {key: value for key, value in given.items() if _is_finite(value)}
        checked = {key: checked_label(name, value, len(atoms), where) for key, value in given.items()}
        for (one, first), (other, second) in pairwise(checked.items()):
            if not np.allclose(first, second, rtol=1e-9, atol=1e-8):
                raise InputError(
                    f"{where} has two different values, '{one}' and '{other}'; say which one is meant by naming the "
                    f"key of the {name}."
                )
        if checked:
            values[name] = next(iter(checked.values()))
    if "stress" in values:
        values["stress"] = values["stress"] * _UNITS[keys.stress_unit or "eV/A^3"]
    virial = atoms.pbc.all() and _take_virial(atoms, keys, values, where)
    return TakenLabels(values, bool(virial), energies)


def drop_labels(atoms: Atoms) -> None:
    """Removes what a structure holds under the known names of labels, unseen."""
    atoms.calc = None
    own = (f"REF_{name}" for name in label_names())
    for key in (*own, *(one.label for one in further_targets()), *_VIRIALS):
        atoms.info.pop(key, None)
        atoms.arrays.pop(key, None)


def likely_keys(atoms: Atoms, name: str) -> list[str]:
    """Keys of a structure that may hold a label that was not found, by their names.

    Of forces, where no name tells, every array of vectors that is not known to hold something else.
    """
    place = atoms.info if name == "energy" else atoms.arrays
    found = [key for key in place if _WORDS[name].search(str(key))]
    if name == "forces" and not found:
        vectors = {key for key, array in place.items() if array.shape == (len(atoms), 3) and array.dtype.kind == "f"}
        found = [key for key in place if key in vectors - _NO_FORCES]
    return [f"{key} with its sign turned" if _GRADIENT.search(key) else key for key in map(str, found)]


def stated_failure(atoms: Atoms) -> str | None:
    """Why a frame has no labels, as ``label_error`` or ``error`` of its `info` says; None where nothing does."""
    return next((str(atoms.info[key]) for key in (LABEL_ERROR, "error") if key in atoms.info), None)


def label_difference(one: Atoms, other: Atoms) -> str | None:
    """How far the labels of two frames of one structure are apart, in words; None where they are the same.

    Energies within 0.1 meV and forces within 0.1 meV/Angstrom are the same: files round.  A label that only one of them
    has is not a difference.
    """
    first, second = ({} if atoms.calc is None else atoms.calc.results for atoms in (one, other))
    parts = []
    for words, scale, unit in (("energy", 1 / len(one), "meV/atom"), ("forces up to", 1.0, "meV/Angstrom")):
        name = words.split()[0]
        if first.get(name) is None or second.get(name) is None:
            continue
        apart = float(np.abs(np.asarray(first[name]) - np.asarray(second[name])).max())
        if not apart <= _SAME_LABEL:
            parts.append(f"{words} {1e3 * apart * scale:.3g} {unit}")
    return f"{' and '.join(parts)} apart" if parts else None


def hint_of_keys(atoms: Atoms) -> str:
    """What to do about a structure without labels, in half a sentence."""
    likely = [key for name in ("energy", "forces") for key in likely_keys(atoms, name)]
    perhaps = f" (perhaps {', '.join(likely)})" if likely else ""
    return f"name the keys that hold them{perhaps} with --energy-key and --forces-key, or keys in a config"


def _given(atoms: Atoms, name: str, key: str | None, *, bare: bool) -> dict[str, Any]:
    """What a structure gives for a label, by the names it stands under; taken out of `info` and arrays.

    With ``bare`` also under its own name there: files have no place for results that ASE does not know.
    """
    results: Mapping[str, Any] = {} if atoms.calc is None else atoms.calc.results
    given = {}
    if key is None:
        names = ("free_energy", "energy") if name == "energy" else (name,)
        found = next((one for one in names if results.get(one) is not None), None)
        if found is not None:
            given[found] = results[found]
    for stored in (f"REF_{name}", *([name] if bare else [])) if key is None else (key,):
        if stored in atoms.info:
            given[stored] = atoms.info.pop(stored)
        elif stored in atoms.arrays and stored not in ("positions", "numbers"):
            given[stored] = atoms.arrays.pop(stored)
        elif results.get(stored) is not None:
            given[stored] = results[stored]
    return given


def _kind_of_energy(atoms: Atoms, keys: LabelKeys) -> Literal["free", "plain", "both"]:
    results: Mapping[str, Any] = {} if atoms.calc is None else atoms.calc.results
    free, plain = results.get("free_energy"), results.get("energy", atoms.info.get("REF_energy"))
    if keys.energy is not None or free is None:
        return "plain"
    try:
        same = plain is not None and abs(float(free) - float(plain)) <= _SAME_ENERGY
    except (TypeError, ValueError):
        same = False  # the check of the label says what is wrong with it
    return "both" if same else "free"


def _take_virial(atoms: Atoms, keys: LabelKeys, values: dict[str, Any], where: str) -> bool:
    """Adds the stress that virials stand for to the other labels, or compares it with the one that is there.

    Returns:
        whether there is a virial.
    """
    there = False
    results: Mapping[str, Any] = {} if atoms.calc is None else atoms.calc.results
    names = _VIRIALS if keys.virial is None else (keys.virial,)
    for key in names:
        found = atoms.info.pop(key, None)
        found = results.get(key) if found is None else found
        if found is None:
            continue
        there = True
        stress = -checked_label("virial", found, len(atoms), where) / atoms.get_volume()
        known = values.setdefault("stress", stress)
        largest = max(np.abs(known).max(), np.abs(stress).max())
        if np.abs(stress - known).max() > 1e-3 * largest + 1e-5:
            hint = ""
            if np.abs(stress + known).max() <= 1e-3 * largest + 1e-5:
                hint = " (they agree except for the sign)"
            raise InputError(
                f"{where}: '{key}' and the stress contradict each other{hint}: the virial should be -volume * stress "
                f"in eV, and stands for a stress of up to {np.abs(stress).max():.4g} eV/Angstrom^3, not "
                f"{np.abs(known).max():.4g}; correct or remove one."
            )
    return there


def _is_finite(value: Any) -> bool:
    try:
        return bool(np.all(np.isfinite(np.asarray(value, np.float64))))
    except (TypeError, ValueError):
        return True  # the check of the label says what is wrong with it
