"""Labels by a code of electronic structure: what it is refused, what it is told, how it runs and what it leaves."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import all_changes

from almlip_jax.errors import InputError, LabelError
from almlip_jax.oracles.base import LabelSource, Results, check_electrons, check_moments
from almlip_jax.oracles.codes.base import Code, Grid, Job, said
from almlip_jax.oracles.identity import structure_identity
from almlip_jax.oracles.scratch import Scratch, remove
from almlip_jax.structures.electronic_state import initial_moments, multiplicity, total_charge

if TYPE_CHECKING:
    from almlip_jax.oracles.sources.calculator import CalculatorSettings

_LONGEST_INPUT = 200  # lines of a file of the input that are shown


def check_settings(code: Code, settings: CalculatorSettings) -> None:
    """Refuses settings that would not reach a code, or would contradict what it is told of each structure.

    Raises:
        ValueError: names the key, and what to do.
    """
    for key, where in code.set_elsewhere.items():
        if said(settings.parameters, key) is not None:
            raise ValueError(f"parameters.{key} cannot be given here: {where}.")
    for refused, key, why in (
        (code.package is not None, "command", "is called within Python"),
        (code.pseudopotentials is None, "pseudopotentials", "takes no pseudopotentials by element"),
        (not code.takes_data, "data_dir", "looks for no such folder"),
        (not code.crystals or not code.kpoints, "kpts", "has no k-points here"),
        (not code.crystals or not code.kpoints, "kspacing", "has no k-points here"),
        (not code.crystals or not code.kpoints, "gamma_centred", "has no k-points here"),
        (not code.restarts, "reuse", "does not begin with an earlier density here"),
    ):
        if refused and getattr(settings, key) != type(settings).model_fields[key].get_default():
            raise ValueError(f"{key} does not belong to code {code.name}: {code.title} {why}.")
    if not code.smeared and not settings.force_consistent:
        raise ValueError(
            f"force_consistent cannot be false for code {code.name}: only the free energy of {code.title} is read."
        )
    if settings.kpts is not None and settings.kspacing is not None:
        raise ValueError("give either kpts or kspacing.")
    own = code.own_grid(settings.parameters)
    if own and (settings.kpts is not None or settings.kspacing is not None or not settings.gamma_centred):
        raise ValueError("the parameters say which k-points there are, and so do kpts, kspacing or gamma_centred.")
    for name in ("charge_key", "spin_key"):
        if getattr(settings, name) is not None:
            raise ValueError(f"{name} belongs to calculators: a code is told charge and multiplicity in its own words.")


def check_structure(code: Code, settings: CalculatorSettings, atoms: Atoms) -> None:
    """Refuses a structure that a code would get wrong.

    Raises:
        LabelError: says why, and what to do.
    """
    periodic = bool(atoms.pbc.any())
    if periodic and not code.crystals:
        raise LabelError(f"code {code.name} labels molecules; the structure is periodic")
    if (periodic or code.cell) and atoms.cell.rank < 3:
        raise LabelError(
            f"{code.title} needs a cell with three vectors; give the structure one (of vacuum where it does not repeat)"
        )
    own = code.own_grid(settings.parameters)
    if periodic and code.kpoints and settings.kpts is None and settings.kspacing is None and not own:
        raise LabelError(
            "the structure is periodic, and nothing says which k-points there are; give oracle.kpts ([1, 1, 1] for "
            "Gamma alone) or oracle.kspacing"
        )
    if code.pseudopotentials == "required":
        missing = sorted(set(atoms.get_chemical_symbols()) - set(settings.pseudopotentials))
        if missing:
            raise LabelError(f"oracle.pseudopotentials names none for {', '.join(missing)}")
    told = _with_moments(settings, atoms)
    moments = initial_moments(told)
    if moments is not None and moments.ndim == 2:
        raise LabelError(f"code {code.name} takes initial magnetic moments along one axis, not vectors")
    if moments is not None and not code.moments and min(moments) < 0 < max(moments):
        raise LabelError(
            f"{code.title} is told the number of unpaired electrons alone, and the initial magnetic moments have both "
            "signs; leave them out, and give the multiplicity (system.spin)"
        )
    if not periodic:
        check_electrons(told)
    elif multiplicity(atoms) != 1:
        check_moments(told)


def build_code(code: Code, settings: CalculatorSettings) -> LabelSource:
    """A function that labels with a code."""
    runner = _Runner(code, settings, Scratch(settings.scratch))

    def label(atoms: Atoms) -> Results:
        settings.check(atoms)
        return runner.label(atoms)

    return label


def preview_of_code(code: Code, settings: CalculatorSettings, atoms: Atoms) -> str:
    """The files that a code would be given for a structure, and the command that would run.

    Nothing need be installed: where data files are not there that go into the input, it says which.

    Raises:
        InputError: the input cannot be made.
        LabelError: likewise.
    """
    prefix = "almlip-input-"
    with tempfile.TemporaryDirectory(prefix=prefix) as place, tempfile.TemporaryDirectory(prefix=prefix) as others:
        folder = Path(place)
        job = code.prepare(job_of(code, settings, atoms, folder))
        try:
            drafted, missing = code.draft(job, Path(others))
            with code.environment(drafted), warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # of ASE, which moves its writers
                code.write_input(drafted)
        except (InputError, LabelError):
            raise
        except Exception as error:  # ASE's writers fail in many ways
            how = " ".join(f"{type(error).__name__}: {error}".split())
            raise InputError(f"the input of {code.title} cannot be made ({how}); correct oracle.parameters.") from error
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        shown = "\n\n".join(f"--- {path.relative_to(folder)}\n{_shown(path)}" for path in files)
    if code.package is not None:
        run = f"{code.title} is called within Python ({settings.version() or 'not installed here'})."
    else:
        command = settings.command or f"of ASE's configuration, or {code.command}"
        run = f"Command: {command}"
    state = f"charge {job.charge}, multiplicity {multiplicity(atoms)}"
    note = "" if missing is None else f"{missing}\n"
    return f"{code.title}: {atoms.get_chemical_formula()}, {state}\n{run}\n{note}\n{shown}"


def job_of(code: Code, settings: CalculatorSettings, atoms: Atoms, folder: Path) -> Job:
    """What a code is asked for one structure."""
    told = _with_moments(settings, atoms)
    spin = multiplicity(told if not atoms.pbc.any() else atoms)
    moments = initial_moments(told) is not None
    free = bool(atoms.pbc.any()) and spin == 1
    polarised = moments or spin != 1
    return Job(
        atoms=told,
        parameters=_copied(settings.parameters),
        folder=folder,
        charge=total_charge(atoms),
        unpaired=None if free and polarised else spin - 1,
        polarised=polarised,
        grid=grid_of(code, settings, atoms),
        pseudopotentials={one: name for one, name in settings.pseudopotentials.items() if one in atoms.symbols},
        data=settings.data_dir,
        command=settings.command,
        leaves=settings.reuse,
        stress=bool(atoms.pbc.all()),
        further=settings.asked_of(atoms),
    )


def grid_of(code: Code, settings: CalculatorSettings, atoms: Atoms) -> Grid | None:
    """The k-points that a code is asked for; None where there are none, or its parameters say."""
    if not atoms.pbc.any() or not code.kpoints or (settings.kpts is None and settings.kspacing is None):
        return None
    if settings.kpts is not None:
        size = list(settings.kpts)
    else:
        assert settings.kspacing is not None
        lengths = 2 * math.pi * np.linalg.norm(atoms.cell.reciprocal().array, axis=1)
        size = [max(1, math.ceil(length / settings.kspacing - 1e-9)) for length in lengths]
    size = [n if repeats else 1 for n, repeats in zip(size, atoms.pbc, strict=True)]
    shift = [0 if settings.gamma_centred or n % 2 else 1 for n in size]
    return Grid((size[0], size[1], size[2]), (shift[0], shift[1], shift[2]))


def _with_moments(settings: CalculatorSettings, atoms: Atoms) -> Atoms:
    """A copy whose atoms begin with the moments of their elements, where the structure has none of its own; without
    constraints, which are no part of a label, and which some codes would take forces away for.
    """
    told = atoms.copy()
    told.set_constraint()
    if initial_moments(atoms) is None and settings.magnetic_moments:
        told.set_initial_magnetic_moments([settings.magnetic_moments.get(one, 0.0) for one in atoms.symbols])
    return told


@dataclass
class _Runner:
    """Runs a code, one label after the other.

    Attributes:
        code: what runs.
        settings: of the label source.
        scratch: where.
        before: the job before and its calculator, where the next may begin with what it left.
    """

    code: Code
    settings: CalculatorSettings
    scratch: Scratch
    count: int = 0
    before: tuple[Job, Any] | None = field(default=None)

    def label(self, atoms: Atoms) -> Results:
        """Runs the code in a folder of its own, and reads what it says."""
        self.count += 1
        folder = self.scratch.folder / f"{self.count:06d}"
        folder.mkdir()
        job = self._begin(self.code.prepare(job_of(self.code, self.settings, atoms, folder)))
        failed = True
        try:
            results = self._run(job)
            failed = False
            return results
        finally:
            self._end(job, atoms, failed)

    def _begin(self, job: Job) -> Job:
        """The job with what the one before left, where that was of the same atoms in the same cell."""
        if not self.settings.reuse or self.before is None:
            return job
        earlier, calculator = self.before
        if not _alike(earlier, job):
            return job
        if self.code.keeps_calculator:
            return replace(job, earlier=calculator, restart=True)
        found = [
            (source, job.folder / (new or source.name))
            for name, new in self.code.density.items()
            for source in sorted(earlier.folder.glob(name))
        ]
        for source, target in found:
            source.rename(target)
        return replace(job, restart=bool(found))

    def _run(self, job: Job) -> Results:
        calculator = None
        try:
            with self.code.environment(job):
                calculator = self.code.make(job)
                calculator.calculate(job.atoms.copy(), job.properties, list(all_changes))
        except (InputError, LabelError):
            raise
        except Exception as error:  # codes and ASE's readers of them fail in many ways
            self._close(calculator)
            self.code.check_converged(job.folder, error)
            raise LabelError(_reason(self.code, job, error)) from error
        self._close(calculator)
        self.code.check_converged(job.folder)
        self.code.check_finished(job.folder)
        from almlip_jax.oracles.sources.calculator import has_converged

        if not has_converged(calculator):
            raise LabelError(f"{self.code.title} did not converge its SCF")
        self._keep_for_next(job, calculator)
        return self._results(job, calculator.results)

    def _close(self, calculator: Any) -> None:
        """Ends a program that waits for more, so that all it said is in its files."""
        if hasattr(calculator, "close") and not self.code.keeps_calculator:
            calculator.close()

    def _keep_for_next(self, job: Job, calculator: Any) -> None:
        if self.settings.reuse:
            self.before = (job, calculator if self.code.keeps_calculator else None)

    def _results(self, job: Job, found: Mapping[str, Any]) -> Results:
        free = found.get("free_energy") if self.settings.force_consistent else None
        energy = found.get("energy") if free is None else free
        if energy is None or found.get("forces") is None:
            raise LabelError(f"{self.code.title} gave no {'energy' if energy is None else 'forces'}")
        asked = self.settings.asked_of(job.atoms)
        if missing := [name for name in asked if found.get(name) is None]:
            raise LabelError(f"{self.code.title} gave no {missing[0]}; leave it out of oracle.targets")
        stress = found.get("stress") if job.stress else None
        return Results(energy, np.array(found["forces"]), stress, {name: found[name] for name in asked})

    def _end(self, job: Job, atoms: Atoms, failed: bool) -> None:
        """Leaves the files where they are asked for, keeps what the next label begins with, and removes the rest."""
        keep = self.settings.keep_files
        if keep == "all" or (keep == "failed" and failed):
            assert self.settings.scratch is not None
            target = self.settings.scratch / structure_identity(atoms, self.settings)[:16]
            remove(target)
            shutil.copytree(job.folder, target, symlinks=True)
        held = {self.before[0].folder} if self.before is not None else set()
        for folder in {one for one in self.scratch.folder.iterdir() if one.is_dir()} - held:
            remove(folder)


def _alike(earlier: Job, job: Job) -> bool:
    """Whether a density of one structure is a beginning for another."""
    same = (earlier.charge, earlier.unpaired, earlier.polarised, earlier.grid)
    return (
        same == (job.charge, job.unpaired, job.polarised, job.grid)
        and np.array_equal(earlier.atoms.numbers, job.atoms.numbers)
        and np.array_equal(earlier.atoms.pbc, job.atoms.pbc)
        and np.allclose(earlier.atoms.cell.array, job.atoms.cell.array, rtol=0, atol=1e-12)
        and np.array_equal(earlier.atoms.get_initial_magnetic_moments(), job.atoms.get_initial_magnetic_moments())
    )


def _reason(code: Code, job: Job, error: Exception) -> str:
    if isinstance(error, FileNotFoundError) and str(error.filename) in (job.command or code.command or "").split():
        return f"{code.title} could not be started ({error}); name its command in oracle.command"
    program = _program(job.command or "")
    if program is not None and shutil.which(program) is None:
        return f"{code.title} could not be started (there is no '{program}' here); name its command in oracle.command"
    how = f"{type(error).__name__}: {error}"
    if isinstance(error, subprocess.CalledProcessError):
        how = f"exit status {error.returncode}"
    elif isinstance(error, AssertionError) and not str(error):
        how = "its program ended unexpectedly, or is not the one that oracle.command names"
    words = code.last_words(job.folder)
    if " says: " in words and not isinstance(error, subprocess.CalledProcessError):
        return f"{code.title} failed{words}"  # of which the error is a consequence
    return f"{code.title} failed ({how}){words}"


def _program(command: str) -> str | None:
    """What a command starts, where that is a plain name or path; None where a shell would make something of it."""
    first = command.split()[0] if command.split() else ""
    return first if re.fullmatch(r"[\w./+-]+", first) else None


def _shown(path: Path) -> str:
    lines = path.read_text(errors="replace").splitlines()
    more = len(lines) - _LONGEST_INPUT
    return "\n".join(lines[:_LONGEST_INPUT] + ([f"... and {more} more lines"] if more > 0 else []))


def _copied(parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _copied(value) if isinstance(value, Mapping) else list(value) if isinstance(value, list) else value
        for key, value in parameters.items()
    }
