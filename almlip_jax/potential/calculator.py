"""The ASE calculator of a potential."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes

from almlip_jax.ensembles import SCORES
from almlip_jax.potential.novelty import NOVELTY
from almlip_jax.structures.electronic_state import electronic_state

if TYPE_CHECKING:
    from almlip_jax.potential.potential import Potential

_PER_ATOM = ("force_std", "force_epistemic", "force_total")


class PotentialCalculator(Calculator):
    """ASE calculator of a `Potential`.

    ``results`` also hold ``energy_std``, ``energy_std_per_atom``, ``force_std_mean``, ``force_std_max``,
    ``force_std_rel``, ``max_disagreement`` and the other scores, and ``force_std``, ``force_epistemic`` and
    ``force_total`` [N], as `ensembles.Committee` defines them.  Of a calibrated potential, ``force_error`` [N] is the
    length of the error vector to be expected of each atom: ``force_total`` times the calibration's ``slope``.  Of one
    that knows its training set (`Potential.knowing`), ``latent_distance`` and ``extrapolation_grade`` are those of the
    structure, ``atom_latent_distance`` and ``atom_extrapolation_grade`` [N] those of its atoms.
    """

    implemented_properties = ["energy", "free_energy", "forces", "stress", "force_error", *_PER_ATOM, *SCORES]
    implemented_properties += [*NOVELTY, *(f"atom_{name}" for name in NOVELTY)]

    def __init__(self, potential: Potential) -> None:
        super().__init__()
        self.potential = potential

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
        found = self.potential.evaluate([self.atoms])
        self.results = {
            "energy": float(found.energy[0]),
            "free_energy": float(found.energy[0]),
            "forces": found.forces[0].astype(np.float64),
            "force_std": found.force_std[0].astype(np.float64),
            "force_epistemic": found.force_epistemic[0].astype(np.float64),
            "force_total": found.force_total[0].astype(np.float64),
            **{name: float(values[0]) for name, values in found.scores.items()},
        }
        self.results |= {f"atom_{name}": of_atoms[0].astype(np.float64) for name, of_atoms in found.novelty.items()}
        error = self.potential.force_error(found.force_total[0])
        if error is not None:
            self.results["force_error"] = error
        if self.atoms.pbc.all():
            self.results["stress"] = found.stress[0]
