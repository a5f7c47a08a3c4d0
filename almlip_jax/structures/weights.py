"""Weights of a structure in the loss, by the names that files give them.

``weight`` goes with all labels of a structure, and is multiplied with the weight of each: ``energy_weight``,
``forces_weight``, ``stress_weight``, ``dipole_weight``.  The names of MACE mean the same; 0 takes a label out of the
training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np
from ase import Atoms

from almlip_jax.errors import InputError
from almlip_jax.targets import further_targets, targets

_OWN: dict[str, tuple[str, ...]] = {
    "weight": ("weight", "config_weight"),
    "energy_weight": ("energy_weight", "config_energy_weight"),
    "forces_weight": ("forces_weight", "force_weight", "config_forces_weight", "config_force_weight"),
    "stress_weight": (
        "stress_weight",
        "virial_weight",
        "virials_weight",
        "config_stress_weight",
        "config_virial_weight",
        "config_virials_weight",
    ),
}


def weight_names() -> dict[str, tuple[str, ...]]:
    """Names of weights in `info`, and the names that each has in files."""
    names = (f"{one.label}_weight" for one in further_targets())
    return _OWN | {name: (name, f"config_{name}") for name in names}


def normalise_weights(atoms: Atoms, where: str) -> None:
    """Brings the weights in `info` under the names of `weight_names` and to float; what is not given stays absent.

    Raises:
        InputError: a weight is not a finite number of at least 0, or two names contradict each other.
    """
    names = weight_names()
    for name, found in _given(atoms, where).items():
        for alias in names[name]:
            atoms.info.pop(alias, None)
        atoms.info[name] = found


def loss_weights(atoms: Atoms, where: str) -> Mapping[str, float]:
    """Weights of the labels of a structure by their names, that of the structure included; 1 where none is given.

    Raises:
        InputError: as for `normalise_weights`.
    """
    given = _given(atoms, where)
    whole = given.get("weight", 1.0)
    return {one.label: whole * given.get(f"{one.label}_weight", 1.0) for one in targets()}


def _given(atoms: Atoms, where: str) -> dict[str, float]:
    """Weights by their names in `weight_names`."""
    found: dict[str, float] = {}
    for name, aliases in weight_names().items():
        there = [alias for alias in aliases if alias in atoms.info]
        values = [_weight(atoms.info[alias], alias, where) for alias in there]
        if len(set(values)) > 1:
            raise InputError(f"{where}: {' and '.join(there)} contradict each other; keep {there[0]}.")
        if values:
            found[name] = values[0]
    return found


def _weight(value: Any, name: str, where: str) -> float:
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, str):  # as 0.50, which features of MLIP-2 keep as it is written
        with suppress(ValueError):
            value = float(value)
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    if not numeric or not math.isfinite(value) or value < 0:
        raise InputError(f"{where}: {name} is {value!r}, but a weight is a number of at least 0; correct it.")
    return float(value)
