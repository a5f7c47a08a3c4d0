"""A moment tensor potential by motep, in its environment: ``python motep_worker.py TRAIN TEST TEMPLATE OUT SECONDS``.

Trains the template's coefficients by BFGS from random ones on energies, forces and stresses with the package's default
weights, and stops after the first iteration that ends later than the given time.  Writes energies [n] in eV, forces of
all atoms one after the other [N, 3] in eV/Angstrom, stresses [n, 6] in eV/Angstrom^3, and seconds and iterations.
"""

from __future__ import annotations

import sys
import time
from contextlib import chdir
from tempfile import TemporaryDirectory

import numpy as np
from ase import Atoms
from ase.io import read
from ase.neighborlist import neighbor_list
from motep.calculator import MTP
from motep.io.mlip.mtp import read_mtp
from motep.optimizers import scipy as optimizers
from motep.train.trainer import Trainer


def main(train: str, test: str, template: str, out: str, seconds: float) -> None:
    """Trains and predicts."""
    frames, others = read(train, ":"), read(test, ":")
    data = read_mtp(template)
    data.species = sorted({int(z) for atoms in frames for z in atoms.numbers})
    data.radial_basis.min = 0.95 * min(float(np.min(distances(atoms))) for atoms in frames)
    data.radial_basis.max = 5.0
    for name in ("radial_coeffs", "moment_coeffs", "species_coeffs"):
        setattr(data, name, None)
    began, iterations = time.monotonic(), -1  # the first report is of the start
    report = optimizers.Callback.__call__

    def watched(self: optimizers.Callback, intermediate_result: optimizers.OptimizeResult) -> None:
        nonlocal iterations
        report(self, intermediate_result)
        iterations += 1
        if iterations and time.monotonic() - began > seconds:
            raise StopIteration

    optimizers.Callback.__call__ = watched
    steps = [{"method": "minimize", "kwargs": {"method": "BFGS", "options": {"maxiter": 100_000}}}]
    with TemporaryDirectory() as folder, chdir(folder):  # the trainer leaves a file where it runs
        Trainer(data, seed=1, steps=steps).train(frames)
    spent = time.monotonic() - began
    energy, forces, stress = [], [], []
    for atoms in others:
        atoms.calc = MTP(data)  # one keeps the size of its first structure
        energy.append(atoms.get_potential_energy())
        forces.append(atoms.get_forces())
        stress.append(atoms.get_stress())
    np.savez(
        out,
        energy=energy,
        forces=np.concatenate(forces),
        stress=stress,
        seconds=spent,
        iterations=iterations,
        parameters=len(data.parameters),
    )


def distances(atoms: Atoms) -> np.ndarray:
    """All distances of less than 4 Angstrom, those to images included."""
    return neighbor_list("d", atoms, 4.0)


if __name__ == "__main__":
    main(*sys.argv[1:5], float(sys.argv[5]))
