"""Labels and what was predicted for them, flat and by group: what figures of errors are drawn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from ase import Atoms

from almlip_jax.evaluation.metrics import Predictions, check_paired, labels_of
from almlip_jax.targets import targets

NO_GROUP = "no group"
"""Name of what belongs to no group."""


@dataclass(frozen=True)
class Pairs:
    """Labels of one kind and what was predicted for them, all in the unit of the label.

    Attributes:
        group: [n] name of the group of each.
        label: [n, c]; c components.
        predicted: [n, c].
        sigma: [n] uncertainty of each vector, or of the number where there is one component; NaN where none is known.
    """

    group: np.ndarray
    label: np.ndarray
    predicted: np.ndarray
    sigma: np.ndarray

    def of(self, group: str) -> Pairs:
        """Those of one group."""
        rows = self.group == group
        return Pairs(self.group[rows], self.label[rows], self.predicted[rows], self.sigma[rows])


def label_pairs(reference: Sequence[Atoms], predicted: Predictions, *, group_key: str = "group") -> dict[str, Pairs]:
    """Everything that can be compared.

    Args:
        reference: labelled structures.
        predicted: what a potential predicts for them, in the same order.
        group_key: ``info`` key that names the group; structures without it belong to `NO_GROUP`.

    Returns:
        those of ``energy`` [n, 1] (eV/atom), ``forces`` [n, 3] (eV/Angstrom), ``stress`` [n, 6] (eV/Angstrom^3) and
        what else the potential gives (``dipole`` [n, 3], e*Angstrom) that some structure has a label for.

    Raises:
        InputError: the predictions are those of others.
    """
    check_paired(reference, predicted)
    found: dict[str, list[Pairs]] = {"energy": [], "forces": [], "stress": []}
    for n, atoms in enumerate(reference):
        labels, size = labels_of(atoms), len(atoms)
        group = str(atoms.info.get(group_key, NO_GROUP))
        if "energy" in labels:
            label, value = (np.full((1, 1), float(one) / size) for one in (labels["energy"], predicted.energy[n]))
            sigma = np.array([float(predicted.scores["energy_total"][n]) / size])
            found["energy"].append(Pairs(np.array([group]), label, value, sigma))
        if "forces" in labels:
            forces = np.asarray(labels["forces"], np.float64), np.asarray(predicted.forces[n], np.float64)
            found["forces"].append(Pairs(np.full(size, group), *forces, predicted.atom_scores["force_total"][n]))
        if "stress" in labels:
            stress = np.atleast_2d(labels["stress"]), np.atleast_2d(predicted.stress[n])
            found["stress"].append(Pairs(np.array([group]), *stress, np.full(1, np.nan)))
        for target in targets(predicted.further):
            if target.label in labels:
                rows = 1 if target.per == "structure" else size
                label, value = (
                    np.reshape(x, (rows, -1)) for x in (labels[target.label], predicted.further[target.name][n])
                )
                pairs = Pairs(np.full(rows, group), label, value, np.full(rows, np.nan))
                found.setdefault(target.label, []).append(pairs)
    return {name: _joined(parts) for name, parts in found.items() if parts}


def _joined(parts: Sequence[Pairs]) -> Pairs:
    return Pairs(
        group=np.concatenate([one.group for one in parts]),
        label=np.concatenate([one.label for one in parts]),
        predicted=np.concatenate([one.predicted for one in parts]),
        sigma=np.concatenate([one.sigma for one in parts]),
    )
