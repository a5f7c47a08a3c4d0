"""A label source of the user's own: a factory, named ``module:function``, of what labels a structure."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import os
from collections.abc import Callable
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any, ClassVar, Literal

from ase import Atoms
from pydantic import Field

from almlip_jax.errors import InputError, LabelError
from almlip_jax.kinds import UserCode
from almlip_jax.oracles.base import LONGEST_LABEL, LabelSource, Results, SourceOfTargets
from almlip_jax.oracles.scratch import Scratch
from almlip_jax.oracles.sources.calculator import calculated, in_folder
from almlip_jax.oracles.sources.electrons import check_untold
from almlip_jax.settings import unit


class UserSourceSettings(UserCode, SourceOfTargets):
    """A user's own factory ``(**parameters)``, called in every label worker.

    It gives a function of an `ase.Atoms` that returns ``(energy, forces)``, ``(energy, forces, stress)`` or ``(energy,
    forces, stress, others)`` in eV, eV/Angstrom and eV/Angstrom^3 (ASE's sign and order; or None), the others being
    what `targets` ask for, by name; or an ASE calculator.  An exception is a failed label.
    """

    kind: Literal["user"] = "user"

    version_binds: ClassVar[bool] = True

    timeout: float = Field(default=3600.0, gt=0, le=LONGEST_LABEL, json_schema_extra=unit("s"))
    """Longest time one label may take, in seconds; then its process is ended and the label has failed."""

    code_version: str = ""
    """Version of your code: labels of one version are taken for the same.  By default a digest of the source of its
    module, or of the whole package that this is in, stands for it, without what it imports from elsewhere."""

    charge_and_spin: bool = False
    """Whether it looks at ``info["charge"]`` (e) and ``info["spin"]`` (2S+1); structures with a charge or of a
    multiplicity other than 1 are refused otherwise."""

    reuse: bool = False
    """Whether an ASE calculator that the factory gives serves all labels of a worker; by default the factory is called
    for each of them, so that no label depends on those before it."""

    def identity(self) -> dict[str, Any]:
        """The settings that decide what a label is."""
        return {name: value for name, value in super().identity().items() if name != "charge_and_spin"}

    def version(self) -> str:
        """A digest of the source where no version is given."""
        return "" if self.code_version else source_digest(self.function.partition(":")[0].partition(".")[0])

    def check(self, atoms: Atoms) -> None:
        """Refuses a charge or spin that would not be looked at."""
        if not self.charge_and_spin:
            taken = f"{self.function} takes them from info['charge'] and info['spin']"
            check_untold(atoms, f"set oracle.charge_and_spin to true if {taken}")

    def check_code(self) -> None:
        """Nothing here: what may not be installed where campaigns run is imported by workers (`Labeller.prepare`)."""

    def build(self) -> LabelSource:
        """A function that labels with what the factory gives."""
        made = self.call()
        calculates = hasattr(made, "get_potential_energy")
        if not calculates and not callable(made):
            raise InputError(
                f"'{self.function}' must return a function of structures or an ASE calculator, but returns a "
                f"{type(made).__name__}."
            )
        ask = self._calculator(made) if calculates else self._function(made)

        def label(atoms: Atoms) -> Results:
            self.check(atoms)
            return ask(atoms)

        return label

    def _function(self, function: Callable[[Atoms], Any]) -> LabelSource:
        def label(atoms: Atoms) -> Results:
            """What the function gives, checked."""
            given = function(atoms.copy())
            if not isinstance(given, tuple | list) or len(given) not in (2, 3, 4):
                raise LabelError(
                    f"'{self.function}' gave a function that returned no (energy, forces), (energy, forces, stress) or "
                    "(energy, forces, stress, others)"
                )
            results = Results(*given)
            for name in self.asked_of(atoms):
                if name not in results.further:
                    raise LabelError(f"'{self.function}' gave a function that returned no {name} among the others")
            return results

        return label

    def _calculator(self, first: Any) -> LabelSource:
        scratch = Scratch()
        ready = [first]

        def label(atoms: Atoms) -> Results:
            calculator = ready[0] if self.reuse else (ready.pop() if ready else self.call())
            if "directory" not in self.parameters:
                in_folder(calculator, scratch)
            return calculated(atoms.copy(), calculator, force_consistent=True, further=self.asked_of(atoms))

        return label


@functools.cache
def source_digest(package: str) -> str:
    """SHA-256 of the Python source of a module or package that lies on the Python path or in the working directory.

    Once found it holds for this process: what a module is when it is imported later is another matter.

    Raises:
        InputError: there is none.
    """
    importlib.invalidate_caches()
    spec = _spec(package)
    if spec is not None and spec.submodule_search_locations is not None:
        files = [(Path(place), file) for place in spec.submodule_search_locations for file in Path(place).rglob("*.py")]
    else:
        files = [(Path(spec.origin).parent, Path(spec.origin))] if spec is not None and spec.has_location else []  # type: ignore[arg-type]
    if not files:
        raise InputError(f"the source of '{package}' cannot be found; is its folder on PYTHONPATH?")
    digest = hashlib.sha256()
    for folder, file in sorted(files):
        digest.update(file.relative_to(folder).as_posix().encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _spec(package: str) -> ModuleSpec | None:
    try:
        found = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        found = None
    return found or PathFinder.find_spec(package, [os.getcwd()])
