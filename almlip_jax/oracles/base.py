"""What a label source is: settings that build a function from a structure to energy, forces and stress.

A source raises `LabelError` with the reason where it cannot label a structure; that reason becomes a row of the label
store.  What a source returns is judged here, so that garbage never becomes a label.
"""

from __future__ import annotations

import json
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from pydantic import Field

from almlip_jax.errors import InputError, LabelError
from almlip_jax.kinds import Spec
from almlip_jax.settings import unit
from almlip_jax.structures.electronic_state import initial_moments, multiplicity, total_charge, total_moment
from almlip_jax.targets import FurtherName, further_targets, has_target, targets


class Results(NamedTuple):
    """What a label source computed for a structure of N atoms.

    Attributes:
        energy: eV, total.
        forces: [N, 3] eV/Angstrom.
        stress: [6] eV/Angstrom^3 in ASE sign and Voigt order (xx yy zz yz xz xy), or None.
        further: what else, by the names that `targets` have in files, of their shapes, [N, ...] of atoms: the
            ``dipole`` [3] in e*Angstrom of a molecule, relative to the centre of mass (of standard masses) where it is
            an ion.
    """

    energy: float
    forces: np.ndarray
    stress: np.ndarray | None = None
    further: Mapping[str, np.ndarray] = MappingProxyType({})


IDENTITY_KEY = "label_identity"
"""Where structures that are labelled elsewhere carry their identity in ``info``."""

LONGEST_LABEL = 2e6
"""Seconds that one label may take at most: some three weeks, the most that the operating system can wait."""

LabelSource = Callable[[Atoms], Results]
"""A built label source: `Results` of a structure, or `LabelError`.  Earlier calls leave no trace in later ones."""


class SourceSettings(Spec):
    """Settings of every label source, whatever its kind.

    The fields declared here say how a label is obtained and judged, not what is calculated, and are therefore not part
    of a label's identity.
    """

    timeout: float = Field(default=600.0, gt=0, le=LONGEST_LABEL, json_schema_extra=unit("s"))
    """Longest time one label may take, in seconds; then its process is ended and the label has failed."""

    attempts: int = Field(default=1, ge=1, le=100)
    """How often a failing label is tried before it counts as failed; every try is a paid call."""

    max_force: float = Field(default=100.0, gt=0, le=1e6, json_schema_extra=unit("eV/Angstrom"))
    """A label with a force component beyond this bound, in eV/Angstrom, is garbage and has failed."""

    in_process: ClassVar[bool] = False
    """True for sources that only look labels up: they need no worker process."""

    drives_dynamics: ClassVar[bool] = True
    """True for sources that label any structure asked for, so that molecular dynamics can run on them."""

    version_binds: ClassVar[bool] = False
    """True where labels of another `version` never match those that are there: a campaign then goes on only if told
    that they may be mixed, and a worker that finds another version than its starter calculates nothing."""

    earlier_defaults: ClassVar[Mapping[str, Any]] = {}
    """What held in earlier versions for keys that their resolved configs do not have."""

    def gives(self, target: str) -> bool:
        """Whether labels may hold one of the `targets` that not every label has."""
        return False

    def identity(self) -> dict[str, Any]:
        """The settings that decide what a label is, as plain data; part of every label's identity."""
        return self.model_dump(mode="json", exclude=set(SourceSettings.model_fields))

    def particulars(self, atoms: Atoms) -> dict[str, Any]:
        """What else decides the label of this structure and follows from it, such as pseudopotentials of its elements.

        Part of the label's identity where it is not empty.
        """
        return {}

    def check(self, atoms: Atoms) -> None:
        """Refuses a structure that the source would get wrong, without calculating anything.

        Raises:
            LabelError: says why, and what to do.
        """

    def bound_to(self) -> str | None:
        """The `version` that labels are bound to; None where a change is only reported."""
        return self.version() if self.version_binds else None

    def with_grid_of(self, atoms: Atoms) -> SourceSettings:
        """These settings with the k-points that they give this structure, for others whose cells differ a little."""
        return self

    def asks(self) -> tuple[SourceSettings, ...]:
        """The label sources that this one asks in turn; none for those that calculate by themselves."""
        return ()

    def files_below(self) -> Path | None:
        """The folder in which workers have theirs, for the files of programs; None for that of temporary files."""
        return None

    def preview(self, atoms: Atoms) -> str:
        """What would be calculated for a structure, for a reader; nothing is calculated.

        Raises:
            LabelError: the structure would be refused.
        """
        self.check(atoms)
        settings = json.dumps({"kind": self.kind, **self.identity(), **self.particulars(atoms)}, indent=2)
        state = f"charge {total_charge(atoms)}, multiplicity {multiplicity(atoms)}"
        return f"{atoms.get_chemical_formula()}, {state}, by {self.version() or self.kind}:\n{settings}"

    def delivery(self) -> Delivery | None:
        """What has arrived, of a source whose labels are made elsewhere; None where they are calculated here.

        Raises:
            InputError: what has arrived cannot be read.
        """
        return None

    @abstractmethod
    def version(self) -> str:
        """The version of the code or data behind the source; part of every label's identity.

        Raises:
            InputError: the code or data is not there.
        """

    @abstractmethod
    def build(self) -> LabelSource:
        """The source as a function; called once in every worker process.

        Raises:
            InputError: the source cannot be used with these settings.
        """


class SourceOfTargets(SourceSettings):
    """Settings of a label source that is told what else to label."""

    targets: tuple[FurtherName, ...] = ()
    """What labels hold besides energies, forces and stresses, as ``[dipole]``; a label without it has failed."""

    def gives(self, target: str) -> bool:
        """What is asked for."""
        return target in self.targets

    def identity(self) -> dict[str, Any]:
        """The settings that decide what a label is; without anything else those of labels that hold no more."""
        settings = super().identity()
        return {name: value for name, value in settings.items() if name != "targets" or value}

    def asked_of(self, atoms: Atoms) -> tuple[str, ...]:
        """Names in results of what the label of a structure has to hold besides."""
        return tuple(one.label for one in targets(self.targets) if has_target(atoms, one))


class PendingLabels(RuntimeError):
    """Labels are being made elsewhere: the run has to stop, and can go on when the results are there.

    Attributes:
        requested: the file that holds the structures to label.
        results: the folder that the labelled file belongs into.
        count: number of structures without a label.
    """

    def __init__(self, requested: Path, results: Path, count: int, remark: str = "") -> None:
        self.requested, self.results, self.count = requested, results, count
        super().__init__(
            f"{count} structure(s) wait for labels from elsewhere: label the frames of {requested} (keep "
            f"info['{IDENTITY_KEY}'] if you can), put the labelled file into {results}, and resume.{remark}"
        )


class Delivery(Protocol):
    """Labels that were made elsewhere and have arrived."""

    def label(self, identity: str, atoms: Atoms) -> Label | None:
        """The label of a structure, its atoms in the structure's order; None where it has not arrived.

        Raises:
            InputError: what has arrived under this identity is another structure.
        """
        ...

    def request(self, missing: Sequence[tuple[str, Atoms]], known: Iterable[Atoms]) -> PendingLabels:
        """Asks for labels, and gives the signal to raise.

        Args:
            missing: identities with their structures; the same ones ask only once.
            known: structures that have their labels.
        """
        ...


def check_electrons(atoms: Atoms) -> None:
    """Refuses a structure whose number of electrons or whose magnetic moments do not allow its multiplicity.

    Raises:
        LabelError: names charge, spin and the number of electrons.
    """
    electrons = int(np.sum(atoms.numbers)) - total_charge(atoms)
    if electrons < 1 or (electrons - multiplicity(atoms) + 1) % 2:
        raise LabelError(
            f'{electrons} electrons (info["charge"] {total_charge(atoms)}) cannot have the multiplicity '
            f'info["spin"] = {multiplicity(atoms)}; correct charge or spin'
        )
    check_moments(atoms)


def check_moments(atoms: Atoms) -> None:
    """Refuses a structure whose initial magnetic moments do not add up to its multiplicity.

    Raises:
        LabelError: says both.
    """
    total = total_moment(atoms)
    if initial_moments(atoms) is not None and abs(total - (multiplicity(atoms) - 1)) > 0.01:
        raise LabelError(
            f"the initial magnetic moments add up to {total:g} unpaired electrons, which contradicts the "
            f'multiplicity info["spin"] = {multiplicity(atoms)}; correct one of them'
        )


def bare(atoms: Atoms) -> Atoms:
    """The part of a structure that a label depends on.

    Species, positions, cell, pbc, charge, spin, and initial magnetic moments where there are any.
    """
    info = {"charge": total_charge(atoms), "spin": multiplicity(atoms)}
    return Atoms(
        numbers=atoms.numbers,
        positions=np.asarray(atoms.positions, np.float64),
        cell=np.asarray(atoms.cell.array, np.float64),
        pbc=atoms.pbc,
        magmoms=initial_moments(atoms),
        info=info,
    )


@dataclass(frozen=True)
class Label:
    """The label of a structure, or the reason there is none.

    Attributes:
        identity: of the structure under the label source, see `structure_identity`.
        energy: eV, or None where the label failed.
        forces: [N, 3] eV/Angstrom, or None where the label failed.
        stress: [6] eV/Angstrom^3, ASE sign and Voigt order, or None.
        further: other labels by name, see `Results`.
        error: why the label failed, or None.
        seconds: that the calculation took.
        calls: of the label source that were made for it.
    """

    identity: str
    energy: float | None = None
    forces: np.ndarray | None = None
    stress: np.ndarray | None = None
    error: str | None = None
    seconds: float = 0.0
    calls: int = 1
    further: Mapping[str, np.ndarray] = field(default_factory=dict)

    def attach(self, atoms: Atoms) -> Atoms:
        """A copy of a structure that carries this label in a `SinglePointCalculator`.

        Raises:
            LabelError: the label failed.
        """
        if self.error is not None:
            raise LabelError(self.error)
        labelled = atoms.copy()
        stress = {} if self.stress is None else {"stress": self.stress}
        labelled.calc = SinglePointCalculator(labelled, energy=self.energy, forces=self.forces, **stress)
        further = {name: value if np.ndim(value) else float(value) for name, value in self.further.items()}
        labelled.calc.results.update(further)
        return labelled


def obtain_label(source: LabelSource, settings: SourceSettings, atoms: Atoms, identity: str) -> Label:
    """Asks a label source once and judges what it says; every way to fail becomes a failed label.

    Args:
        source: built from the settings.
        settings: hold the bounds.
        atoms: the structure.
        identity: of the label.
    """
    start = time.perf_counter()
    try:
        if not np.all(np.isfinite(atoms.positions)):
            raise LabelError("the structure has positions that are not finite")
        results = judged(source(atoms), len(atoms), settings.max_force)
    except Exception as error:  # a label source may raise anything; the reason is kept in the store
        return Label(identity, error=_one_line(reason_of(error)), seconds=time.perf_counter() - start)
    seconds = time.perf_counter() - start
    return Label(identity, results.energy, results.forces, results.stress, seconds=seconds, further=results.further)


def reason_of(error: Exception) -> str:
    """Why a label failed, as its row of the store says it: what is no sentence of ours says what it is."""
    return str(error) if isinstance(error, LabelError | InputError) else f"{type(error).__name__}: {error}"


def judged(results: Results, num_atoms: int, max_force: float) -> Results:
    """The results as float64, if they can be a label.

    Raises:
        LabelError: no `Results`, a wrong shape, a value that is not finite, or a force beyond `max_force`
            (eV/Angstrom).
    """
    if not isinstance(results, Results):
        raise LabelError(
            f"the label source returned a {type(results).__name__}; what build() gives has to return Results(energy, "
            "forces, stress), of almlip_jax.oracles"
        )
    try:
        energy = float(results.energy)
        forces = np.array(results.forces, np.float64)
        stress = None if results.stress is None else np.array(results.stress, np.float64)
        further = {name: np.array(value, np.float64) for name, value in results.further.items()}
    except (TypeError, ValueError) as error:
        raise LabelError(f"the label source returned something that is not numbers: {error}") from error
    if forces.shape != (num_atoms, 3):
        raise LabelError(f"the label source returned forces of shape {forces.shape} for {num_atoms} atoms")
    if stress is not None and stress.shape != (6,):
        raise LabelError(f"the label source returned a stress of shape {stress.shape}, not (6,)")
    if not np.isfinite(energy):
        raise LabelError(f"the label source returned the energy {energy}")
    if not np.all(np.isfinite(forces)) or (stress is not None and not np.all(np.isfinite(stress))):
        raise LabelError("the label source returned forces or a stress that are not finite")
    for target in further_targets():
        shape = target.shape_of(num_atoms)
        value = further.get(target.label)
        if value is not None and (value.shape != shape or not np.all(np.isfinite(value))):
            raise LabelError(f"the label source returned {target.one} that is not {shape} finite numbers")
    largest = float(np.max(np.abs(forces), initial=0.0))
    if largest > max_force:
        raise LabelError(f"a force component of {largest:.3g} eV/A exceeds max_force = {max_force:g} eV/A")
    return Results(energy, forces, stress, further)


def _one_line(reason: str) -> str:
    return " ".join(reason.split())[:500] or "no reason given"
