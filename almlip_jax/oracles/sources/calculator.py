"""Any ASE calculator as a label source, named ``module:Class`` in the config."""

from __future__ import annotations

import importlib
import importlib.metadata
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from ase import Atoms
from pydantic import Field

from almlip_jax.errors import InputError, LabelError
from almlip_jax.oracles.base import LONGEST_LABEL, LabelSource, Results, SourceOfTargets
from almlip_jax.oracles.sources.electrons import (
    StateKeys,
    check_state,
    known_keys,
    state_parameters,
    with_state,
)
from almlip_jax.settings import unit
from almlip_jax.structures.electronic_state import multiplicity, total_charge


class CalculatorSettings(SourceOfTargets):
    """Any ASE calculator: a class, or a function that returns a calculator.

    The structure reaches the calculator with its initial magnetic moments, and with charge and spin in ``info`` and
    where the calculator takes them (`charge_key`, `spin_key`); a charge or spin that it would not take is refused.
    Each worker process has a folder of its own for calculators that write files, unless the parameters name a
    ``directory``.  What `targets` ask for is a property of the calculator, under the name that it has in files.
    """

    kind: Literal["ase"] = "ase"

    earlier_defaults: ClassVar[Mapping[str, Any]] = {"force_consistent": False}

    timeout: float = Field(default=3600.0, gt=0, le=LONGEST_LABEL, json_schema_extra=unit("s"))
    """Longest time one label may take, in seconds; then its process is ended and the label has failed."""

    calculator: str = Field(pattern=r"^[\w.]+:[\w.]+$")
    """The class or function as ``module:name``, found on the Python path or in the working directory."""

    parameters: dict[str, Any] = {}
    """Keyword arguments of the class or function."""

    charge_key: str | None = None
    """The parameter that takes the total charge of a structure, in e (dotted where it lies within another); ``info`` or
    ``initial_charges`` for calculators that find it there.  By default as is known of the calculator's class; a charge
    that then has no place is refused."""

    spin_key: str | None = None
    """The parameter that takes the spin multiplicity 2S+1, likewise; ``info`` or ``initial_magmoms`` for calculators
    that find it there."""

    force_consistent: bool = True
    """Whether energies are the free energies whose derivatives the forces are, where the calculator gives them;
    otherwise its energies (in DFT with smearing, those extrapolated to no smearing)."""

    reuse: bool = False
    """Whether one calculator serves all labels of a worker; faster to set up, but a label may then depend on the labels
    before it (wavefunctions kept between calls), and a resumed run differ from an uninterrupted one."""

    code_version: str = ""
    """Version of your calculator's code; change it to have structures labelled anew after changing the code."""

    def version(self) -> str:
        """The version of the installed package the calculator comes from, if it comes from one."""
        package = self.calculator.split(":")[0].split(".")[0]
        distributions = sorted(set(importlib.metadata.packages_distributions().get(package, ())))
        return " ".join(f"{name} {importlib.metadata.version(name)}" for name in distributions)

    @property
    def state_keys(self) -> StateKeys:
        """Where the calculator takes charge and spin."""
        known = known_keys(self.calculator)
        return StateKeys(self.charge_key or known.charge, self.spin_key or known.spin)

    def identity(self) -> dict[str, Any]:
        """The settings that decide what a label is."""
        # Energies were what the calculator calls so before there was a choice; their labels keep their identity.
        settings = super().identity()
        return {name: value for name, value in settings.items() if (name, value) != ("force_consistent", False)}

    def particulars(self, atoms: Atoms) -> dict[str, Any]:
        """Where the charge or spin of a structure that has them reaches the calculator, if no setting says so."""
        keys = self.state_keys
        told = {}
        if self.charge_key is None and total_charge(atoms) != 0:
            told["charge_key"] = keys.charge
        if self.spin_key is None and multiplicity(atoms) != 1:
            told["spin_key"] = keys.spin
        return told

    def check(self, atoms: Atoms) -> None:
        """Refuses a charge or spin that would not reach the calculator."""
        check_state(atoms, self.state_keys, self.parameters, self.calculator)

    def build(self) -> LabelSource:
        """A function that labels with the calculator."""
        factory = _load(self.calculator)
        folder = tempfile.TemporaryDirectory(prefix="almlip-label-")
        kept: dict[tuple[int, int], Any] = {}
        keys, named = self.state_keys, self.charge_key is not None or self.spin_key is not None

        def make(atoms: Atoms) -> Any:
            parameters = state_parameters(atoms, keys, self.parameters, always=named)
            calculator = factory(**parameters)
            if "directory" not in parameters:
                in_folder(calculator, folder)
            return calculator

        def label(atoms: Atoms) -> Results:
            self.check(atoms)
            state = (total_charge(atoms), multiplicity(atoms))
            if state not in kept or not self.reuse:
                kept[state] = make(atoms)
            consistent, asked = self.force_consistent, self.asked_of(atoms)
            return calculated(with_state(atoms, keys), kept[state], force_consistent=consistent, further=asked)

        return label


def in_folder(calculator: Any, folder: tempfile.TemporaryDirectory[str]) -> None:
    """Lets a calculator that writes files do so in a folder, which lives as long as what holds it."""
    if hasattr(calculator, "directory"):  # of some classes of ASE it is a text, of others a path, and stays one
        own = isinstance(calculator.directory, Path)
        calculator.directory = Path(folder.name) if own else folder.name


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
