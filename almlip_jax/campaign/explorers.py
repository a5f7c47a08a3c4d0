"""What explores round after round: made once, with the capacities that were needed before, so that nothing compiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ase import Atoms

from almlip_jax.campaign.inputs import Inputs
from almlip_jax.dynamics import ExplorationSettings, Explorer, Knowledge, know
from almlip_jax.ensembles import EnsembleSettings
from almlip_jax.potential import Potential
from almlip_jax.structures.walkers import Room


class Explorers:
    """Explorers by name, such as that of the walkers and that which relaxes their starts.

    Args:
        inputs: say which elements there are, and how large starts can be.
        budget: structures that a training set can have at most.
        precision: of the dynamics.
        known: capacities that those of earlier sessions came to, by name.
    """

    def __init__(self, inputs: Inputs, budget: int, precision: str, known: Mapping[str, Any]) -> None:
        self._inputs = inputs
        self._budget = budget
        self._dtype = np.dtype(precision)
        self._known = dict(known)
        self._held: dict[str, tuple[EnsembleSettings, Explorer]] = {}

    @property
    def measured(self) -> dict[str, Any]:
        """Capacities that they have come to, by name; JSON."""
        used = {name: explorer.room for name, (_, explorer) in self._held.items()}
        return self._known | {name: room.as_dict() for name, room in used.items() if room is not None}

    def get(self, name: str, settings: ExplorationSettings, potential: Potential, atoms: int | None = None) -> Explorer:
        """The explorer of a name.

        It is kept as long as potentials have the same members; a committee may have lost one in a training.

        Args:
            name: of the explorer.
            settings: the same in every round.
            potential: that is explored with.
            atoms: least room for those of a walker; by default for the structures that walkers may start at.
        """
        members, held = self._held.get(name, (None, None))
        if held is None or members != potential.member_settings:
            self._known = self.measured
            held = self._new(settings, potential, self._known.get(name), atoms)
            self._held[name] = potential.member_settings, held
        return held

    def _new(
        self,
        settings: ExplorationSettings,
        potential: Potential,
        known: Mapping[str, Any] | None,
        atoms: int | None,
    ) -> Explorer:
        return Explorer(
            potential.ensemble.predict,
            self._inputs.species,
            potential.cutoff,
            settings,
            room=None if known is None else Room.of(known),
            atoms=max((len(frame) for frame in self._inputs.listed), default=0) if atoms is None else atoms,
            dtype=self._dtype,
        )

    def knowledge(
        self,
        settings: ExplorationSettings,
        potential: Potential,
        dataset: Sequence[Atoms],
        seed: int,
        chosen: Sequence[Atoms] = (),
    ) -> Knowledge:
        """What an exploration needs to know of the training set (see `know`), in arrays that keep their shapes."""
        return know(settings, potential, dataset, seed, self._budget, chosen)
