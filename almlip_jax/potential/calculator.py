"""The ASE calculator of a potential."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes
from ase.outputs import Properties, all_outputs

from almlip_jax.potential.following import Following, Part
from almlip_jax.structures.electronic_state import electronic_state

if TYPE_CHECKING:
    from almlip_jax.compilation import Precision
    from almlip_jax.potential.potential import Potential


class PotentialCalculator(Calculator):
    """ASE calculator of a `Potential`.

    ``results`` hold energy (and ``free_energy``), ``forces``, ``stress`` where the cell has a volume (of slabs and
    wires it is that of the cell, as of other calculators of ASE), and what else the models predict: of a model that
    gives dipoles, ``dipole`` [3] of a molecule is in e*Angstrom, relative to the centre of mass where it is an ion.

    Other results are there for who looks them up, ``results["force_std"]`` or ``get_property("force_std")``:

    - every score of the structure and of its atoms [N] (`scores`), ``force_std_max`` and ``force_std`` for instance; of
      a potential that knows its training set (`Potential.knowing`), ``latent_distance`` and ``extrapolation_grade`` of
      the structure, ``atom_latent_distance`` and ``atom_extrapolation_grade`` [N] of its atoms; of one with an active
      set (`Potential.spanning`) these grades, or ``configuration_grade``;
    - of a calibrated potential, ``force_error`` [N], the length of the error vector to be expected of each atom:
      ``force_total`` times the calibration's ``slope``;
    - what the M members say: ``member_energy`` [M], ``member_forces`` [M, N, 3], ``member_stress`` [M, 6];
    - the share of each atom in the energy: ``energies`` [N], their spread ``energies_std`` [N], and
      ``member_energies`` [M, N]; and in the stress, by its own edges: ``stresses`` [N, 6], whose sum is the stress.

    What was looked up of one structure is computed along with the forces of the next, so that reading scores at each
    step costs no second evaluation.

    Args:
        potential: what it is the calculator of.
        skin: Angstrom, by which lists of neighbours reach beyond the cutoff; they are made anew when an atom moved half
            of it.  It changes no result.
        precision: ``float32`` or ``float64``; that of the potential where not given.
    """

    def __init__(self, potential: Potential, *, skin: float = 0.5, precision: Precision | None = None) -> None:
        super().__init__()
        self.potential = potential
        self.following = Following(potential, skin, precision)
        self.implemented_properties = list(self.following.known)
        self._asked: set[str] = set()
        self._done: set[Part] = set()
        self._spare: dict[str, Any] = {}

    def check_state(self, atoms: Atoms, tol: float = 1e-15) -> list[str]:
        """What of a structure is not that of the last calculation, to the last digit; ``info`` of charge and spin."""
        known = self.atoms
        if known is None:
            return list(all_changes)
        pairs = {name: (known.arrays.get(name), atoms.arrays.get(name)) for name in all_changes}
        pairs |= {"cell": (known.cell.array, atoms.cell.array), "pbc": (known.pbc, atoms.pbc)}
        changes = [name for name, (old, new) in pairs.items() if not _same(old, new)]
        return changes if electronic_state(atoms) == electronic_state(known) else [*changes, "info"]

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = tuple(all_changes),
    ) -> None:
        """Fills ``results`` with what is asked for, and with what was looked up of the structure before."""
        super().calculate(atoms, list(properties), list(system_changes))
        wanted = set(properties)
        if system_changes:
            wanted |= self._asked
            self.results, self._asked, self._done, self._spare = _Results(self._look_up), set(), set(), {}
        self._asked.update(properties)
        self._complete(wanted)

    def export_properties(self) -> Properties:
        """What there is of the results that ASE has names for, as `Atoms.get_properties` gives them."""
        return Properties({name: value for name, value in self.results.items() if name in all_outputs})

    def _look_up(self, name: str) -> None:
        """Notes that a result is looked at, and computes it where it is not there yet."""
        if name in self.following.known and self.atoms is not None:
            self._asked.add(name)
            if not dict.__contains__(self.results, name):
                self._complete({name})

    def _complete(self, wanted: set[str]) -> None:
        """Computes what is missing of some results; what is there stays as it is.

        Energies and stresses of atoms stay aside until they are asked for: files of structures would hold them.
        """
        for part in self.following.parts(wanted):
            if part not in self._done:
                self._done.add(part)
                found = self.following(self.atoms, part).results()
                spare = {name for name in found if set(self.following.known[name]) <= {"energies", "atoms"}}
                self._spare |= {name: found.pop(name) for name in spare}
                for name, value in found.items():
                    self.results.setdefault(name, value)
        for name in wanted & self._spare.keys():
            self.results[name] = self._spare.pop(name)


def _same(old: np.ndarray | None, new: np.ndarray | None) -> bool:
    return old is new or (old is not None and new is not None and np.array_equal(old, new))


class _Results(dict[str, Any]):
    """Results of one structure, which are told what is looked at."""

    def __init__(self, look_up: Callable[[str], None]) -> None:
        super().__init__()
        self._look_up = look_up

    def __getitem__(self, name: str) -> Any:
        self._look_up(name)
        return super().__getitem__(name)
