"""mace-torch: its own training, and ASE dynamics with one model or a committee; one JSON task in, one JSON line out.

In the dynamics the parameters are random and the energies scaled down, which changes nothing about the time of a step.
"""

from __future__ import annotations

from common import elapsed, errors, training_result, work  # isort: skip

import logging
import os
import re
import time
from pathlib import Path
from typing import Any

os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"  # e3nn keeps its constants in a file that torch now mistrusts

import numpy as np
import torch
from ase import units
from ase.io import read
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from e3nn import o3
from mace import modules
from mace.calculators import MACECalculator


class Validations(logging.Handler):
    """Keeps when each epoch was validated and its force error, from the log: the program hands it out nowhere else."""

    def __init__(self) -> None:
        super().__init__()
        self.curve: list[tuple[float, float]] = []

    def emit(self, record: logging.LogRecord) -> None:
        found = re.match(r"Epoch \d+:.*MAE_F=\s*([\d.]+)", record.getMessage())
        if found:
            self.curve.append((elapsed(), 1e-3 * float(found[1])))


def train(task: dict[str, Any]) -> dict[str, Any]:
    from mace.cli.run_train import run
    from mace.tools import build_default_arg_parser

    folder, epochs = Path(task["out"]), task["epochs"]
    folder.mkdir(parents=True, exist_ok=True)
    options = {
        "name": "model",
        "work_dir": folder,
        "train_file": task["train"],
        "valid_file": task["valid"],
        "energy_key": "REF_energy",
        "forces_key": "REF_forces",
        "E0s": "average",
        "model": "MACE",
        "num_channels": 32,
        "max_L": 1,
        "max_ell": 3,
        "correlation": 3,
        "r_max": 5.0,
        "batch_size": task["batch"],
        "valid_batch_size": 10,
        "max_num_epochs": epochs,
        "start_swa": max(3 * epochs // 4, 1),
        "ema_decay": 0.99,
        "default_dtype": "float32",
        "device": "cpu",
        "error_table": "PerAtomMAE",
        "plot": False,
        "seed": 1,
    }
    given = [f"--{name}={value}" for name, value in options.items()] + ["--swa", "--ema", "--amsgrad"]
    validations = Validations()
    logging.getLogger().addHandler(validations)
    run(build_default_arg_parser().parse_args(given))
    result = training_result(validations.curve[-1][0], validations.curve, task["target"])
    path = folder / "model_stagetwo.model"
    calculator = MACECalculator(
        model_paths=str(path if path.exists() else folder / "model.model"), device="cpu", default_dtype="float32"
    )
    for name, file in task["tests"].items():
        test = read(file, ":")
        energies, forces = [], []
        for atoms in test:
            copy = atoms.copy()
            copy.calc = calculator
            forces.append(copy.get_forces())
            energies.append(copy.get_potential_energy())
        result |= errors(name, energies, forces, test)
    return result


def random_model(numbers: list[int], seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    interaction = modules.interaction_classes["RealAgnosticResidualInteractionBlock"]
    return modules.ScaleShiftMACE(
        r_max=5.0,
        num_bessel=8,
        num_polynomial_cutoff=5,
        max_ell=3,
        interaction_cls=interaction,
        interaction_cls_first=interaction,
        num_interactions=2,
        num_elements=len(numbers),
        hidden_irreps=o3.Irreps("32x0e + 32x1o"),
        MLP_irreps=o3.Irreps("16x0e"),
        atomic_energies=np.zeros(len(numbers)),
        avg_num_neighbors=14.0,
        atomic_numbers=numbers,
        correlation=3,
        gate=torch.nn.functional.silu,
        atomic_inter_scale=1e-3,
        atomic_inter_shift=0.0,
    )


def dynamics(task: dict[str, Any]) -> dict[str, Any]:
    torch.set_default_dtype(torch.float32)
    atoms = read(task["start"], "0")
    numbers = sorted(set(atoms.numbers.tolist()))
    committee = [random_model(numbers, seed) for seed in range(task["members"])]
    calculator = MACECalculator(models=committee, device="cpu", default_dtype="float32")
    atoms.calc = calculator
    kelvin = task["temperature"]
    MaxwellBoltzmannDistribution(atoms, temperature_K=kelvin, rng=np.random.default_rng(0))
    driver = Langevin(
        atoms, 0.5 * units.fs, temperature_K=kelvin, friction=0.01 / units.fs, rng=np.random.default_rng(1)
    )
    largest = []

    def uncertainty() -> None:
        forces = calculator.results["forces_comm"]
        largest.append(np.sqrt(np.mean(np.sum((forces - forces.mean(0)) ** 2, -1), 0)).max())

    if task["members"] > 1:
        driver.attach(uncertainty)
    began = time.perf_counter()
    driver.run(1)
    first, first_at = time.perf_counter() - began, elapsed()
    driver.run(9)  # torch goes on to compile for some steps
    steps, seconds = task["steps"], []
    for _ in range(task["repeats"]):
        began = time.perf_counter()
        driver.run(steps)
        seconds.append(time.perf_counter() - began)
    one = sum(seconds) / (steps * len(seconds))
    return {"steps_per_second": [steps / s for s in seconds], "compile": first - one, "start_up": first_at - one}


if __name__ == "__main__":
    work({"train": train, "md": dynamics}, ("mace-torch", "torch", "e3nn", "numpy"))
