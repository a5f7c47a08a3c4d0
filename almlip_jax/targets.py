"""Targets: what labels hold and models predict, each declared once, with its name, shape, unit and symmetry.

Packed data, the weights of labels, residuals, loss, label store, files, metrics, evaluations and the calculator iterate
over declarations.  Every model gives the energy and what is derived from it; what else a model gives, it says by
`models.base.Model.targets`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Final, Literal

from ase import Atoms


@dataclass(frozen=True)
class Target:
    """Something that labels hold.

    Attributes:
        name: in predictions, packed data and the settings of the loss.
        unit: A is the Angstrom.
        label: name in files and in a calculator's results, where it is another one.
        per: whose it is.
        shape: of one.
        symmetry: how it turns with the structure.
        derived_from: the target whose derivative it is, if it is one.
        structures: which have it: all, those that are periodic in three directions, or those that are in none.
        by_atoms: whether its residual is judged per atom of the structure.
        weight: of its mean penalty in the loss, where settings do not say another.
        delta: with Huber penalties, residual beyond which they are linear; likewise.
    """

    name: str
    unit: str
    label: str
    per: Literal["structure", "atom"] = "structure"
    shape: tuple[int, ...] = ()
    symmetry: Literal["scalar", "vector", "tensor"] = "scalar"
    derived_from: str | None = None
    structures: Literal["all", "periodic", "open"] = "all"
    by_atoms: bool = False
    weight: float = 1.0
    delta: float = 0.01

    @property
    def basic(self) -> bool:
        """Whether every model gives it."""
        return self.name == "energy" or self.derived_from == "energy"

    @property
    def owners(self) -> str:
        """The structures that have it, in words."""
        directions = {"periodic": " that are periodic in three directions", "open": " that are periodic in none"}
        return f"structures{directions.get(self.structures, '')}"


_DECLARED = (
    Target("energy", "eV", "energy", by_atoms=True),
    Target("forces", "eV/A", "forces", "atom", (3,), "vector", derived_from="energy", delta=0.1),
    Target("virial", "eV", "stress", "structure", (3, 3), "tensor", "energy", structures="periodic", by_atoms=True),
    Target("dipole", "e*A", "dipole", shape=(3,), symmetry="vector", structures="open", delta=0.05),
)
_TARGETS = {one.name: one for one in _DECLARED}

TARGET_ERRORS: Final = {f"{one.label}_{kind}": one for one in _DECLARED for kind in ("mae", "rmse")}
"""Name of each error of a target (``forces_rmse``, over its components) -> the target."""


def targets(names: Collection[str] | None = None) -> tuple[Target, ...]:
    """All declared targets, or those of some names, in the order of their declaration."""
    return tuple(one for one in _TARGETS.values() if names is None or one.name in names)


def further_targets() -> tuple[Target, ...]:
    """Those that not every model gives."""
    return tuple(one for one in _TARGETS.values() if not one.basic)


def with_further(names: Iterable[str]) -> tuple[str, ...]:
    """Names of the targets of a model that gives some besides those that every model gives."""
    further = set(names)
    return tuple(name for name, one in _TARGETS.items() if one.basic or name in further)


def has_target(structure: Atoms, target: Target) -> bool:
    """Whether a structure is one of those that a target belongs to."""
    if target.structures == "periodic":
        return bool(structure.pbc.all())
    return target.structures == "all" or not structure.pbc.any()
