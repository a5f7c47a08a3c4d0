"""LAMMPS driven by a potential: what its ``fix external`` asks for at each step.

LAMMPS hands over the atoms it holds, in any order and any image, and is given energy, forces and virial of the
committee's mean; the scores of the committee and what its members say stand in the vector of the fix, for `fix halt`,
`thermo_style` and variables, and scores of atoms in per-atom properties, for dumps and computes.
"""

from __future__ import annotations

import ctypes
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.data import atomic_masses, atomic_numbers, chemical_symbols

from almlip_jax.errors import InputError
from almlip_jax.interfaces.columns import Gathered, columns
from almlip_jax.interfaces.lammps_memory import LammpsMemory
from almlip_jax.interfaces.lammps_text import HANDED, computes_of_atoms
from almlip_jax.potential import Potential
from almlip_jax.potential.answers import Answer, of_atoms
from almlip_jax.potential.following import Following, given_scores, reads_positions
from almlip_jax.potential.states import completed_state
from almlip_jax.scores import atom_scores
from almlip_jax.structures.followed import cell_volume
from almlip_jax.structures.species import SpeciesTable
from almlip_jax.units import KCAL_PER_MOL

_ENERGY_UNITS = {"metal": 1.0, "real": KCAL_PER_MOL}  # eV; both have Angstrom
_SAME_MASS = 0.1  # amu, of an element and a type of atoms
_COMPUTES = re.compile(r"^Compute\[\s*\d+\]:\s+(\S+),\s+style = ([^\s,]+),", re.MULTILINE)
_VOIGT = np.array([0, 1, 2, 5, 4, 3])  # xx yy zz yz xz xy of ASE, as xx yy zz xy xz yz


@dataclass(frozen=True)
class Coupling:
    """How a potential stands in LAMMPS.

    Attributes:
        fix: ID of the ``fix external``; it is defined where there is none.
        group: atoms that the potential sees and acts on; the others belong to the pair style alone.
        elements: element of each type of atoms, from type 1 on; where not given, type labels that are elements say it,
            or else masses.  Types that no atom of the group has may be anything.
        per_atom: results of atoms (`PotentialCalculator`) that become per-atom properties of the fix; ``energies``
            are handed to ``compute pe/atom`` too, and cost a second forward pass; ``stresses`` are handed to
            ``compute stress/atom`` alone, and cost a second evaluation.
        charge: e, of all that the potential sees.
        spin: its multiplicity 2S+1.  Where charge and spin are not given, they are the ones that the potential has
            learned of, if these are the same for all it was trained on, and else those of a neutral singlet; a charge
            alone has the multiplicity of the only state of this charge that it has learned of.
        skin: Angstrom, by which lists of neighbours reach beyond the cutoff.
        share: whether the cores of a CPU share out the members (`Following`); where not given, if they have work
            enough: four `medium` ones for 64 atoms, but not `tiny` ones.
    """

    fix: str = "almlip"
    group: str = "all"
    elements: Sequence[str] | None = None
    per_atom: Sequence[str] = ("force_std",)
    charge: int | None = None
    spin: int | None = None
    skin: float = 0.5
    share: bool | None = None


Observer = Callable[[int, Atoms, Mapping[str, Any]], None]
"""Called after each evaluation with the step, the atoms in order of their IDs, and the results.

The next step moves these atoms, and results are taken out as they are asked for: keep a copy (``atoms.copy()``,
``dict(results)``), not the ones that are given.
"""


def attach(
    lmp: Any,
    potential: Potential,
    coupling: Coupling | None = None,
    observe: Observer | None = None,
) -> AttachedPotential:
    """Lets a potential drive atoms of LAMMPS, in addition to whatever pair style and fixes there are.

    Args:
        lmp: a ``lammps.lammps`` whose box and atoms are defined.
        potential: it gives forces, energy and virial, in the units of the simulation.
        coupling: how; the fix ``almlip`` on all atoms where not given.
        observe: told of each evaluation.

    Returns:
        what is attached; keep it as long as LAMMPS runs.

    Raises:
        InputError: units, dimension or number of processes that cannot be served, an element that is not known, a
            charge or spin that the potential has learned nothing of, or a result of atoms that there is none of.

    Warns:
        UserWarning: there are computes of energies or stresses of atoms, which would lack those of the potential.
    """
    attached = AttachedPotential(lmp, potential, coupling or Coupling(), observe)
    attached.look_at_computes()
    return attached


class AttachedPotential:
    """A potential behind a ``fix external``; made by `attach`.

    Its vector ``f_ID[i]`` holds the values of `columns`, each also the variable ``v_ID_NAME``; per-atom properties are
    called ``d_ID_NAME``.
    """

    def __init__(self, lmp: Any, potential: Potential, coupling: Coupling, observe: Observer | None) -> None:
        self.lmp, self.potential, self.coupling, self.observe = lmp, potential, coupling, observe
        self.energy_unit = _energy_unit(lmp)
        self.following = Following(potential, coupling.skin, share=coupling.share)
        self.columns = columns(potential)
        self.evaluations = 0
        self.problem: BaseException | None = None
        """What went wrong in a step; LAMMPS then stops at the next one."""
        self._numbers: np.ndarray | None = None  # by type, from 1 on; 0 where the potential does not know it
        self._atoms = Atoms()
        self._computes: set[str] = set()  # of parts of atoms that have been looked at
        self._told_masses = False
        self._types = b"", b"", b""  # of these atoms, elements by type, and periodic directions
        self._state = _state(potential, coupling)
        self._electronic = 0, 1  # charge and multiplicity of these atoms
        self._fix = coupling.fix.encode()
        self._memory = LammpsMemory(lmp)
        self._gathered: Gathered | None = None
        self._values = np.zeros(0)  # of the columns, and the virial
        self._seen, self._order = np.zeros(0, np.int64), np.zeros(0, np.int64)
        self._groups = np.zeros(0, np.int32)  # bits of the groups that atoms are in
        self._places: slice | np.ndarray = self._order
        self._check_per_atom()
        self._properties = {
            name: f"d_{coupling.fix}_{name}".encode() for name in coupling.per_atom if name != "stresses"
        }
        # what scores come without
        self._parts = self.following.parts({*coupling.per_atom} & {"energies", "energies_std", "stresses"})
        if coupling.elements is not None:
            self._numbers = _given_elements(lmp, coupling.elements, potential.species)
        self._labelled = _labelled_types(lmp, potential.species)
        self._define()

    @property
    def last(self) -> dict[str, float]:
        """Values of the vector after the last evaluation; empty before the first."""
        return dict(zip(self.columns, self._values.tolist(), strict=False))

    def check(self) -> None:
        """Raises what went wrong in a step, if anything did."""
        if self.problem is not None:
            raise self.problem

    def command(self, text: str) -> None:
        """Has LAMMPS do a command, and raises what went wrong in one of its steps.

        Raises:
            InputError: it is a compute of energies or stresses of atoms that would lack those of the potential.
        """
        for name, style, holds_fixes in computes_of_atoms(text):
            if holds_fixes and HANDED[style] not in self.coupling.per_atom:
                raise InputError(self._lacking(name, style))
            self._computes.add(name)
        if text.split()[:1] in (["run"], ["minimize"]):
            self.look_at_computes()
        self.lmp.command(text)
        self.check()

    def look_at_computes(self) -> None:
        """Warns, once of each, of computes that LAMMPS was given elsewhere: it does not say which parts they hold."""
        with tempfile.TemporaryDirectory() as folder:
            told = Path(folder) / "computes"
            self.lmp.command(f'info out overwrite "{told}" computes')
            found = _COMPUTES.findall(told.read_text())
        for name, style in found:
            if HANDED.get(style, style) not in (style, *self.coupling.per_atom) and name not in self._computes:
                self._computes.add(name)
                warnings.warn(self._lacking(name, style), stacklevel=3)

    def _lacking(self, name: str, style: str) -> str:
        """What is said of a compute."""
        asked = (*self.coupling.per_atom, HANDED[style])
        return (
            f"compute {name} ({style}) lacks what the potential gives, which is not handed over by default: use "
            f"Coupling(per_atom={asked}), or name the parts that it shall hold, as pair."
        )

    def _check_per_atom(self) -> None:
        known = _of_atoms(self.potential)
        for name in self.coupling.per_atom:
            if name not in known:
                raise InputError(
                    f"'{name}' is no number of each atom that this potential gives; it gives {', '.join(known)}."
                )

    def _define(self) -> None:
        """The fix with its vector and properties, and variables that name them."""
        lmp, own = self.lmp, self.coupling.fix
        if not lmp.has_id("fix", own):
            lmp.command(f"fix {own} {self.coupling.group} external pf/callback 1 1")
        lmp.command(f"fix_modify {own} energy yes virial yes")
        if self._properties:
            properties = " ".join(name.decode() for name in self._properties.values())
            lmp.command(f"fix {own}_per_atom all property/atom {properties} writedata no")
        lmp.fix_external_set_vector_length(own, len(self.columns))
        for number, name in enumerate(self.columns, 1):
            lmp.command(f"variable {own}_{name} equal f_{own}[{number}]")
        if self.coupling.group != "all":
            lmp.command(f"variable {own}_group atom gmask({self.coupling.group})")
        called = self._memory.callback(self._called)
        lmp.callback[own] = {"function": called, "caller": self}  # as its own wrapper does, which makes arrays anew
        lmp.lib.lammps_set_fix_external_callback(
            lmp.lmp, self._fix, ctypes.cast(called, lmp.FIX_EXTERNAL_CALLBACK_FUNC), self
        )

    def _called(self, _: Any, step: int, count: int, tags: int, positions: int, forces: int) -> None:
        """What LAMMPS calls, with addresses; nothing may be raised here."""
        given = self._memory.vectors(forces, count)
        given[:] = 0.0
        if self.problem is not None:
            self.lmp.force_timeout()
            return
        try:
            self._step(step, self._memory.tags(tags, count), self._memory.vectors(positions, count), given)
        except BaseException as error:  # it would be lost in the library
            self.problem = error
            given[:] = 0.0
            self.lmp.force_timeout()

    def _step(self, step: int, tags: np.ndarray, positions: np.ndarray, forces: np.ndarray) -> None:
        places = self._in_order(tags)
        if not len(self._order):
            raise InputError(f"the group '{self.coupling.group}' of fix {self.coupling.fix} holds no atom.")
        atoms = self._moved(places, positions)
        answer = self.following.moved(atoms, "scores", self._electronic)
        results: Mapping[str, Any] = answer
        for part in self._parts:
            results = {**self.following.moved(atoms, part, self._electronic), **results}
        self.evaluations += 1
        if isinstance(places, slice):
            np.divide(answer.of_atoms("forces"), self.energy_unit, out=forces[places])
        else:
            forces[places] = answer.of_atoms("forces") / self.energy_unit
        self._hand_over(answer, results, places, len(tags))
        if self.observe is not None:
            self.observe(step, atoms, results)

    def _in_order(self, tags: np.ndarray) -> slice | np.ndarray:
        """Places of the atoms that the potential sees, in order of their IDs, so that sorting changes no list."""
        same = np.array_equal(tags, self._seen)
        if self.coupling.group != "all":  # which a script may fill anew between runs
            groups = self._memory.of_atoms(b"mask", len(tags))
            same = same and np.array_equal(groups, self._groups)
            self._groups = groups.copy()
        if not same:
            mine = np.arange(len(tags))
            if self.coupling.group != "all":
                mask = np.asarray(self.lmp.extract_variable(f"{self.coupling.fix}_group", "all", 1))
                mine = np.flatnonzero(mask[: len(tags)])
            self._seen, self._order = tags.copy(), mine[np.argsort(tags[mine])]
            as_they_are = np.array_equal(self._order, np.arange(len(tags)))
            self._places = slice(0, len(tags)) if as_they_are else self._order
        return self._places

    def _moved(self, places: slice | np.ndarray, positions: np.ndarray) -> Atoms:
        """The atoms where they are now."""
        types = self._memory.of_atoms(b"type", len(positions))[places]
        low, cell, periodic = self._memory.box()
        elements = self._by_type()
        key = types.tobytes(), elements.tobytes(), periodic.tobytes()
        if key != self._types:
            numbers = elements[types]
            if not numbers.all():
                raise self._unknown(int(types[np.argmin(numbers)]))
            if self.coupling.elements is not None:
                self._look_at_masses(elements, types)
            self._atoms, self._types = Atoms(numbers=numbers, info=self._state, pbc=periodic), key
            self._electronic = self.following.state_of(self._atoms)
        np.subtract(positions[places], low, out=self._atoms.positions)
        self._atoms.cell.array[:] = cell
        return self._atoms

    def _unknown(self, kind: int) -> InputError:
        """What is said of a type of atoms that the potential sees and does not know."""
        lmp, known = self.lmp, self.potential.species.symbols
        if self.coupling.elements is not None:
            found = f"are {self.coupling.elements[kind - 1]}"
        elif self._labelled:
            found = "have a label"
        else:
            masses = lmp.numpy.extract_atom("mass")
            found = f"have a mass of {0.0 if masses is None else float(np.ravel(masses)[kind]):g} amu"
        remedy = "say which element each type is (elements, or --elements), or leave them out of the group of the fix"
        return InputError(f"atoms of type {kind} {found}, which is not that of one of {', '.join(known)}; {remedy}.")

    def _look_at_masses(self, elements: np.ndarray, types: np.ndarray) -> None:
        """Warns, once, of a type with the mass of another element that is known: perhaps their order is another."""
        masses, known = self.lmp.numpy.extract_atom("mass"), self.potential.species.numbers
        if masses is None or self._told_masses:
            return
        for kind in np.unique(types).tolist():
            mass = float(np.ravel(masses)[kind])
            near = [z for z in known if abs(atomic_masses[z] - mass) < _SAME_MASS]
            if near and elements[kind] not in near:
                self._told_masses = True
                told = f"of {mass:g} amu, which is that of {chemical_symbols[near[0]]}"
                warnings.warn(
                    f"atoms of type {kind} are {chemical_symbols[elements[kind]]}, as was said, and have a mass "
                    f"{told}; correct the order of the elements if that is not meant.",
                    stacklevel=2,
                )
                return

    def _by_type(self) -> np.ndarray:
        if self._numbers is None:  # masses need not be set before the first run
            self._numbers = _found_elements(self.lmp, self._labelled, self.potential.species)
        return self._numbers

    def _hand_over(
        self, answer: Answer, results: Mapping[str, Any], places: slice | np.ndarray, count: int
    ) -> None:
        """Energy, virial, vector and per-atom properties, in the units of the simulation."""
        lmp, own, unit = self.lmp, self.coupling.fix, self.energy_unit
        if self._gathered is None or self._gathered.layout is not answer.layout:
            self._gathered = Gathered(answer, self.columns)
        self._values = self._gathered(answer)
        self._memory.set_fix(self._fix, self._values[: len(self.columns)].tolist(), self._values[-6:], unit)
        for name, known in self._properties.items():
            held = self._memory.of_atoms(known, count)
            if self.coupling.group != "all":
                held[:] = 0.0  # of atoms that have left the group too
            held[places] = results[name]
        if "energies" in self.coupling.per_atom:
            of_atoms = np.zeros(count)
            of_atoms[places] = results["energies"] / unit
            lmp.fix_external_set_energy_peratom(own, of_atoms.tolist())
        if "stresses" in self.coupling.per_atom:
            virials = np.zeros((count, 6))
            volume = cell_volume(self._atoms.cell.array)
            virials[places] = -results["stresses"][:, _VOIGT] * volume / unit
            lmp.fix_external_set_virial_peratom(own, virials.tolist())


def _state(potential: Potential, coupling: Coupling) -> dict[str, int]:
    """Charge and spin as far as they are known; where the potential tells them apart, in any case.

    Raises:
        InputError: some are given of which it has learned nothing.
    """
    state = completed_state(potential.states_met, coupling.charge, coupling.spin)
    if coupling.charge is not None or coupling.spin is not None:
        strange = potential.strange_state(Atoms(info=state))
        if strange is not None:
            raise InputError(strange)
    return {"charge": 0, "spin": 1} | state if potential.ensemble.sees_state else state


def _of_atoms(potential: Potential) -> list[str]:
    """Names of the results that are one number for each atom."""
    error = ["force_error"] if potential.force_error(np.ones(1)) is not None else []
    stresses = [] if reads_positions(potential.ensemble) else ["stresses"]
    return [*map(of_atoms, given_scores(atom_scores(), potential)), *error, "energies", "energies_std", *stresses]


def _energy_unit(lmp: Any) -> float:
    """The unit of energy in eV.

    Raises:
        InputError: units, dimension or number of processes cannot be served.
    """
    units = str(lmp.extract_global("units"))
    if units not in _ENERGY_UNITS:
        raise InputError(f"LAMMPS works in units '{units}'; a potential works in {' or '.join(_ENERGY_UNITS)}.")
    if lmp.extract_setting("dimension") != 3:
        raise InputError("LAMMPS works in two dimensions, and a potential in three; use 'dimension 3'.")
    if lmp.extract_setting("world_size") > 1:
        raise InputError("LAMMPS runs in several processes, each with some of the atoms; start it in one.")
    return _ENERGY_UNITS[units]


def _given_elements(lmp: Any, symbols: Sequence[str], known: SpeciesTable) -> np.ndarray:
    """Atomic numbers by type, [types + 1] with nothing first, from the symbols of all types; 0 where not known."""
    types = int(lmp.extract_setting("ntypes"))
    if len(symbols) != types:
        raise InputError(f"{len(symbols)} elements are given for {types} types of atoms; give one for each type.")
    for symbol in symbols:
        if symbol not in atomic_numbers or symbol == "X":
            raise InputError(f"'{symbol}' is not a chemical element; give the symbol of one for each atom type.")
    numbers = np.array([0, *(atomic_numbers[symbol] for symbol in symbols)])
    return np.where(np.isin(numbers, known.numbers), numbers, 0)


def _found_elements(lmp: Any, labelled: Mapping[str, int], known: SpeciesTable) -> np.ndarray:
    """The same from the type labels of LAMMPS, where they are elements, or else from masses; 0 where neither does."""
    numbers = np.zeros(int(lmp.extract_setting("ntypes")) + 1, np.int64)
    found = lmp.numpy.extract_atom("mass")
    masses = np.zeros(len(numbers)) if found is None else np.ravel(found)
    for symbol, kind in labelled.items():
        _check_label(kind, symbol, float(masses[kind]), known)
        numbers[kind] = atomic_numbers[symbol]
    if labelled:
        return numbers  # types without such a label belong to others
    for kind in range(1, len(numbers)):
        near = [z for z in known.numbers if abs(atomic_masses[z] - masses[kind]) < _SAME_MASS]
        numbers[kind] = near[0] if len(near) == 1 else 0
    return numbers


def _check_label(kind: int, symbol: str, mass: float, known: SpeciesTable) -> None:
    """Says so where a label and the mass are of two elements; masses of isotopes and coarse ones are of none.

    Raises:
        InputError: both are elements that the potential knows.
    """
    near = [z for z in range(1, len(atomic_masses)) if abs(atomic_masses[z] - mass) < _SAME_MASS]
    if not near or atomic_numbers[symbol] in near:
        return
    told = (
        f"atoms of type {kind} have the label {symbol}, and a mass of {mass:g} amu, which is that of "
        f"{chemical_symbols[near[0]]}"
    )
    if any(z in known.numbers for z in near):
        raise InputError(
            f"{told}; correct one of them, or say which element each type is (elements, or --elements)."
        )
    warnings.warn(f"{told}; they are taken for {symbol}.", stacklevel=2)


def _labelled_types(lmp: Any, known: SpeciesTable) -> dict[str, int]:
    """The types of atoms whose label is an element that is known.

    To be asked between runs: where there are no labels at all, LAMMPS says so by an error, and an error makes it
    take a run for ended (variables with ``elapsed`` or ``ramp`` then fail in it).
    """
    lmp.set_show_error(0)
    try:
        return {
            symbol: int(lmp.eval(f"label2type(atom,{symbol})"))
            for symbol in known.symbols
            if lmp.eval(f"is_typelabel(atom,{symbol})")
        }
    except Exception:  # it has no class of errors of its own
        return {}
    finally:
        lmp.set_show_error(1)
