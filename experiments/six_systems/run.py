"""Six unlike systems in one campaign, or six campaigns?  ``python experiments/six_systems/run.py``.

The Zundel and Eigen cations, acetylacetone, ethanol, benzene and the dimer of formic acid, labels by GFN2-xTB: from one
geometry each, campaigns with selection in the loop at 600 K label 60 structures of each system by itself, and one
campaign labels all of them side by side, up to as many in all.  Seeds are paired, tests (dynamics of the label source
at 600 K) shared.

What is finished is not run again, the rest goes on.  One row a campaign, round and system in ``results.csv`` of the
output folder; ``--report`` prints what that says.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from ase import Atoms
from ase.build import molecule
from ase.data.s22 import create_s22_system

from almlip_jax.campaign.config import ExperimentConfig
from almlip_jax.compilation import prepare_jax
from almlip_jax.oracles import Labeller, LabelStore, TBLiteSettings
from almlip_jax.oracles.sampling import label_md
from almlip_jax.structures.io import read_structures, write_structures

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import add, finished, seeds_of

HERE = Path(__file__).resolve().parent

TOGETHER, TOLD = "together", "together, told of charge"
FIRST, BATCH, ROUNDS = 10, 10, 5  # labels of a system by itself
STEPS = {"alone": 3000, TOGETHER: 18000}
"""Of a training: as many passes over the labels."""
MOST = (FIRST + BATCH * ROUNDS) * 6
SHARE = 5  # labels of each system in a round of all


def geometries() -> dict[str, Atoms]:
    """One of each system, with its charge."""
    strategies = HERE.parent / "exploration_strategies"
    found = {
        "zundel": read_structures(HERE.parents[1] / "configs" / "zundel.xyz")[0],
        "eigen": read_structures(strategies / "eigen.xyz")[0],
        "acetylacetone": read_structures(strategies / "acetylacetone.xyz")[0],
        "ethanol": molecule("CH3CH2OH"),
        "benzene": molecule("C6H6"),
        "acids": create_s22_system("Formic_acid_dimer"),
    }
    for name, atoms in found.items():
        atoms.info = {"charge": int(name in ("zundel", "eigen")), "spin": 1, "system": name}
        atoms.calc = None
    return found


def tests(folder: Path) -> Path:
    """Frames of dynamics with the label source at 600 K of each system, every 20 fs, made once."""
    folder.mkdir(parents=True, exist_ok=True)
    path = (folder / "600K.extxyz").resolve()
    if path.exists():
        return path
    frames = []
    with LabelStore(folder / "labels.db") as store, Labeller(TBLiteSettings(), store) as labeller:
        for name, start in geometries().items():
            length = {"steps": 2000, "equilibration": 1000, "every": 20}
            made = label_md(start, labeller, temperature=600, timestep=1.0, **length, seed=0, purpose="test")
            for frame in made:
                frame.info["system"] = name
            frames += made
    write_structures(path, frames)
    return path


def config(out: Path, names: list[str], seed: int, *, told: bool = False) -> ExperimentConfig:
    """A campaign with some of the systems, whose model may be told of charge and spin."""
    starts, files = geometries(), {}
    for name in names:
        files[name] = str((out / f"{name}.extxyz").resolve())
        if not Path(files[name]).exists():
            write_structures(Path(files[name]), [starts[name]])
    of_one = (out / "tests" / f"{'-'.join(names)}.extxyz").resolve()
    if not of_one.exists():
        known = read_structures(tests(out / "tests"), require_labels=True)
        write_structures(of_one, [frame for frame in known if frame.info["system"] in names])
    together = len(names) > 1
    return ExperimentConfig.model_validate(
        {
            "name": "six-systems",
            "seed": seed,
            "system": {"structures": files},
            "oracle": {"kind": "tblite", "method": "GFN2-xTB"},
            "initial": {"rattle": {"count": FIRST * len(names), "stdev": 0.06}},
            "test": {"files": [{"path": str(of_one), "group": "600K"}]},
            "model": {"size": "tiny", "electronic_state": told},
            "ensemble": {"size": 4},
            "training": {"max_steps": STEPS[TOGETHER if together else "alone"], "max_epochs": 10**6},
            "exploration": {
                "kind": "md",
                "walkers": [{"temperature": 600, "count": 4 * len(names)}],
                "steps": 1500,
                "record_every": 10,
                "buffer": 16,
                "when_full": "go_on",
                "thresholds": {"kind": "fixed", "record": 0.05, "stop": 1.0},
                "admission": {"kind": "log_det"},
            },
            "selection": {"batch": SHARE * len(names) if together else BATCH, "selector": {"kind": "max_det"}},
            "stopping": {
                "max_rounds": (MOST - FIRST * 6) // (SHARE * 6) if together else ROUNDS,
                "share_below": None,
            },
        }
    )


def report(table: pd.DataFrame) -> str:
    """Labels of the common campaign, over those of six, with which errors are what those of the six are in the end."""
    lines = ["| seed | campaign | system | alone | together, most labels | label share |", "|" + " --- |" * 6]
    for seed, own in table.groupby("seed"):
        alone = own[own.campaign == own.system]
        ends = alone[alone["round"] == ROUNDS].set_index("system").forces_rmse
        for way in (TOGETHER, TOLD):
            joint = own[own.campaign == way].pivot(index="labels", columns="system", values="forces_rmse")
            if len(ends) == 6 and not joint.empty:
                lines += of_seed(seed, way, ends, joint)
    return "\n".join(lines)


def of_seed(seed: int, way: str, ends: pd.Series, joint: pd.DataFrame) -> list[str]:
    """Lines of one seed and common campaign."""
    ratios = joint[ends.index] / ends
    lines = [
        f"| {seed} | {way} | {name} | {ends[name]:.1f} | {joint[name].iloc[-1]:.1f} | {share(ratios[name])} |"
        for name in ends.index
    ]
    mean, worst = np.exp(np.log(ratios).mean(axis=1)), ratios.max(axis=1)
    lines.append(f"| {seed} | {way} | geometric mean | 1 | {mean.iloc[-1]:.2f} | {share(mean)} |")
    return [*lines, f"| {seed} | {way} | every one | 1 | {worst.iloc[-1]:.2f} | {share(worst)} |"]


def share(ratios: pd.Series) -> str:
    """Labels of all systems at which a ratio of errors comes to 1, over those of six campaigns."""
    logs = np.minimum.accumulate(np.log(ratios.to_numpy(float)))
    if logs[-1] > 0:
        return f"more than {ratios.index[-1] / MOST:.2f}"
    labels = np.exp(np.interp(0.0, -logs, np.log(ratios.index.to_numpy(float))))
    return f"{'at most ' if logs[0] <= 0 else ''}{labels / MOST:.2f}"


def main() -> None:
    """Runs what is not finished, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/six_systems"))
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--campaigns", nargs="+", default=[TOLD], choices=[TOGETHER, TOLD])
    parser.add_argument("--report", action="store_true", help="tell of what was run, and run nothing")
    options = parser.parse_args()
    out, table = options.out, options.out / "results.csv"
    if not options.report:
        prepare_jax()
        names = list(geometries())
        for seed in seeds_of(options):
            for campaign in (*options.campaigns, *names):
                chosen = [campaign] if campaign in names else names
                folder = out / f"{campaign.split(',')[0]}{'-told' * (campaign == TOLD)}-{seed}"
                history = finished(folder, config(out, chosen, seed, told=campaign == TOLD))
                rows = [
                    {"seed": seed, "campaign": campaign, "system": name}
                    | {"round": one["round"], "labels": one["labels"]}
                    | {"forces_rmse": round(1e3 * one["errors"][f"forces_rmse_{name} 600K"], 3)}
                    for one in history
                    for name in chosen
                ]
                add(table, rows, ["seed", "campaign", "system", "round"])
    print(report(pd.read_csv(table)))


if __name__ == "__main__":
    main()
