"""CH4 + CN -> CH3 + HCN, set size and accuracy against parameters: ``python experiments/mtp_reaction/run.py``.

Campaigns in the manner of MLIP-2 with moment tensor potentials of several levels: dynamics at 300 K with the Andersen
thermostat and the grade inside, labels by GFN2-xTB, walkers that start along the path of the
reaction.  Afterwards each potential is compared with GFN2-xTB on dynamics of GFN2-xTB itself and along the relaxed
path.  One row a campaign goes into ``results.csv``, one a campaign and point of the path into ``path.csv``, and the
figure is drawn; a campaign that is finished is not run again.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from path import GRID, andersen_frames, difference, relaxed_path

import almlip_jax as al
from almlip_jax.campaign import finish_campaign
from almlip_jax.campaign.config import ExperimentConfig
from almlip_jax.evaluation.statistics import t_interval
from almlip_jax.files import write_csv
from almlip_jax.progress import open_progress
from almlip_jax.structures.io import write_structures

HERE = Path(__file__).resolve().parent
SOURCE, WORKER = {"kind": "tblite", "method": "GFN2-xTB"}, {"kind": "local", "workers": 1}
SIDES = {"reactants": (-9.0, -0.6), "complex": (-0.6, 0.0), "products": (0.0, 9.0)}  # of the difference, Angstrom


def config(level: int, seed: int, files: dict[str, Path]) -> ExperimentConfig:
    """A campaign."""
    return ExperimentConfig.model_validate(
        {
            "name": "mtp-reaction",
            "seed": seed,
            "system": {"structures": str(files["path"]), "charge": 0, "spin": 2},
            "oracle": SOURCE,
            "executor": WORKER,
            "initial": {"rattle": {"count": len(GRID), "stdev": 0.03}},
            "test": {"files": [{"path": str(files["test"])}]},
            "model": {"kind": "mtp", "level": level, "cutoff": 5.0, "min_dist": 0.8},
            "ensemble": {"size": 1},
            "training": {
                "projection": {"iterations": 40, "starts": 2, "trial_iterations": 10},
                "loss": {"kind": "mlip"},
                "warm_start": True,
                "warm_steps": 15,
                "validation_fraction": 0.0,
                "replay": 0,
            },
            "active_set": {"mode": "neighborhood"},
            "exploration": {
                "kind": "md",
                "walkers": [{"temperature": 300, "count": len(GRID)}],
                "steps": 500,
                "timestep": 0.5,
                "integrator": {"kind": "andersen", "rate": 0.01},
                "biases": [{"kind": "sphere", "radius": 3.5, "stiffness": 1.0}],
                "gate": {"kind": "absolute", "score": "extrapolation_grade"},
                "thresholds": {"kind": "grade", "gamma_select": 2.0, "gamma_break": 10.0},
                "sanity": {"dissociation": False, "max_temperature": 20},
                "starts": {"kind": "file", "path": str(files["path"])},
                "record_every": 5,
                "buffer": 32,
                "when_full": "go_on",
            },
            "selection": {"batch": 50, "selector": {"kind": "maxvol", "mode": "neighborhood"}},
            "stopping": {"max_rounds": 15, "share_below": {"share": 1.0, "rounds": 1}},
        }
    )


def prepared(folder: Path) -> dict[str, Path]:
    """Files with the path and the test set, labelled, made unless they are there."""
    files = {"path": (folder / "path.extxyz").resolve(), "test": (folder / "test.extxyz").resolve()}
    folder.mkdir(parents=True, exist_ok=True)
    if not files["path"].exists():
        write_structures(files["path"], al.label(SOURCE, relaxed_path(), executor=WORKER))
    if not files["test"].exists():
        frames = andersen_frames(al.read_structures(files["path"])[::2], seed=1000)
        for frame in frames:
            frame.info["group"] = next(name for name, (a, b) in SIDES.items() if a <= difference(frame) < b)
        write_structures(files["test"], al.label(SOURCE, frames, executor=WORKER))
    return files


def finished(folder: Path, settings: ExperimentConfig) -> dict[str, Any]:
    """The state of a campaign, which is run or gone on with unless it is finished."""
    with open_progress() as progress:
        return finish_campaign(settings, folder, progress=progress).model_dump()


def row_of(level: int, seed: int, state: dict[str, Any], potential: al.Potential, test: list[Atoms]) -> dict[str, Any]:
    """What a campaign bought, and what that gave: meV and meV/Angstrom."""
    evaluated = potential.evaluate(test)
    errors = al.error_metrics(test, evaluated)
    energies = evaluated.energy - [frame.get_potential_energy() for frame in test]
    found = {
        "level": level,
        "seed": seed,
        "parameters": parameters(potential),
        "labels": state["labels"],
        "rounds": len(state["history"]),
        "reason": state["reason"],
        "forces_rmse": round(1e3 * float(errors["forces_rmse"]), 2),
        "energy_rmse": round(1e3 * float(np.sqrt(np.mean(energies**2))), 2),
    }
    groups = np.array([frame.info["group"] for frame in test])
    for name in SIDES:
        apart = np.concatenate([evaluated.forces[n] - test[n].get_forces() for n in np.flatnonzero(groups == name)])
        found[f"forces_rmse_{name}"] = round(1e3 * float(np.sqrt(np.mean(apart**2))), 2)
    return found


def parameters(potential: al.Potential) -> int:
    """Coefficients of a moment tensor potential: radial ones of ordered pairs, of moments, of species."""
    model, species = potential.ensemble.model, len(potential.species)
    radial = model.settings.radial_basis_size * model.basis.radial_functions
    return species**2 * radial + len(model.basis.scalars) + species


def of_level(table: list[dict[str, Any]], level: int, key: str) -> tuple[float, float, float]:
    """Geometric mean over the seeds of a level, and the ends of its 95 % interval (the mean itself with one seed)."""
    values = np.array([float(row[key]) for row in table if int(row["level"]) == level])
    found = t_interval(values, log=True)
    mean, low, high = (float(x) for x in (found.center, found.low, found.high))
    return (mean, low, high) if len(values) > 1 else (mean, mean, mean)


def markdown(table: list[dict[str, Any]], along: list[dict[str, Any]]) -> str:
    """A row for each level, with 95 % intervals over seeds."""
    sides = "".join(f" | {name}" for name in SIDES)
    lines = [
        f"| level | parameters | seeds | labels | energy RMSE, meV | force RMSE, meV/Angstrom{sides} | path RMSE, meV |"
    ]
    lines.append("| ---: " * (7 + len(SIDES)) + "|")
    for level in sorted({int(row["level"]) for row in table}):
        mine = [row for row in table if int(row["level"]) == level]
        cells = [str(level), str(mine[0]["parameters"]), str(len(mine))]
        for key in ("labels", "energy_rmse", "forces_rmse", *(f"forces_rmse_{name}" for name in SIDES)):
            mean, low, high = of_level(table, level, key)
            cells.append(
                f"{mean:.0f} [{low:.0f}, {high:.0f}]"
                if key in ("labels", "energy_rmse", "forces_rmse")
                else f"{mean:.0f}"
            )
        off = [float(row["energy"]) - float(row["source"]) for row in along if int(row["level"]) == level]
        cells.append(f"{1e3 * np.sqrt(np.mean(np.square(off))):.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(table: list[dict[str, Any]], along: list[dict[str, Any]], stem: Path) -> None:
    """Labels and errors against the number of parameters, and energies along the path."""
    from matplotlib import pyplot as plt

    from almlip_jax.figures.style import INK, MUTED, RECORD, save, style

    levels = sorted({int(row["level"]) for row in table})
    with style():
        figure, panels = plt.subplots(1, 3, figsize=(9.6, 2.8))
        quantities = {"labels": "labels", "forces_rmse": "force RMSE, meV/Angstrom"}
        for axes, (key, name) in zip(panels, quantities.items(), strict=False):
            for level in levels:
                mine = [row for row in table if int(row["level"]) == level]
                at, (mean, low, high) = int(mine[0]["parameters"]), of_level(table, level, key)
                axes.plot([at] * len(mine), [float(row[key]) for row in mine], ".", color=MUTED, markersize=4)
                axes.errorbar(at, mean, [[mean - low], [high - mean]], fmt="o", color=RECORD, capsize=3)
            axes.set(xlabel="parameters", ylabel=name, ylim=(0, None))
        axes, zero = panels[2], min(float(row["source"]) for row in along)
        for n, level in enumerate(levels):
            mean = [
                np.mean([float(r["energy"]) for r in along if int(r["level"]) == level and float(r["difference"]) == x])
                for x in GRID
            ]
            axes.plot(
                GRID, np.array(mean) - zero, color=plt.get_cmap("viridis")(n / len(levels)), label=f"level {level}"
            )
        source = {float(row["difference"]): float(row["source"]) for row in along}
        axes.plot(GRID, [source[x] - zero for x in GRID], ".", color=INK, label="GFN2-xTB")
        axes.set(xlabel="d(C-H) - d(H-CN), Angstrom", ylabel="energy, eV")
        axes.legend()
        save(figure, stem)


def main() -> None:
    """Runs what is missing, writes the tables and draws them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/mtp_reaction"), help="folder of the campaigns")
    parser.add_argument("--levels", nargs="*", type=int, default=[6, 10, 12, 16])
    parser.add_argument("--seeds", nargs="*", type=int, default=range(3))
    options = parser.parse_args()
    al.prepare_jax()
    files = prepared(options.out)
    path, test = al.read_structures(files["path"]), al.read_structures(files["test"])
    table: list[dict[str, Any]] = []
    along: list[dict[str, Any]] = []
    for seed in options.seeds:
        for level in options.levels:
            folder = options.out / f"level-{level}-seed-{seed}"
            state = finished(folder, config(level, seed, files))
            potential = al.load(folder / "potential")
            table.append(row_of(level, seed, state, potential, test))
            print(table[-1], flush=True)
            for x, frame, energy in zip(GRID, path, potential.evaluate(path).energy, strict=True):
                about = {"level": level, "seed": seed, "difference": float(x)}
                along.append(about | {"energy": float(energy), "source": float(frame.get_potential_energy())})
            write_csv(HERE / "results.csv", table)
            write_csv(HERE / "path.csv", along)
    (HERE / "results.md").write_text(markdown(table, along))
    draw(table, along, HERE / "figures" / "reaction")


if __name__ == "__main__":
    main()
