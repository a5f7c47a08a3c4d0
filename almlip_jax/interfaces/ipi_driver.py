"""i-PI with a potential: a driver for ``ffdirect`` (``<pes>custom</pes>``) and for the socket (``i-pi-py_driver``).

i-PI works in atomic units and hands over a cell with its vectors in columns.  It is given energy, forces and virial of
the committee's mean, and what the members say as extras in the format of its ``ffcommittee``, so that its own
reweighting and its thresholds work; scores are extras too, in eV and Angstrom.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from almlip_jax.compilation import prepare_jax
from almlip_jax.errors import InputError, meant
from almlip_jax.potential import Potential
from almlip_jax.potential.following import Following
from almlip_jax.potential.states import completed_state
from almlip_jax.scores import scores
from almlip_jax.structures.electronic_state import stated_state
from almlip_jax.structures.io import read_structures
from almlip_jax.units import BOHR, HARTREE

__DRIVER_NAME__ = "almlip"
__DRIVER_CLASS__ = "PotentialDriver"

_OF_IPI = {"verbose", "verbosity"}
_BEADS = 64  # that have lists of their own
_MATRIX = (0, 5, 4, 5, 1, 3, 4, 3, 2)  # of six components in Voigt's order


class PotentialDriver:
    """What i-PI calls for each bead.

    Args:
        potential: folder of a saved potential.
        template: file whose first structure says the elements, in i-PI's order, which directions are periodic, and
            charge and spin.
        skin: Angstrom, by which lists of neighbours reach beyond the cutoff.
        others: what i-PI adds of its own (``verbose``, ``verbosity``), on which nothing depends; another is told of.

    Raises:
        InputError: a parameter is missing, of another kind, or all but spelt as one of these; a file cannot be read, or
            holds elements, or a charge and spin, that the potential does not know.
    """

    def __init__(
        self,
        potential: str | None = None,
        template: str | None = None,
        skin: float | str = 0.5,
        **others: object,
    ) -> None:
        for name in sorted({*others} - _OF_IPI):
            if hint := meant(name, ("potential", "template", "skin"), cutoff=0.6):
                raise InputError(f"there is no parameter '{name}'; {hint}")
            warnings.warn(f"nothing is made of the parameter '{name}'.", stacklevel=2)
        if potential is None or template is None:
            raise InputError(
                "the parameters potential (folder of a potential) and template (file with a structure) are needed."
            )
        prepare_jax()
        try:
            self.skin = float(skin)
        except ValueError as error:
            raise InputError(f"the parameter skin is '{skin}', and should be a number in Angstrom.") from error
        self.potential = Potential.load(potential)
        self.template = read_structures(Path(template), ignore_labels=True)[0]
        self.potential.check_elements([self.template], template)
        stated = stated_state(self.template)
        self.template.info |= completed_state(self.potential.states_met, stated.get("charge"), stated.get("spin"))
        if (strange := self.potential.strange_state(self.template)) is not None:
            raise InputError(f"{template}: {strange}")
        self._following: list[tuple[np.ndarray, Following]] = []  # and where each was last

    def __call__(self, cell: Any, positions: Any) -> Any:
        """Energy, forces, virial and extras of a structure, or a list of these for lists of structures."""
        if isinstance(cell, list):
            return [self._of_structure(one, where) for one, where in zip(cell, positions, strict=True)]
        return self._of_structure(cell, positions)

    def _of_structure(self, cell: np.ndarray, positions: np.ndarray) -> tuple[float, np.ndarray, np.ndarray, str]:
        """Of cell [3, 3] with vectors in columns and positions [N, 3], atomic units."""
        atoms = self.template.copy()
        places = np.asarray(positions, np.float64).reshape(-1, 3) * BOHR
        if places.shape != atoms.positions.shape:
            raise InputError(f"i-PI has {len(places)} atoms and the template {len(atoms)}; give the same structure.")
        atoms.positions = places
        atoms.set_cell(np.asarray(cell, np.float64).T * BOHR)
        results = self._nearest(atoms)(atoms, "scores")
        force = HARTREE / BOHR
        none = np.zeros(6)  # of a structure without a cell
        virial = _virials(results.get("stress", none), atoms)
        members = _virials(results.get("member_stress", np.tile(none, (len(results["member_energy"]), 1))), atoms)
        extras = {
            "committee_pot": (results["member_energy"] / HARTREE).tolist(),
            "committee_force": (results["member_forces"].reshape(len(members), -1) / force).tolist(),
            "committee_virial": members.reshape(-1, 9).tolist(),
            "force_std": results["force_std"].tolist(),
            **{one.name: results[one.name] for one in scores() if np.isfinite(results.get(one.name, np.nan))},
        }
        return results["energy"] / HARTREE, results["forces"] / force, virial, json.dumps(extras)

    def _check_whole(self, atoms: Atoms) -> None:
        """Refuses a structure that i-PI took apart: it brings atoms into the cell in all directions or none.

        Raises:
            InputError: atoms are where they were in the template, or in the call before, but for other numbers of cells
                in an open direction.
        """
        if atoms.pbc.all() or atoms.cell.rank < 3:
            return
        inverse = np.linalg.inv(atoms.cell.array)
        for last in (self.template.positions, *(places for places, _ in self._following)):
            moved = atoms.positions - last
            cells = np.rint(moved @ inverse)
            torn = np.flatnonzero((cells != cells[0])[:, ~atoms.pbc].any(axis=1))
            if torn.size and np.abs(moved - cells @ atoms.cell.array).max() <= self.skin / 2:
                raise InputError(
                    f"i-PI has brought atom {torn[0]} back into the cell in a direction in which the template is open; "
                    "leave pbc='true' of the force field out of the input."
                )

    def _nearest(self, atoms: Atoms) -> Following:
        """What followed the bead that is nearest to a structure: i-PI does not say which bead it asks for."""
        places = atoms.positions
        off = [float(np.abs(places - last).max()) for last, _ in self._following]
        number = int(np.argmin(off)) if off else 0
        if not off or off[number] > self.skin / 2:
            self._check_whole(atoms)
            if len(off) < _BEADS:
                number = len(off)
                self._following.append((places, Following(self.potential, self.skin)))
        following = self._following[number][1]
        self._following[number] = places, following
        return following


def _virials(stress: np.ndarray, atoms: Atoms) -> np.ndarray:
    """Virials [..., 3, 3] in hartree of stresses [..., 6] in eV/Angstrom^3."""
    virial = -stress[..., _MATRIX] * atoms.cell.volume / HARTREE
    return virial.reshape(*stress.shape[:-1], 3, 3)
