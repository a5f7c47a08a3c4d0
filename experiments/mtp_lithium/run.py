"""Labels bought against gamma_select, bcc lithium at 300 K: ``python experiments/mtp_lithium/run.py --data DIR``.

The labels are those of a potential of ours that was fitted to the lithium of the mlearn set (Zuo et al., J. Phys.
Chem. A 124, 731, 2020), so that errors and labels can be counted over seeds. Each campaign is that of MLIP-2: a
moment tensor potential, dynamics with the extrapolation grade inside, frames above ``gamma_select`` offered to the
active set, what enters it labelled, all refitted; a walker that comes to ``gamma_break`` begins again. The dynamics
of all campaigns are equally long. One row a campaign goes into ``results.csv`` beside this script, and the figure is
drawn anew; rows that are there are not made again.
"""

from __future__ import annotations

import argparse
import csv
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator

import almlip_jax as al
from almlip_jax.dynamics import Status
from almlip_jax.evaluation.statistics import t_interval
from almlip_jax.files import write_csv
from almlip_jax.fitting import fit_potential
from almlip_jax.models import SharedDensitySettings
from almlip_jax.oracles import SourceSettings
from almlip_jax.oracles.base import LabelSource
from almlip_jax.training import EnsembleSettings, TrainingSettings

HERE = Path(__file__).resolve().parent
GAMMA_SELECT = (1.1, 1.5, 2.0, 3.0, 5.0, 10.0)
GAMMA_BREAK = 10.0  # that of MLIP-2
LATTICE, TEMPERATURE, TIMESTEP = 3.48, 300.0, 2.0  # Angstrom, K, fs
SIZES = {54: 3, 128: 4}  # atoms: cells along each edge
WALKERS, STEPS = 4, 250  # in a round
PICOSECONDS, MOST_ROUNDS = 10.0, 100  # of all walkers together
INITIAL, MOST_LABELS = 2, 400
TRAINING = {
    "projection": {"iterations": 30, "starts": 2, "trial_iterations": 8},
    "loss": {"kind": "mlip"},
    "warm_start": True,
    "warm_steps": 8,
    "validation_fraction": 0.0,
    "replay": 0,
}
DYNAMICS: dict[str, Any] = {
    "walkers": [{"temperature": TEMPERATURE, "count": WALKERS}],
    "steps": STEPS,
    "timestep": TIMESTEP,
    "integrator": {"kind": "langevin", "friction": 0.02},
    "chunk": STEPS,
    "trajectory_every": STEPS,
    "trace_every": 50,
}


@dataclass(frozen=True)
class Study:
    """What all campaigns share.

    Attributes:
        crystal: start of the dynamics.
        source: the label source.
        test: frames of the dynamics of the label source itself, labelled.
        level: of the moment tensor potential.
        mode: rows of the active set, those of atoms or of structures.
    """

    crystal: Atoms
    source: LabelSource
    test: list[Atoms]
    level: int
    mode: str


def label_source(data: Path, folder: Path) -> al.Potential:
    """The potential that labels, fitted to the lithium of mlearn unless it is there."""
    if (folder / "potential.json").exists():
        return al.load(folder)
    frames = al.read_structures(data / "mlearn" / "Li_train.extxyz")
    training = TrainingSettings(max_steps=2500, max_epochs=10**6, patience=10**6, validate_every=250)
    model = SharedDensitySettings(size="small", cutoff=5.0)
    potential, _ = fit_potential(frames, model, EnsembleSettings(size=1), training, 0)
    potential.save(folder)
    return potential


def frames_of(source: al.Potential, crystal: Atoms, file: Path) -> list[Atoms]:
    """40 frames of the label source's own dynamics at 300 K, 0.25 ps apart, after 2 ps; made unless they are there."""
    if not file.exists():
        settings = DYNAMICS | {"steps": 2250, "trajectory_every": 125, "trace_every": 125, "chunk": 125}
        found = source.explorer(settings).run([crystal], seed=1000)
        al.write_structures(file, [frame for walker in found.trajectories for frame in walker[-10:]])
    return al.read_structures(file)


def campaign(study: Study, gamma_select: float, seed: int) -> dict[str, Any]:
    """One campaign: what it bought, and what that gave."""
    began = time.process_time()
    data = labelled(study, al.rattle(study.crystal, INITIAL, np.random.default_rng(seed), stdev=0.1))
    learner = al.Learner(
        MOST_LABELS, typical=data, model=model_of(study), ensemble={"size": 1}, training=TRAINING, seed=seed
    )
    grade = "extrapolation_grade" if study.mode == "neighborhood" else "configuration_grade"
    settings = DYNAMICS | {"gate": {"kind": "absolute", "score": grade}, "record_every": 5, "buffer": 100}
    rule = {"kind": "grade", "gamma_select": gamma_select, "gamma_break": GAMMA_BREAK}
    starts, active, trained, potential = [study.crystal] * WALKERS, None, 0, None
    tally = {"rounds": 0, "fits": 0, "stopped": 0, "recorded": 0, "picoseconds": 0.0}
    for step in range(MOST_ROUNDS):
        if len(data) > trained:
            tally["fits"] += 1
            potential = learner.fit(data).spanning(data, {"mode": study.mode}, earlier=active)
            active, trained = potential.active_set, len(data)
        found = potential.explorer(settings).run(starts, rule, labelled=data, seed=seed, step=step)
        went_on = [status is Status.COMPLETED for status in found.status]
        starts = [last if well else study.crystal for last, well in zip(found.final, went_on, strict=True)]
        batch, potential = al.select_add(potential, found.recorded)
        active = potential.active_set
        data += labelled(study, batch)
        tally["rounds"] += 1
        tally["stopped"] += went_on.count(False)
        tally["recorded"] += len(found.recorded)
        tally["picoseconds"] = round(tally["picoseconds"] + found.picoseconds, 3)
        if tally["picoseconds"] >= PICOSECONDS:
            break
    last = learner.fit(data) if len(data) > trained else potential
    errors = al.error_metrics(study.test, last.evaluate(study.test))
    return {
        "gamma_select": gamma_select,
        "seed": seed,
        "labels": len(data),
        **{name: round(1e3 * float(errors[name]), 3) for name in ("forces_rmse", "energy_rmse")},
        **tally,
        "cpu_seconds": round(time.process_time() - began, 1),
    }


def model_of(study: Study) -> dict[str, Any]:
    """The moment tensor potential."""
    return {"kind": "mtp", "level": study.level, "cutoff": 5.0, "min_dist": 2.0}


def labelled(study: Study, frames: list[Atoms]) -> list[Atoms]:
    """Frames with labels, made in this process: a worker would take longer to start than they take."""
    found = []
    for frame in frames:
        energy, forces, stress, *_ = study.source(frame)
        bare = Atoms(frame.numbers, frame.positions, cell=frame.cell, pbc=frame.pbc)
        bare.calc = SinglePointCalculator(bare, energy=energy, forces=forces, stress=stress)
        found.append(bare)
    return found


def draw(table: list[dict[str, Any]], stem: Path) -> None:
    """Labels and force errors against gamma_select, with 95 % intervals over seeds."""
    from matplotlib import pyplot as plt

    from almlip_jax.figures.style import MUTED, RECORD, save, style

    quantities = {"labels": "labels", "forces_rmse": "force RMSE, meV/Angstrom"}
    gammas = sorted({float(row["gamma_select"]) for row in table})
    with style():
        figure, panels = plt.subplots(1, len(quantities), figsize=(6.4, 2.7))
        for axes, (key, name) in zip(panels, quantities.items(), strict=True):
            for gamma in gammas:
                values = [float(row[key]) for row in table if float(row["gamma_select"]) == gamma]
                mean, low, high = interval(values)
                axes.plot([gamma] * len(values), values, ".", color=MUTED, markersize=4, alpha=0.6)
                axes.errorbar(gamma, mean, [[mean - low], [high - mean]], fmt="o", color=RECORD, capsize=3)
            axes.set(xscale="log", xlabel="gamma_select", ylabel=name, ylim=(0, None))
            axes.set_xticks(gammas, [f"{gamma:g}" for gamma in gammas])
            axes.minorticks_off()
        save(figure, stem)


def interval(values: list[float]) -> tuple[float, float, float]:
    """Mean over seeds and ends of its 95 % interval; the value itself where there is one."""
    found = t_interval(np.array(values), log=False)
    mean, low, high = (float(x) for x in (found.center, found.low, found.high))
    return (mean, low, high) if len(values) > 1 else (mean, mean, mean)


def markdown(table: list[dict[str, Any]]) -> str:
    """A row for each gamma_select, with 95 % intervals over seeds."""
    lines = ["| gamma_select | seeds | labels | force RMSE, meV/Angstrom | fits | walkers stopped |"]
    lines.append("| ---: | ---: | ---: | ---: | ---: | ---: |")
    for gamma in sorted({float(row["gamma_select"]) for row in table}):
        mine = [row for row in table if float(row["gamma_select"]) == gamma]
        cells = [f"{gamma:g}", str(len(mine))]
        for key, digits in (("labels", 1), ("forces_rmse", 2)):
            mean, low, high = interval([float(row[key]) for row in mine])
            cells.append(f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]")
        cells += [f"{np.mean([float(row[key]) for row in mine]):.1f}" for key in ("fits", "stopped")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs what is missing, writes the table and draws it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("ALMLIP_DATA_DIR"), help="reference data")
    parser.add_argument("--out", type=Path, default=Path("runs/mtp_lithium"), help="folder of the label source")
    parser.add_argument("--table", type=Path, default=HERE / "results.csv")
    parser.add_argument("--atoms", type=int, default=54, choices=SIZES)
    parser.add_argument("--level", type=int, default=8, help="of the moment tensor potential")
    parser.add_argument("--mode", choices=["configuration", "neighborhood"], default="configuration")
    parser.add_argument("--gammas", nargs="*", type=float, default=GAMMA_SELECT)
    parser.add_argument("--seeds", nargs="*", type=int, default=range(5))
    options = parser.parse_args()
    if options.data is None:
        parser.error("give the folder of the reference data with --data or ALMLIP_DATA_DIR.")
    al.prepare_jax()
    options.out.mkdir(parents=True, exist_ok=True)
    source = label_source(Path(options.data), options.out / "source")
    crystal = bulk("Li", "bcc", a=LATTICE, cubic=True) * ((SIZES[options.atoms],) * 3)
    table = list(csv.DictReader(options.table.open())) if options.table.exists() else []
    done = {(float(row["gamma_select"]), int(row["seed"])) for row in table}
    labels = SourceSettings.parse({"kind": "potential", "path": str(options.out / "source")}).build()
    study = Study(crystal, labels, [], options.level, options.mode)
    study = replace(
        study, test=labelled(study, frames_of(source, crystal, options.out / f"test_{options.atoms}.extxyz"))
    )
    for seed in options.seeds:
        for gamma in options.gammas:
            if (gamma, seed) not in done:
                table.append(campaign(study, gamma, seed))
                print(table[-1], flush=True)
                write_csv(options.table, table)
    options.table.with_suffix(".md").write_text(markdown(table))
    draw(table, HERE / "figures" / "labels")


if __name__ == "__main__":
    main()
