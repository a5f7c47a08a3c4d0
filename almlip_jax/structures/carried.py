"""What a structure carries besides its geometry, through every border: masses, moments, constraints, charge and spin.

These change what dynamics do with a structure, or what a label of it is.  The name of the system that it belongs to
goes with them (``info["system"]``), to whatever is made of it.  Remarks (other entries of `info`, tags, further arrays)
and labels are not part of it.
"""

from __future__ import annotations

from copy import deepcopy

import numpy as np
from ase import Atoms

from almlip_jax.errors import InputError
from almlip_jax.structures.electronic_state import stated_state

SYSTEM = "system"
"""Key of `info` that names the system that a structure belongs to."""

BATH_TEMPERATURE = "bath_temperature"
"""Key of `info` that holds the temperature of the bath that a structure of dynamics was in, K."""

_ARRAYS = ("masses", "initial_magmoms")


def carried(atoms: Atoms) -> Atoms:
    """A structure with species, positions, cell, pbc and all that it carries, and nothing else."""
    clean = Atoms(numbers=atoms.numbers, positions=atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
    for name in _ARRAYS:
        if name in atoms.arrays:
            clean.set_array(name, atoms.arrays[name])
    clean.set_constraint(deepcopy(atoms.constraints))
    clean.info = dict(stated_state(atoms)) | named(atoms)
    return clean


def system_of(atoms: Atoms) -> str | None:
    """The name of the system that a structure belongs to; None where it says none."""
    stated = atoms.info.get(SYSTEM)
    return None if stated is None else str(stated)


def named(atoms: Atoms) -> dict[str, str]:
    """What says so: ``system``, and nothing where it says none."""
    name = system_of(atoms)
    return {} if name is None else {SYSTEM: name}


def carrying(frame: Atoms, other: Atoms) -> Atoms:
    """A copy of a structure, labels and remarks included, with the masses, moments and constraints of another."""
    loaded = frame.copy()
    loaded.calc = frame.calc
    for name in _ARRAYS:
        loaded.set_array(name, other.arrays.get(name))
    loaded.set_constraint(deepcopy(other.constraints))
    return loaded


def normalise_masses(atoms: Atoms, where: str) -> None:
    """Brings a column ``mass`` under ASE's name ``masses``, in amu.

    Raises:
        InputError: masses that are not one positive number for each atom, or two different ones for an atom.
    """
    if "mass" in atoms.arrays:
        given = atoms.arrays.pop("mass")
        if "masses" in atoms.arrays and not np.array_equal(atoms.arrays["masses"], given):
            raise InputError(f"{where}: mass and masses contradict each other; keep masses.")
        atoms.arrays["masses"] = given
    if "masses" not in atoms.arrays:
        return
    masses = atoms.arrays["masses"]
    if masses.shape != (len(atoms),) or masses.dtype.kind not in "fiu":
        raise InputError(f"{where}: masses {masses.dtype}{list(masses.shape)} are not one number for each atom.")
    atoms.arrays["masses"] = masses = np.asarray(masses, np.float64)
    bad = ~(np.isfinite(masses) & (masses > 0))
    if bad.any():
        atom = int(np.argmax(bad))
        raise InputError(f"{where}: the mass of atom {atom} is {masses[atom]:g}; give a positive one.")
