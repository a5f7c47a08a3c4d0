"""A label source that a script holds in its hands: an ASE calculator, or a function of structures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
from ase import Atoms

from almlip_jax.errors import LabelError
from almlip_jax.oracles.base import LabelSource, Results, SourceSettings
from almlip_jax.oracles.sources.calculator import calculated
from almlip_jax.oracles.sources.electrons import check_untold
from almlip_jax.settings import Settings


class OwnSource(SourceSettings):
    """A calculator or a function, asked in the process that holds it, one structure after the other.

    What it gives is judged like the labels of any other source; nothing ends a calculation that takes too long.  Its
    kind has no default, so that it is none that a config could name.
    """

    in_process: ClassVar[bool] = True

    kind: Literal["own"]
    own: Any
    """The ASE calculator; or a function of a structure that gives the structure with a calculator, a calculator, or
    what functions of kind ``user`` give: ``(energy, forces)``, ``(energy, forces, stress)`` or ``(energy, forces,
    stress, others)``."""
    known_as: str
    """What labels are taken for: those of one name are the same."""
    charge_and_spin: bool = False
    """Whether charges and multiplicities reach it; structures that have some are refused otherwise."""

    def identity(self) -> dict[str, Any]:
        """The name."""
        return {"kind": self.kind, "known_as": self.known_as}

    def version(self) -> str:
        """None: the name has to say it."""
        return ""

    def check(self, atoms: Atoms) -> None:
        """Refuses a charge or spin that would not be looked at."""
        if not self.charge_and_spin:
            check_untold(atoms, "give charge_and_spin=True if your calculator or function takes them into account")

    def build(self) -> LabelSource:
        """A function that asks it."""

        def label(atoms: Atoms) -> Results:
            self.check(atoms)
            given = atoms.copy()
            return _results(self.own if _calculates(self.own) else self.own(given.copy()), given)

        return label


def is_own_source(given: Any) -> bool:
    """Whether a thing labels by itself, rather than being settings of what does."""
    if isinstance(given, Settings | Mapping | str | Atoms | type):
        return False
    return _calculates(given) or callable(given)


def _calculates(given: Any) -> bool:
    return hasattr(given, "get_potential_energy") and not isinstance(given, Atoms)


def _results(given: Any, atoms: Atoms) -> Results:
    """Energy, forces and stress of a structure, from whatever holds them.

    Raises:
        LabelError: nothing does, or they are those of another structure.
    """
    if _calculates(given):
        return calculated(atoms, given, force_consistent=True)
    if isinstance(given, Atoms):
        if given.calc is None:
            raise LabelError("the function gave a structure without a calculator, so that it has no energy")
        if not _alike(given, atoms):
            raise LabelError("the function gave another structure: its atoms, cell or positions differ")
        free = given.copy()
        free.set_constraint()  # which would take forces away
        return calculated(free, given.calc, force_consistent=True)
    if isinstance(given, tuple | list) and len(given) in (2, 3, 4):
        return Results(*given)
    raise LabelError(
        f"the function gave {type(given).__name__}, not a structure with a calculator, a calculator, (energy, forces), "
        "(energy, forces, stress) or (energy, forces, stress, others)"
    )


def _alike(one: Atoms, other: Atoms) -> bool:
    return (
        len(one) == len(other)
        and bool(np.all(one.numbers == other.numbers) and np.all(one.pbc == other.pbc))
        and np.allclose(one.positions, other.positions, rtol=0, atol=1e-6)
        and np.allclose(one.cell.array, other.cell.array, rtol=0, atol=1e-6)
    )
