"""A file of labelled structures as a label source: studies on a fixed pool need no calculation."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from ase import Atoms
from pydantic import Field, model_validator

from almlip_jax.errors import InputError, LabelError
from almlip_jax.oracles.base import LabelSource, Results, SourceSettings
from almlip_jax.settings import unit
from almlip_jax.structures.electronic_state import agrees_in_state
from almlip_jax.structures.labels import FileReading, LabelKeys, label_difference
from almlip_jax.targets import further_targets

_FIRST = ("energy", "forces", "stress")
"""Labels whose keys stand in the identity of every label, as they did in the first stores."""


class FileSettings(SourceSettings, FileReading):
    """Labels looked up in a labelled file (extxyz or anything else that is read as structures).

    A structure is found by its species in order, pbc, positions and cell; charge and spin count where the frame in the
    file states them.  A structure that is not in the file has a failed label.
    """

    kind: Literal["file"] = "file"

    in_process: ClassVar[bool] = True
    drives_dynamics: ClassVar[bool] = False

    path: Path
    """The labelled file."""

    tolerance: float = Field(default=1e-8, ge=0, le=0.1, json_schema_extra=unit("Angstrom"))
    """Largest difference of a coordinate at which structures are the same, in Angstrom (extxyz files may be rounded to
    8 decimals)."""

    def gives(self, target: str) -> bool:
        """Whatever the file has."""
        return True

    def identity(self) -> dict[str, Any]:
        """The settings that decide what a label is; the path is not among them, the content is (see `version`)."""
        identity = {key: value for key, value in super().identity().items() if key not in {"path", "keys", "types"}}
        keys = (self.keys or LabelKeys()).model_dump(mode="json")
        identity |= {f"{name}_key": keys[name] for name in _FIRST}  # as they have always stood in label stores
        identity |= {
            f"{one.label}_key": keys[one.label] for one in further_targets() if keys.get(one.label) is not None
        }
        identity |= {name: keys[name] for name in ("virial", "stress_unit") if keys[name] is not None}
        return identity | ({} if self.types is None else {"types": list(self.types)})

    @model_validator(mode="before")
    @classmethod
    def _keys_have_moved(cls, given: Any) -> Any:
        """Configs of earlier versions, those in run directories too, name the keys one by one."""
        before = [f"{name}_key" for name in _FIRST]
        if not isinstance(given, dict) or not any(name in given for name in before):
            return given
        keys = {name: given[f"{name}_key"] for name in _FIRST if given.get(f"{name}_key") is not None}
        kept = {name: value for name, value in given.items() if name not in before}
        if keys and kept.get("keys") is not None:
            raise ValueError(f"{' and '.join(f'{name}_key' for name in keys)} belong in keys, which is given as well.")
        return kept | ({"keys": keys} if keys else {})

    def version(self) -> str:
        """A hash of the content of the file."""
        try:
            return hashlib.sha256(self.path.read_bytes()).hexdigest()
        except OSError as error:
            raise InputError(
                f"the labelled file {self.path} cannot be read ({error.strerror}); correct oracle.path."
            ) from error

    def build(self) -> LabelSource:
        """A function that looks labels up."""
        from almlip_jax.structures.io import read_structures

        frames = read_structures(self.path, require_labels=True, **self.arguments)
        index = GeometryIndex(frames)

        def label(atoms: Atoms) -> Results:
            found = index.find_all(atoms, self.tolerance)
            if not found:
                raise LabelError(f"the structure is not in {self.path}")
            for other in found[1:]:
                apart = label_difference(frames[found[0]], frames[other])
                if apart is not None:
                    raise LabelError(
                        f"frames {found[0]} and {other} of {self.path} are the same structure with different labels "
                        f"({apart}); remove the wrong one"
                    )
            return results_of(frames[found[0]])

        return label


def results_of(frame: Atoms) -> Results:
    """The label that a labelled frame carries in its calculator.

    Raises:
        LabelError: it has no energy or no forces.
    """
    results = {} if frame.calc is None else frame.calc.results
    if "energy" not in results or "forces" not in results:
        raise LabelError("the frame has no energy or no forces")
    stress = results.get("stress") if frame.pbc.all() else None
    further = {one.label: results[one.label] for one in further_targets() if results.get(one.label) is not None}
    return Results(results["energy"], results["forces"], stress, further)


class GeometryIndex:
    """Finds structures by species, pbc, positions and cell.

    Args:
        frames: the structures to search.
    """

    def __init__(self, frames: Sequence[Atoms]) -> None:
        groups: dict[tuple[bytes, bytes], list[int]] = {}
        for n, frame in enumerate(frames):
            groups.setdefault(_kind(frame), []).append(n)
        self._frames = frames
        self._groups = {
            kind: _Alike(np.array(members), np.stack([_coordinates(frames[n]) for n in members]))
            for kind, members in groups.items()
        }

    def find(self, atoms: Atoms, tolerance: float) -> int | None:
        """The frame that differs least from a structure, if no coordinate differs by more than `tolerance` (Angstrom).

        Frames that state a charge or spin (in ``info``) other than the structure's are passed over.
        """
        found = self.find_all(atoms, tolerance)
        return found[0] if found else None

    def find_all(self, atoms: Atoms, tolerance: float) -> list[int]:
        """All frames that `find` chooses from, the nearest first."""
        group = self._groups.get(_kind(atoms))
        found = [] if group is None else group.within(_coordinates(atoms), tolerance)
        return [n for n in found if agrees_in_state(self._frames[n], atoms)]


class _Alike:
    """Frames of one kind, in the order of a weighted sum of their coordinates: few are as near as one asked for.

    Weights are drawn, since plain sums stay the same in dynamics whose centre of mass rests.

    Args:
        members: numbers of the frames, [F].
        coordinates: [F, N, 3] Angstrom.
    """

    def __init__(self, members: np.ndarray, coordinates: np.ndarray) -> None:
        self._weights = np.random.default_rng(0).uniform(-1, 1, coordinates.shape[1:])
        sums = self._summed(coordinates)
        order = np.argsort(sums, kind="stable")
        self._members, self._coordinates, self._sums, self._order = members, coordinates, sums[order], order

    def within(self, coordinates: np.ndarray, tolerance: float) -> list[int]:
        """Frames none of whose coordinates differs by more than a tolerance (Angstrom), the nearest first."""
        places = self.candidates(coordinates, tolerance)
        distance = np.max(np.abs(self._coordinates[places] - coordinates), axis=(1, 2))
        near = np.flatnonzero(distance <= tolerance)
        found: list[int] = self._members[places[near[np.argsort(distance[near], kind="stable")]]].tolist()
        return found

    def candidates(self, coordinates: np.ndarray, tolerance: float) -> np.ndarray:
        """Places of the frames whose sums are near enough, in order."""
        largest, rounding = float(np.abs(coordinates).max(initial=0.0)) + tolerance, np.finfo(float).eps
        apart = np.abs(self._weights).sum() * (tolerance + coordinates.size * rounding * largest)
        middle = self._summed(coordinates)
        first = np.searchsorted(self._sums, middle - apart, "left")
        last = np.searchsorted(self._sums, middle + apart, "right")
        places: np.ndarray = np.sort(self._order[first:last])
        return places

    def _summed(self, coordinates: np.ndarray) -> np.ndarray:
        sums: np.ndarray = np.einsum("...ij,ij->...", coordinates, self._weights)
        return sums


def _kind(atoms: Atoms) -> tuple[bytes, bytes]:
    return np.asarray(atoms.numbers, np.int64).tobytes(), np.asarray(atoms.pbc, bool).tobytes()


def _coordinates(atoms: Atoms) -> np.ndarray:
    # The cell of a direction that is not periodic says nothing.
    cell = np.where(np.asarray(atoms.pbc)[:, None], atoms.cell.array, 0.0)
    return np.concatenate([np.asarray(atoms.positions, np.float64), cell])
