"""How well, and how soon, are dipoles of one molecule learned?  ``python experiments/dipole/run.py``.

Ethanol in GFN2-xTB at 400 K: potentials of two members that also give dipoles are trained on more and more frames of a
trajectory, and compared with later frames of it.  One row a training size in ``results.csv``: errors of a dipole
component and of a force component, what a training without dipoles reaches in forces, the rank correlation of
``dipole_std`` with the error of the dipole, seconds of training and of the evaluation of a frame.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from ase import Atoms, units
from ase.build import molecule
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from scipy.stats import spearmanr

from almlip_jax.ensembles import EnsembleSettings
from almlip_jax.evaluation import error_metrics
from almlip_jax.fitting import fit_potential
from almlip_jax.models import SharedDensitySettings
from almlip_jax.oracles.base import obtain_label
from almlip_jax.oracles.sources.xtb import TBLiteSettings
from almlip_jax.training import TrainingSettings

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import Driving

HERE = Path(__file__).resolve().parent
SOURCE = TBLiteSettings(dipole=True)
TRAINING = TrainingSettings.model_validate({"max_steps": 1500, "loss": {"dipole": 10.0}})
APART = 10  # steps of 0.5 fs between two frames
TESTS = 200
COLUMNS = (
    "frames",
    "dipole_mae",
    "dipole_rmse",
    "forces_rmse",
    "forces_rmse_without",
    "spearman",
    "seconds_train",
    "ms_frame",
)


def trajectory(number: int, seed: int = 0) -> Iterator[Atoms]:
    """Labelled frames of ethanol at 400 K."""
    atoms, generator = molecule("CH3CH2OH"), np.random.default_rng(seed)
    atoms.calc = Driving(SOURCE)
    MaxwellBoltzmannDistribution(atoms, temperature_K=400, rng=generator)
    dynamics = Langevin(atoms, 0.5 * units.fs, temperature_K=400, friction=0.01 / units.fs, rng=generator, fixcm=False)
    label = SOURCE.build()
    dynamics.run(1000)
    for _ in range(number):
        dynamics.run(APART)
        yield obtain_label(label, SOURCE, atoms, "").attach(Atoms(atoms.numbers, atoms.positions))


def row(train: list[Atoms], test: list[Atoms]) -> dict[str, float]:
    """Errors on the test frames after a training."""
    members = EnsembleSettings(size=2)
    found = {}
    for dipole in (True, False):
        model = SharedDensitySettings.model_validate({"size": "tiny", "dipole": dipole})
        training = TRAINING if dipole else TrainingSettings(max_steps=TRAINING.max_steps)
        begin = time.perf_counter()
        potential, _ = fit_potential(train, model, members, training, 0)
        seconds = time.perf_counter() - begin
        potential.evaluate(test)
        begin = time.perf_counter()
        said = potential.evaluate(test)
        each = 1e3 * (time.perf_counter() - begin) / len(test)
        metrics = error_metrics(test, said)
        if not dipole:
            return found | {"forces_rmse_without": metrics["forces_rmse"]}
        errors = np.linalg.norm(said.further["dipole"] - [frame.calc.results["dipole"] for frame in test], axis=1)
        found = {name: metrics[name] for name in ("dipole_mae", "dipole_rmse", "forces_rmse")}
        found |= {"frames": len(train), "seconds_train": seconds, "ms_frame": each}
        found["spearman"] = float(spearmanr(said.scores["dipole_std"], errors).statistic)
    raise AssertionError("unreachable")


def main(sizes: list[int], out: Path) -> None:
    """Writes the table."""
    frames = list(trajectory(max(sizes) + TESTS))
    spread = np.std([frame.calc.results["dipole"] for frame in frames[-TESTS:]])
    print(f"standard deviation of a dipole component over the test frames: {spread:.4f} e*A")
    with out.open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        for size in sizes:
            found = row(frames[:size], frames[-TESTS:])
            table.writerow({name: f"{found[name]:.4g}" for name in COLUMNS})
            file.flush()
            print({name: float(f"{found[name]:.4g}") for name in COLUMNS}, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[25, 100, 400])
    parser.add_argument("--out", type=Path, default=HERE / "results.csv")
    given = parser.parse_args()
    main(given.sizes, given.out)
