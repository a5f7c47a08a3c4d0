"""Speed of motep, in its environment: ``python motep_timer.py POTENTIAL STRUCTURE OUT STEPS``.

Writes the energy of the structure in eV, and ``microseconds``, the processor time of an atom and evaluation of energy,
forces and stress, each of slightly other positions, on one core.
"""

from __future__ import annotations

import sys
import time

import numpy as np
from ase.io import read
from motep.calculator import MTP
from motep.io.mlip.mtp import read_mtp


def main(potential: str, structure: str, out: str, steps: int) -> None:
    """Evaluates and times."""
    atoms, data = read(structure), read_mtp(potential)
    data.species = sorted({int(z) for z in atoms.numbers})
    atoms.calc = MTP(data)
    energy, rng, spent = atoms.get_potential_energy(), np.random.default_rng(0), []
    for _ in range(3):
        began = time.process_time()
        for _ in range(steps):
            atoms.positions += rng.normal(scale=1e-3, size=atoms.positions.shape)
            atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress()
        spent.append(time.process_time() - began)
    np.savez(out, energy=energy, microseconds=1e6 * min(spent) / steps / len(atoms))


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]))
