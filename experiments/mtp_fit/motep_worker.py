"""motep's fit, in an environment with motep: ``python motep_worker.py TRAIN TEMPLATE START OUT SECONDS``.

From radial coefficients of START (``radial`` [1, 1, mu, R], ``scaling``, ``min_dist``), first linear least squares for
the others, then BFGS, both motep's own, on the squares of total energies, forces and virials.  OUT.csv gets a line for
each iteration: processor seconds so far and the loss as motep has it, a mean over structures in which off-diagonal
components of the virial count twice.  It ends after the first iteration beyond the given processor seconds; OUT.npz
holds the coefficients.
"""

from __future__ import annotations

import sys
import time
from contextlib import chdir
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from ase.io import read
from motep.io.mlip.mtp import read_mtp
from motep.optimizers import scipy as optimizers
from motep.train.trainer import Trainer

LOSS = {
    "energy_weight": 1.0,
    "forces_weight": 0.01,
    "stress_weight": 0.001,
    "energy_per_atom": False,
    "forces_per_atom": False,
    "stress_times_volume": True,
}


def main(train: str, template: str, start: str, out: str, seconds: float) -> None:
    """Fits."""
    frames, begin = read(train, ":"), np.load(start)
    data = read_mtp(template)
    data.species = sorted({int(z) for atoms in frames for z in atoms.numbers})
    data.radial_basis.min, data.radial_basis.max = float(begin["min_dist"]), 5.0
    data.scaling = float(begin["scaling"])
    data.radial_coeffs = np.array(begin["radial"])
    data.moment_coeffs = np.zeros(data.alpha_scalar_moments)
    data.species_coeffs = np.zeros(1)
    lines = Path(out).with_suffix(".csv").open("w", buffering=1)
    lines.write("cpu_seconds,loss\n")
    report = optimizers.Callback.__call__

    def watched(self: optimizers.Callback, intermediate_result: optimizers.OptimizeResult) -> None:
        report(self, intermediate_result)
        spent = time.process_time()
        lines.write(f"{spent:.2f},{intermediate_result.fun:.10g}\n")
        np.savez(
            Path(out).with_suffix(".npz"),
            radial=data.radial_coeffs,
            moment=data.moment_coeffs,
            species=data.species_coeffs,
            seconds=spent,
        )
        if spent > seconds:
            raise StopIteration

    optimizers.Callback.__call__ = watched
    steps = [
        {"method": "LLS"},
        {"method": "minimize", "kwargs": {"method": "BFGS", "options": {"maxiter": 100_000}}},
    ]
    with TemporaryDirectory() as folder, chdir(folder):  # the trainer leaves files where it runs
        Trainer(data, seed=1, steps=steps, loss=LOSS).train(frames)


if __name__ == "__main__":
    main(*(str(Path(one).absolute()) for one in sys.argv[1:5]), float(sys.argv[5]))
