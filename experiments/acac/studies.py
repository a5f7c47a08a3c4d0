"""How to train and how many members: ``python experiments/acac/studies.py rates|committee --data DIR --out DIR``.

``rates`` scans learning rate and batch size over equal numbers of epochs: one row a point in ``rates.csv``, points that
are there already are not trained again.  ``committee`` trains sixteen members and asks how few of them rank the frames
of the 600 K set as all do: the mean over subsets of the Spearman correlation of their `force_std_mean` and
`force_std_max` with those of the whole, and with the true errors, one row a size in ``committee.csv``.
"""

from __future__ import annotations

import argparse
import csv
import os
import time
from pathlib import Path

import jax
import numpy as np
from ase import Atoms
from scipy.stats import spearmanr

from almlip_jax.compilation import prepare_jax
from almlip_jax.fitting import fit_potential
from almlip_jax.models import SharedDensitySettings
from almlip_jax.potential import Potential
from almlip_jax.structures.io import read_structures
from almlip_jax.training import EnsembleSettings, TrainingSettings

MODEL = SharedDensitySettings(size="small")
EPOCHS = 60
RATES, BATCHES = (2e-3, 5e-3, 1e-2), (2, 5, 10)
MEMBERS, SUBSETS = 16, 20


def rmse(potential: Potential, frames: list[Atoms]) -> float:
    """Root mean square error of force components, meV/Angstrom."""
    pairs = zip(potential.evaluate(frames).forces, frames, strict=True)
    return 1e3 * float(np.sqrt(np.mean(np.concatenate([f - a.calc.results["forces"] for f, a in pairs]) ** 2)))


def rates(data: Path, out: Path) -> None:
    """The scan of learning rate and batch size."""
    frames = read_structures(data / "train_300K.xyz")
    tests = {name: read_structures(data / f"test_MD_{name}.xyz") for name in ("300K", "600K")}
    table = out / "rates.csv"
    done = set()
    if table.exists():
        done = {(float(row["learning_rate"]), int(row["batch_size"])) for row in csv.DictReader(table.open())}
    for rate in RATES:
        for batch in BATCHES:
            if (rate, batch) in done:
                continue
            steps = EPOCHS * int(np.ceil(0.9 * len(frames) / batch))
            training = TrainingSettings(
                learning_rate=rate, batch_size=batch, max_steps=steps, max_epochs=10**6, patience=10**6
            )
            began = time.monotonic()
            potential, _ = fit_potential(frames, MODEL, EnsembleSettings(size=4), training, seed=0)
            row = {"learning_rate": rate, "batch_size": batch, "steps": steps}
            row |= {"seconds": round(time.monotonic() - began)}
            row |= {f"forces_rmse_{name}": round(rmse(potential, test), 2) for name, test in tests.items()}
            append(table, row)


def committee(data: Path, out: Path) -> None:
    """The study of the number of members."""
    frames, test = (read_structures(data / f"{name}.xyz") for name in ("train_300K", "test_MD_600K"))
    training = TrainingSettings(max_steps=6000, max_epochs=10**6, patience=10**6, validate_every=450)
    folder = out / "committee"
    if (folder / "potential.json").exists():
        potential = Potential.load(folder)
    else:
        potential, _ = fit_potential(frames, MODEL, EnsembleSettings(size=MEMBERS), training, seed=0)
        potential.save(folder)
    forces = np.stack([member_forces(potential, m, test) for m in range(MEMBERS)])  # [M, n, N, 3]
    true = np.stack([atoms.calc.results["forces"] for atoms in test])
    whole = scores(forces)
    table = out / "committee.csv"
    table.unlink(missing_ok=True)
    rng = np.random.default_rng(0)
    for size in (2, 3, 4, 5, 6, 8, 10, 12, 14, 16):
        chosen = [rng.choice(MEMBERS, size, replace=False) for _ in range(SUBSETS if size < MEMBERS else 1)]
        parts = [scores(forces[subset]) for subset in chosen]
        errors = [np.linalg.norm(forces[subset].mean(axis=0) - true, axis=-1) for subset in chosen]
        row: dict[str, float] = {"members": size}
        for name, reduce in (("mean", np.mean), ("max", np.max)):
            row[f"rank_{name}"] = np.mean([spearmanr(part[name], whole[name])[0] for part in parts])
            pairs = zip(parts, errors, strict=True)
            row[f"error_{name}"] = np.mean([spearmanr(p[name], reduce(e, axis=1))[0] for p, e in pairs])
        row["forces_rmse"] = np.mean([np.sqrt(np.mean((forces[s].mean(axis=0) - true) ** 2)) for s in chosen])
        row["forces_rmse"] *= 1e3
        append(table, {key: round(float(value), 4) for key, value in row.items()})


def member_forces(potential: Potential, m: int, test: list[Atoms]) -> np.ndarray:
    """Forces of one member, [n, N, 3]."""
    params = jax.tree.map(lambda x: x[m : m + 1], potential.params)
    one = Potential(potential.settings, potential.species, params, potential.reference_energies)
    return np.stack(one.evaluate(test).forces)


def scores(forces: np.ndarray) -> dict[str, np.ndarray]:
    """`force_std_mean` and `force_std_max` of each frame from member forces [M, n, N, 3]."""
    spread = np.sqrt(np.mean(np.sum((forces - forces.mean(axis=0)) ** 2, axis=-1), axis=0))
    return {"mean": spread.mean(axis=1), "max": spread.max(axis=1)}


def append(table: Path, row: dict) -> None:
    """One more row of a table."""
    print(row, flush=True)
    fresh = not table.exists()
    with table.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(row))
        if fresh:
            writer.writeheader()
        writer.writerow(row)


def main() -> None:
    """Runs one of the studies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=("rates", "committee"))
    parser.add_argument("--data", type=Path, default=os.environ.get("ALMLIP_DATA_DIR"), help="reference data")
    parser.add_argument("--out", type=Path, required=True, help="folder for tables and potentials")
    options = parser.parse_args()
    if options.data is None:
        parser.error("give the folder of the reference data with --data or ALMLIP_DATA_DIR.")
    prepare_jax()
    options.out.mkdir(parents=True, exist_ok=True)
    {"rates": rates, "committee": committee}[options.study](Path(options.data) / "acac", options.out)


if __name__ == "__main__":
    main()
