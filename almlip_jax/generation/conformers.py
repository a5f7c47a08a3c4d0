"""Conformers of molecules, by the distance geometry of RDKit."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Literal, cast

import numpy as np
from ase import Atoms
from pydantic import Field

from almlip_jax.errors import InputError
from almlip_jax.generation.base import GenerationInputs, GeneratorSettings, apart
from almlip_jax.generation.deformed import displaced
from almlip_jax.settings import unit
from almlip_jax.structures.carried import carried
from almlip_jax.structures.electronic_state import electronic_state

_IN_VAIN = 50  # draws in a row that bring nothing new, before there are no more conformers
_SEEDS = 2**31 - 1


class ConformersSettings(GeneratorSettings):
    """Conformers of molecules, by distance geometry that knows about torsions (ETKDG).

    Bonds, stereo centres and double bonds stay what they are.  Needs RDKit (extra ``rdkit``).  Source: S. Riniker and
    G. A. Landrum, J. Chem. Inf. Model. 55, 2562 (2015).
    """

    needs_starts: ClassVar[bool] = False

    kind: Literal["conformers"] = "conformers"
    smiles: tuple[str, ...] = ()
    """Molecules as SMILES, in turn, hydrogens added; where none is named the start geometries, whose bonds follow from
    distances."""
    force_field: Literal["none", "uff", "mmff"] = "mmff"
    """What relaxes them; a force field of RDKit costs no label."""
    least_rmsd: float = Field(default=0.3, ge=0, le=10, json_schema_extra=unit("Angstrom"))
    """Least root mean square distance between two conformers of a molecule, hydrogens on carbon apart, Angstrom.
    Nearer ones are drawn again, and there are fewer than ``count`` where a molecule has not as many."""
    stdev: float = Field(default=0.0, ge=0, le=2.0, json_schema_extra=unit("Angstrom"))
    """Standard deviation of each Cartesian displacement afterwards, Angstrom."""

    @property
    def elements(self) -> frozenset[int]:
        """Those of the SMILES."""
        return frozenset(atom.GetAtomicNum() for text in self.smiles for atom in _of_smiles(text).GetAtoms())

    def unsuited(self, start: Atoms) -> str | None:
        """Without SMILES it has to be a molecule whose bonds RDKit can make out, and that the force field knows."""
        if self.smiles:
            return None
        _rdkit()
        try:
            molecule = _of_geometry(start)
        except ValueError as error:
            return str(error)
        return _unknown(molecule, self.force_field)

    def check(self, starts: Sequence[Atoms]) -> None:
        """There have to be molecules; the force field has to know those of the SMILES."""
        if not starts and not self.smiles:
            raise InputError("'conformers' makes conformers of start geometries; give these, or smiles.")
        for text in self.smiles:
            if why := _unknown(_of_smiles(text), self.force_field):
                raise InputError(f"'conformers': '{text}' {why}.")

    def generate(self, given: GenerationInputs) -> Iterable[Atoms]:
        """Conformers of the molecules in turn."""
        molecules = self._molecules(given)
        shares = [len(range(n, self.count, len(molecules))) for n in range(len(molecules))]
        made = [
            self._conformers(molecule, start, share, given.generator)
            for (molecule, start), share in zip(molecules, shares, strict=True)
            if share
        ]
        turns = range(max(map(len, made)))
        return [own[turn] for turn in turns for own in made if turn < len(own)]

    def _molecules(self, given: GenerationInputs) -> list[tuple[Any, Atoms]]:
        """Molecules as RDKit and as ASE have them."""
        if self.smiles:
            return [(molecule, _atoms_of(molecule)) for molecule in map(_of_smiles, self.smiles)]
        found = []
        for place, start in enumerate(given.starts):
            try:
                found.append((_of_geometry(start), start))
            except ValueError as error:
                raise InputError(f"'conformers': {given.called(place)} {error}.") from error
        return found

    def _conformers(self, molecule: Any, start: Atoms, count: int, draw: np.random.Generator) -> list[Atoms]:
        """Different conformers of a molecule, ``count`` at most."""
        from rdkit.Chem.rdMolAlign import GetBestRMS

        found: list[Atoms] = []
        skeletons: list[Any] = []
        in_vain = 0
        while len(found) < count and in_vain < _IN_VAIN:
            in_vain += 1
            embedded = _embedded(molecule, self.force_field, int(draw.integers(_SEEDS)))
            if embedded is None:
                continue
            frame = carried(start)
            frame.positions = embedded.GetConformer().GetPositions()
            frame = displaced(frame, self.stdev, draw) if self.stdev else frame
            skeleton = _skeleton(embedded)
            if any(GetBestRMS(_copied(skeleton), other) <= self.least_rmsd for other in skeletons):
                continue
            if apart(frame, self.closest):
                in_vain = 0
                found.append(frame)
                skeletons.append(skeleton)
        if not found:
            raise InputError(
                f"'conformers' finds none of {start.get_chemical_formula()} with atoms {self.closest:g} of their "
                "covalent distance apart; leave the molecule out, or lower closest."
            )
        return found


def _rdkit() -> Any:
    """The module of molecules.

    Raises:
        InputError: RDKit is not installed.
    """
    try:
        from rdkit import Chem
    except ImportError as error:
        raise InputError("'conformers' needs RDKit: pip install 'almlip-jax[rdkit]'.") from error
    return Chem


def _in_silence() -> AbstractContextManager[Any]:
    """Within, RDKit writes nothing: what it complains of becomes a sentence."""
    from rdkit.rdBase import BlockLogs

    return cast(AbstractContextManager[Any], BlockLogs())


@functools.cache
def _of_smiles(text: str) -> Any:
    """The molecule of a SMILES, hydrogens added."""
    chem = _rdkit()
    with _in_silence():
        molecule = chem.MolFromSmiles(text)
    if molecule is None or not molecule.GetNumAtoms():
        raise InputError(f"'conformers': '{text}' is not the SMILES of a molecule.")
    if any(atom.GetNumRadicalElectrons() for atom in molecule.GetAtoms()):
        raise InputError(f"'conformers' knows closed shells, but '{text}' is a radical.")
    return chem.AddHs(molecule)


def _of_geometry(start: Atoms) -> Any:
    """The molecule of a geometry, its atoms in the same order.

    Raises:
        ValueError: there is none; what is to be said of the geometry.
    """
    chem = _rdkit()
    charge, spin = electronic_state(start)
    if start.pbc.any() or start.constraints:
        raise ValueError("is periodic or holds atoms fixed, and free molecules are moved")
    if spin != 1:
        raise ValueError(f"has multiplicity {spin}, which is no closed shell")
    from rdkit.Chem.rdDetermineBonds import DetermineBonds

    rows = (f"{s} {x:.8f} {y:.8f} {z:.8f}" for s, (x, y, z) in zip(start.symbols, start.positions, strict=True))
    molecule = chem.MolFromXYZBlock("\n".join([str(len(start)), "", *rows, ""]))
    try:
        with _in_silence():
            DetermineBonds(molecule, charge=charge)
            chem.SanitizeMol(molecule)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"has bonds that RDKit cannot make out ({start.get_chemical_formula()}, charge {charge}; name the molecule "
            "as smiles)"
        ) from error
    if len(chem.GetMolFrags(molecule)) > 1:
        raise ValueError("has several parts, and one molecule is moved")
    chem.AssignStereochemistryFrom3D(molecule)
    return molecule


def _atoms_of(molecule: Any) -> Atoms:
    """Numbers, charge and spin of a molecule; all atoms at the origin."""
    chem = _rdkit()
    numbers = [atom.GetAtomicNum() for atom in molecule.GetAtoms()]
    state = {"charge": chem.GetFormalCharge(molecule), "spin": 1}
    return Atoms(numbers, positions=np.zeros((len(numbers), 3)), info=state)


def _unknown(molecule: Any, force_field: str) -> str | None:
    """What is to be said of a molecule for which a force field has no parameters; None where it has."""
    from rdkit.Chem import rdForceFieldHelpers as fields

    knows = {"mmff": fields.MMFFHasAllMoleculeParams, "uff": fields.UFFHasAllMoleculeParams}
    if force_field not in knows or knows[force_field](molecule):
        return None
    formula = _atoms_of(molecule).get_chemical_formula()
    return f"is unknown to force_field {force_field}, which has no parameters for {formula} (take another, or none)"


def _embedded(molecule: Any, force_field: str, seed: int) -> Any | None:
    """A copy of a molecule with one random conformer, relaxed; None where distances met no geometry."""
    from rdkit.Chem import rdForceFieldHelpers as fields
    from rdkit.Chem.rdDistGeom import EmbedMolecule, ETKDGv3

    copy, parameters = _copied(molecule), cast(Any, ETKDGv3())
    parameters.randomSeed = seed
    if EmbedMolecule(copy, parameters) < 0:
        return None
    if force_field != "none":
        relax = fields.MMFFOptimizeMolecule if force_field == "mmff" else fields.UFFOptimizeMolecule
        relax(copy, maxIters=1000)
    return copy


def _skeleton(molecule: Any) -> Any:
    """What conformers are compared by: all atoms but hydrogens on carbon, which are many and turn into each other."""
    chem = _rdkit()
    pattern = chem.MolFromSmarts("[H][#6]")
    hydrogens = {match[0] for match in molecule.GetSubstructMatches(pattern, maxMatches=10**6)}
    bare = chem.RWMol(molecule)
    for number in sorted(hydrogens, reverse=True):
        bare.RemoveAtom(number)
    for atom in bare.GetAtoms():
        atom.SetNoImplicit(True)
    return bare.GetMol()


def _copied(molecule: Any) -> Any:
    return _rdkit().Mol(molecule)
