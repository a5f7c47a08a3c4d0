"""A round at work, as its stages see it: where it stands, its potential, and the labels that it may ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from ase import Atoms

from almlip_jax.campaign.rundir import RoundDirectory, RunDirectory
from almlip_jax.features import FeatureRequest
from almlip_jax.keys import named_key, numpy_generator
from almlip_jax.potential import Evaluated, Potential
from almlip_jax.progress import Advance, Progress
from almlip_jax.structures.io import read_structures


@dataclass(frozen=True)
class Round:
    """Where a round has its files and its random numbers, and who hears of it.

    Attributes:
        run: directory of the campaign.
        index: number of the round, from 0.
        campaign: name of the campaign.
        seed: of the campaign.
        progress: tells the user.
        types: element of each type of files of MLIP-2, from type 0 on; None where the config does not say.
    """

    run: RunDirectory
    index: int
    campaign: str
    seed: int
    progress: Progress
    types: tuple[str, ...] | None = None

    @property
    def folder(self) -> RoundDirectory:
        """Its files."""
        return self.run.round(self.index)

    @property
    def provenance(self) -> dict[str, Any]:
        """What is noted with whatever it makes."""
        return {"campaign": self.campaign, "round": self.index}

    def dataset(self) -> list[Atoms]:
        """The structures trained on, read anew."""
        return read_structures(self.folder.dataset, require_labels=True)

    def key(self, *names: str) -> jax.Array:
        """The random stream for some purpose."""
        return named_key(self.seed, *names, self.index)

    def generator(self, *names: str) -> np.random.Generator:
        """The same on the host."""
        return numpy_generator(self.seed, *names, self.index)


@dataclass(frozen=True)
class Trained:
    """The potential of a round, and what it says of the sets that stages ask about.

    Attributes:
        potential: of the round.
        features: that the selector looks at.
        monitor: the score whose means are written down and judged.
    """

    potential: Potential
    features: FeatureRequest
    monitor: str
    _evaluated: dict[str, Evaluated] = field(default_factory=dict, init=False, repr=False, compare=False)

    def evaluate(self, name: str, structures: Sequence[Atoms], advance: Advance | None = None) -> Evaluated:
        """A set of structures with the features that the selector looks at, evaluated once for all stages.

        A resumed stage evaluates again, to the same bits.

        Args:
            name: of the set.
            structures: the set.
            advance: is told how many structures are done.
        """
        if name not in self._evaluated:
            found = self.potential.evaluate(structures, features=self.features, on_batch=advance)
            self._evaluated[name] = found
        return self._evaluated[name]


@dataclass(frozen=True)
class Budget:
    """Labels that a round may ask for: of the batch first, then of frames drawn for the gate's thresholds.

    Attributes:
        batch: structures in a whole batch.
        left: of the label budget; None where there is no limit.
    """

    batch: int
    left: int | None

    @property
    def selected(self) -> int:
        """Structures that may be selected."""
        return self.batch if self.left is None else max(0, min(self.batch, self.left))

    def drawn(self, asked: int) -> int:
        """Frames that may be drawn where a number is asked for: at most what a batch leaves."""
        return asked if self.left is None else max(0, min(asked, self.left - self.batch))
