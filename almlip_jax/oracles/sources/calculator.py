"""Any ASE calculator as a label source, named ``module:Class`` in the config."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols
from pydantic import AfterValidator, Field, model_validator

from almlip_jax.errors import InputError, LabelError
from almlip_jax.names import Known
from almlip_jax.oracles.base import LONGEST_LABEL, LabelSource, Results, SourceOfTargets
from almlip_jax.oracles.codes.base import codes
from almlip_jax.oracles.scratch import Scratch
from almlip_jax.oracles.sources.code import build_code, check_settings, check_structure, grid_of, preview_of_code
from almlip_jax.oracles.sources.electrons import (
    StateKeys,
    check_state,
    known_keys,
    state_parameters,
    with_state,
)
from almlip_jax.settings import unit
from almlip_jax.structures.electronic_state import multiplicity, total_charge

CodeName = Annotated[str, Known("code of electronic structure", lambda: codes())]
Count = Annotated[int, Field(ge=1, le=1000)]


def _is_element(symbol: str) -> str:
    if symbol not in chemical_symbols[1:]:
        raise ValueError(f"'{symbol}' is not the symbol of an element")
    return symbol


ElementName = Annotated[str, AfterValidator(_is_element)]


class CalculatorSettings(SourceOfTargets):
    """A code of electronic structure by name, or any ASE calculator: a class, or a function that returns one.

    A `code` is told charge, multiplicity, magnetic moments and k-points in its own words, and what did not converge is
    no label.  A `calculator` is given the structure with its initial magnetic moments, and charge and spin in ``info``
    and where it takes them (`charge_key`, `spin_key`); a charge or spin that it would not take is refused.  What
    `targets` ask for is a property of the calculator, under the name that it has in files.
    """

    kind: Literal["ase"] = "ase"

    earlier_defaults: ClassVar[Mapping[str, Any]] = {"force_consistent": False}

    timeout: float = Field(default=3600.0, gt=0, le=LONGEST_LABEL, json_schema_extra=unit("s"))
    """Longest time one label may take, in seconds; then its process is ended and the label has failed."""

    code: CodeName | None = None
    """The code, by name: what it is told of a label is known.  This, or `calculator`."""

    calculator: Annotated[str, Field(pattern=r"^[\w.]+:[\w.]+$")] | None = Field(
        default=None, examples=["ase.calculators.emt:EMT"]
    )
    """The class or function as ``module:name``, found on the Python path or in the working directory."""

    parameters: dict[str, Any] = {}
    """Settings of the code, as its own manual names them; keyword arguments of the class or function."""

    command: str | None = None
    """What starts the code, as ``mpirun -n 16 pw.x``; by default that of ASE's configuration, or the code's own
    name."""

    pseudopotentials: dict[ElementName, str] = {}
    """The pseudopotential of each element, by the code's name for it: a file, a setup, a potential."""

    data_dir: Path | None = None
    """The folder with the code's pseudopotentials, basis sets or species; by default where the code or ASE looks."""

    kpts: tuple[Count, Count, Count] | None = None
    """The number of k-points along each reciprocal vector of periodic structures; 1 along directions without period."""

    kspacing: float | None = Field(default=None, gt=0, le=10, json_schema_extra=unit("1/Angstrom"))
    """The largest distance between k-points, in 1/Angstrom with the factor of 2 pi: a grid for each cell, in place of
    `kpts`."""

    gamma_centred: bool = True
    """Whether grids of k-points contain Gamma; otherwise those of an even number lie half a step off it (Monkhorst and
    Pack's)."""

    magnetic_moments: dict[ElementName, Annotated[float, Field(ge=-20, le=20)]] = Field(
        default={}, json_schema_extra=unit("Bohr magneton")
    )
    """Magnetic moments that the atoms of each element begin with, in Bohr magnetons, in structures that have none."""

    charge_key: str | None = None
    """The parameter that takes the total charge of a structure, in e (dotted where it lies within another); ``info`` or
    ``initial_charges`` for calculators that find it there.  By default as is known of the calculator's class; a charge
    that then has no place is refused.  A `code` needs none."""

    spin_key: str | None = None
    """The parameter that takes the spin multiplicity 2S+1, likewise; ``info`` or ``initial_magmoms`` for calculators
    that find it there."""

    force_consistent: bool = True
    """Whether energies are the free energies whose derivatives the forces are, where the calculator gives them;
    otherwise its energies (in DFT with smearing, those extrapolated to no smearing)."""

    reuse: bool = False
    """Whether one calculator serves all labels of a worker, and a code begins with the density of the label before
    where atoms and cell are alike; faster, but a label may then depend on the labels before it, and a resumed run
    differ from an uninterrupted one."""

    scratch: Path | None = None
    """The folder in which workers have theirs for the files of programs, removed with them; by default that of
    temporary files."""

    keep_files: Literal["none", "failed", "all"] = "none"
    """Whose files a code leaves in `scratch`, in a folder for each label, named by its identity."""

    code_version: str = ""
    """Version of your calculator's code; change it to have structures labelled anew after changing the code."""

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if (self.code is None) == (self.calculator is None):
            raise ValueError("give either code (the name of a code) or calculator (module:Class).")
        if self.keep_files != "none" and self.scratch is None:
            raise ValueError("keep_files needs scratch, the folder that they are kept in.")
        if self.code is not None:
            check_settings(codes()[self.code], self)
            return self
        given = [name for name in _OF_CODES if getattr(self, name) != type(self).model_fields[name].default]
        if given:
            raise ValueError(
                f"{given[0]} belongs to a code; a calculator takes it among its parameters, or from structures."
            )
        return self

    def version(self) -> str:
        """The version of the installed package the calculator comes from, if it comes from one."""
        if self.code is not None:
            known = codes()[self.code]
            return f"{known.package} {_installed(known.package)}".strip() if known.package else ""
        package = self._named.split(":")[0].split(".")[0]
        distributions = sorted(set(importlib.metadata.packages_distributions().get(package, ())))
        return " ".join(f"{name} {importlib.metadata.version(name)}" for name in distributions)

    @property
    def state_keys(self) -> StateKeys:
        """Where the calculator takes charge and spin."""
        known = known_keys(self._named)
        return StateKeys(self.charge_key or known.charge, self.spin_key or known.spin)

    @property
    def _named(self) -> str:
        assert self.calculator is not None
        return self.calculator

    def files_below(self) -> Path | None:
        """The folder that workers have theirs in."""
        return self.scratch

    def identity(self) -> dict[str, Any]:
        """The settings that decide what a label is; not where and how fast it is calculated."""
        settings = super().identity()
        # What labels of earlier versions had no choice of adds nothing, so that they keep their identity.
        defaults = {name: type(self).model_fields[name].get_default() for name in _OF_LATER}
        dropped = {name for name, default in defaults.items() if getattr(self, name) == default} | _NO_MATTER
        settings = {name: value for name, value in settings.items() if name not in dropped}
        return {name: value for name, value in settings.items() if (name, value) != ("force_consistent", False)}

    def particulars(self, atoms: Atoms) -> dict[str, Any]:
        """Where the charge or spin of a structure that has them reaches the calculator, if no setting says so."""
        if self.code is not None:
            return {}
        keys = self.state_keys
        told = {}
        if self.charge_key is None and total_charge(atoms) != 0:
            told["charge_key"] = keys.charge
        if self.spin_key is None and multiplicity(atoms) != 1:
            told["spin_key"] = keys.spin
        return told

    def check(self, atoms: Atoms) -> None:
        """Refuses a charge or spin that would not reach the calculator, and what a code would get wrong."""
        if self.code is not None:
            check_structure(codes()[self.code], self, atoms)
            return
        check_state(atoms, self.state_keys, self.parameters, self._named)

    def with_grid_of(self, atoms: Atoms) -> CalculatorSettings:
        """With as many k-points as `kspacing` gives this structure."""
        grid = None if self.code is None or self.kspacing is None else grid_of(codes()[self.code], self, atoms)
        return self if grid is None else self.model_copy(update={"kspacing": None, "kpts": grid.size})

    def preview(self, atoms: Atoms) -> str:
        """The input of a code, and what would be run."""
        self.check(atoms)
        return super().preview(atoms) if self.code is None else preview_of_code(codes()[self.code], self, atoms)

    def build(self) -> LabelSource:
        """A function that labels with the calculator."""
        if self.code is not None:
            return build_code(codes()[self.code], self)
        factory = _load(self._named)
        scratch = Scratch(self.scratch)
        kept: dict[tuple[int, int], Any] = {}
        keys, named = self.state_keys, self.charge_key is not None or self.spin_key is not None

        def make(atoms: Atoms) -> Any:
            parameters = state_parameters(atoms, keys, self.parameters, always=named)
            calculator = factory(**parameters)
            if "directory" not in parameters:
                in_folder(calculator, scratch)
            return calculator

        def label(atoms: Atoms) -> Results:
            self.check(atoms)
            state = (total_charge(atoms), multiplicity(atoms))
            if state not in kept or not self.reuse:
                kept[state] = make(atoms)
            consistent, asked = self.force_consistent, self.asked_of(atoms)
            return calculated(with_state(atoms, keys), kept[state], force_consistent=consistent, further=asked)

        return label


_OF_CODES = (
    "command", "pseudopotentials", "data_dir", "kpts", "kspacing", "gamma_centred", "magnetic_moments", "keep_files"
)  # fmt: skip
"""Keys that a calculator has no use for."""

_OF_LATER = ("code", "calculator", *_OF_CODES, "scratch")
"""Keys that came after labels were stored first, and the one that they may stand in place of."""

_NO_MATTER = {"command", "data_dir", "scratch", "keep_files"}
"""Keys that say where and how fast labels are calculated."""


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def in_folder(calculator: Any, scratch: Scratch) -> None:
    """Lets a calculator that writes files do so in a folder, which lives as long as what holds it."""
    if hasattr(calculator, "directory"):  # of some classes of ASE it is a text, of others a path, and stays one
        own = isinstance(calculator.directory, Path)
        calculator.directory = scratch.folder if own else str(scratch.folder)


def calculated(atoms: Atoms, calculator: Any, *, force_consistent: bool, further: Sequence[str] = ()) -> Results:
    """What a calculator gives for a structure, with a stress where this is periodic in three directions.

    Args:
        atoms: the structure, which gets the calculator.
        calculator: of ASE.
        force_consistent: whether the energy is the free energy, where the calculator gives one.
        further: other properties that are wanted.

    Raises:
        LabelError: it did not converge, or does not give what is wanted.
    """
    atoms.calc = calculator
    energy, forces = atoms.get_potential_energy(), atoms.get_forces()
    if force_consistent:
        energy = _free_energy(atoms, energy)
    if not has_converged(calculator):
        raise LabelError("the calculator says that it has not converged")
    stress = None
    if atoms.pbc.all():
        try:
            stress = atoms.get_stress()
        except NotImplementedError:
            stress = None
    return Results(energy, forces, stress, {name: _property(atoms, calculator, name) for name in further})


def _property(atoms: Atoms, calculator: Any, name: str) -> Any:
    try:
        return calculator.get_property(name, atoms)
    except (NotImplementedError, AttributeError) as error:
        raise LabelError(f"the calculator gives no {name}; leave it out of oracle.targets") from error


def _free_energy(atoms: Atoms, energy: float) -> float:
    """The energy whose derivatives the forces are, or `energy` where the calculator gives no other."""
    try:
        free = atoms.get_potential_energy(force_consistent=True)
    except Exception:  # calculators refuse what they do not know in many ways; the energy itself is there already
        return energy
    return energy if free is None else free


_PARTS = ("calc", "calcs", "calculator", "calculators", "mixer", "scf")
"""Attributes under which calculators hold others, or what iterates to self-consistency."""


def has_converged(calculator: Any, depth: int = 3) -> bool:
    """Whether nothing in a calculator says that the last calculation did not converge.

    Some calculators raise; others, such as ASE's Vasp, only set ``converged`` to False, there or in their results.

    Args:
        calculator: after a calculation.
        depth: how deep in calculators made of others.
    """
    results = getattr(calculator, "results", None)
    said = [getattr(calculator, name, None) for name in _SAID]
    said += [results.get(name) for name in _SAID] if isinstance(results, Mapping) else []
    if any(isinstance(value, bool | np.bool_) and not value for value in said):
        return False
    if depth == 0:
        return True
    parts = [getattr(calculator, name, None) for name in _PARTS]
    inner = [one for part in parts for one in (part if isinstance(part, list | tuple) else [part])]
    return all(has_converged(one, depth - 1) for one in inner if one is not None)


_SAID = ("converged", "is_converged", "scf_converged", "scf_is_converged", "electronic_converged")


def _load(reference: str) -> Callable[..., Any]:
    module, _, path = reference.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for name in path.split("."):
            found = getattr(found, name)
    except Exception as error:  # importing user code may raise anything
        raise InputError(
            f"the calculator '{reference}' cannot be imported ({type(error).__name__}: {error}); "
            "give module:Class of something on the Python path."
        ) from error
    if not callable(found):
        raise InputError(f"the calculator '{reference}' is neither a class nor a function; give module:Class.")
    return found
