"""apax: trains its Gaussian moment network and runs its jax-md dynamics; one JSON task in, one JSON line out.

Steps per second come from the difference of a long and a short run, so that start-up and compilation do not count.
"""

from __future__ import annotations

from common import elapsed, errors, training_result, work  # isort: skip

import csv
import time
from itertools import accumulate
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import yaml
from apax.md import run_md
from apax.md.ase_calc import ASECalculator
from apax.train.run import run
from ase.io import read

KEPT = "forces_uncertainty/value"  # in its trajectories


def train(task: dict[str, Any]) -> dict[str, Any]:
    folder = Path(task["out"])
    config = {
        "n_epochs": task["epochs"],
        "seed": 1,
        "data": {
            "directory": str(folder),
            "experiment": "model",
            "train_data_path": task["train"],
            "val_data_path": task["valid"],
            "batch_size": task["batch"],
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
    run(config, log_level="error")
    seconds = elapsed()
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    rows = list(csv.DictReader((folder / "model" / "log.csv").open()))
    taken = [float(row["epoch_time"]) for row in rows]
    ends = [seconds - sum(taken) + t for t in accumulate(taken)]  # what is not an epoch came before the first one
    curve = [(end, float(row["val_forces_mae"])) for end, row in zip(ends, rows, strict=True)]
    result = training_result(seconds, curve, task["target"])
    for name, path in task["tests"].items():
        test, calculator = read(path, ":"), ASECalculator(folder / "model")
        energies, forces = [], []
        for atoms in test:
            copy = atoms.copy()
            copy.calc = calculator
            forces.append(copy.get_forces())
            energies.append(copy.get_potential_energy())
        result |= errors(name, energies, forces, test)
    return result


def configuration(task: dict[str, Any], steps: int, tag: str, threshold: float = 1e6) -> dict[str, Any]:
    """Of dynamics that check the uncertainty at every step where there is one."""
    ensemble = task["members"] > 1
    config: dict[str, Any] = {
        "seed": 1,
        "ensemble": {
            "name": "nvt",
            "dt": 0.5,
            "temperature_schedule": {"name": "constant", "T0": task["temperature"]},
        },
        "duration": 0.5 * steps,
        "n_inner": task["inner"],
        "sampling_rate": 1 if ensemble else 10,  # a single model has no uncertainty to look at: apax's default
        "buffer_size": 100,
        "dr_threshold": 0.5,
        "sim_dir": str(Path(task["out"]) / tag),
        "initial_structure": task["start"],
        "restart": False,
        "disable_pbar": True,
    }
    if ensemble:
        config["dynamics_checks"] = [{"name": "forces_uncertainty", "threshold": threshold}]
    return config


def dynamics(task: dict[str, Any]) -> dict[str, Any]:
    potential, inner = str(Path(task["potential"]) / "config.yaml"), task["inner"]

    def once(steps: int, tag: str) -> float:
        began = time.perf_counter()
        run_md(potential, configuration(task, steps, tag))
        return time.perf_counter() - began

    first = once(inner, "first")
    first_at, steps, rates = elapsed(), task["steps"], []
    for n in range(task["repeats"]):
        short = once(inner, f"short{n}")
        rates.append(steps / (once(inner + steps, f"long{n}") - short))
    steady = inner / rates[0]
    return {"steps_per_second": rates, "compile": first - steady, "start_up": first_at - steady}


def stop(task: dict[str, Any]) -> dict[str, Any]:
    """One run to the threshold; without one, what the check sees at each step."""
    threshold = task.get("threshold")
    tag = f"stop{threshold or 0:g}"
    run_md(str(Path(task["potential"]) / "config.yaml"), configuration(task, task["steps"], tag, threshold or 1e6))
    seconds = elapsed()
    (file,) = (Path(task["out"]) / tag).glob("*.h5")
    found: list[np.ndarray] = []
    with h5py.File(file) as content:
        content.visititems(lambda name, node: found.append(node[()]) if name.endswith(KEPT) else None)
    seen = found[0].max(axis=(1, 2)).tolist()
    over = [n for n, value in enumerate(seen) if threshold is not None and value >= threshold]
    return {"seconds": seconds, "stopped": over[0] if over else None, "seen": seen if threshold is None else []}


if __name__ == "__main__":
    work({"train": train, "md": dynamics, "stop": stop}, ("apax", "jax", "numpy"))
