"""Targets: what labels hold and models predict, each declared once, with its name, shape, unit and symmetry.

Packed data, the weights of labels, residuals, loss, label store, files, metrics, evaluations, scores and the calculator
iterate over declarations.  Every model gives the energy and what is derived from it; what else a model gives, it says
by `models.base.Model.targets`.  `declare` adds a target; other packages do so in the modules of their entry points
(`almlip_jax.kinds`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

from ase import Atoms

from almlip_jax.kinds import load_plugins
from almlip_jax.names import Known


@dataclass(frozen=True)
class Target:
    """Something that labels hold.

    Attributes:
        name: in predictions, packed data and the settings of the loss.
        unit: A is the Angstrom; empty for a plain number.
        label: name in files and in a calculator's results, the same where not given.
        meaning: in a few words.
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
    label: str = ""
    meaning: str = ""
    per: Literal["structure", "atom"] = "structure"
    shape: tuple[int, ...] = ()
    symmetry: Literal["scalar", "vector", "tensor"] = "scalar"
    derived_from: str | None = None
    structures: Literal["all", "periodic", "open"] = "all"
    by_atoms: bool = False
    weight: float = 1.0
    delta: float = 0.01

    def __post_init__(self) -> None:
        if not self.label:
            object.__setattr__(self, "label", self.name)

    @property
    def basic(self) -> bool:
        """Whether every model gives it."""
        return self.name == "energy" or self.derived_from == "energy"

    @property
    def owners(self) -> str:
        """The structures that have it, in words."""
        directions = {"periodic": " that are periodic in three directions", "open": " that are periodic in none"}
        return f"structures{directions.get(self.structures, '')}"

    @property
    def one(self) -> str:
        """The name with its article: a dipole, an octupole, charges."""
        return self.name if self.name.endswith("s") else f"{'an' if self.name[0] in 'aeiou' else 'a'} {self.name}"

    @property
    def many(self) -> str:
        """The name in the plural: dipoles, charges."""
        return self.name if self.name.endswith("s") else f"{self.name}s"

    @property
    def written(self) -> str:
        """The unit as settings write it: e*Angstrom."""
        return self.unit.replace("A", "Angstrom")

    @property
    def shown(self) -> str:
        """The unit of a thousandth, in which errors are shown."""
        return f"m{self.unit}" if self.unit else "1e-3"

    def shape_of(self, atoms: int) -> tuple[int, ...]:
        """The shape of the label of a structure of that many atoms."""
        return self.shape if self.per == "structure" else (atoms, *self.shape)


DIPOLE = Target(
    "dipole",
    "e*A",
    meaning="dipole of a molecule, of an ion relative to its centre of mass",
    shape=(3,),
    symmetry="vector",
    structures="open",
    delta=0.05,
)

_TARGETS = {
    one.name: one
    for one in (
        Target("energy", "eV", by_atoms=True),
        Target("forces", "eV/A", "", "", "atom", (3,), "vector", derived_from="energy", delta=0.1),
        Target("virial", "eV", "stress", "", "structure", (3, 3), "tensor", "energy", "periodic", by_atoms=True),
        DIPOLE,
    )
}

_NOT_LABELS = frozenset(
    ("pbc", "cell", "species", "symbols", "numbers", "positions", "pos", "momenta", "masses", "tags", "move_mask")
    + ("charge", "spin", "group", "config_type", "weight", "free_energy", "energies", "virials", "stresses", "kind")
)
"""What stands in files under these names is something else."""


def declare(*given: Target) -> None:
    """Makes targets known, and with each the scores of its spread among the members (`scores.spreads`).

    Declaring one again unchanged, as when a cell of a notebook runs twice, is allowed.

    Raises:
        ValueError: a name is taken by another target, is not a valid name, or what is said of a target does not go
            together.
    """
    from almlip_jax.scores import declare as declare_scores
    from almlip_jax.scores import spreads

    for target in given:
        if _TARGETS.get(target.name) != target:
            _check(target)
            declare_scores(*spreads(target))
            _TARGETS[target.name] = target


def _check(target: Target) -> None:
    for name in (target.name, target.label):
        taken = {known for one in _TARGETS.values() for known in (one.name, one.label)}
        if name in taken:
            raise ValueError(f"there is another target '{name}'.")
        if not name.isidentifier() or name.lower() in _NOT_LABELS:
            raise ValueError(f"'{name}' cannot be the name of a target; choose another one.")
    if target.basic:
        raise ValueError(f"target '{target.name}' cannot be derived from the energy: the models give it themselves.")
    if target.by_atoms and target.per == "atom":
        raise ValueError(f"target '{target.name}' belongs to atoms, so that by_atoms has no meaning.")


def adopt(known: Iterable[Target]) -> None:
    """Takes the targets of another process for all that there are, without importing what declares them."""
    global _adopted
    _TARGETS.update({one.name: one for one in known})
    _adopted = True


_adopted = False


def targets(names: Collection[str] | None = None) -> tuple[Target, ...]:
    """All declared targets, or those of some names, in the order of their declaration."""
    if not _adopted:
        load_plugins()
    return tuple(one for one in _TARGETS.values() if names is None or one.name in names)


def further_targets() -> tuple[Target, ...]:
    """Those that not every model gives."""
    return tuple(one for one in targets() if not one.basic)


def with_further(names: Iterable[str]) -> tuple[str, ...]:
    """Names of the targets of a model that gives some besides those that every model gives."""
    further = set(names)
    return tuple(one.name for one in targets() if one.basic or one.name in further)


def target_named(label: str) -> Target | None:
    """The further target of that name in files."""
    return next((one for one in further_targets() if one.label == label), None)


def label_names() -> tuple[str, ...]:
    """What a label may hold: ``energy`` eV, ``forces`` eV/Angstrom, ``stress`` eV/Angstrom^3, and others."""
    return tuple(one.label for one in targets())


def target_errors() -> dict[str, Target]:
    """Name of each error of a target (``forces_rmse``, over its components) -> the target."""
    return {f"{one.label}_{kind}": one for one in targets() for kind in ("mae", "rmse")}


FurtherName: TypeAlias = Annotated[str, Known("target", lambda: tuple(one.name for one in further_targets()))]
"""A target that not every model gives."""


def has_target(structure: Atoms, target: Target) -> bool:
    """Whether a structure is one of those that a target belongs to."""
    if target.structures == "periodic":
        return bool(structure.pbc.all())
    return target.structures == "all" or not structure.pbc.any()
