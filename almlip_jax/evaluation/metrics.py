"""Error metrics of a potential on labelled structures, with the names every table, file and figure uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols
from ase.stress import full_3x3_to_voigt_6_stress

from almlip_jax.errors import InputError
from almlip_jax.given import given_structures
from almlip_jax.targets import further_targets, has_target, targets
from almlip_jax.uncertainty import calibration_metrics, force_calibration


class Predictions(Protocol):
    """What is compared with the labels; `potential.Evaluated` is one."""

    @property
    def energy(self) -> np.ndarray:
        """[n] eV."""
        ...

    @property
    def forces(self) -> list[np.ndarray]:
        """[N, 3] eV/Angstrom each."""
        ...

    @property
    def stress(self) -> np.ndarray:
        """[n, 6] eV/Angstrom^3."""
        ...

    @property
    def further(self) -> Mapping[str, np.ndarray | list[np.ndarray]]:
        """Name -> [n, ...], or [N, ...] of each where it is one of atoms, of further `targets` that it gives."""
        ...

    @property
    def atom_scores(self) -> dict[str, list[np.ndarray]]:
        """Name -> [N] each; ``force_total`` is looked at."""
        ...

    @property
    def scores(self) -> dict[str, np.ndarray]:
        """Name -> [n]; ``energy_total`` is looked at."""
        ...


def error_metrics(
    reference: Sequence[Atoms] | Atoms, predicted: Predictions, *, group_key: str = "group"
) -> dict[str, Any]:
    """Errors of energies, forces and stresses, and the calibration of their uncertainties.

    A structure that lacks a label does not take part in that metric; a metric without structures is NaN.

    Args:
        reference: labelled structures.
        predicted: what a potential predicts for them, in the same order.
        group_key: ``info`` key by which ``by_group`` tells structures apart; those without it form no group.

    Returns:
        ``energy_mae``, ``energy_rmse``, ``energy_offset_free_rmse`` (after the mean error has been taken away; of one
        structure nothing is left), all in eV/atom; ``energy_mae_structure`` and ``energy_rmse_structure`` in eV;
        ``forces_mae``, ``forces_rmse`` in eV/Angstrom over components; ``stress_mae``, ``stress_rmse`` in
        eV/Angstrom^3 over the six components of structures that are periodic in three directions; of what else the
        potential gives, errors over components too, ``dipole_mae``, ``dipole_rmse`` in e*Angstrom; ``num_structures``;
        ``num_labelled``, how many of these have each label (``energy``, ``forces``, ``stress``, ``dipole``);
        ``num_atoms`` that have forces and ``force_total_mean``, the mean of their ``force_total`` in eV/Angstrom;
        ``by_species`` (symbol -> ``num_atoms``, ``forces_mae``, ``forces_rmse``, ``force_total_mean`` and
        ``calibration`` of the forces); ``calibration`` (of ``forces`` and ``energy``); ``by_group`` (name -> the same
        without ``by_group``).  Calibrations are without atoms alone in open space.

    Raises:
        InputError: there are no structures, none has a label, or the predictions are those of others.
    """
    reference = given_structures(reference, "reference")
    rows = _rows(reference, predicted)
    groups: dict[str, list[_Row]] = {}
    for row, atoms in zip(rows, reference, strict=True):
        if group_key in atoms.info:
            groups.setdefault(str(atoms.info[group_key]), []).append(row)
    return _metrics(rows) | {"by_group": {name: _metrics(members) for name, members in groups.items()}}


def _rows(reference: Sequence[Atoms], predicted: Predictions) -> list[_Row]:
    if not reference:
        raise InputError("there is no structure to compare with.")
    check_paired(reference, predicted)
    rows = [_Row(atoms, predicted, n) for n, atoms in enumerate(reference)]
    if not any(row.is_labelled for row in rows):
        raise InputError(
            "no structure has an energy, forces or, where it is periodic in three directions, a stress to compare with."
        )
    return rows


def check_paired(reference: Sequence[Atoms], predicted: Predictions) -> None:
    """Refuses predictions that are not those of some structures, as far as numbers show.

    Raises:
        InputError: names the numbers of structures, or of atoms.
    """
    told = len(predicted.energy)
    if len(reference) != told:
        raise InputError(f"there are {len(reference)} structures, but predictions for {told}; evaluate the same ones.")
    for n, (atoms, forces) in enumerate(zip(reference, predicted.forces, strict=True)):
        if len(atoms) != len(forces):
            raise InputError(
                f"structure {n} has {len(atoms)} atoms, but the forces predicted for it are of {len(forces)}; evaluate "
                "the same structures in the same order."
            )


def plain_errors(reference: Sequence[Atoms], predicted: Predictions) -> dict[str, float]:
    """The errors of `error_metrics` of all structures together, without calibration; arguments and errors as there."""
    return _errors(_rows(reference, predicted))


class Labels:
    """Labels of one method as predictions, to be held against those of another; they say no uncertainty.

    A stress that a structure lacks is NaN; what else not all of them have is left out.

    Args:
        frames: structures with energies and forces.
    """

    def __init__(self, frames: Sequence[Atoms]) -> None:
        labels = [labels_of(frame) for frame in frames]
        self.energy = np.array([known["energy"] for known in labels], np.float64)
        self.forces = [np.asarray(known["forces"], np.float64) for known in labels]
        self.stress = np.array([known.get("stress", np.full(6, np.nan)) for known in labels])
        self.further: dict[str, np.ndarray | list[np.ndarray]] = {
            target.name: [known[target.label] for known in labels]
            for target in further_targets()
            if all(target.label in known for known in labels)
        }
        self.scores: dict[str, np.ndarray] = {"energy_total": np.zeros(len(frames))}
        self.atom_scores = {"force_total": [np.zeros(len(frame)) for frame in frames]}


class _Row:
    """Errors of one structure; None where there is no label.

    An atom ``alone`` in open space has no force by symmetry: errors and spreads of 0 that calibrate nothing.
    """

    def __init__(self, atoms: Atoms, predicted: Predictions, n: int) -> None:
        labels = labels_of(atoms)
        self.numbers = atoms.numbers
        self.alone = len(atoms) == 1 and not atoms.pbc.any()
        self.force_sigma = predicted.atom_scores["force_total"][n]
        self.energy_sigma = float(predicted.scores["energy_total"][n])
        self.energy_error = float(predicted.energy[n] - labels["energy"]) if "energy" in labels else None
        self.force_errors = predicted.forces[n] - labels["forces"] if "forces" in labels else None
        self.stress_errors = predicted.stress[n] - labels["stress"] if "stress" in labels else None
        self.further_errors = {
            one.label: np.ravel(predicted.further[one.name][n] - labels[one.label]) if one.label in labels else None
            for one in targets(predicted.further)
        }

    @property
    def is_labelled(self) -> bool:
        """Whether anything can be compared."""
        errors = (self.energy_error, self.force_errors, self.stress_errors, *self.further_errors.values())
        return any(error is not None for error in errors)


def labels_of(atoms: Atoms) -> dict[str, Any]:
    """The labels that a prediction can be compared with: ``energy`` eV, ``forces`` [N, 3] eV/Angstrom, ``stress`` [6].

    A stress, eV/Angstrom^3 in Voigt order, is one only where the structure is periodic in three directions, and a
    ``dipole`` [3], e*Angstrom, where it is periodic in none.
    """
    results: Mapping[str, Any] = atoms.calc.results if atoms.calc is not None else {}
    labels = {name: results[name] for name in ("energy", "forces") if results.get(name) is not None}
    if results.get("stress") is not None and atoms.pbc.all():
        stress = np.asarray(results["stress"], np.float64)
        labels["stress"] = stress if stress.shape == (6,) else full_3x3_to_voigt_6_stress(stress.reshape(3, 3))
    for target in further_targets():
        if results.get(target.label) is not None and has_target(atoms, target):
            labels[target.label] = np.asarray(results[target.label], np.float64)
    return labels


def _metrics(rows: Sequence[_Row]) -> dict[str, Any]:
    with_forces = [row for row in rows if row.force_errors is not None]
    forces = _joined([row.force_errors for row in with_forces if row.force_errors is not None], (0, 3))
    numbers = _joined([row.numbers for row in with_forces], (0,))
    force_sigma = _joined([row.force_sigma for row in with_forces], (0,))
    told = _joined([np.full(len(row.numbers), not row.alone) for row in with_forces], (0,)).astype(bool)
    with_energy = [row for row in rows if row.energy_error is not None and not row.alone]
    energy = np.array([row.energy_error for row in with_energy], np.float64)
    energy_sigma = np.array([row.energy_sigma for row in with_energy])
    return {
        **_errors(rows),
        "num_labelled": _counts(rows),
        "num_atoms": len(forces),
        "force_total_mean": float(np.mean(force_sigma)) if len(force_sigma) else float("nan"),
        "by_species": {
            chemical_symbols[z]: _of_species(*(values[numbers == z] for values in (forces, force_sigma, told)))
            for z in sorted({int(z) for z in numbers})
        },
        "calibration": {
            "forces": force_calibration(forces[told], force_sigma[told]),
            "energy": calibration_metrics(energy, energy_sigma),
        },
    }


def _counts(rows: Sequence[_Row]) -> dict[str, int]:
    """Structures that take part in the errors of each label."""
    compared: list[dict[str, Any]] = [
        {"energy": row.energy_error, "forces": row.force_errors, "stress": row.stress_errors, **row.further_errors}
        for row in rows
    ]
    return {name: sum(one[name] is not None for one in compared) for name in compared[0]}


def _errors(rows: Sequence[_Row]) -> dict[str, float]:
    with_energy = [row for row in rows if row.energy_error is not None]
    energy = np.array([row.energy_error for row in with_energy], np.float64)
    per_atom = energy / np.array([len(row.numbers) for row in with_energy])
    forces = _joined([row.force_errors for row in rows if row.force_errors is not None], (0, 3))
    stress = _joined([np.atleast_2d(row.stress_errors) for row in rows if row.stress_errors is not None], (0, 6))
    return {
        "num_structures": len(rows),
        "energy_mae": _mae(per_atom),
        "energy_rmse": _rmse(per_atom),
        "energy_offset_free_rmse": _rmse(per_atom - per_atom.mean()) if len(per_atom) > 1 else float("nan"),
        "energy_mae_structure": _mae(energy),
        "energy_rmse_structure": _rmse(energy),
        "forces_mae": _mae(forces),
        "forces_rmse": _rmse(forces),
        "stress_mae": _mae(stress),
        "stress_rmse": _rmse(stress),
        **_further_errors(rows),
    }


def _further_errors(rows: Sequence[_Row]) -> dict[str, float]:
    """Errors of what the potential gives besides energies."""
    found: dict[str, float] = {}
    for name in rows[0].further_errors:
        errors = _joined([one for row in rows if (one := row.further_errors[name]) is not None], (0,))
        found |= {f"{name}_mae": _mae(errors), f"{name}_rmse": _rmse(errors)}
    return found


def _of_species(errors: np.ndarray, sigma: np.ndarray, told: np.ndarray) -> dict[str, Any]:
    """Forces of the atoms of one element: errors [n, 3], spreads [n], both in eV/Angstrom; and which calibrate [n]."""
    return {
        "num_atoms": len(errors),
        "forces_mae": _mae(errors),
        "forces_rmse": _rmse(errors),
        "force_total_mean": float(np.mean(sigma)),
        "calibration": force_calibration(errors[told], sigma[told]),
    }


def _joined(parts: Sequence[np.ndarray], empty: tuple[int, ...]) -> np.ndarray:
    return np.concatenate([np.asarray(p, np.float64) for p in parts]) if parts else np.zeros(empty)


def _mae(errors: np.ndarray) -> float:
    return float(np.mean(np.abs(errors))) if errors.size else float("nan")


def _rmse(errors: np.ndarray) -> float:
    return float(np.sqrt(np.mean(errors**2))) if errors.size else float("nan")
