"""One potential for several charges against one for each: told the charge, and where it can do without, not told.

Three sets of 300 K geometries with GFN2-xTB labels: the Zundel cation H5O2+, the neutral water dimer, and the cation of
the dimer in the geometries of the neutral one, a doublet.  For each seed, potentials are trained on ``--structures`` of
one set, or on as many of each of two sets, and tested on frames of other runs.

Use: ``python experiments/charge_states/run.py --out runs/charge_states``; what is done already is not done again.
"""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.build import molecule

from almlip_jax.compilation import prepare_jax
from almlip_jax.ensembles import EnsembleSettings
from almlip_jax.evaluation import error_metrics
from almlip_jax.evaluation.statistics import t_interval
from almlip_jax.fitting import fit_potential
from almlip_jax.keys import numpy_generator
from almlip_jax.models import SharedDensitySettings
from almlip_jax.oracles import Labeller, LabelStore, TBLiteSettings, label_md
from almlip_jax.structures.io import read_structures, write_structures
from almlip_jax.training import TrainingSettings

HERE = Path(__file__).resolve().parent
SETS = ("zundel", "dimer", "dimer_cation")
ARMS = {
    "zundel alone": (("zundel",), False),
    "dimer alone": (("dimer",), False),
    "dimer_cation alone": (("dimer_cation",), False),
    "zundel + dimer, told": (("zundel", "dimer"), True),
    "zundel + dimer, not told": (("zundel", "dimer"), False),
    "dimer + dimer_cation, told": (("dimer", "dimer_cation"), True),
}
"""Which sets a potential learns from, and whether it is told charge and spin."""


def starts() -> dict[str, Atoms]:
    """Zundel cation and water dimer."""
    zundel = read_structures(HERE.parents[1] / "configs" / "zundel.xyz")[0]
    zundel.info.update(charge=1, spin=1)
    dimer = molecule("H2O") + molecule("H2O")
    dimer.positions[3:] += [0.0, 2.0, -2.1]
    dimer.info.update(charge=0, spin=1)
    return {"zundel": zundel, "dimer": dimer}


def labelled(out: Path, steps: int) -> dict[str, dict[str, list[Atoms]]]:
    """Frames of each set for training and for tests, by purpose."""
    found: dict[str, dict[str, list[Atoms]]] = {"train": {}, "test": {}}
    with Labeller(TBLiteSettings(), LabelStore(out / "labels.db")) as labeller:
        for number, purpose in enumerate(found):
            for name, start in starts().items():
                run = {"temperature": 300.0, "steps": steps, "every": 20, "equilibration": 500}
                found[purpose][name] = label_md(start, labeller, **run, seed=number, purpose=f"{purpose}_{name}")
            bare = [Atoms(a.numbers, a.positions, info={"charge": 1, "spin": 2}) for a in found[purpose]["dimer"]]
            results = labeller.label(bare, {"purpose": f"{purpose}_dimer_cation"})
            found[purpose]["dimer_cation"] = [result.atoms for result in results if result.atoms is not None]
            for name, frames in found[purpose].items():
                write_structures(out / f"{purpose}_{name}.xyz", frames)
    return found


def train_and_test(
    arm: str, seed: int, options: argparse.Namespace, frames: dict[str, dict[str, list[Atoms]]]
) -> list[dict[str, object]]:
    """Errors of one potential on the test frames of its sets."""
    names, told = ARMS[arm]
    dataset: list[Atoms] = []
    for name in names:  # the same structures in every arm
        order = numpy_generator(seed, f"draw {name}").permutation(len(frames["train"][name]))
        dataset += [frames["train"][name][n] for n in order[: options.structures]]
    dataset = [dataset[n] for n in numpy_generator(seed, "order").permutation(len(dataset))]
    model = SharedDensitySettings(size="tiny", electronic_state=told)
    steps = options.steps * len(names)  # as many passes over the data
    training = TrainingSettings(max_steps=steps, patience=1000, validation_fraction=0.1, batch_size=8)
    began = time.monotonic()
    potential, _ = fit_potential(dataset, model, EnsembleSettings(size=2), training, seed)
    rows = []
    for name in names:
        test = frames["test"][name]
        errors = error_metrics(test, potential.evaluate(test))
        numbers = {key: errors[key] for key in ("forces_rmse", "energy_rmse")}
        rows.append({"arm": arm, "set": name, "seed": seed, "structures": len(dataset), **numbers})
    print(arm, seed, f"{time.monotonic() - began:.0f} s", flush=True)
    return rows


def summary(rows: list[dict[str, str]]) -> list[str]:
    """A table of errors, and of their ratios to those of a potential for each set, with 95 % intervals over seeds."""
    found = {(r["arm"], r["set"], r["seed"]): r for r in rows}
    seeds = sorted({r["seed"] for r in rows})
    lines = [
        "| tested on | potential | F RMSE meV/A | E RMSE meV/atom | F ratio | E ratio |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name in SETS:
        for arm, (names, _) in ARMS.items():
            if name not in names or any((arm, name, seed) not in found for seed in seeds):
                continue
            cells = [name, arm]
            values = {}
            for key in ("forces_rmse", "energy_rmse"):
                own = np.array([float(found[arm, name, seed][key]) for seed in seeds])
                alone = np.array([float(found[f"{name} alone", name, seed][key]) for seed in seeds])
                values[key] = own, own / alone
            cells += [f"{1000 * own.mean():.1f}" for own, _ in values.values()]
            for _, ratios in values.values():
                cells.append("1" if arm.endswith("alone") else f"{t_interval(ratios):.2f}")
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Labels, trains what is not trained yet, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/charge_states"))
    parser.add_argument("--seeds", type=int, default=4, help="how many")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--structures", type=int, default=60)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--md-steps", type=int, default=4000)
    options = parser.parse_args()
    prepare_jax()
    options.out.mkdir(parents=True, exist_ok=True)
    frames = labelled(options.out, options.md_steps)
    table = options.out / "results.csv"
    rows: list[dict[str, str]] = []
    if table.exists():
        with table.open(newline="") as file:
            rows = list(csv.DictReader(file))
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for arm in ARMS:
            if any(r["arm"] == arm and r["seed"] == str(seed) for r in rows):
                continue
            rows += [{k: str(v) for k, v in row.items()} for row in train_and_test(arm, seed, options, frames)]
            building = table.with_suffix(".tmp")
            with building.open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)
            building.replace(table)
    print("\n".join(summary(rows)))


if __name__ == "__main__":
    main()
