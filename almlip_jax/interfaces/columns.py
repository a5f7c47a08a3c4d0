"""What other programs are told of a committee: the energy, every score of the structure, and each member's energy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from almlip_jax.potential import Potential
from almlip_jax.potential.answers import Answer
from almlip_jax.potential.following import given_scores
from almlip_jax.scores import score_of, scores


def columns(potential: Potential) -> list[str]:
    """Names of the values: the energy, scores, and the energies of the members, ``energy_1`` and so on."""
    members = [f"energy_{member}" for member in range(1, potential.ensemble.members + 1)]
    return ["energy", *given_scores(scores(), potential), *members]


def column_values(results: Mapping[str, Any], names: Sequence[str]) -> dict[str, float]:
    """Their values by name, in eV and Angstrom, from the results that a `Following` gives with scores."""
    members = {f"energy_{number}": value for number, value in enumerate(results["member_energy"], 1)}
    return {name: float(members[name] if name in members else results[name]) for name in names}


_VIRIAL = np.array([0, 4, 8, 1, 2, 5])  # xx yy zz xy xz yz of a matrix [3, 3]


class Gathered:
    """Values of columns, and the virial, out of an evaluation in one go: engines are told of them in each step.

    Args:
        answer: an evaluation with scores; others of its layout are read like it.
        names: of the columns.
    """

    def __init__(self, answer: Answer, names: Sequence[str]) -> None:
        self.layout = answer.layout
        places = {path: begin for path, (begin, _, _) in answer.layout.places.items()}
        members = range(answer.layout.places["member_energy"][2][0])
        energies = {f"energy_{number + 1}": places["member_energy"] + number for number in members}
        energies["energy"] = places["energy"]
        known = energies | {
            name: places[f"scores/{name}"]
            for name in names
            if f"scores/{name}" in places and (score := score_of(name)) is not None and score.target is None
        }
        self._reference = 0.0, np.zeros(len(names) + len(_VIRIAL))
        self._others = [(number, name) for number, name in enumerate(names) if name not in known]
        self._energies = np.array([*(name in energies for name in names), *(False for _ in _VIRIAL)], float)
        self._places = np.array([*(known.get(name, 0) for name in names), *(places["virial"] + _VIRIAL)])

    def __call__(self, answer: Answer) -> np.ndarray:
        """The values in eV and Angstrom, as `column_values` has them, then the virial xx yy zz xy xz yz in eV."""
        if answer.reference != self._reference[0]:
            self._reference = answer.reference, self._energies * answer.reference
        found = answer.take(self._places) + self._reference[1]
        for number, name in self._others:
            found[number] = float(answer[name])
        return found
