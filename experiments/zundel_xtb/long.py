"""The labelled sets of ``run.py`` trained once more and longer: what the labels are worth when training is no limit.

Use: ``python experiments/zundel_xtb/long.py --out runs/zundel_xtb``.
"""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path

from almlip_jax.campaign.config import load_config
from almlip_jax.campaign.rundir import RunDirectory
from almlip_jax.compilation import prepare_jax
from almlip_jax.evaluation import error_metrics
from almlip_jax.fitting import fit_potential
from almlip_jax.structures.io import read_structures

HERE = Path(__file__).resolve().parent


def main() -> None:
    """Trains on the last labelled set of each campaign and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/zundel_xtb"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12_000)
    options = parser.parse_args()
    prepare_jax()
    rows: list[dict[str, object]] = []
    for seed in range(options.seeds):
        for strategy in ("selected", "random"):
            run = RunDirectory(options.out / f"{strategy}-{seed}")
            config = load_config(run.config, [f"training.max_steps={options.steps}", "training.patience=1000"])
            dataset = read_structures(run.rounds()[-1].dataset, require_labels=True)
            began = time.monotonic()
            potential, _ = fit_potential(dataset, config.model, config.ensemble, config.training, seed)
            seconds = time.monotonic() - began
            test = read_structures(run.test, require_labels=True)
            groups = error_metrics(test, potential.evaluate(test))["by_group"]
            errors = {f"{name}_{g}": v[name] for g, v in groups.items() for name in ("forces_rmse", "energy_rmse")}
            rows.append({"strategy": strategy, "seed": seed, "structures": len(dataset), **errors, "seconds": seconds})
            with (HERE / "results_long.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)


if __name__ == "__main__":
    main()
