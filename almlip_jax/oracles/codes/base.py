"""What a code of electronic structure is to a label: a description, and the job that one label is."""

from __future__ import annotations

import contextlib
import os
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from ase import Atoms
from ase.calculators.calculator import all_changes
from ase.config import cfg

from almlip_jax.errors import LabelError
from almlip_jax.kinds import load_plugins


@dataclass(frozen=True)
class Grid:
    """K-points of a structure: how many along each reciprocal vector.

    Attributes:
        size: [3].
        shift: [3], 1 where the grid is moved off Gamma by half a step, else 0.
    """

    size: tuple[int, int, int]
    shift: tuple[int, int, int] = (0, 0, 0)


@dataclass(frozen=True)
class Job:
    """One label as a code is asked for it.

    Attributes:
        atoms: the structure, with the magnetic moments to begin with, if any.
        parameters: settings as the code's manual names them; its own to change.
        folder: where it runs; empty but for what it restarts from.
        charge: total charge, e.
        unpaired: number of unpaired electrons, which is kept; None where the moments may find their own.
        polarised: whether spins differ.
        grid: of k-points; None where the structure or the code has none, or the parameters say.
        pseudopotentials: by element.
        data: folder of pseudopotentials, basis sets or species; None for the code's own.
        command: that starts the code; None for that of ASE's configuration, or the code's own name.
        restart: whether the folder, or `earlier`, holds a density to begin with.
        leaves: whether the next label may begin with the density of this one.
        stress: whether the structure has one.
        earlier: the calculator of the label before it, where it is to be used again.
        further: properties that are wanted besides, by ASE's names.
    """

    atoms: Atoms
    parameters: dict[str, Any]
    folder: Path
    charge: int = 0
    unpaired: int | None = 0
    polarised: bool = False
    grid: Grid | None = None
    pseudopotentials: Mapping[str, str] | None = None
    data: Path | None = None
    command: str | None = None
    restart: bool = False
    leaves: bool = False
    stress: bool = False
    earlier: Any = None
    further: tuple[str, ...] = ()

    @property
    def properties(self) -> list[str]:
        """What is to be calculated, by ASE's names."""
        return ["energy", "forces", *(["stress"] if self.stress else []), *self.further]

    @property
    def elements(self) -> tuple[str, ...]:
        """Symbols of the elements, each once, in the order of the structure."""
        return tuple(dict.fromkeys(self.atoms.get_chemical_symbols()))


@dataclass(frozen=True)
class Code:
    """A code: what it takes, and how it is told.

    Attributes:
        name: in configs.
        title: in texts.
        make: the calculator of a job.
        write: writes the input of a job into its folder, without running anything; by default as ASE does.
        draft: the job as its input can be made without data files that are not there, with others in a folder in their
            place, and a sentence on what is missing; for codes whose input holds such files.
        prepare: the job as the calculator takes it, for what ASE says in other units or words than the code.
        set_elsewhere: parameters that have keys of their own, with the text that says where; dotted within sections.
        command: that starts it, where nothing else says so; None for a package of Python.
        package: the package of Python that it is.
        crystals: whether it takes periodic structures.
        moments: whether atoms begin with moments of their own; where not, the code is told their sum alone.
        cell: whether every structure needs a cell, as for plane waves.
        kpoints: whether periodic structures need k-points.
        own_grid: whether parameters say which k-points there are.
        pseudopotentials: whether it takes any by element; ``required`` where it does not run without.
        data: the variable of the environment with its data folder, or None where that goes another way.
        takes_data: whether it takes a data folder at all.
        smeared: whether it gives the energy extrapolated to no smearing beside the free energy.
        output: names of files that say how it went, as patterns.
        unconverged: texts in these, in lower case, where it did not converge.
        finished: text in one of these where it came to its end, in lower case; None where its calculator knows.
        blamed: pattern whose first group is what its output says of an error; None where the line that has the word.
        density: files and folders that the next label begins with, with the names that it finds them under; patterns
            with an empty name, whose files keep theirs; nothing where it cannot.
        keeps_calculator: whether the next label begins with the calculator of the one before instead.
        example: keys of a label source for some elements, to begin with.
    """

    name: str
    title: str
    make: Callable[[Job], Any]
    set_elsewhere: Mapping[str, str]
    write: Callable[[Job], None] | None = None
    draft: Callable[[Job, Path], tuple[Job, str | None]] = lambda job, folder: (job, None)
    prepare: Callable[[Job], Job] = lambda job: job
    command: str | None = None
    package: str | None = None
    crystals: bool = True
    moments: bool = True
    cell: bool = False
    kpoints: bool = True
    own_grid: Callable[[Mapping[str, Any]], bool] = lambda parameters: False
    pseudopotentials: str | None = None
    data: str | None = None
    takes_data: bool = False
    smeared: bool = False
    output: tuple[str, ...] = ()
    unconverged: tuple[str, ...] = ()
    finished: str | None = None
    blamed: str | None = None
    density: Mapping[str, str] = field(default_factory=dict)
    keeps_calculator: bool = False
    example: Callable[[tuple[str, ...]], dict[str, Any]] = lambda elements: {}

    @property
    def restarts(self) -> bool:
        """Whether a label can begin with the density of the one before."""
        return bool(self.density) or self.keeps_calculator

    def write_input(self, job: Job) -> None:
        """Writes the input of a prepared job into its folder, without running anything."""
        if self.write is not None:
            self.write(job)
            return
        calculator = self.make(job)
        if hasattr(calculator, "write_inputfiles"):
            calculator.write_inputfiles(job.atoms, job.properties)
        else:
            calculator.write_input(job.atoms, job.properties, list(all_changes))

    @contextlib.contextmanager
    def environment(self, job: Job) -> Iterator[None]:
        """The environment that the code finds its data in."""
        if self.data is None or job.data is None:
            yield
            return
        before = os.environ.get(self.data)
        os.environ[self.data] = str(job.data)
        try:
            yield
        finally:
            if before is None:
                del os.environ[self.data]
            else:
                os.environ[self.data] = before

    def check_converged(self, folder: Path, error: Exception | None = None) -> None:
        """Refuses what says that it did not converge, in its files or in what it raised.

        Raises:
            LabelError: it does.
        """
        said = self._said(folder) + ("" if error is None else f"{type(error).__name__}: {error}".lower())
        if any(text in said for text in self.unconverged):
            raise LabelError(f"{self.title} did not converge its SCF")

    def check_finished(self, folder: Path) -> None:
        """Refuses what does not say that it came to its end.

        Raises:
            LabelError: it does not.
        """
        if self.finished is not None and self.finished not in self._said(folder):
            raise LabelError(f"{self.title} did not come to its end{self.last_words(folder)}")

    def _said(self, folder: Path) -> str:
        return "\n".join(path.read_text(errors="replace") for path in self.outputs(folder)).lower()

    def outputs(self, folder: Path) -> list[Path]:
        """Files that say how it went."""
        return [path for pattern in self.output for path in sorted(folder.glob(pattern)) if path.is_file()]

    def last_words(self, folder: Path) -> str:
        """What the output says of an error, or its end, for a message; empty where there is none."""
        for path in self.outputs(folder):
            blamed = re.findall(self.blamed, path.read_text(errors="replace"), re.MULTILINE) if self.blamed else []
            if blamed:
                return f"; {path.name} says: {' '.join(blamed[-1].split())[:300]}"
            lines = [line.strip(" \t*|/\\_%") for line in path.read_text(errors="replace").splitlines()]
            lines = [line for line in lines if any(letter.isalnum() for letter in line)][-40:]
            if lines:
                bad = [n for n, line in enumerate(lines) if re.search("error|abort", line, re.IGNORECASE)]
                some = lines[bad[-1] : bad[-1] + 3] if bad else lines[-3:]
                return f"; {path.name} {'says' if bad else 'ends with'}: {' / '.join(some)[:300]}"
        return ""


_KNOWN: dict[str, Code] = {}


def declare(code: Code) -> Code:
    """Makes a code known; gives it back.

    Raises:
        TypeError: another has its name.
    """
    held = _KNOWN.get(code.name)
    if held is not None and held.make.__module__ != code.make.__module__:
        raise TypeError(f"code '{code.name}' is declared by {held.make.__module__} and by {code.make.__module__}.")
    _KNOWN[code.name] = code
    return code


def codes() -> Mapping[str, Code]:
    """Codes by name: those of this folder, and of other packages."""
    _ours()
    load_plugins()
    return dict(sorted(_KNOWN.items()))


@cache
def _ours() -> None:
    package = import_module("almlip_jax.oracles.codes")
    for module in pkgutil.iter_modules(package.__path__):
        if module.name != "base":
            import_module(f"{package.__name__}.{module.name}")


def configured(section: str, key: str) -> str | None:
    """What ASE's configuration says of a code."""
    return cfg.parser.get(section, key, fallback=None)


def said(parameters: Mapping[str, Any], dotted: str) -> Any:
    """What parameters say under a dotted key, whatever the case of its letters; None where nothing."""
    place: Any = parameters
    for part in dotted.split("."):
        if not isinstance(place, Mapping):
            return None
        place = next((value for key, value in place.items() if str(key).lower() == part.lower()), None)
    return place
