"""Energies of isolated atoms, or references that are fitted?  ``python experiments/isolated_atoms/run.py --data DIR``.

Acetylacetone (300 K frames) with and without the three isolated atoms of the set:
with them the reference energies are theirs and the models are zero for isolated atoms (`models.anchored`), without them
references are fitted.  The same frames and seeds in both; errors on four test sets, one row a training and test set in
``results.csv``.  What is in the table already is not trained again.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

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
TESTS = ("MD_300K", "MD_600K", "dihedral", "H_transfer")
ERRORS = ("forces_mae", "energy_mae")


def trained(
    frames: list[Atoms], atoms: list[Atoms], tests: dict[str, list[Atoms]], seed: int, steps: int
) -> list[dict[str, Any]]:
    """Errors on each test set after a training with these isolated atoms."""
    settings = TrainingSettings(max_steps=steps, max_epochs=10**6, patience=10**6)
    model = SharedDensitySettings(size="small")
    potential, _ = fit_potential([*frames, *atoms], model, EnsembleSettings(size=2), settings, seed)
    found = []
    for name, test in tests.items():
        errors = error_metrics(test, potential.evaluate(test))
        about = {"frames": len(frames), "isolated_atoms": bool(atoms), "seed": seed, "steps": steps, "test": name}
        found.append(about | {key: round(1e3 * float(errors[key]), 3) for key in ERRORS})
    return found


def summary(table: pd.DataFrame) -> str:
    """Means, and ratios of errors with isolated atoms to those without, with 95 % intervals, as Markdown."""
    quantities = (f"{name}, fitted | isolated | ratio" for name in ("forces MAE, meV/A", "energy MAE, meV/atom"))
    lines = [" | ".join(("| frames | test", *quantities)) + " |", "|" + "---|" * 8]
    for (frames, test), own in table.groupby(["frames", "test"], sort=False):
        cells = [str(frames), str(test).replace("_", " ")]
        for name in ERRORS:
            errors = own.pivot(index="seed", columns="isolated_atoms", values=name).dropna()
            if errors.empty:  # no such labels
                cells += ["-"] * 3
                continue
            cells += [f"{errors[kind].mean():.2f}" for kind in (False, True)]
            cells.append(f"{t_interval(errors[True] / errors[False]):.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Trains what is not in the table yet, and prints the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("ALMLIP_DATA_DIR"), help="reference data")
    parser.add_argument("--out", type=Path, default=HERE / "results.csv")
    parser.add_argument("--frames", type=int, nargs="*", default=[30, 300])
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=3000)
    options = parser.parse_args()
    if options.data is None:
        parser.error("give the folder of the reference data with --data or ALMLIP_DATA_DIR.")
    prepare_jax()
    folder = Path(options.data) / "acac"
    atoms, pool = (read_structures(folder / name) for name in ("isolated_atoms.xyz", "train_300K.xyz"))
    tests = {name: read_structures(folder / f"test_{name}.xyz") for name in TESTS}
    rows = pd.read_csv(options.out).to_dict("records") if options.out.exists() else []
    done = {(r["frames"], r["isolated_atoms"], r["seed"]) for r in rows}
    for frames in options.frames:
        for seed in range(options.seeds):
            chosen = np.random.default_rng(seed).permutation(len(pool))[:frames]
            for kind in (False, True):
                if (frames, kind, seed) in done:
                    continue
                rows += trained([pool[n] for n in chosen], atoms if kind else [], tests, seed, options.steps)
                print(*rows[-len(TESTS) :], sep="\n", flush=True)
                pd.DataFrame(rows).to_csv(options.out, index=False)
    print(summary(pd.DataFrame(rows)))


if __name__ == "__main__":
    main()
