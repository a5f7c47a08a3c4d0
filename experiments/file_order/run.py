"""Does a training depend on the order of its file?  ``python experiments/file_order/run.py --data DIR``.

Silicon and lithium of the mlearn sets (Zuo et al., J. Phys. Chem. A 124, 731, 2020), in the order of the file, sorted
by the largest force (strained perfect cells first), the other way round, and shuffled; the same seeds for each order.
``results.csv`` gets a row a training; the table printed compares what an order changes with what a seed changes.
What is in the table already is not trained again.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import numpy as np
import pandas as pd
from ase import Atoms

from almlip_jax.compilation import prepare_jax
from almlip_jax.ensembles import EnsembleSettings
from almlip_jax.evaluation import error_metrics
from almlip_jax.evaluation.statistics import t_interval
from almlip_jax.fitting import fit_potential
from almlip_jax.models import SharedDensitySettings
from almlip_jax.structures.io import read_structures
from almlip_jax.training import TrainingSettings

HERE = Path(__file__).resolve().parent
ORDERS = ("as in the file", "smallest forces first", "largest forces first", "shuffled")
ERRORS = ("forces_mae", "energy_mae")


def ordered(frames: list[Atoms], order: str) -> list[Atoms]:
    """The same structures in another order."""
    if order == "as in the file":
        return frames
    if order == "shuffled":
        return [frames[n] for n in np.random.default_rng(0).permutation(len(frames))]
    found = sorted(frames, key=lambda atoms: float(np.linalg.norm(atoms.get_forces(), axis=1).max()))
    return found if order == "smallest forces first" else found[::-1]


def row(
    material: str, order: str, seed: int, steps: int, train: list[Atoms], test: list[Atoms]
) -> dict[str, str | float]:
    """Errors on the test set after a training."""
    settings = TrainingSettings(max_steps=steps, max_epochs=10**6, patience=10**6)
    began = time.monotonic()
    model = SharedDensitySettings(size="tiny")
    potential, _ = fit_potential(ordered(train, order), model, EnsembleSettings(size=2), settings, seed)
    seconds = time.monotonic() - began
    errors = error_metrics(test, potential.evaluate(test))
    found: dict[str, str | float] = {"material": material, "order": order, "seed": seed, "steps": steps}
    return found | {name: round(1e3 * float(errors[name]), 3) for name in ERRORS} | {"seconds": round(seconds, 1)}


def summary(table: pd.DataFrame) -> str:
    """Means, ratios to the order of the file with 95 % intervals of paired logarithms, and spreads, as Markdown."""
    lines = ["| set | order | forces MAE, meV/A | ratio | energy MAE, meV/atom | ratio |", "|---|---|---|---|---|---|"]
    for material, own in table.groupby("material", sort=False):
        errors = {name: own.pivot(index="seed", columns="order", values=name).dropna() for name in ERRORS}
        for order in ORDERS:
            cells = [str(material), order]
            for name in ERRORS:
                cells += [f"{errors[name][order].mean():.1f}", _ratio(errors[name][order], errors[name][ORDERS[0]])]
            lines.append("| " + " | ".join(cells) + " |")
        logs = np.log(errors["forces_mae"])
        lines.append(
            f"| {material} | | another seed: {logs.std(axis=0, ddof=1).pow(2).mean() ** 0.5:.3f}, another order: "
            f"{logs.std(axis=1, ddof=1).pow(2).mean() ** 0.5:.3f} (standard deviations of the logarithm) | | | |"
        )
    return "\n".join(lines)


def _ratio(errors: pd.Series, reference: pd.Series) -> str:
    return "1" if (errors == reference).all() else f"{t_interval(errors / reference):.2f}"


def main() -> None:
    """Trains what is not in the table yet, and prints the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("ALMLIP_DATA_DIR"), help="reference data")
    parser.add_argument("--out", type=Path, default=HERE / "results.csv")
    parser.add_argument("--materials", nargs="*", default=["Si", "Li"], choices=["Si", "Li"])
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3000)
    options = parser.parse_args()
    if options.data is None:
        parser.error("give the folder of the reference data with --data or ALMLIP_DATA_DIR.")
    prepare_jax()
    rows = pd.read_csv(options.out).to_dict("records") if options.out.exists() else []
    done = {(r["material"], r["order"], r["seed"]) for r in rows}
    for material in options.materials:
        paths = [Path(options.data) / "mlearn" / f"{material}_{part}.extxyz" for part in ("train", "test")]
        sets = [read_structures(path) for path in paths]
        for seed in range(options.seeds):
            for order in ORDERS:
                if (material, order, seed) in done:
                    continue
                rows.append(row(material, order, seed, options.steps, *sets))
                print(rows[-1], flush=True)
                pd.DataFrame(rows).to_csv(options.out, index=False)
    print(summary(pd.DataFrame(rows)))


if __name__ == "__main__":
    main()
