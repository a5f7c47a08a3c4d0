"""mace-torch: ASE dynamics with one model or its committee; one JSON task in, one JSON line out.

The parameters are random and the energies scaled down, which changes nothing about the time of a step.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time

BEGAN = time.perf_counter()

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


def model(numbers: list[int], seed: int) -> torch.nn.Module:
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


def main(task: dict) -> dict:
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(task["threads"])
    atoms = read(task["start"], "0")
    numbers = sorted(set(atoms.numbers.tolist()))
    committee = [model(numbers, seed) for seed in range(task["members"])]
    calculator = MACECalculator(models=committee, device="cpu", default_dtype="float32")
    atoms.calc = calculator
    MaxwellBoltzmannDistribution(atoms, temperature_K=task["temperature"], rng=np.random.default_rng(0))
    dynamics = Langevin(atoms, 0.5 * units.fs, temperature_K=task["temperature"], friction=0.01 / units.fs)
    largest = []

    def uncertainty() -> None:
        if task["members"] > 1:
            forces = calculator.results["forces_comm"]
            largest.append(np.sqrt(np.mean(np.sum((forces - forces.mean(0)) ** 2, -1), 0)).max())

    dynamics.attach(uncertainty)
    dynamics.run(5)
    start_up = time.perf_counter() - BEGAN
    rates = []
    for _ in range(task["repeats"]):
        began = time.perf_counter()
        dynamics.run(task["steps"])
        rates.append(task["steps"] / (time.perf_counter() - began))
    return {"steps_per_second": rates, "start_up": start_up}


if __name__ == "__main__":
    result = main(json.loads(sys.argv[1]))
    result["memory_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print("RESULT " + json.dumps(result))
