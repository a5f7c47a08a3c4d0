"""What a structure and its labels must be before anything is computed with them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import all_properties
from ase.calculators.singlepoint import SinglePointCalculator
from ase.data import chemical_symbols
from ase.stress import full_3x3_to_voigt_6_stress

from almlip_jax.errors import InputError
from almlip_jax.structures.neighbors import edge_vectors, neighborhood, shortest_edge
from almlip_jax.targets import label_names, target_named

_TENSORS = ("stress", "virial")
_CONTACT = 0.2  # Angstrom; no two nuclei come this close in anything worth a label
_SEARCH = 2.0  # Angstrom; the search for contacts divides space into boxes of this size, so it should not be tiny


def check_structure(atoms: Atoms, where: str) -> None:
    """Refuses a structure that cannot be a real one.

    Args:
        atoms: the structure.
        where: what to call it in the message, such as ``water.xyz, frame 3``.

    Raises:
        InputError: no atoms, an unknown element, a position or cell that is not finite, a degenerate periodic cell, or
            two atoms (or images of one) less than 0.2 Angstrom apart.
    """
    if len(atoms) == 0:
        raise InputError(f"{where} has no atoms; leave it out.")
    unknown = (atoms.numbers < 1) | (atoms.numbers >= len(chemical_symbols))
    if unknown.any():
        atom = int(np.argmax(unknown))
        raise InputError(f"{where}: atom {atom} is of no known element (number {atoms.numbers[atom]}); correct it.")
    _check_finite(atoms.positions, "position", where)
    try:
        shortest = shortest_edge(atoms, _SEARCH)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    if shortest < _CONTACT:
        hood = neighborhood(atoms, _SEARCH)
        distances = np.where(hood.mask, np.linalg.norm(edge_vectors(atoms, hood), axis=-1), np.inf)
        atom, slot = (int(index) for index in np.unravel_index(np.argmin(distances), distances.shape))
        other = int(hood.neighbors[atom, slot])
        pair = f"atoms {atom} and {other} are" if atom != other else f"atom {atom} and its periodic image are"
        raise InputError(
            f"{where}: {pair} {distances[atom, slot]:.3g} Angstrom apart; correct the positions or the cell."
        )


def attach_labels(atoms: Atoms, labels: Mapping[str, Any], where: str) -> None:
    """Checks labels and puts them into a `SinglePointCalculator`, next to other results that are there already.

    Args:
        atoms: the structure; its calculator is replaced.
        labels: some of ``energy`` (eV), ``forces`` [N, 3] (eV/Angstrom), ``stress`` (eV/Angstrom^3; Voigt
            [6], [3, 3] or [9]).
        where: what to call the structure in messages.

    Raises:
        InputError: a label of the wrong shape, or not finite.
    """
    results = dict(atoms.calc.results) if atoms.calc is not None else {}
    replaced = {*label_names()} | ({"free_energy"} if "energy" in labels else set())  # two would be a choice for others
    results = {name: value for name, value in results.items() if name not in replaced}
    for name, value in labels.items():
        results[name] = checked_label(name, value, len(atoms), where)
    atoms.calc = holding(atoms, results) if results else None


def holding(atoms: Atoms, results: Mapping[str, Any]) -> SinglePointCalculator:
    """A calculator that holds results for a structure, also some that ASE has no name for."""
    known = {name: value for name, value in results.items() if name in all_properties}
    calculator = SinglePointCalculator(atoms, **known)
    calculator.results |= {name: value for name, value in results.items() if name not in known}
    return calculator


def checked_label(name: str, value: Any, num_atoms: int, where: str) -> float | np.ndarray:
    """A label as it is stored: a float, forces [N, 3], a Voigt stress or virial [6], or another target, in float64.

    Raises:
        InputError: the wrong shape, or not finite.
    """
    try:
        array = np.asarray(value, np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: {name} is not numeric ({value!r}); correct it.") from error
    if name == "forces":
        if array.shape != (num_atoms, 3):
            raise InputError(f"{where}: forces have shape {array.shape}, not ({num_atoms}, 3); correct them.")
        _check_finite(array, "force", where)
        return array
    further = target_named(name)
    if further is not None:
        shape = further.shape_of(num_atoms)
        rows = shape[:1] if further.per == "atom" else ()
        if array.shape == (*rows, math.prod(further.shape)):  # as files hold matrices
            array = array.reshape(shape)
        if array.shape != shape or not np.all(np.isfinite(array)):
            wrong = f"has shape {array.shape}, not {shape}" if array.shape != shape else "is not finite"
            raise InputError(f"{where}: the {name} {wrong}; correct or remove it.")
        return array
    if name in _TENSORS:
        if array.shape not in ((6,), (3, 3), (9,)):
            raise InputError(f"{where}: the {name} has shape {array.shape}, not (6,), (3, 3) or (9,); correct it.")
        array = array if array.shape == (6,) else full_3x3_to_voigt_6_stress(array.reshape(3, 3))
    elif array.size != 1:
        raise InputError(f"{where}: the energy has shape {array.shape}, not that of one number; correct it.")
    if not np.all(np.isfinite(array)):
        remedy = f"remove the {name}, " if name in _TENSORS else ""
        raise InputError(f"{where}: the {name} is not finite; {remedy}leave the structure out or label it again.")
    return array if name in _TENSORS else float(array.reshape(()))


def _check_finite(rows: np.ndarray, name: str, where: str) -> None:
    finite = np.isfinite(rows).all(axis=1)
    if not finite.all():
        raise InputError(
            f"{where}: the {name} of atom {int(np.argmin(finite))} is not finite; leave the structure out."
        )
