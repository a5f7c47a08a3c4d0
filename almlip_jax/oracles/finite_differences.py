"""Forces of a label source held against differences of its energies: whether the two belong together."""

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
class ForceCheck:
    """What was found of one structure.

    Attributes:
        label: of the structure.
        compared: components of the forces.
        seconds: that all labels took.
    """

    label: Atoms
    compared: tuple[Compared, ...]
    seconds: float

    @property
    def agrees(self) -> bool:
        """Whether all components do."""
        return all(one.agrees for one in self.compared)


def check_forces(
    atoms: Atoms,
    oracle: SourceSettings,
    executor: ExecutorSettings | None = None,
    *,
    components: int = 3,
    step: float = 0.01,
) -> ForceCheck:
    """Labels a structure, and it again with single atoms moved to both sides; nothing is stored.

    The components are the largest force of each atom, those of the largest first.

    Args:
        atoms: the structure.
        oracle: settings of the label source.
        executor: where to calculate.
        components: how many, at most one of each atom.
        step: of each move, Angstrom.

    Raises:
        InputError: the label source makes no labels of other structures.
        LabelError: a label failed.
    """
    if oracle.in_process or oracle.delivery() is not None:
        raise InputError(f"the label source '{oracle.kind}' has no labels of displaced structures; nothing to compare.")
    with (
        tempfile.TemporaryDirectory(prefix="almlip-check-") as folder,
        LabelStore(Path(folder) / "labels.db") as store,
        Labeller(oracle, store, executor) as labeller,
    ):
        first = _sound(labeller.label([atoms], {"purpose": "check"}))[0]
        assert first.atoms is not None
        forces = first.atoms.get_forces(apply_constraint=False)
        chosen = _largest(forces, components)
        moved = [_moved(atoms, atom, axis, sign * step) for atom, axis in chosen for sign in (1, -1)]
        results = _sound(labeller.label(moved, {"purpose": "check"}))
    energies = np.array([one.atoms.get_potential_energy() for one in results if one.atoms is not None]).reshape(-1, 2)
    slopes = -(energies[:, 0] - energies[:, 1]) / (2 * step)
    found = zip(chosen, slopes.tolist(), strict=True)
    compared = tuple(Compared(atom, axis, float(forces[atom, axis]), slope) for (atom, axis), slope in found)
    return ForceCheck(first.atoms, compared, first.seconds + sum(one.seconds for one in results))


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
