"""Frames with predictions and uncertainties of a potential next to the labels they came with.

A pool of any length is read, scored and written a few frames at a time, and none of them is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from ase import Atoms

from almlip_jax.errors import InputError
from almlip_jax.potential import GRADES, Evaluated, Potential
from almlip_jax.scores import atom_scores, names
from almlip_jax.scores import scores as declared
from almlip_jax.structures.io import iterate_elements, iterate_structures, write_structures
from almlip_jax.structures.labels import LABEL_ERROR, drop_labels
from almlip_jax.structures.mlip_cfg import require_typed
from almlip_jax.structures.validation import holding
from almlip_jax.targets import has_target, targets

MV_GRADE = "MV_grade"
"""What MLIP-2 calls the grade of a structure in its files."""
NBH_GRADES = "nbh_grades"
"""What it calls those of atoms there."""
_SOURCE = "EFS_by"  # what says in them where labels are from
_SITE_ENERGIES = "site_en"

Labels: TypeAlias = Literal["kept", "predicted"]
"""What the labels of scored structures are: those that they came with, or predictions."""


@dataclass
class PoolSummary:
    """What is remembered of the frames of a pool.

    Attributes:
        number: frames so far.
        sums: name -> sum of a score that needs no training set.
        left_out: names of what frames have and the format of the file written has no place for.
        largest: name -> largest value of a score, and the first frame of it; one that is not a number counts as larger.
    """

    number: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    largest: dict[str, tuple[float, int]] = field(default_factory=dict)

    @property
    def mean(self) -> dict[str, float]:
        """Name -> mean of a score; those that need no training set."""
        return {name: total / self.number for name, total in self.sums.items()}

    @property
    def most_uncertain(self) -> int:
        """The frame of the largest ``force_std_max``."""
        return self.largest["force_std_max"][1]

    def add(self, scores: Mapping[str, np.ndarray]) -> None:
        """Takes the scores [n] of the next frames, by name."""
        for score in declared():
            if score.name not in scores:
                continue
            values = scores[score.name]
            if not score.fitted:
                self.sums[score.name] = self.sums.get(score.name, 0.0) + float(np.sum(values, dtype=np.float64))
            place = int(np.argmax(values))
            found, (before, _) = float(values[place]), self.largest.get(score.name, (-math.inf, 0))
            if not (math.isnan(before) or found <= before):
                self.largest[score.name] = found, self.number + place
        self.number += len(scores["force_std_max"])


def score_pool(
    potential: Potential,
    pool: Path,
    out: Path,
    advance: Callable[[int], object] | None = None,
    *,
    type_numbers: Sequence[int] | None = None,
    labels: Labels = "kept",
) -> PoolSummary:
    """Writes the structures of a file with predictions and uncertainties, in memory that does not grow.

    Args:
        potential: whose they are.
        pool: what `iterate_structures` reads; labels are neither needed nor looked at.
        out: extended XYZ, an ASE database, or MLIP-2's ``.cfg``, where grades are ``MV_grade`` and ``nbh_grades``; it
            appears complete or not at all.
        advance: told the number of frames of each batch.
        type_numbers: atomic number of each type of ``cfg`` files, from type 0 on; for writing those that
            the potential remembers (`Potential.type_numbers`) where not given.
        labels: ``kept`` as they were read, with predictions under names of their own (`predicted_frame`); or
            ``predicted``, what the potential says in their place (`labelled_frame`).

    Raises:
        InputError: a frame cannot be read or holds an element the potential does not know, or `out` cannot be written.
    """
    types = potential.type_numbers if type_numbers is None else type_numbers
    for number, elements in enumerate(iterate_elements(pool, type_numbers=type_numbers)):  # before hours of evaluation
        try:
            potential.species.index(elements)
        except InputError as error:
            raise InputError(f"{pool}, frame {number}: {error}") from error
        if out.suffix == ".cfg":
            require_typed(elements, types, f"{pool}, frame {number}")
    summary = PoolSummary()
    batches = potential.evaluate_stream(
        iterate_structures(pool, keep_labels=True, type_numbers=type_numbers), source=str(pool)
    )
    frames = _scored(potential, batches, summary, advance, predicted_frame if labels == "kept" else labelled_frame)
    written = map(_as_mlip_says, frames) if out.suffix == ".cfg" else frames
    summary.left_out = write_structures(out, written, type_numbers=types)
    return summary


def _as_mlip_says(frame: Atoms) -> Atoms:
    """The frame, with grades under their names in the files of MLIP-2."""
    for name in GRADES.values():
        if name in frame.info:
            frame.info[MV_GRADE] = frame.info.pop(name)
        if name in frame.arrays:
            frame.arrays[NBH_GRADES] = frame.arrays.pop(name)
    return frame


def write_predictions(
    potential: Potential,
    frames: Sequence[Atoms],
    evaluated: Evaluated,
    out: Path,
    type_numbers: Sequence[int] | None = None,
) -> tuple[str, ...]:
    """Writes structures with their labels, predictions and uncertainties, as `predicted_frame` gives them.

    Args:
        potential: whose predictions they are.
        frames: the structures.
        evaluated: what it predicts for them, in the same order.
        out: extended XYZ or MLIP-2's ``.cfg``, which appears complete or not at all.
        type_numbers: as for `score_pool`.

    Returns:
        names of what has no place in the format.
    """
    told = (predicted_frame(potential, frame, evaluated, n) for n, frame in enumerate(frames))
    return write_structures(out, told, type_numbers=potential.type_numbers if type_numbers is None else type_numbers)


def predicted_frame(potential: Potential, frame: Atoms, evaluated: Evaluated, n: int) -> Atoms:
    """A structure with the predictions of a potential, under names that no reader takes for labels.

    Labels stay results of the calculator.  ``info`` gets ``predicted_energy`` (eV), ``predicted_stress``
    [6] (eV/Angstrom^3, Voigt order; where the structure is periodic in three directions), what else the model gives
    (``predicted_dipole`` [3], e*Angstrom, of molecules) and every score; arrays
    ``predicted_forces`` [N, 3] (eV/Angstrom), every score of its atoms (``force_std``; ``force_epistemic`` and
    ``force_total`` where the members say something about their own errors; those of novelty where the potential knows
    its training set), and ``force_error`` where it is calibrated.

    Args:
        potential: whose predictions they are.
        frame: the structure; it is left as it is.
        evaluated: what the potential predicts for some structures.
        n: which of them it is.
    """
    told = frame.copy()
    told.calc = frame.calc
    for target in targets():
        (told.info if target.per == "structure" else told.arrays).pop(f"predicted_{target.label}", None)  # of another
    for name in (*names(declared()), MV_GRADE):
        told.info.pop(name, None)
    for name in ("predicted_forces", *names(atom_scores()), "force_error", NBH_GRADES):
        told.arrays.pop(name, None)
    told.info["predicted_energy"] = float(evaluated.energy[n])
    if frame.pbc.all():
        told.info["predicted_stress"] = np.asarray(evaluated.stress[n], np.float64)
    for target in targets(evaluated.further):
        if has_target(frame, target):
            value = np.asarray(evaluated.further[target.name][n], np.float64)
            if target.per == "atom":
                told.arrays[f"predicted_{target.label}"] = value.reshape(len(frame), -1)
            else:
                told.info[f"predicted_{target.label}"] = value.ravel() if target.shape else float(value)
    told.info.update({name: float(values[n]) for name, values in evaluated.scores.items()})
    told.arrays["predicted_forces"] = np.asarray(evaluated.forces[n], np.float64)
    for score in atom_scores():
        if score.name in evaluated.atom_scores and (potential.says_errors or not score.says_errors):
            told.arrays[score.name] = np.asarray(evaluated.atom_scores[score.name][n], np.float64)
    error = potential.force_error(evaluated.atom_scores["force_total"][n])
    if error is not None:
        told.arrays["force_error"] = error
    return told


def labelled_frame(potential: Potential, frame: Atoms, evaluated: Evaluated, n: int) -> Atoms:
    """A structure with the predictions of a potential as its labels, and with scores as `predicted_frame` has them.

    Labels that it came with are dropped, also under other known names, and with them what tells of them: why there are
    none (``label_error``), where they are from and shares of atoms in the energy (``EFS_by``, ``site_en`` of MLIP-2).

    Args:
        potential: whose predictions they are.
        frame: the structure; it is left as it is.
        evaluated: what the potential predicts for some structures.
        n: which of them it is.
    """
    told = predicted_frame(potential, frame, evaluated, n)
    drop_labels(told)
    for key in (LABEL_ERROR, _SOURCE):
        told.info.pop(key, None)
    told.arrays.pop(_SITE_ENERGIES, None)
    results = {"energy": told.info.pop("predicted_energy"), "forces": told.arrays.pop("predicted_forces")}
    if "predicted_stress" in told.info:
        results["stress"] = told.info.pop("predicted_stress")
    for target in targets(evaluated.further):
        place = told.info if target.per == "structure" else told.arrays
        if f"predicted_{target.label}" in place:
            value = place.pop(f"predicted_{target.label}")
            results[target.label] = np.reshape(value, target.shape_of(len(frame)))
    told.calc = holding(told, results)
    return told


def _scored(
    potential: Potential,
    batches: Iterable[tuple[list[Atoms], Evaluated]],
    summary: PoolSummary,
    advance: Callable[[int], object] | None,
    told: Callable[[Potential, Atoms, Evaluated, int], Atoms],
) -> Iterator[Atoms]:
    for frames, evaluated in batches:
        for n, frame in enumerate(frames):
            yield told(potential, frame, evaluated, n)
        summary.add(evaluated.scores)
        if advance is not None:
            advance(len(frames))
