"""Scoring a pool of any length: its frames are read, scored and written a few at a time, and none of them is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from ase import Atoms

from almlip_jax.ensembles import SCORES
from almlip_jax.potential import Evaluated, Potential
from almlip_jax.structures.io import iterate_structures, write_structures


@dataclass
class PoolSummary:
    """What is remembered of the frames of a pool.

    Attributes:
        number: frames so far.
        most_uncertain: the first frame of the largest ``force_std_max``; one that is not a number counts as larger.
        sums: name -> sum of a score.
    """

    number: int = 0
    most_uncertain: int = 0
    sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SCORES, 0.0))
    _largest: float = -math.inf

    @property
    def mean(self) -> dict[str, float]:
        """Name -> mean of a score; those of `ensembles.SCORES`."""
        return {name: total / self.number for name, total in self.sums.items()}

    def add(self, scores: Mapping[str, np.ndarray]) -> None:
        """Takes the scores [n] of the next frames, by name."""
        index = int(np.argmax(scores["force_std_max"]))
        value = float(scores["force_std_max"][index])
        if not (math.isnan(self._largest) or value <= self._largest):
            self.most_uncertain, self._largest = self.number + index, value
        for name in self.sums:
            self.sums[name] += float(np.sum(scores[name], dtype=np.float64))
        self.number += len(scores["force_std_max"])


def score_pool(
    potential: Potential,
    pool: Path,
    out: Path,
    advance: Callable[[int], object] | None = None,
    *,
    type_numbers: Sequence[int] | None = None,
) -> PoolSummary:
    """Writes the structures of a file with the uncertainty of each frame and atom, in memory that does not grow.

    Args:
        potential: whose uncertainty it is.
        pool: what `iterate_structures` reads; labels are neither needed nor written.
        out: extended XYZ, which appears complete or not at all.
        advance: told the number of frames of each batch.
        type_numbers: atomic number of each type of a ``cfg`` file, from type 0 on.

    Raises:
        InputError: a frame cannot be read or holds an element the potential does not know, or `out` cannot be written.
    """
    summary = PoolSummary()
    batches = potential.evaluate_stream(
        iterate_structures(pool, ignore_labels=True, type_numbers=type_numbers), source=str(pool)
    )
    write_structures(out, _scored(batches, summary, advance))
    return summary


def _scored(
    batches: Iterable[tuple[list[Atoms], Evaluated]], summary: PoolSummary, advance: Callable[[int], object] | None
) -> Iterator[Atoms]:
    for frames, found in batches:
        for n, frame in enumerate(frames):
            bare = frame.copy()
            bare.info.update({name: float(values[n]) for name, values in found.scores.items()})
            bare.arrays["force_std"] = found.force_std[n].astype(float)
            yield bare
        summary.add(found.scores)
        if advance is not None:
            advance(len(frames))
