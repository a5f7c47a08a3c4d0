"""A reporter for OpenMM: what the committee says of the atoms that it drives, frames for labels, and a stop.

The spread is that of the reported positions: the reporter evaluates them itself, one evaluation for each report, since
what the force computed last may have been a trial move of a barostat or another context's.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from almlip_jax.errors import InputError
from almlip_jax.files import cannot_write
from almlip_jax.interfaces.columns import column_values, columns
from almlip_jax.interfaces.openmm import Driven, driven, driven_in
from almlip_jax.interfaces.recording import Recorder, Recording, alone, check_kept
from almlip_jax.potential import Potential
from almlip_jax.scores import names, score_units, scores
from almlip_jax.unit_names import with_unit


class UncertaintyStop(RuntimeError):
    """A run that `CommitteeReporter` stopped; the simulation can go on from where it is.

    Attributes:
        step: at which it stopped.
        score: what was too large.
        value: of the score.
    """

    def __init__(self, step: int, score: str, value: float, above: float) -> None:
        self.step, self.score, self.value = step, score, value
        super().__init__(f"step {step}: {score} is {with_unit(f'{value:.4g}', score)}, above {above:g}.")


class CommitteeReporter:
    """Writes the energy, every score and each member's energy (eV, Angstrom) as a table; a frame where it is asked to.

    The frames hold the atoms that the potential sees.  Where these are part of a system in a box, they are written
    without the box, each beside its neighbours, so that a label is that of the molecule alone; unless they see
    themselves across the box.

    Args:
        file: CSV to write.
        interval: steps between reports.
        score: of structures, which decides what is recorded and when to stop.
        stop_above: a report with a larger score raises `UncertaintyStop`, after its row and frame are written.
        record: extended XYZ for frames with large scores, for ``almlip label``.
        record_above: what is large; ``stop_above`` where not given.
        record_every: least number of steps between two frames; the frame of a stop is written in any case.
        append: whether table and frames go on in the files that are there; others than empty ones are refused if not.
        force: the ``PythonForce`` of the potential; the only one in the system where not given.

    Raises:
        InputError: a file cannot be written or would be lost, the score is not one that the potential gives, or the
            simulation has no potential, or several.
    """

    def __init__(
        self,
        file: Path | str,
        interval: int,
        *,
        score: str = "force_std_max",
        stop_above: float | None = None,
        record: Path | str | None = None,
        record_above: float | None = None,
        record_every: int = 1,
        append: bool = False,
        force: Any = None,
    ) -> None:
        if interval < 1:
            raise InputError(f"there are {interval} steps between reports; give 1 or more.")
        if score not in names(scores()):
            raise InputError(f"'{score}' is no score of structures; give one of {', '.join(names(scores()))}.")
        for name, value in (("stop_above", stop_above), ("record_above", record_above)):
            if value is not None and not isinstance(value, int | float | np.number):
                unit = score_units()[score]
                told = f"{score} in {unit}" if unit else score
                raise InputError(f"{name} is a number, of {told}, without OpenMM's units.")
            if value is not None and np.isnan(value):
                raise InputError(f"{name} is not a number; give one.")
        self.interval, self.score, self.stop_above, self.force = interval, score, stop_above, force
        above = stop_above if record_above is None else record_above
        if record is None and record_above is not None:
            raise InputError("record_above says which frames are written; say where too, by record.")
        if record is not None and above is None:
            raise InputError("record says where frames are written; say which too, by record_above or stop_above.")
        check_kept(Path(file), append=append)
        self.recorder: Recorder | None = None
        if record is not None and above is not None:
            self.recorder = Recorder(Recording(Path(record), score, above, record_every, append))
        self.last: dict[str, float] = {}
        """Values of the last report, by the names of the columns."""
        self._atoms: Driven | None = None
        try:
            self._file = Path(file).open("a" if append else "w", encoding="utf-8", newline="")
        except OSError as error:
            raise cannot_write(Path(file), error) from error
        self._table = csv.writer(self._file)
        self._headed = append and self._file.tell() > 0

    def __del__(self) -> None:
        if "_file" in self.__dict__:
            self._file.close()

    def describeNextReport(self, simulation: Any) -> dict[str, Any]:
        """When the next report is due, and what it needs; OpenMM asks before each of its runs."""
        self._found(simulation)
        steps = self.interval - simulation.currentStep % self.interval
        return {"steps": steps, "periodic": False, "include": ["positions"]}

    def report(self, simulation: Any, state: Any) -> None:
        """Writes a row, a frame if it is one to be labelled, and stops the run if it is to be stopped."""
        atoms = self._found(simulation)
        frame = atoms.computation.placed(state, atoms.particles)
        results = atoms.computation.following(frame, "scores")
        step = int(simulation.currentStep)
        self.last = column_values(results, columns(atoms.computation.potential))
        if not self._headed:
            self._table.writerow(["step", "time_ps", *self.last])
            self._headed = True
        time = state.getTime().value_in_unit_system(_md_units())
        self._table.writerow([step, f"{time:.10g}", *(f"{value:.10g}" for value in self.last.values())])
        self._file.flush()
        value = self.last[self.score]
        stops = self.stop_above is not None and not value <= self.stop_above  # also where it is not a number
        if self.recorder is not None and (stops or self.recorder.wants(step, results)):
            self.recorder.write(step, _alone(frame, results, atoms), results)
        if stops and self.stop_above is not None:
            raise UncertaintyStop(step, self.score, value, self.stop_above)

    def _found(self, simulation: Any) -> Driven:
        """The atoms that the potential drives."""
        if self._atoms is None:
            if self.force is not None:
                one = driven(self.force)
                found = [] if one is None else [one]
            else:
                found = driven_in(simulation.system)
            if len(found) != 1:
                raise InputError(
                    f"the simulation has {len(found)} forces of a potential, of which one is reported; say which "
                    "(force), or add one (potential_force)."
                )
            self._check_score(found[0].computation.potential)
            self._atoms = found[0]
        return self._atoms

    def _check_score(self, potential: Potential) -> None:
        known = columns(potential)
        if self.score not in known:
            raise InputError(f"this potential gives no '{self.score}'; it gives {', '.join(known)}.")


def _md_units() -> Any:
    from openmm import unit

    return unit.md_unit_system


def _alone(frame: Atoms, results: Mapping[str, Any], atoms: Driven) -> Atoms:
    """A frame as it is to be labelled: part of a system without the box, unless it sees itself across that."""
    return frame if atoms.particles is None else alone(frame, results["energy"], atoms.computation.following)
