"""Active learning of a molecule inside its environment: ``python experiments/openmm_ligand/run.py``.

Alanine dipeptide (ACE-ALA-NME, 22 atoms) in 800 TIP3P waters: OpenMM moves all of it, a committee describes the inside
of the molecule, Amber14 its interaction with the water (mechanical embedding).  Labels are GFN2-xTB of the molecule
alone.  The first ones are of frames of the force field; then rounds of dynamics that the committee's spread stops,
labels of the frames that were kept, and a training that goes on from the one before.  At the end: a run with the last
potential against GFN2-xTB, the mixed system's energy against our own calculator, and the drift of NVE.

Needs ``pip install ".[openmm]"``; writes ``rounds.csv`` and ``summary.json`` beside everything that was made.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openmm
from ase import Atoms
from openmm import app, unit
from openmmml import MLPotential

import almlip_jax as al
from almlip_jax.interfaces.openmm_reporter import CommitteeReporter, UncertaintyStop
from almlip_jax.units import KB, KJ_PER_MOL

HERE = Path(__file__).resolve().parent
SOURCE = {"kind": "tblite"}
MODEL, MEMBERS = {"size": "tiny"}, {"size": 4}
TRAINING = {"max_steps": 2000, "warm_start": True, "warm_steps": 1000}
WATERS, TEMPERATURE = 800, 300
STOP, RECORD = 0.6, 0.25  # eV/A, of force_std_max
EVERY = 10  # steps between reports
STEP = 0.001  # ps
MOST = 30  # labels of a round


@dataclass(frozen=True)
class Box:
    """The solvated molecule, equilibrated with the force field.

    Attributes:
        topology: of all atoms, the molecule first.
        field: the force field of all of it.
        state: positions, velocities and box vectors.
        molecule: indices of its atoms.
        numbers: their elements.
        frames: the molecule in the last part of the equilibration.
        platform: of OpenMM, on which everything is moved.
    """

    topology: Any
    field: Any
    state: Any
    molecule: list[int]
    numbers: list[int]
    frames: list[Atoms]
    platform: str


def simulation(
    platform: str, topology: Any, system: Any, integrator: Any, state: Any = None, precision: str = "mixed"
) -> Any:
    """On a platform, from a state; platforms other than the CPU are told in which precision."""
    told = {"Threads": str(len(os.sched_getaffinity(0)))} if platform == "CPU" else {"Precision": precision}
    made = app.Simulation(topology, system, integrator, openmm.Platform.getPlatformByName(platform), told)
    if state is not None:
        made.context.setState(state)
    return made


def thermostat(seed: int) -> Any:
    integrator = openmm.LangevinMiddleIntegrator(TEMPERATURE, 1.0, STEP)
    integrator.setRandomNumberSeed(seed)
    return integrator


def solvated(steps: int, frames: int, platform: str) -> Box:
    """The box after some steps of the force field, whose second half gives the frames."""
    pdb, field = app.PDBFile(str(HERE / "dipeptide.pdb")), app.ForceField("amber14-all.xml", "amber14/tip3p.xml")
    modeller = app.Modeller(pdb.topology, pdb.positions)
    modeller.addSolvent(field, model="tip3p", numAdded=WATERS)
    topology = modeller.topology
    method: dict[str, Any] = {"nonbondedMethod": app.PME, "nonbondedCutoff": 0.9 * unit.nanometer}
    system = field.createSystem(topology, constraints=None, rigidWater=True, **method)
    atoms = list(next(topology.chains()).atoms())
    molecule, numbers = [one.index for one in atoms], [one.element.atomic_number for one in atoms]
    moving = simulation(platform, topology, system, thermostat(1))
    moving.context.setPositions(modeller.positions)
    moving.minimizeEnergy(maxIterations=100)
    moving.context.setVelocitiesToTemperature(TEMPERATURE, 1)
    moving.step(steps // 2)
    kept = []
    for _ in range(frames):
        moving.step(max(steps // 2 // frames, 1))
        places = moving.context.getState(positions=True).getPositions(asNumpy=True).value_in_unit(unit.angstrom)
        kept.append(Atoms(numbers, places[molecule]))
    state = moving.context.getState(positions=True, velocities=True)
    return Box(topology, system, state, molecule, numbers, kept, platform)


def mixed(box: Box, potential: al.Potential) -> Any:
    """The system with the inside of the molecule from a potential."""
    made = MLPotential("almlip", potential=potential)
    return made.createMixedSystem(box.topology, box.field, box.molecule, forceGroup=1, returnEnergyType="energy")


def _remove(*files: Path) -> None:
    """Removes what an earlier run wrote: a reporter refuses to write over it."""
    for file in files:
        file.unlink(missing_ok=True)


def explore(box: Box, potential: al.Potential, out: Path, walkers: int, steps: int, seed: int) -> dict[str, Any]:
    """Runs from the equilibrated box, each until the spread stops it; the frames that were kept, and what was seen."""
    system, kept, spreads, stops, done = mixed(box, potential), [], [], 0, 0
    for walker in range(walkers):
        moving = simulation(box.platform, box.topology, system, thermostat(seed + walker), box.state)
        moving.context.setVelocitiesToTemperature(TEMPERATURE, seed + walker)
        moving.context.setStepCount(0)
        moving.context.setTime(0)
        table, frames = out / f"spread_{walker}.csv", out / f"uncertain_{walker}.extxyz"
        _remove(table, frames)
        moving.reporters.append(
            CommitteeReporter(table, EVERY, stop_above=STOP, record=frames, record_above=RECORD, record_every=2 * EVERY)
        )
        try:
            moving.step(steps)
        except UncertaintyStop:
            stops += 1
        done += moving.currentStep
        with table.open() as file:
            spreads += [float(row["force_std_max"]) for row in csv.DictReader(file)]
        kept += al.read_structures(frames) if frames.stat().st_size else []
    chosen = [kept[index] for index in np.unique(np.linspace(0, len(kept) - 1, min(MOST, len(kept))).astype(int))]
    return {"frames": chosen, "stops": stops, "picoseconds": done * STEP, "spread": float(np.median(spreads))}


def against_labels(potential: al.Potential, labelled: list[Atoms]) -> dict[str, float]:
    """Errors and spread on labelled frames, meV/A and meV."""
    said = potential.evaluate(labelled)
    errors = al.error_metrics(labelled, said)
    off = np.concatenate([s - a.get_forces() for s, a in zip(said.forces, labelled, strict=True)])
    spread = np.concatenate(said.atom_scores["force_std"])
    correlation = np.corrcoef(np.linalg.norm(off, axis=1).argsort().argsort(), spread.argsort().argsort())[0, 1]
    return {
        "forces_rmse": 1e3 * errors["forces_rmse"],
        "energy_offset_free_rmse": 1e3 * errors["energy_offset_free_rmse"] * len(labelled[0]),
        "force_std_mean": 1e3 * float(np.mean(said.scores["force_std_mean"])),
        "force_std_max": 1e3 * float(np.mean(said.scores["force_std_max"])),
        "spearman": float(correlation),
    }


def production(box: Box, potential: al.Potential, steps: int, out: Path) -> tuple[list[Atoms], Any, float]:
    """Frames of the molecule in an undisturbed run, its last state, and milliseconds a step."""
    moving = simulation(box.platform, box.topology, mixed(box, potential), thermostat(99), box.state)
    moving.context.setVelocitiesToTemperature(TEMPERATURE, 99)
    frames_file, table = out / "production.extxyz", out / "production.csv"
    _remove(table, frames_file)
    moving.reporters.append(CommitteeReporter(table, 50, record=frames_file, record_above=0.0))
    moving.step(10)
    begin = time.perf_counter()
    moving.step(steps)
    each = 1e3 * (time.perf_counter() - begin) / steps
    state = moving.context.getState(positions=True, velocities=True)
    return al.read_structures(frames_file), state, each


def agreement(box: Box, potential: al.Potential, state: Any) -> float:
    """|energy of the potential's group - our own calculator|, eV, in the mixed system."""
    moving = simulation(box.platform, box.topology, mixed(box, potential), openmm.VerletIntegrator(STEP), state)
    found = moving.context.getState(energy=True, positions=True, groups={1})
    energy = KJ_PER_MOL * found.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole)
    places = found.getPositions(asNumpy=True).value_in_unit(unit.angstrom)[box.molecule]
    return abs(energy - float(potential.evaluate([Atoms(box.numbers, places)]).energy[0]))


def drift(box: Box, system: Any, state: Any, steps: int) -> dict[str, float]:
    """Of the total energy at constant energy: its slope for each degree of freedom, and the noise around that."""
    integrator = openmm.VerletIntegrator(STEP / 2)
    integrator.setConstraintTolerance(1e-7)
    moving = simulation(box.platform, box.topology, system, integrator, state, precision="double")
    freedom = 3 * system.getNumParticles() - system.getNumConstraints() - 3
    energies, every = [], 20
    moving.step(every)
    begin = time.perf_counter()
    for _ in range(steps // every):
        moving.step(every)
        found = moving.context.getState(energy=True)
        energies.append((found.getPotentialEnergy() + found.getKineticEnergy()).value_in_unit(unit.kilojoule_per_mole))
    times = np.arange(len(energies)) * every * STEP / 2 / 1000  # ns
    slope, start = np.polyfit(times, energies, 1)
    scale = KJ_PER_MOL / (KB * TEMPERATURE)
    noise = float(np.std(np.asarray(energies) - slope * times - start))
    return {
        "drift_kT_per_ns_per_dof": float(slope * scale / freedom),
        "drift_error": float(noise / np.std(times) / len(times) ** 0.5 * scale / freedom),
        "noise_kJ_per_mol": noise,
        "picoseconds": float(1000 * times[-1]),
        "ms_per_step": 1e3 * (time.perf_counter() - begin) / steps,
    }


def main(given: argparse.Namespace) -> None:
    """The campaign, then what it made."""
    al.prepare_jax()
    out: Path = given.out
    out.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    box = solvated(given.equilibration, 40, given.platform)
    print(f"box of {box.topology.getNumAtoms()} atoms equilibrated in {time.perf_counter() - begin:.0f} s", flush=True)
    data = al.label(SOURCE, box.frames, store=out / "labels.db")
    learner = al.Learner(40 + MOST * given.rounds, model=MODEL, ensemble=MEMBERS, training=TRAINING, seed=0)
    if given.potential is not None:
        judge(box, al.load(given.potential), out, given)
        return
    rows = []
    for number in range(given.rounds + 1):
        clock = [time.perf_counter()]
        potential = learner.fit(data)
        clock.append(time.perf_counter())
        row = {"round": number, "labels": len(data), "seconds_train": clock[1] - clock[0]}
        if number < given.rounds:
            folder = out / f"round_{number}"
            folder.mkdir(exist_ok=True)
            seen = explore(box, potential, folder, given.walkers, given.steps, 1000 * number + 1)
            clock.append(time.perf_counter())
            new = al.label(SOURCE, seen["frames"], store=out / "labels.db", failed="leave_out")
            row |= {"seconds_md": clock[2] - clock[1], "seconds_label": time.perf_counter() - clock[2]}
            row |= {name: seen[name] for name in ("stops", "picoseconds")} | {"spread_md": 1e3 * seen["spread"]}
            row |= {"kept": len(new)}
            if new:
                row |= {"forces_rmse_kept": against_labels(potential, new)["forces_rmse"]}
            data += new
        rows.append(row)
        print({name: float(f"{value:.3g}") for name, value in row.items()}, flush=True)
        with (out / "rounds.csv").open("w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]), restval="")
            table.writeheader()
            table.writerows(rows)
    potential.save(out / "potential")
    judge(box, potential, out, given)


def judge(box: Box, potential: al.Potential, out: Path, given: argparse.Namespace) -> None:
    """What the last potential is worth."""
    frames, state, each = production(box, potential, given.production, out)
    labelled = al.label(SOURCE, frames, store=out / "labels.db", failed="leave_out")
    summary: dict[str, Any] = {"production": against_labels(potential, labelled) | {"frames": len(labelled)}}
    summary |= {"ms_per_step": each, "energy_difference_eV": agreement(box, potential, state)}
    print(json.dumps(summary, indent=1), flush=True)
    summary["nve_mixed"] = drift(box, mixed(box, potential), state, given.nve)
    summary["nve_force_field"] = drift(box, box.field, state, given.nve)
    print(json.dumps(summary, indent=1), flush=True)
    (out / "summary.json").write_text(json.dumps(summary, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/openmm_ligand"))
    parser.add_argument("--platform", default="CPU", help="of OpenMM: CPU, CUDA, OpenCL, HIP")
    parser.add_argument("--potential", type=Path, help="a saved one: it is judged, and no campaign run")
    parser.add_argument("--rounds", type=int, default=4, help="of dynamics and labels")
    parser.add_argument("--walkers", type=int, default=3, help="runs of each round")
    parser.add_argument("--steps", type=int, default=1000, help="of each of them at most, 1 fs")
    parser.add_argument("--equilibration", type=int, default=3000, help="steps with the force field")
    parser.add_argument("--production", type=int, default=3000, help="steps with the last potential")
    parser.add_argument("--nve", type=int, default=3000, help="steps of 0.5 fs at constant energy")
    main(parser.parse_args())
