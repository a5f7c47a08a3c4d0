"""What charges do to one potential of all systems: ``python experiments/six_systems/longer.py --out DIR``.

The last labels of the common campaign of a seed train potentials from fresh parameters, three times as long as a round
does (as many passes over the data as the campaigns of one system have): without being told of charge, told of it
(``electronic_state``), and on energies from which a fitted energy of each charge has been taken.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from run import STEPS, TOGETHER, tests

import almlip_jax as al
from almlip_jax.campaign.rundir import RunDirectory
from almlip_jax.campaign.state import read_state
from almlip_jax.evaluation import error_metrics
from almlip_jax.fitting import fit_potential
from almlip_jax.models import SharedDensitySettings
from almlip_jax.structures.io import read_structures
from almlip_jax.training import EnsembleSettings, TrainingSettings


def energy_of_charge(frames: list[Atoms]) -> float:
    """What a positive charge costs, eV, by least squares with the elements beside it."""
    elements = sorted({number for atoms in frames for number in atoms.numbers})
    rows = np.array([[*(np.sum(atoms.numbers == z) for z in elements), atoms.info["charge"]] for atoms in frames])
    sizes = np.array([len(atoms) for atoms in frames])
    energies = np.array([atoms.get_potential_energy() for atoms in frames])
    return float(np.linalg.lstsq(rows / sizes[:, None], energies / sizes, rcond=None)[0][-1])


def without(frames: list[Atoms], cost: float) -> list[Atoms]:
    """Copies without what their charge costs."""
    found = []
    for atoms in frames:
        copy = atoms.copy()
        energy = atoms.get_potential_energy() - cost * atoms.info["charge"]
        copy.calc = SinglePointCalculator(copy, energy=energy, forces=atoms.get_forces())
        found.append(copy)
    return found


def main() -> None:
    """Trains the three and prints force errors, meV/Angstrom."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/six_systems"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    al.prepare_jax()
    run = RunDirectory(options.out / f"{TOGETHER}-{options.seed}")
    data = read_structures(run.round(read_state(run).history[-1].round).dataset, require_labels=True)
    test = read_structures(tests(options.out / "tests"), require_labels=True)
    training = TrainingSettings(max_steps=3 * STEPS[TOGETHER], max_epochs=10**6)
    cost = energy_of_charge(data)
    for name, told, taken in (("not told", False, 0.0), ("told", True, 0.0), (f"less {cost:.2f} eV", False, cost)):
        model = SharedDensitySettings(size="tiny", electronic_state=told)
        potential, _ = fit_potential(without(data, taken), model, EnsembleSettings(size=4), training, options.seed)
        frames = without(test, taken)
        errors = {}
        for system in dict.fromkeys(atoms.info["system"] for atoms in frames):
            own = [atoms for atoms in frames if atoms.info["system"] == system]
            errors[system] = round(1e3 * float(error_metrics(own, potential.evaluate(own))["forces_rmse"]), 1)
        print(name, errors, flush=True)


if __name__ == "__main__":
    main()
