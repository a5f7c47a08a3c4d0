"""What the tables of production dynamics hold for each walker: names, units, and how they follow from the traces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from ase import Atoms

from almlip_jax.dynamics import ExplorationSettings
from almlip_jax.dynamics.biases import build_bias
from almlip_jax.dynamics.state import Traces
from almlip_jax.scores import score_of
from almlip_jax.units import GPA


@dataclass(frozen=True)
class Quantities:
    """The quantities of a run.

    ``total_energy`` is potential, kinetic and bias energy; ``conserved_energy`` is the total energy less what
    thermostats, swaps and changing biases have supplied, so that it drifts by the errors of the integration alone (and
    jumps where a walker begins again).  Biases add what they show of themselves, such as ``bias0.distance``.

    Args:
        settings: of the exploration.
        starts: start structure of each walker.
        references: reference energy of each, eV.
    """

    settings: ExplorationSettings
    starts: Sequence[Atoms]
    references: Sequence[float]

    @cached_property
    def units(self) -> dict[str, str]:
        """Name -> unit, in the order of the columns."""
        found = {"potential_energy": "eV"}
        if self.settings.thermal:
            found |= {"kinetic_energy": "eV", "total_energy": "eV"}
        if self.settings.counts_supplied:
            found["conserved_energy"] = "eV"
        found |= {"temperature": "K", "pressure": "GPa", "volume": "Angstrom+3"}
        found |= {name: _spelt(unit) for name, unit in self._scores.items()}
        return found | {"bias": "eV"} | build_bias(self.settings.biases).quantities

    @property
    def _scores(self) -> dict[str, str]:
        """Name -> unit of the scores that a run looks at: the largest spread, the gate's score, what is monitored."""
        asked = dict.fromkeys(("force_std_max", self.settings.gate.score, *self.settings.monitor))
        return {name: declared.unit for name in asked if (declared := score_of(name)) is not None}

    def values(self, part: Traces) -> dict[str, np.ndarray]:
        """The quantities from the traces of a chunk, name -> [T, W] float64.

        Energies hold the reference energies; pressure and volume are not a number where a walker is not periodic in
        three directions, and all are where it has ended.
        """
        cells = np.array([start.pbc.all() for start in self.starts])
        potential, kinetic, bias, supplied = (
            np.asarray(getattr(part, name), np.float64) for name in ("energy", "kinetic", "bias", "supplied")
        )
        potential = potential + np.asarray(self.references)
        total = potential + kinetic + bias
        found = {
            "potential_energy": potential,
            "kinetic_energy": kinetic,
            "total_energy": total,
            "conserved_energy": total - supplied,
            "temperature": np.asarray(part.temperature, np.float64),
            "pressure": np.where(cells, np.asarray(part.pressure, np.float64) / GPA, np.nan),
            "volume": np.where(cells, np.asarray(part.volume, np.float64), np.nan),
            **{name: np.asarray(part.scores[name], np.float64) for name in self._scores},
            "bias": bias,
            **{name: np.asarray(values, np.float64) for name, values in part.watched.items()},
        }
        return {name: found[name] for name in self.units}


def _spelt(unit: str) -> str:
    """The unit of a score in the spelling of H5MD: ``eV/A`` is ``eV Angstrom-1``."""
    above, *below = unit.split("/")
    names = {"A": "Angstrom"}
    factors = [names.get(one, one) for one in above.split("*")] + [f"{names.get(one, one)}-1" for one in below]
    return " ".join(factors)
