"""Forces and stresses of a label source held against differences of its energies: whether they belong together."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ase import Atoms

from almlip_jax.cluster import ExecutorSettings
from almlip_jax.errors import InputError, LabelError
from almlip_jax.oracles.base import SourceSettings
from almlip_jax.oracles.executor import Labeller, LabelResult
from almlip_jax.oracles.store import LabelStore

_ABSOLUTE = 0.02  # eV/Angstrom that a sound DFT calculation may be off by: egg boxes, energies that end at 1e-6
_RELATIVE = 0.02
_ABSOLUTE_STRESS = 0.0006  # eV/Angstrom^3, which are 0.1 GPa
_VOIGT = ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1))


@dataclass(frozen=True)
class Compared:
    """One component of the forces.

    Attributes:
        atom: number of the atom, from 0.
        axis: 0, 1 or 2.
        force: of the label, eV/Angstrom.
        difference: minus the central difference of the energies, eV/Angstrom.
    """

    atom: int
    axis: int
    force: float
    difference: float

    @property
    def agrees(self) -> bool:
        """Whether they are the same, to what a sound calculation gives."""
        return abs(self.force - self.difference) <= _ABSOLUTE + _RELATIVE * abs(self.force)


@dataclass(frozen=True)
class ComparedStress:
    """One component of the stress.

    Attributes:
        component: as ``xx`` or ``yz``.
        stress: of the label, eV/Angstrom^3, ASE's sign.
        difference: central difference of the energies of strained structures by the strain, over the volume.
    """

    component: str
    stress: float
    difference: float

    @property
    def agrees(self) -> bool:
        """Whether they are the same, to what a sound calculation gives."""
        return abs(self.stress - self.difference) <= _ABSOLUTE_STRESS + _RELATIVE * abs(self.stress)


@dataclass(frozen=True)
class DerivativeCheck:
    """What was found of one structure.

    Attributes:
        label: of the structure.
        compared: components of the forces.
        stresses: components of the stress; none where the label has none.
        seconds: that all labels took.
    """

    label: Atoms
    compared: tuple[Compared, ...]
    stresses: tuple[ComparedStress, ...]
    seconds: float

    @property
    def agrees(self) -> bool:
        """Whether all components do."""
        return all(one.agrees for one in self.compared) and all(one.agrees for one in self.stresses)


def check_derivatives(
    atoms: Atoms,
    oracle: SourceSettings,
    executor: ExecutorSettings | None = None,
    *,
    components: int = 3,
    step: float = 0.01,
    strain: float = 0.004,
) -> DerivativeCheck:
    """Labels a structure, and it again with single atoms moved and, where it has a stress, strained; nothing is stored.

    The components are the largest force of each atom, those of the largest first; the largest normal stress, and the
    largest shear.

    Args:
        atoms: the structure.
        oracle: settings of the label source.
        executor: where to calculate.
        components: how many of the forces, at most one of each atom.
        step: of each move, Angstrom, to both sides.
        strain: of each strain, to both sides; atoms are strained with the cell, k-points stay as many as they are.

    Raises:
        InputError: the label source makes no labels of other structures.
        LabelError: a label failed.
    """
    if oracle.in_process or oracle.delivery() is not None:
        raise InputError(f"the label source '{oracle.kind}' has no labels of displaced structures; nothing to compare.")
    with (
        tempfile.TemporaryDirectory(prefix="almlip-check-") as folder,
        LabelStore(Path(folder) / "labels.db") as store,
        Labeller(oracle.with_grid_of(atoms), store, executor) as labeller,
    ):
        first = _sound(labeller.label([atoms], {"purpose": "check"}))[0]
        assert first.atoms is not None
        forces = first.atoms.get_forces(apply_constraint=False)
        chosen = _largest(forces, components)
        others = [_moved(atoms, atom, axis, sign * step) for atom, axis in chosen for sign in (1, -1)]
        stress = _stress(first.atoms)
        strained = _largest_stresses(stress)
        others += [_strained(atoms, one, sign * strain) for one in strained for sign in (1, -1)]
        results = _sound(labeller.label(others, {"purpose": "check"}))
    energies = np.array([one.atoms.get_potential_energy() for one in results if one.atoms is not None]).reshape(-1, 2)
    differences = energies[:, 0] - energies[:, 1]
    slopes = (-differences[: len(chosen)] / (2 * step)).tolist()
    stresses = (differences[len(chosen) :] / (2 * strain * atoms.cell.volume)).tolist() if strained else []
    return DerivativeCheck(
        first.atoms,
        tuple(Compared(a, axis, float(forces[a, axis]), x) for (a, axis), x in zip(chosen, slopes, strict=True)),
        tuple(
            ComparedStress("".join("xyz"[axis] for axis in _VOIGT[one]), float(stress[one]), x)
            for one, x in zip(strained, stresses, strict=True)
        ),
        first.seconds + sum(one.seconds for one in results),
    )


def _stress(label: Atoms) -> np.ndarray:
    """Of a label [6], nothing where it has none."""
    assert label.calc is not None
    stress = label.calc.results.get("stress")
    return np.full(6, np.nan) if stress is None else np.asarray(stress)


def _largest_stresses(stress: np.ndarray) -> list[int]:
    """The largest normal stress and the largest shear, as numbers in Voigt's order; none where there is no stress."""
    return [int(np.argmax(abs(stress[:3]))), 3 + int(np.argmax(abs(stress[3:])))] if np.isfinite(stress).all() else []


def _strained(atoms: Atoms, component: int, by: float) -> Atoms:
    """Along an axis, or a shear of two by the same halves: its derivative is a component of the stress."""
    i, j = _VOIGT[component]
    strain = np.eye(3)
    strain[i, j] += by / 2
    strain[j, i] += by / 2
    strained = atoms.copy()
    strained.cell[:] = atoms.cell.array @ strain
    strained.positions[:] = atoms.positions @ strain
    return strained


def _largest(forces: np.ndarray, count: int) -> list[tuple[int, int]]:
    axes = np.argmax(np.abs(forces), axis=1)
    sizes = np.abs(forces)[np.arange(len(forces)), axes]
    return [(int(atom), int(axes[atom])) for atom in np.argsort(-sizes, kind="stable")[:count]]


def _moved(atoms: Atoms, atom: int, axis: int, by: float) -> Atoms:
    moved = atoms.copy()
    moved.positions[atom, axis] += by
    return moved


def _sound(results: list[LabelResult]) -> list[LabelResult]:
    for one in results:
        if one.error is not None:
            raise LabelError(one.error)
    return results
