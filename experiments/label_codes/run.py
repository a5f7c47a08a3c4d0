"""Labels of real codes on cells of two atoms: forces and stresses by finite differences, smearing, magnetism.

    python experiments/label_codes/run.py espresso --data-dir /usr/share/espresso/pseudo --out espresso.json
    python experiments/label_codes/run.py cp2k --data-dir /usr/share/cp2k --out cp2k.json
    python experiments/label_codes/run.py gpaw --out gpaw.json
    python experiments/label_codes/run.py nwchem --out nwchem.json

Each case is a label, the same with the strongest force's atom moved to both sides, and with the cell strained to both
sides.  Numbers of k-points and cutoffs are far from converged: what is asked is whether energies, forces and stresses
belong together, and whether charge, moments and smearing arrive.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.build import bulk, molecule

from almlip_jax.oracles import CalculatorSettings, Results

STEP, STRAIN = 0.01, 0.004

_SMEARED = {"occupations": "smearing", "smearing": "mv", "degauss": 0.03}


def _cp2k(functional: str, cutoff: float, scf: dict[str, Any], **kinds: dict[str, str]) -> dict[str, Any]:
    return {
        "FORCE_EVAL": {
            "DFT": {
                "BASIS_SET_FILE_NAME": "BASIS_MOLOPT",
                "POTENTIAL_FILE_NAME": "GTH_POTENTIALS",
                "MGRID": {"CUTOFF": cutoff, "REL_CUTOFF": 50},
                "QS": {"EPS_DEFAULT": 1e-12},
                "SCF": {"EPS_SCF": 1e-7, "MAX_SCF": 100, **scf},
                "XC": {"XC_FUNCTIONAL": {"_": functional}},
            },
            "SUBSYS": {"KIND": kinds},
        }
    }


SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "espresso": {
        "silicon": {"pseudopotentials": {"Si": "Si.pz-vbc.UPF"}, "parameters": {"ecutwfc": 24, "conv_thr": 1e-10}},
        "aluminium": {
            "pseudopotentials": {"Al": "Al.pz-vbc.UPF"},
            "parameters": {"ecutwfc": 40, "conv_thr": 1e-10, **_SMEARED},
        },
        "iron": {
            "pseudopotentials": {"Fe": "Fe.pz-nd-rrkjus.UPF"},
            "parameters": {"ecutwfc": 25, "ecutrho": 200, "conv_thr": 1e-9, **_SMEARED},
        },
        "iron, up and down": {
            "pseudopotentials": {"Fe": "Fe.pz-nd-rrkjus.UPF"},
            "parameters": {"ecutwfc": 25, "ecutrho": 200, "conv_thr": 1e-9, **_SMEARED},
        },
    },
    "cp2k": {
        "silicon": {
            "parameters": _cp2k("PADE", 200, {}, Si={"BASIS_SET": "SZV-MOLOPT-SR-GTH", "POTENTIAL": "GTH-PADE-q4"})
        },
        "aluminium": {
            "parameters": _cp2k(
                "PADE",
                150,
                {
                    "ADDED_MOS": 8,
                    "SMEAR": {"_": "ON", "METHOD": "FERMI_DIRAC", "ELECTRONIC_TEMPERATURE": "[K] 3000"},
                    "MIXING": {"METHOD": "BROYDEN_MIXING", "ALPHA": 0.3},
                },
                Al={"BASIS_SET": "SZV-MOLOPT-SR-GTH", "POTENTIAL": "GTH-PADE-q3"},
            )
        },
        "iron": {
            "parameters": _cp2k(
                "PADE",
                400,
                {
                    "EPS_SCF": 5e-6,  # densities of neighbouring steps differ by as much for ever
                    "ADDED_MOS": "10 10",
                    "SMEAR": {"_": "ON", "METHOD": "FERMI_DIRAC", "ELECTRONIC_TEMPERATURE": "[K] 3000"},
                    "MIXING": {"METHOD": "BROYDEN_MIXING", "ALPHA": 0.3, "BETA": 3},
                },
                Fe={"BASIS_SET": "SZV-MOLOPT-SR-GTH", "POTENTIAL": "GTH-PADE-q16"},
            )
        },
        "oxygen": {
            "parameters": _cp2k("PADE", 200, {}, O={"BASIS_SET": "SZV-MOLOPT-SR-GTH", "POTENTIAL": "GTH-PADE-q6"})
        },
    },
    "nwchem": {
        "water": {"parameters": {"theory": "dft", "basis": "3-21g", "dft": {"xc": "xpbe96 cpbe96", "iterations": 100}}},
        "water, CCSD(T)": {"parameters": {"theory": "ccsd(t)", "basis": "3-21g"}},
        "water cation": {"parameters": {"theory": "scf", "basis": "3-21g"}},
        "oxygen": {"parameters": {"theory": "mp2", "basis": "3-21g", "scf": {"uhf": None}}},
    },
    "gpaw": {
        "silicon": {"parameters": {"mode": {"name": "pw", "ecut": 250}, "xc": "LDA", "convergence": {"density": 1e-6}}},
        "aluminium": {
            "parameters": {
                "mode": {"name": "pw", "ecut": 200},
                "xc": "LDA",
                "convergence": {"density": 1e-6},
                "occupations": {"name": "fermi-dirac", "width": 0.3},
            }
        },
        "iron": {
            "parameters": {
                "mode": {"name": "pw", "ecut": 300},
                "xc": "LDA",
                "convergence": {"density": 1e-5},
                "occupations": {"name": "fermi-dirac", "width": 0.2},
            }
        },
    },
}


def structures() -> dict[str, Atoms]:
    """Two or three atoms each, none at rest."""
    silicon, aluminium = bulk("Si", a=5.43), bulk("Al", "bcc", a=3.2, cubic=True)
    iron, oxygen = bulk("Fe", a=2.8, cubic=True), Atoms("O2", [[3, 3, 3], [3, 3, 4.28]], cell=[6, 6, 7.3])
    for atoms in (silicon, aluminium, iron):
        atoms.positions[1] += [0.06, 0.02, -0.03]
    opposite = iron.copy()
    iron.set_initial_magnetic_moments([2.2, 2.2])
    opposite.set_initial_magnetic_moments([2.2, -2.2])
    oxygen.info["spin"] = 3
    water = molecule("H2O")
    water.rattle(0.05, seed=1)
    water.rotate(33, (1, 2, 3))
    cation = water.copy()
    cation.info |= {"charge": 1, "spin": 2}
    irons = {"iron": iron, "iron, up and down": opposite}
    waters = {"water": water, "water, CCSD(T)": water, "water cation": cation}
    return {"silicon": silicon, "aluminium": aluminium, "oxygen": oxygen, **irons, **waters}


def slope(label: Callable[[Atoms], Results], frames: list[Atoms], width: float) -> float:
    """The central difference of the energies of two structures."""
    low, high = (label(one).energy for one in frames)
    return (high - low) / width


def moved(atoms: Atoms, atom: int, axis: int) -> list[Atoms]:
    """The structure with an atom moved to both sides."""
    frames = [atoms.copy(), atoms.copy()]
    for frame, sign in zip(frames, (-1, 1), strict=True):
        frame.positions[atom, axis] += sign * STEP
    return frames


def strained(atoms: Atoms) -> list[Atoms]:
    """The structure compressed and stretched along x."""
    frames = [atoms.copy(), atoms.copy()]
    for frame, sign in zip(frames, (-1, 1), strict=True):
        stretch = np.diag([1 + sign * STRAIN, 1, 1])
        frame.set_cell(atoms.cell.array @ stretch, scale_atoms=True)
    return frames


def measure(atoms: Atoms, settings: CalculatorSettings) -> dict[str, Any]:
    """What is seen of one case."""
    label = settings.build()
    start = time.perf_counter()
    first = label(atoms)
    seconds = time.perf_counter() - start
    atom, axis = np.unravel_index(np.argmax(np.abs(first.forces)), first.forces.shape)
    found = {
        "energy": first.energy,
        "seconds": seconds,
        "force": float(first.forces[atom, axis]),
        "force by differences": -slope(label, moved(atoms, int(atom), int(axis)), 2 * STEP),
    }
    if first.stress is not None:
        width = 2 * STRAIN * atoms.cell.volume
        found |= {"stress": float(first.stress[0]), "stress by differences": slope(label, strained(atoms), width)}
    return found


def main() -> None:
    """Runs the cases of one code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("code", choices=sorted(SETTINGS))
    parser.add_argument("--command")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--cases", nargs="*", help="all by default")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    results = {}
    for name, own in SETTINGS[given.code].items():
        if given.cases and name not in given.cases:
            continue
        atoms = structures()[name]
        kpts = {"kpts": (2, 2, 2)} if atoms.pbc.any() else {}
        settings = CalculatorSettings(
            code=given.code, command=given.command, data_dir=given.data_dir, **own, **kpts, timeout=600
        )
        results[name] = measure(atoms, settings)
        if name == "aluminium" and given.code == "gpaw":
            results[f"{name}, no smearing"] = measure(atoms, settings.model_copy(update={"force_consistent": False}))
        if name == "iron":
            bare = atoms.copy()
            bare.set_initial_magnetic_moments(None)
            results[f"{name}, without moments"] = {"energy": settings.build()(bare).energy}
        print(name, json.dumps(results[name]), flush=True)
        given.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
