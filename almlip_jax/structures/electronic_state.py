"""Charge and spin of a structure, however a file states them, under the names ``charge`` and ``spin``.

A label source that is not told them computes the neutral singlet, so every statement of another state is understood
or refused.
Labels, packed data and walkers take charge and spin from here alone: what is labelled is what a model sees.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterator
from typing import Any

import numpy as np
from ase import Atoms

from almlip_jax.errors import InputError

_CHARGES = ("charge", "total_charge", "net_charge")
_MULTIPLICITIES = ("spin", "multiplicity", "spin_multiplicity")
_UNPAIRED = ("uhf", "unpaired_electrons")
_AMBIGUOUS = "total_spin"
_NAMES = frozenset((*_CHARGES, *_MULTIPLICITIES, *_UNPAIRED, _AMBIGUOUS))
_WHOLE_CHARGE = "the total charge must be a whole number"
_ROUNDING = 0.01  # what sums of charges and moments may differ from whole numbers by


def normalise_state(atoms: Atoms, where: str) -> None:
    """Brings charge and multiplicity 2S+1 into `atoms.info` as ints, ``charge`` and ``spin``, where they are given.

    In `info`, in any case, ``charge``, ``total_charge`` and ``net_charge`` are the total charge; ``spin``,
    ``multiplicity`` and ``spin_multiplicity`` are 2S+1; ``uhf`` and ``unpaired_electrons`` are 2S.  Charges of the
    atoms (``initial_charges``, or a calculator's ``charges``) state the total charge where they add up to a whole
    number, and initial magnetic moments of an open structure the number of unpaired electrons, unless that is none.

    Raises:
        InputError: a charge that is not a whole number, a spin that is not a positive whole number, two statements that
            contradict each other, or one that has several meanings.
    """
    charges = list(_given(atoms, _CHARGES, where, _WHOLE_CHARGE, None))
    charges += _charges_of_atoms(atoms, where, stated=bool(charges))
    spins = _stated_spins(atoms, where) + _moments_of_atoms(atoms)
    for name, statements in (("charge", charges), ("spin", spins)):
        _refuse_contradictions(name, statements, where)
    _check_total_spin(atoms, spins, where)
    for key in [key for key in atoms.info if _plain(key) in _NAMES]:
        del atoms.info[key]
    for name, statements in (("charge", charges), ("spin", spins)):
        if statements:
            atoms.info[name] = statements[0][1]


def electronic_state(atoms: Atoms) -> tuple[int, int]:
    """Total charge in e and multiplicity 2S+1 of a structure; raises as `total_charge` and `multiplicity`."""
    stated = stated_state(atoms)
    return stated.get("charge", 0), _multiplicity(atoms, stated)


def total_charge(atoms: Atoms) -> int:
    """The total charge of a structure in e, under any name that `normalise_state` knows; 0 where none states it.

    Raises:
        InputError: it is not a whole number, or two statements contradict each other.
    """
    return stated_state(atoms).get("charge", 0)


def multiplicity(atoms: Atoms) -> int:
    """The spin multiplicity 2S+1 of a structure.

    It is what `info` says under any of the names that `normalise_state` knows, or else what the initial magnetic
    moments of a molecule add up to, or else 1; those of a crystal are where its bands begin.

    Raises:
        InputError: it is not a whole number above zero, or two statements contradict each other.
    """
    return _multiplicity(atoms, stated_state(atoms))


def _multiplicity(atoms: Atoms, stated: dict[str, int]) -> int:
    spin = stated.get("spin")
    if spin is None:
        return 1 if atoms.pbc.any() else 1 + round(total_moment(atoms))
    return spin


def stated_state(atoms: Atoms) -> dict[str, int]:
    """``charge`` and ``spin`` of a structure as far as they are stated, by any name, magnetic moments aside.

    Charges of the atoms count where `info` says no total charge.

    Raises:
        InputError: as `normalise_state`.
    """
    keys = [key for key in atoms.info if _plain(key) in _NAMES]
    of_atoms = "initial_charges" in atoms.arrays or (atoms.calc is not None and "charges" in atoms.calc.results)
    if {*keys} <= {"charge", "spin"} and not of_atoms:  # looking takes less time than writing a formula for errors
        found = {name: atoms.info[name] for name in ("charge", "spin") if name in keys}
        if all(type(number) is int for number in found.values()) and found.get("spin", 1) > 0:
            return found
    where = atoms.get_chemical_formula()
    charges = list(_given(atoms, _CHARGES, where, _WHOLE_CHARGE, None))
    charges = charges or _charges_of_atoms(atoms, where, stated=False)
    spins = _stated_spins(atoms, where)
    _check_total_spin(atoms, spins, where)
    found = {}
    for name, statements in (("charge", charges), ("spin", spins)):
        _refuse_contradictions(name, statements, where)
        if statements:
            found[name] = statements[0][1]
    return found


def agrees_in_state(frame: Atoms, atoms: Atoms) -> bool:
    """Whether a frame says no other charge or spin than those of a structure; what it does not state agrees."""
    known = dict(zip(("charge", "spin"), electronic_state(atoms), strict=True))
    return all(known[name] == said for name, said in stated_state(frame).items())


def initial_moments(atoms: Atoms) -> np.ndarray | None:
    """Initial magnetic moments in Bohr magnetons, [N] or [N, 3]; None where there are none but zeros."""
    moments = atoms.arrays.get("initial_magmoms")
    return None if moments is None or not np.any(moments) else np.asarray(moments, np.float64)


def total_moment(atoms: Atoms) -> float:
    """Length of the sum of the initial magnetic moments, in Bohr magnetons: the number of unpaired electrons."""
    moments = initial_moments(atoms)
    return 0.0 if moments is None else float(np.linalg.norm(np.atleast_1d(moments.sum(axis=0))))


def _stated_spins(atoms: Atoms, where: str) -> list[tuple[str, int]]:
    """Multiplicities that `info` states, and the names it does so by."""
    spins = list(_given(atoms, _MULTIPLICITIES, where, "the multiplicity 2S+1 must be a positive whole number", 1))
    unpaired = _given(
        atoms, _UNPAIRED, where, "the number of unpaired electrons must be a whole number, not negative", 0
    )
    return spins + [(name, number + 1) for name, number in unpaired]


def _refuse_contradictions(name: str, statements: list[tuple[str, int]], where: str) -> None:
    if len({number for _, number in statements}) > 1:
        raise InputError(
            f"{where}: {' and '.join(given for given, _ in statements)} contradict each other "
            f"({name} {' or '.join(str(number) for _, number in statements)}); keep {name}."
        )


def _plain(key: Any) -> str:
    return key.lower() if isinstance(key, str) else ""


def _given(atoms: Atoms, names: tuple[str, ...], where: str, rule: str, least: int | None) -> Iterator[tuple[str, int]]:
    """Keys of `info` that state something, in the order of the names, with the whole numbers they hold."""
    keys = [key for name in names for key in atoms.info if _plain(key) == name]
    for key in keys:
        value = atoms.info[key]
        if isinstance(value, np.ndarray | np.generic) and value.size == 1:
            value = value.item()
        number = int(value) if _is_whole(value) else None
        if number is None or (least is not None and number < least):
            raise InputError(f"{where}: {key} is {value!r}, but {rule}; correct it.")
        yield key, number


def _charges_of_atoms(atoms: Atoms, where: str, stated: bool) -> list[tuple[str, int]]:
    results = {} if atoms.calc is None else atoms.calc.results
    found = []
    for name, charges in (
        ("initial_charges", atoms.arrays.get("initial_charges")),
        ("charges", results.get("charges")),
    ):
        if charges is None or not np.any(charges):
            continue
        total = float(np.sum(charges))
        if np.isfinite(total) and abs(total - round(total)) <= _ROUNDING:
            found.append((name, round(total)))
        elif name == "initial_charges" and not stated:
            raise InputError(f"{where}: the initial charges add up to {total:g}, not a whole number; give charge too.")
    return found


def _moments_of_atoms(atoms: Atoms) -> list[tuple[str, int]]:
    """The multiplicity that moments state; those of a crystal are where its bands begin, and no multiplicity."""
    moments = atoms.arrays.get("initial_magmoms")
    if moments is None or atoms.pbc.any():
        return []
    total = float(np.linalg.norm(np.atleast_1d(np.sum(moments, axis=0))))
    if not np.isfinite(total) or round(total) == 0 or abs(total - round(total)) > _ROUNDING:
        return []
    return [("initial_magmoms", round(total) + 1)]


def _check_total_spin(atoms: Atoms, spins: list[tuple[str, int]], where: str) -> None:
    """Refuses ``total_spin``, which programs use for S, 2S and 2S+1, where nothing else says what it is."""
    for key in [key for key in atoms.info if _plain(key) == _AMBIGUOUS]:
        value = atoms.info[key]
        value = value.item() if isinstance(value, np.ndarray | np.generic) and value.size == 1 else value
        multiplicity = spins[0][1] if spins else None
        meanings = () if multiplicity is None else (multiplicity, multiplicity - 1, (multiplicity - 1) / 2)
        if isinstance(value, numbers.Real) and float(value) in meanings:
            continue
        known = "it may be S, 2S or 2S+1" if multiplicity is None else f"the multiplicity is {multiplicity}"
        raise InputError(f"{where}: {key} is {value!r}, and {known}; give the multiplicity 2S+1 as spin instead.")


def _is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool | np.bool_) and float(value).is_integer()
