"""OpenMM driven by a potential: a ``PythonForce`` with energy and forces of the committee's mean.

OpenMM hands over the positions of the atoms that the force concerns, in nanometres, and is given kJ/mol.  It copies and
serialises a force by pickling what computes it, and that is also how the potential behind a force is found again.
"""

from __future__ import annotations

import operator
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast
from xml.etree import ElementTree

import numpy as np
from ase import Atoms

from almlip_jax.errors import InputError
from almlip_jax.potential import Potential
from almlip_jax.potential.following import Following
from almlip_jax.potential.states import completed_state
from almlip_jax.units import KJ_PER_MOL

if TYPE_CHECKING:
    from almlip_jax.compilation import Precision

_ANGSTROM_PER_NM = 10.0


def potential_force(
    potential: Potential,
    topology: Any,
    atoms: Sequence[int] | None = None,
    *,
    charge: int | None = None,
    spin: int | None = None,
    periodic: bool | None = None,
    precision: Precision | None = None,
    interaction: bool = False,
    skin: float = 0.5,
) -> Any:
    """An ``openmm.PythonForce`` of a potential, to be added to a ``System``.

    It acts between the atoms that it concerns alone.  Other forces of the system act on these atoms too: what a force
    field says about pairs of them is taken out by ``MLPotential.createMixedSystem`` (`openmm_ml`), not here.

    Args:
        potential: gives energy and forces.
        topology: ``openmm.app.Topology`` that says the elements.
        atoms: indices of the atoms it concerns, in any order; all of them where not given.
        charge: of these atoms together, e.
        spin: their multiplicity 2S+1.  Where charge and spin are not given, they are the ones that the potential has
            learned of, if these are the same for all it was trained on, and else those of a neutral singlet; a charge
            alone has the multiplicity of the only state of this charge that it has learned of.
        periodic: whether the atoms see each other across the faces of the box; where not given, whether the topology
            has one.
        precision: ``float32`` or ``float64``; that of the potential where not given.
        interaction: whether reference energies are left out of the energy.
        skin: Angstrom, by which lists of neighbours reach beyond the cutoff.

    Raises:
        InputError: OpenMM cannot do that, an atom has no element or one that the potential does not know, indices are
            wrong, or the potential has learned of other states only.
    """
    openmm = _openmm()
    template = _template(potential, topology, atoms, completed_state(potential.states_met, charge, spin))
    template.pbc[:] = topology.getPeriodicBoxVectors() is not None if periodic is None else periodic
    force = openmm.PythonForce(Computation(potential, template, precision, interaction, skin))
    if atoms is not None:
        force.setParticles([int(index) for index in atoms])
    force.setUsesPeriodicBoundaryConditions(bool(template.pbc.any()))
    force.setName("almlip")
    return force


class Computation:
    """What a ``PythonForce`` calls.

    Args:
        potential: gives energy and forces.
        template: elements, periodic directions, charge and spin of the atoms.
        precision: as for `potential_force`.
        interaction: likewise.
        skin: likewise.
    """

    def __init__(
        self, potential: Potential, template: Atoms, precision: Precision | None, interaction: bool, skin: float
    ) -> None:
        self._arguments = potential, template, precision, interaction, skin
        self.potential, self.template = potential, template
        self.following = Following(potential, skin, precision)
        self.offset = potential.reference_energy(template) if interaction else 0.0
        """eV that the energy leaves out."""

    def __reduce__(self) -> tuple[type[Computation], tuple[Any, ...]]:
        return Computation, self._arguments

    def __call__(self, state: Any) -> tuple[float, np.ndarray]:
        """Energy in kJ/mol and forces [N, 3] in kJ/mol/nm of the atoms that OpenMM hands over."""
        results = self.following(self.placed(state), "forces")
        forces = results["forces"] * (_ANGSTROM_PER_NM / KJ_PER_MOL)
        return (results["energy"] - self.offset) / KJ_PER_MOL, forces

    def placed(self, state: Any, particles: Sequence[int] | None = None) -> Atoms:
        """The atoms where a ``State`` says they are.

        Args:
            state: with positions.
            particles: which of its particles they are; all where not given.

        Raises:
            InputError: it holds another number of atoms.
        """
        from openmm import unit

        positions = state.getPositions(asNumpy=True).value_in_unit(unit.angstrom)
        positions = positions if particles is None else positions[list(particles)]
        atoms = self.template.copy()
        if len(positions) != len(atoms):
            raise InputError(
                f"OpenMM has {len(positions)} particles for a potential of {len(atoms)} atoms; make the force for the "
                "topology that the system has, or name its atoms."
            )
        atoms.positions = positions
        if atoms.pbc.any():
            atoms.set_cell(state.getPeriodicBoxVectors(asNumpy=True).value_in_unit(unit.angstrom))
        return atoms


@dataclass(frozen=True)
class Driven:
    """Atoms of a system that a potential drives.

    Attributes:
        computation: with potential and elements.
        particles: their indices; None where they are all.
    """

    computation: Computation
    particles: tuple[int, ...] | None


def driven(force: Any) -> Driven | None:
    """What a force drives by a potential; None where it is another force, or has no potential of ours."""
    if type(force).__name__ != "PythonForce":
        return None
    from openmm import XmlSerializer

    pickled = bytes.fromhex(ElementTree.fromstring(XmlSerializer.serialize(force)).get("function") or "")
    if __name__.encode() not in pickled:
        return None
    computation = pickle.loads(pickled)
    return Driven(computation, tuple(force.getParticles()) or None) if isinstance(computation, Computation) else None


def driven_in(system: Any) -> list[Driven]:
    """What potentials drive in a ``System``, also where collective variables hold them (interpolated systems)."""
    return [found for force in _forces(system) if (found := driven(force)) is not None]


def _forces(system: Any) -> Iterator[Any]:
    for force in system.getForces():
        yield force
        if type(force).__name__ == "CustomCVForce":
            yield from (force.getCollectiveVariable(number) for number in range(force.getNumCollectiveVariables()))


def _openmm() -> Any:
    """The package.

    Raises:
        InputError: it is not installed, or is too old.
    """
    try:
        import openmm
    except ImportError as error:
        raise InputError('OpenMM is not installed; install it with: pip install "almlip-jax[openmm]"') from error
    if not hasattr(getattr(openmm, "PythonForce", None), "setParticles"):
        raise InputError(
            f"OpenMM {openmm.__version__} has no forces in Python for part of the atoms; take 8.6 or newer."
        )
    return openmm


def _template(potential: Potential, topology: Any, atoms: Sequence[int] | None, state: dict[str, int]) -> Atoms:
    """Elements, charge and spin of the atoms that a force concerns."""
    every = list(topology.atoms())
    try:
        chosen = range(len(every)) if atoms is None else [operator.index(index) for index in atoms]
    except TypeError as error:
        raise InputError(
            f"atoms are named by their indices, not so ({error}); give whole numbers, as [0, 1, 2]."
        ) from error
    if len(chosen) == 0:
        raise InputError("there is no atom that the potential concerns; name some, or give none for all of them.")
    if len({*chosen}) != len(chosen):
        raise InputError("an atom is named twice among those that the potential concerns; name each once.")
    wrong = next((index for index in chosen if not 0 <= index < len(every)), None)
    if wrong is not None:
        raise InputError(f"there is no atom {wrong} among the {len(every)} of the topology; count from 0.")
    for index in chosen:
        if every[index].element is None:
            raise InputError(
                f"atom {index} ({every[index].name} of {every[index].residue.name}) has no element, and a potential "
                "knows nothing else; leave out virtual sites and the like."
            )
    template = Atoms(numbers=[cast(int, every[index].element.atomic_number) for index in chosen], info=state)
    strange = potential.strange_state(template)
    if strange is not None:
        raise InputError(strange)
    potential.check_elements([template], "the topology")
    return template
