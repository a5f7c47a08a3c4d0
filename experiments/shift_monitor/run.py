"""Which score tells 600 K frames from 300 K ones?  ``python experiments/shift_monitor/run.py --data DIR --out DIR``.

A committee trained on acetylacetone at 300 K judges unseen frames at 300 K and at 600 K; each score is a detector of
the shift between the two, measured by the area under its receiver operating characteristic: of single frames, and of
means over runs of frames that follow one another.  One row a score, training seed and length of run in ``results.csv``.
"""

from __future__ import annotations

import argparse
import csv
import os
from pathlib import Path

import numpy as np
from ase import Atoms
from scipy.stats import rankdata

from almlip_jax.compilation import prepare_jax
from almlip_jax.fitting import fit_potential
from almlip_jax.models import SharedDensitySettings
from almlip_jax.potential import Potential
from almlip_jax.structures.io import read_structures
from almlip_jax.training import EnsembleSettings, TrainingSettings

HERE = Path(__file__).resolve().parent
RUNS = (1, 5, 20)


def trained(frames: list[Atoms], folder: Path, seed: int, steps: int) -> Potential:
    """The committee, from the folder where it is there already."""
    if (folder / "potential.json").exists():
        return Potential.load(folder)
    training = TrainingSettings(max_steps=steps, max_epochs=10**6, patience=10**6)
    model = SharedDensitySettings(size="small")
    potential, _ = fit_potential(frames, model, EnsembleSettings(), training, seed)
    potential.save(folder)
    return potential


def novelty_of_frames(potential: Potential, name: str, frames: list[Atoms]) -> dict[str, np.ndarray]:
    """Largest and mean value of the atoms of each frame."""
    parts = potential.evaluate(frames).atom_scores[name]
    return {"max": np.array([p.max() for p in parts]), "mean": np.array([p.mean() for p in parts])}


def area(low: np.ndarray, high: np.ndarray) -> float:
    """Probability that a value of ``high`` exceeds one of ``low``."""
    ranks = rankdata(np.concatenate([low, high]))[len(low) :]
    return float((ranks.sum() - len(high) * (len(high) + 1) / 2) / (len(low) * len(high)))


def means_of_runs(values: np.ndarray, length: int) -> np.ndarray:
    """Means over runs of so many frames."""
    whole = len(values) // length * length
    return values[:whole].reshape(-1, length).mean(axis=1)


def main() -> None:
    """Trains, judges and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("ALMLIP_DATA_DIR"), help="reference data")
    parser.add_argument("--out", type=Path, required=True, help="folder for the potentials")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4000)
    options = parser.parse_args()
    if options.data is None:
        parser.error("give the folder of the reference data with --data or ALMLIP_DATA_DIR.")
    prepare_jax()
    data = Path(options.data) / "acac"
    train, cold, hot = (read_structures(data / f"{n}.xyz") for n in ("train_300K", "test_MD_300K", "test_MD_600K"))
    rows = []
    for seed in range(options.seeds):
        potential = trained(train, options.out / f"potential-{seed}", seed, options.steps)
        found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        knowing = potential.knowing(train)
        for name in ("latent_distance", "extrapolation_grade"):
            both = [novelty_of_frames(knowing, name, frames) for frames in (cold, hot)]
            found |= {f"{name}_{kind}": (both[0][kind], both[1][kind]) for kind in ("max", "mean")}
        scores = [potential.evaluate(frames).scores for frames in (cold, hot)]
        for name in ("force_std_max", "force_std_mean", "energy_std"):
            found[name] = scores[0][name], scores[1][name]
        for name, (low, high) in found.items():
            row: dict[str, object] = {"score": name, "seed": seed}
            row |= {f"auroc_{n}": round(area(means_of_runs(low, n), means_of_runs(high, n)), 4) for n in RUNS}
            rows.append(row)
            print(row, flush=True)
    with (HERE / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
