"""Frames of other programs' runs that are written for labels, because a score says that they are uncertain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ase import Atoms

from almlip_jax.files import cannot_write
from almlip_jax.scores import scores
from almlip_jax.structures.extxyz import write_frame


@dataclass(frozen=True)
class Recording:
    """Which frames of a run are written for labels.

    Attributes:
        file: extended XYZ that frames are added to.
        score: of structures (`scores`).
        above: threshold of the score, in its unit.
        every: least number of steps between two frames.
    """

    file: Path
    score: str = "force_std_max"
    above: float = 0.0
    every: int = 1


class Recorder:
    """Adds frames to a file that it begins anew, and counts them.

    Raises:
        InputError: the file cannot be written.
    """

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.number = 0
        """Frames written."""
        self._last: int | None = None  # the step of the last of them
        try:
            recording.file.write_text("")
        except OSError as error:
            raise cannot_write(recording.file, error) from error

    def wants(self, step: int, results: Mapping[str, Any]) -> bool:
        """Whether the frame of a step is one to be labelled."""
        if not results[self.recording.score] > self.recording.above:
            return False
        return self._last is None or abs(step - self._last) >= self.recording.every

    def write(self, step: int, atoms: Atoms, results: Mapping[str, Any]) -> None:
        """Writes a frame with what was predicted, under names that no reader takes for labels."""
        self._last, self.number = step, self.number + 1
        frame = atoms.copy()
        frame.info |= {"step": step, "predicted_energy": results["energy"]}
        frame.info |= {one.name: results[one.name] for one in scores() if one.name in results}
        frame.arrays["predicted_forces"] = results["forces"]
        frame.arrays["force_std"] = results["force_std"]
        with self.recording.file.open("a", encoding="utf-8", newline="\n") as file:
            write_frame(file, frame, f"step {step}")
