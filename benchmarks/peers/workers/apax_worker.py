"""apax: trains its Gaussian moment network and runs its jax-md dynamics; one JSON task in, one JSON line out.

Steps per second come from the difference of a long and a short run, so that start-up and compilation do not count.
"""

from __future__ import annotations

import csv
import json
import resource
import sys
import time
from pathlib import Path

BEGAN = time.perf_counter()

import numpy as np
import yaml
from apax.md import run_md
from apax.md.ase_calc import ASECalculator
from apax.train.run import run
from ase.io import read


def train(task: dict) -> dict:
    folder = Path(task["out"])
    config = {
        "n_epochs": task["epochs"],
        "seed": 1,
        "data": {
            "directory": str(folder),
            "experiment": "model",
            "data_path": task["train"],
            "n_train": task["n_train"],
            "n_valid": task["n_valid"],
            "batch_size": 4,
            "valid_batch_size": 10,
        },
        "model": {
            "name": "gmnn",
            "basis": {"name": "bessel", "n_basis": 16, "r_max": 5.0},
            "ensemble": {"kind": "full", "n_members": task["members"]} if task["members"] > 1 else None,
        },
        "loss": [{"name": "energy"}, {"name": "forces", "weight": 4.0}],
        "metrics": [{"name": "energy", "reductions": ["mae"]}, {"name": "forces", "reductions": ["mae"]}],
        "callbacks": [{"name": "csv"}],
        "progress_bar": {"disable_epoch_pbar": True, "disable_batch_pbar": True},
    }
    began = time.perf_counter()
    run(config, log_level="error")
    seconds = time.perf_counter() - began
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    result = {"seconds": time.perf_counter() - BEGAN}
    logs = list(folder.glob("model/log.csv"))
    if logs:
        rows = list(csv.DictReader(logs[0].open()))
        times = [float(row["epoch_time"]) for row in rows if row.get("epoch_time")]
        result["seconds_per_epoch"] = float(np.median(times)) if times else seconds / task["epochs"]
    for name, path in task.get("tests", {}).items():
        test, calculator = read(path, ":"), ASECalculator(folder / "model")
        errors, energies = [], []
        for atoms in test[:: task["test_every"]]:
            labels = atoms.get_forces(), atoms.get_potential_energy()
            atoms.calc = calculator
            errors.append(atoms.get_forces() - labels[0])
            energies.append(atoms.get_potential_energy() - labels[1])
        result[f"forces_mae_{name}"] = 1e3 * float(np.mean(np.abs(np.concatenate(errors))))
        result[f"energy_mae_{name}"] = 1e3 * float(np.mean(np.abs(energies)))
    return result


def dynamics(task: dict) -> dict:
    folder = Path(task["potential"])

    def once(steps: int, tag: str) -> float:
        config = {
            "ensemble": {
                "name": "nvt",
                "dt": 0.5,
                "temperature_schedule": {"name": "constant", "T0": task["temperature"]},
            },
            "duration": 0.5 * steps,
            "n_inner": task["inner"],
            "sampling_rate": task["every"],
            "buffer_size": 100,
            "dr_threshold": 0.5,
            "sim_dir": str(Path(task["out"]) / tag),
            "initial_structure": task["start"],
            "restart": False,
            "disable_pbar": True,
        }
        if task["members"] > 1:
            config["dynamics_checks"] = [{"name": "forces_uncertainty", "threshold": 1e6}]
        began = time.perf_counter()
        run_md(str(folder / "config.yaml"), config)
        return time.perf_counter() - began

    once(task["inner"], "first")
    start_up = time.perf_counter() - BEGAN
    rates = []
    for n in range(task["repeats"]):
        short = once(task["inner"], f"short{n}")
        long = once(task["inner"] + task["steps"], f"long{n}")
        rates.append(task["steps"] / (long - short))
    return {"steps_per_second": rates, "start_up": start_up}


if __name__ == "__main__":
    task = json.loads(sys.argv[1])
    result = {"train": train, "md": dynamics}[task["part"]](task)
    result["memory_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print("RESULT " + json.dumps(result))
