"""Any ASE calculator as a label source, named ``module:Class`` in the config."""

from __future__ import annotations

import importlib
import importlib.metadata
import tempfile
from collections.abc import Callable
from typing import Any, Literal

from ase import Atoms
from pydantic import Field

from almlip_jax.errors import InputError
from almlip_jax.oracles.base import LabelSource, Results, SourceSettings, multiplicity, total_charge


class CalculatorSettings(SourceSettings):
    """Any ASE calculator: a class, or a function that returns a calculator.

    The structure reaches the calculator with its charge and spin in ``info``; calculators that take them as parameters
    get them through `charge_key` and `spin_key`.  Each worker process has a folder of its own for calculators that
    write files, unless the parameters name a ``directory``.
    """

    kind: Literal["ase"] = "ase"

    timeout: float = Field(default=3600.0, gt=0)
    """Longest time one label may take, in seconds; then its process is ended and the label has failed."""

    calculator: str = Field(pattern=r"^[\w.]+:[\w.]+$")
    """The class or function as ``module:name``, found on the Python path or in the working directory."""

    parameters: dict[str, Any] = {}
    """Keyword arguments of the class or function."""

    charge_key: str | None = None
    """The parameter that takes the total charge of a structure, in e; none by default."""

    spin_key: str | None = None
    """The parameter that takes the spin multiplicity 2S+1 of a structure; none by default."""

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

    def build(self) -> LabelSource:
        """A function that labels with the calculator."""
        factory = _load(self.calculator)
        folder = tempfile.TemporaryDirectory(prefix="almlip-label-")
        kept: dict[tuple[int, int], Any] = {}

        def make(charge: int, spin: int) -> Any:
            parameters = dict(self.parameters)
            if self.charge_key is not None:
                parameters[self.charge_key] = charge
            if self.spin_key is not None:
                parameters[self.spin_key] = spin
            calculator = factory(**parameters)
            if "directory" not in parameters and hasattr(calculator, "directory"):
                calculator.directory = folder.name
            return calculator

        def label(atoms: Atoms) -> Results:
            state = (total_charge(atoms), multiplicity(atoms))
            if state not in kept or not self.reuse:
                kept[state] = make(*state)
            atoms = atoms.copy()
            atoms.calc = kept[state]
            energy, forces = atoms.get_potential_energy(), atoms.get_forces()
            stress = None
            if atoms.pbc.all():
                try:
                    stress = atoms.get_stress()
                except NotImplementedError:
                    stress = None
            return Results(energy, forces, stress)

        return label


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
