"""How ASE calculators are told charge and spin, for which ASE has no rule that all of them follow."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from ase import Atoms

from almlip_jax.errors import LabelError
from almlip_jax.oracles.base import check_moments
from almlip_jax.structures.electronic_state import initial_moments, multiplicity, total_charge

INFO, CHARGES, MOMENTS = "info", "initial_charges", "initial_magmoms"
"""Words for calculators that read ``info``, or add up the atoms' initial charges or magnetic moments."""


@dataclass(frozen=True)
class StateKeys:
    """Where a calculator takes total charge and spin multiplicity.

    Attributes:
        charge: a parameter (dotted where it lies within another), ``info``, ``initial_charges``, or None: nowhere.
        spin: likewise, with ``initial_magmoms`` in place of ``initial_charges``.
    """

    charge: str | None = None
    spin: str | None = None


_KNOWN = {
    "AIMNet2ASE": StateKeys("charge", "mult"),
    "Aims": StateKeys("charge"),
    "CP2K": StateKeys("charge", "multiplicity"),
    "Dftb": StateKeys("Hamiltonian_Charge"),
    "Espresso": StateKeys("input_data.system.tot_charge"),
    "GAMESSUS": StateKeys("contrl.icharg", "contrl.mult"),
    "GPAW": StateKeys("charge"),
    "Gaussian": StateKeys("charge", "mult"),
    "MOPAC": StateKeys("charge", MOMENTS),
    "NWChem": StateKeys("charge", MOMENTS),
    "ORCA": StateKeys("charge", "mult"),
    "Psi4": StateKeys("charge", "multiplicity"),
    "QChem": StateKeys("charge", "multiplicity"),
    "Siesta": StateKeys("fdf_arguments.NetCharge"),
    "TBLite": StateKeys("charge", "multiplicity"),
    "Vasp": StateKeys("charge"),
    "XTB": StateKeys(CHARGES, MOMENTS),
}
"""By the name of the class.  Where no spin is given, initial magnetic moments are all that the calculator takes."""


def known_keys(calculator: str) -> StateKeys:
    """What is known of a calculator, named ``module:Class``."""
    return _KNOWN.get(calculator.rpartition(":")[2].rpartition(".")[2], StateKeys())


def check_untold(atoms: Atoms, remedy: str) -> None:
    """Refuses a charge or spin where nothing tells the label source of them.

    Raises:
        LabelError: says which, and the remedy.
    """
    charge, spin = total_charge(atoms), multiplicity(atoms)
    if charge != 0 or (spin != 1 and initial_moments(atoms) is None):
        raise LabelError(f"the structure has charge {charge} and multiplicity {spin}; {remedy}")


def check_state(atoms: Atoms, keys: StateKeys, parameters: Mapping[str, Any], calculator: str) -> None:
    """Refuses charge and spin that would not reach a calculator, instead of labelling the neutral singlet.

    Raises:
        LabelError: says which, and what to set.
    """
    charge, spin = total_charge(atoms), multiplicity(atoms)
    if charge != 0 and keys.charge is None:
        raise LabelError(_untold(f"the charge {charge}", "charge_key", CHARGES, calculator))
    if spin != 1 and keys.spin is None and initial_moments(atoms) is None:
        raise LabelError(
            _untold(f"the multiplicity {spin}", "spin_key", MOMENTS, calculator)
            + "; or give the structure initial magnetic moments"
        )
    if keys.spin is not None and keys.spin not in (INFO, MOMENTS) and not atoms.pbc.any():
        check_moments(atoms)
    for key, wanted, usual in ((keys.charge, charge, 0), (keys.spin, spin, 1)):
        fixed = None if key is None or key in (INFO, CHARGES, MOMENTS) else _lookup(parameters, key)
        # A structure without charge and spin counts as a neutral singlet; the parameters then decide.
        if fixed is not None and fixed != wanted != usual:
            raise LabelError(
                f"oracle.parameters fixes {key} = {fixed}, but the structure has {wanted}; give charge and spin in the "
                "section system, or in the structures, and leave them out of the parameters"
            )


def _untold(what: str, setting: str, word: str, calculator: str) -> str:
    return (
        f"{what} of the structure would not reach {calculator}; set oracle.{setting} to the parameter that takes it, "
        f"or to {INFO} or {word} if the calculator finds it there"
    )


def with_state(atoms: Atoms, keys: StateKeys) -> Atoms:
    """A copy whose initial charges and moments say charge and spin, for calculators that look there."""
    told = atoms.copy()
    if keys.charge == CHARGES and total_charge(atoms) != 0:
        told.set_initial_charges(_on_the_first(atoms, total_charge(atoms)))
    if keys.spin == MOMENTS and initial_moments(atoms) is None and multiplicity(atoms) != 1:
        told.set_initial_magnetic_moments(_on_the_first(atoms, multiplicity(atoms) - 1))
    return told


def state_parameters(atoms: Atoms, keys: StateKeys, parameters: Mapping[str, Any], *, always: bool) -> dict[str, Any]:
    """Parameters of a calculator with charge and spin in them.

    Args:
        atoms: the structure.
        keys: where they go.
        parameters: the others.
        always: also for a neutral singlet.
    """
    told = copy.deepcopy(dict(parameters))
    values = ((keys.charge, total_charge(atoms), 0), (keys.spin, multiplicity(atoms), 1))
    for key, value, usual in values:
        if key is not None and key not in (INFO, CHARGES, MOMENTS) and (always or value != usual):
            *sections, last = key.split(".")
            place = told
            for section in sections:
                place = place.setdefault(section, {})
            place[last] = value
    return told


def _on_the_first(atoms: Atoms, value: float) -> np.ndarray:
    """Only the sum matters to calculators that add up; this one is exact."""
    values = np.zeros(len(atoms))
    values[:1] = value
    return values


def _lookup(parameters: Mapping[str, Any], key: str) -> Any:
    place: Any = parameters
    for part in key.split("."):
        place = place.get(part) if isinstance(place, Mapping) else None
    return place
