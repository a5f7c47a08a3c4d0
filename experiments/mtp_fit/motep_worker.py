"""motep's fit, in an environment with motep: ``python motep_worker.py TRAIN TEMPLATE START OUT SECONDS``.

From radial coefficients of START (``radial`` [1, 1, mu, R], ``scaling``, ``min_dist``), first linear least squares for
the others, then BFGS, both motep's own, on the squares of total energies, forces and virials.  OUT.csv gets a line for
each iteration: processor seconds so far and the loss as motep has it, a mean over structures in which off-diagonal
components of the virial count twice.  It ends after the first iteration beyond the given processor seconds; OUT.npz
holds the coefficients and the inverse Hessian that BFGS has come to.  Interrupted, it goes on from these: what is
lost is the iteration at hand, and one evaluation for the gradient.
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


def inverse_hessian() -> np.ndarray | None:
    """What BFGS, which called the caller, is about to go on with; None in other methods.

    It calls before it puts the last step ``s`` and the change ``y`` of the gradient into its matrix.
    """
    frame = sys._getframe(1)
    while frame is not None and not {"Hk", "sk", "yk"} <= frame.f_locals.keys():
        frame = frame.f_back
    if frame is None:
        return None
    old, s, y = (frame.f_locals[name] for name in ("Hk", "sk", "yk"))
    if not y @ s > 0:
        return old
    away = np.eye(len(s)) - np.outer(s, y) / (y @ s)
    new = away @ old @ away.T + np.outer(s, s) / (y @ s)
    return 0.5 * (new + new.T)


def main(train: str, template: str, start: str, out: str, seconds: float) -> None:
    """Fits, or goes on with a fit."""
    frames, begin, place = read(train, ":"), np.load(start), Path(out)
    earlier = dict(np.load(place)) if place.exists() else {}
    data = read_mtp(template)
    data.species = sorted({int(z) for atoms in frames for z in atoms.numbers})
    data.radial_basis.min, data.radial_basis.max = float(begin["min_dist"]), 5.0
    data.scaling = float(begin["scaling"])
    data.radial_coeffs = np.array(begin["radial"])
    data.moment_coeffs = np.zeros(data.alpha_scalar_moments)
    data.species_coeffs = np.zeros(1)
    lines = place.with_suffix(".csv").open("a" if earlier else "w", buffering=1)
    if earlier:
        data.radial_coeffs, data.moment_coeffs = earlier["radial"], earlier["moment"]
        data.species_coeffs = earlier["species"]
    else:
        lines.write("cpu_seconds,loss\n")
    report = optimizers.Callback.__call__

    def watched(self: optimizers.Callback, intermediate_result: optimizers.OptimizeResult) -> None:
        report(self, intermediate_result)
        spent = time.process_time() + float(earlier.get("seconds", 0.0))
        lines.write(f"{spent:.2f},{intermediate_result.fun:.10g}\n")
        hessian = inverse_hessian()
        if hessian is not None:
            arrays = {"radial": data.radial_coeffs, "moment": data.moment_coeffs, "species": data.species_coeffs}
            unfinished = place.with_suffix(".part.npz")
            np.savez(unfinished, **arrays, hessian=hessian, seconds=spent, converged=False)
            unfinished.replace(place)
        if spent > seconds:
            raise StopIteration

    optimizers.Callback.__call__ = watched
    known = {"hess_inv0": earlier["hessian"]} if earlier else {}
    search = {"method": "BFGS", "options": {"maxiter": 100_000, **known}}
    steps = [] if earlier else [{"method": "LLS"}]
    steps.append({"method": "minimize", "kwargs": search})
    with TemporaryDirectory() as folder, chdir(folder):  # the trainer leaves files where it runs
        Trainer(data, seed=1, steps=steps, loss=LOSS).train(frames)
    found = dict(np.load(place))
    np.savez(place, **(found | {"converged": found["seconds"] <= seconds}))


if __name__ == "__main__":
    main(*(str(Path(one).absolute()) for one in sys.argv[1:5]), float(sys.argv[5]))
