"""Labels made elsewhere: structures are exported to a folder, and labelled files are taken back from it.

The folder holds two more: ``requested/`` with one extxyz file for each batch that waits for labels, and ``results/``,
into which labelled files (extxyz or anything that is read as structures) are put by hand or by a script.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from ase import Atoms
from pydantic import Field

from almlip_jax.errors import InputError, LabelError
from almlip_jax.oracles.base import IDENTITY_KEY, Label, LabelSource, PendingLabels, SourceSettings, bare, judged
from almlip_jax.oracles.matching import ImageIndex
from almlip_jax.oracles.sources.labelled_file import results_of
from almlip_jax.settings import unit
from almlip_jax.structures.labels import FileReading, label_difference, stated_failure
from almlip_jax.structures.repeats import geometry_key
from almlip_jax.targets import further_targets


class ExternalSettings(SourceSettings, FileReading):
    """Labels made elsewhere, by hand or by a workflow of your own."""

    kind: Literal["external"] = "external"

    drives_dynamics: ClassVar[bool] = False

    method: str = Field(min_length=1)
    """A name for how the labels are made, such as ``vasp-pbe-520eV``; labels of different methods never mix."""

    folder: Path
    """The folder with ``requested/`` and ``results/``."""

    energy_key: str | None = None
    """Where energies (eV) stand in ``info``; by default calculator results or ``REF_energy``."""

    forces_key: str | None = None
    """Where forces (eV/Angstrom) stand in ``arrays``; by default calculator results or ``REF_forces``."""

    stress_key: str | None = None
    """Where stresses (eV/Angstrom^3) stand in ``info``; by default calculator results or ``REF_stress``."""

    tolerance: float = Field(default=1e-4, ge=0, le=0.1, json_schema_extra=unit("Angstrom"))
    """Largest difference of a coordinate between the structure asked for and the one labelled, in Angstrom; another
    image of the cell, or another order of equal atoms, does not count as a difference."""

    def gives(self, target: str) -> bool:
        """Whatever the files have."""
        return True

    def identity(self) -> dict[str, Any]:
        """The settings that decide what a label is: the name of the method."""
        return {"kind": self.kind, "method": self.method}

    def version(self) -> str:
        """Nothing: the name of the method is all that is known."""
        return ""

    def build(self) -> LabelSource:
        """Refuses: nothing can be calculated here."""
        raise InputError("the label source is external: its labels are made elsewhere, and none can be made here.")

    def delivery(self) -> DeliveredFiles:
        """The files in ``results/``."""
        return DeliveredFiles(self)


class DeliveredFiles:
    """The labelled frames that lie in ``results/``.

    A frame belongs to a structure if it carries its identity; one that carries none, if no coordinate differs by more
    than the tolerance.  Other images of the cell, and another order of equal atoms, are the same structure.  A frame
    with ``info["error"]``, or ``label_error`` as ``almlip label`` writes it, is a failed label with that reason; so is
    one whose values are garbage.

    Args:
        oracle: the settings.

    Raises:
        InputError: a results file cannot be read, or two frames have different labels for one structure.
    """

    def __init__(self, oracle: ExternalSettings) -> None:
        self._oracle = oracle
        read = [
            (path, n, frame) for path in _result_files(oracle.folder) for n, frame in enumerate(_read(path, oracle))
        ]
        read = _each_once(read)
        self._named = {str(frame.info[IDENTITY_KEY]): frame for *_, frame in read if IDENTITY_KEY in frame.info}
        self._nameless = ImageIndex([frame for *_, frame in read if IDENTITY_KEY not in frame.info])
        self._places = [f"{path}, frame {n}" for path, n, frame in read if IDENTITY_KEY not in frame.info]
        self._claimed: set[int] = set()

    def label(self, identity: str, atoms: Atoms) -> Label | None:
        """The label of a structure, its atoms in the structure's order; None where it has not arrived.

        Raises:
            InputError: a frame has the identity of the structure with other coordinates.
        """
        index = self._nameless if identity not in self._named else ImageIndex([self._named[identity]])
        match = index.find(atoms, self._oracle.tolerance)
        if match is not None:
            if index is self._nameless:
                self._claimed.add(match.frame)
            return _label(index.frames[match.frame], match.order, identity, self._oracle)
        if index is not self._nameless:
            raise InputError(
                f"a frame in {self._oracle.folder / 'results'} has {IDENTITY_KEY} {identity[:12]}... but its atoms are "
                f"not within {self._oracle.tolerance:g} Angstrom of those requested; put labels of requested frames "
                "there."
            )
        return None

    def request(self, missing: Sequence[tuple[str, Atoms]], known: Iterable[Atoms]) -> PendingLabels:
        """Writes the structures that need labels into ``requested/``, and says which results belong to none of them."""
        frames = [(identity, bare(atoms)) for identity, atoms in missing]
        return export_request(self._oracle, frames, self.unmatched([atoms for _, atoms in frames], known))

    def unmatched(self, missing: Sequence[Atoms], known: Iterable[Atoms]) -> str:
        """What to report about frames without identity that no structure matches; empty where there are none.

        Args:
            missing: structures that wait for their labels.
            known: structures that have theirs.
        """
        for atoms in known if len(self._claimed) < len(self._places) else ():
            match = self._nameless.find(atoms, self._oracle.tolerance)
            if match is not None:
                self._claimed.add(match.frame)
        strange = [n for n in range(len(self._places)) if n not in self._claimed]
        if not strange:
            return ""
        frame = self._nameless.frames[strange[0]]
        apart = ImageIndex(missing).nearest(frame)
        reason = (
            "no structure that waits has its elements and periodic directions"
            if apart is None
            else f"{apart:.3g} Angstrom from the nearest that waits, charge and spin apart; oracle.tolerance is "
            f"{self._oracle.tolerance:g}"
        )
        return (
            f" {len(strange)} frame(s) in results/ were read and match no structure that was asked for, the first of "
            f"them {self._places[strange[0]]} ({reason})."
        )


def export_request(oracle: ExternalSettings, missing: Sequence[tuple[str, Atoms]], remark: str = "") -> PendingLabels:
    """Writes the structures that need labels into ``requested/``; the same structures give the same file.

    Args:
        oracle: the settings.
        missing: identities with their structures.
        remark: what else to tell.

    Returns:
        the signal to raise.
    """
    from almlip_jax.structures.io import write_structures

    batch = hashlib.sha256("".join(identity for identity, _ in missing).encode()).hexdigest()[:12]
    requested, results = oracle.folder / "requested", oracle.folder / "results"
    path = requested / f"{batch}.extxyz"
    try:
        requested.mkdir(parents=True, exist_ok=True)
        results.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            frames = [atoms.copy() for _, atoms in missing]
            for frame, (identity, _) in zip(frames, missing, strict=True):
                frame.info[IDENTITY_KEY] = identity
            write_structures(path, frames)
    except OSError as error:
        raise InputError(
            f"structures cannot be exported to {path} ({error.strerror}); correct oracle.folder."
        ) from error
    return PendingLabels(path, results, len(missing), remark)


def _result_files(folder: Path) -> list[Path]:
    results = folder / "results"
    return sorted(path for path in results.iterdir() if not path.name.startswith(".")) if results.is_dir() else []


def _read(path: Path, oracle: ExternalSettings) -> list[Atoms]:
    from almlip_jax.structures.io import read_structures

    reading = oracle.with_keys(energy=oracle.energy_key, forces=oracle.forces_key, stress=oracle.stress_key)
    return read_structures(path, **reading.arguments)


def _each_once(read: Sequence[tuple[Path, int, Atoms]]) -> list[tuple[Path, int, Atoms]]:
    """One frame of each identity, or geometry where it carries none; where one failed and was made again, the label.

    Raises:
        InputError: two of one identity or geometry have different labels.
    """
    found: dict[str | bytes, tuple[Path, int, Atoms]] = {}
    for path, number, frame in read:
        key = str(frame.info[IDENTITY_KEY]) if IDENTITY_KEY in frame.info else geometry_key(frame)
        before = found.get(key)
        if before is None or before[2].calc is None or stated_failure(before[2]) is not None:
            found[key] = path, number, frame
        elif stated_failure(frame) is None and (apart := label_difference(before[2], frame)) is not None:
            raise InputError(
                f"frame {before[1]} of {before[0]} and frame {number} of {path} are labels of one structure, and "
                f"{apart}; remove the wrong one."
            )
    return list(found.values())


def _label(frame: Atoms, order: np.ndarray, identity: str, oracle: ExternalSettings) -> Label:
    if (reason := stated_failure(frame)) is not None:
        return Label(identity, error=reason)
    try:
        results = judged(results_of(frame), len(frame), oracle.max_force)
    except LabelError as error:
        return Label(identity, error=str(error))
    forces, further = np.asarray(results.forces)[order], dict(results.further)
    for target in further_targets():
        if target.per == "atom" and target.label in further:
            further[target.label] = further[target.label][order]
    return Label(identity, results.energy, forces, results.stress, further=further)
