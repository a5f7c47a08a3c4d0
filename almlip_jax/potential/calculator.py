"""The ASE calculator of a potential."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes

from almlip_jax.scores import atom_scores, names, score_of, scores
from almlip_jax.structures.electronic_state import electronic_state
from almlip_jax.targets import has_target, targets

if TYPE_CHECKING:
    from almlip_jax.potential.potential import Potential


_PROPERTIES = ("energy", "free_energy", "forces", "stress", "force_error")


def _of_atoms(name: str) -> str:
    """What results call a score of atoms, which structures may have under the same name."""
    return f"atom_{name}" if score_of(name) is not None else name


class PotentialCalculator(Calculator):
    """ASE calculator of a `Potential`.

    ``results`` also hold every score of the structure and of its atoms [N] (`scores`), ``force_std_max`` and
    ``force_std`` for instance.  Of a calibrated potential, ``force_error`` [N] is the length of the error vector to be
    expected of each atom: ``force_total`` times the calibration's ``slope``.  Of one that knows its training set
    (`Potential.knowing`), ``latent_distance`` and ``extrapolation_grade`` are those of the structure,
    ``atom_latent_distance`` and ``atom_extrapolation_grade`` [N] those of its atoms.  Of a model that gives dipoles,
    ``dipole`` [3] of a molecule is in e*Angstrom, relative to the centre of mass where it is an ion.
    """

    def __init__(self, potential: Potential) -> None:
        super().__init__()
        self.potential = potential
        of_atoms = (_of_atoms(name) for name in names(atom_scores()))
        given = (one.label for one in targets(potential.ensemble.targets))
        self.implemented_properties = [*_PROPERTIES, *given, *names(scores()), *of_atoms]

    def check_state(self, atoms: Atoms, tol: float = 1e-15) -> list[str]:
        """What of a structure is not that of the last calculation; ``info`` where charge or spin are not."""
        changes: list[str] = super().check_state(atoms, tol)
        if self.atoms is not None and electronic_state(atoms) != electronic_state(self.atoms):
            changes.append("info")
        return changes

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = tuple(all_changes),
    ) -> None:
        """Fills ``results`` by one evaluation of the ensemble."""
        super().calculate(atoms, list(properties), list(system_changes))
        evaluated = self.potential.evaluate([self.atoms])
        self.results = {
            "energy": float(evaluated.energy[0]),
            "free_energy": float(evaluated.energy[0]),
            "forces": evaluated.forces[0].astype(np.float64),
            **{name: float(values[0]) for name, values in evaluated.scores.items()},
        }
        self.results |= {_of_atoms(name): one[0].astype(np.float64) for name, one in evaluated.atom_scores.items()}
        error = self.potential.force_error(evaluated.atom_scores["force_total"][0])
        if error is not None:
            self.results["force_error"] = error
        for target in targets(evaluated.further):
            if has_target(self.atoms, target):
                self.results[target.label] = np.asarray(evaluated.further[target.name][0], np.float64)
        if self.atoms.pbc.all():
            self.results["stress"] = evaluated.stress[0]
