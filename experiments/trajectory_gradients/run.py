"""Steering first velocities by gradients through the trajectory: ``python run.py --data DIR --out DIR``.

A committee trained on a few frames of acetylacetone at 300 K runs short trajectories from labelled frames.  Gradient
ascent on the first momenta, at their given kinetic energy, drives the mean of the largest force spread over the last
steps up; beside it stands the best of as many random draws as the ascent has cost in evaluations (a gradient counts as
three trajectories).  Both get the same first draw.  One row a walker in ``results.csv``.
"""

from __future__ import annotations

import argparse
import csv
import os
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ase import Atoms

from almlip_jax.compilation import prepare_jax
from almlip_jax.dynamics import ExplorationSettings, Explorer, WalkerGroup
from almlip_jax.dynamics.differentiable import rollout
from almlip_jax.dynamics.integrators import NveSettings
from almlip_jax.dynamics.motion import maxwell_boltzmann, without_drift
from almlip_jax.fitting import fit_potential
from almlip_jax.models import SharedDensitySettings
from almlip_jax.potential import Potential
from almlip_jax.structures.io import read_structures
from almlip_jax.training import EnsembleSettings, TrainingSettings

WALKERS, STEPS, KELVIN = 16, 100, 600.0
ITERATIONS, RATE, COST = 20, 0.2, 3  # COST: trajectories that a gradient is worth
LAST = 20  # steps whose spread counts


def trained(frames: list[Atoms], folder: Path, labels: int) -> Potential:
    """The committee, from the folder where it is there already."""
    if (folder / "potential.json").exists():
        return Potential.load(folder)
    training = TrainingSettings(max_steps=3000, max_epochs=10**6, patience=10**6)
    potential, _ = fit_potential(frames[:labels], SharedDensitySettings(size="small"), EnsembleSettings(), training, 0)
    potential.save(folder)
    return potential


class Trajectories:
    """Short trajectories of walkers as functions of their first momenta [W, N, 3] in sqrt(amu eV).

    Args:
        potential: the committee.
        frames: that walkers start at.
    """

    def __init__(self, potential: Potential, frames: list[Atoms]) -> None:
        settings = ExplorationSettings(
            walkers=(WalkerGroup(temperature=KELVIN, count=WALKERS),), integrator=NveSettings(), steps=STEPS
        )
        explorer = Explorer(potential.ensemble.predict, potential.species, potential.cutoff, settings)
        starts = [frames[n] for n in range(WALKERS)]
        self.session = explorer.begin(potential.params, starts, (1e9, 1e9), jax.random.key(0))
        self.loop = explorer.loop(find_fragments=False)
        self.motion, self.drive = self.session.state.motion, self.session.setup.drive
        self.spread = jax.jit(self._spread)
        self.slope = jax.jit(jax.grad(lambda momentum: jnp.sum(jnp.log(self._spread(momentum)))))
        self.ascend = jax.jit(self._ascend)

    def _spread(self, momentum: jax.Array) -> jax.Array:
        """Mean of the largest force spread over the last steps, [W] eV/Angstrom."""
        state = replace(self.session.state, motion=self.motion.set(momentum=momentum))
        found = rollout(self.loop, self.session.params, state, self.session.setup, STEPS)
        return jnp.mean(found.scores["force_std_max"][-LAST:], axis=0)

    def kinetic(self, momentum: jax.Array) -> jax.Array:
        """Twice the kinetic energy of each walker, [W, 1, 1] eV."""
        return jnp.sum(momentum**2 / self.motion.mass, axis=(1, 2), keepdims=True)

    def at_rest(self, momentum: jax.Array) -> jax.Array:
        """Momenta [W, N, 3] with the centre of mass at rest."""
        return without_drift(momentum, self.motion.mass, self.drive.mobile, self.drive.free)

    def _ascend(self, momentum: jax.Array, gradient: jax.Array) -> jax.Array:
        """A step along the gradient, scaled to the momentum, then back to the kinetic energy and to rest."""
        weighted = gradient * self.motion.mass  # steepest in the metric of the kinetic energy
        size = jnp.sqrt(self.kinetic(momentum) / jnp.maximum(self.kinetic(weighted), 1e-30))
        moved = self.at_rest(momentum + RATE * size * weighted)
        return moved * jnp.sqrt(self.kinetic(momentum) / self.kinetic(moved))

    def drawn(self, seed: int) -> jax.Array:
        """Momenta at random, of the kinetic energy of the first ones."""
        keys = jax.random.split(jax.random.key(seed), WALKERS)
        momentum = maxwell_boltzmann(keys, self.motion.mass, self.drive.mobile, self.drive.kt[:, 0])
        momentum = self.at_rest(momentum)
        return momentum * jnp.sqrt(self.kinetic(self.motion.momentum) / self.kinetic(momentum))


def compared(trajectories: Trajectories) -> dict[str, np.ndarray]:
    """Spreads of the first draw, after the ascent, of the best draw of equal cost, and of all of these, [W]."""
    momentum = trajectories.motion.momentum
    first = best = np.asarray(trajectories.spread(momentum))
    for _ in range(ITERATIONS):
        momentum = trajectories.ascend(momentum, trajectories.slope(momentum))
        best = np.maximum(best, np.asarray(trajectories.spread(momentum)))
    draws = [first]
    draws += [np.asarray(trajectories.spread(trajectories.drawn(100 + n))) for n in range(ITERATIONS * (COST + 1))]
    return {"first": first, "ascent": best, "best_random": np.max(draws, axis=0), "mean_random": np.mean(draws, axis=0)}


def main() -> None:
    """Runs the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("ALMLIP_DATA_DIR"), help="reference data")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--labels", type=int, default=50)
    options = parser.parse_args()
    if options.data is None:
        parser.error("give the folder of the reference data with --data or ALMLIP_DATA_DIR.")
    prepare_jax()
    frames = read_structures(Path(options.data) / "acac" / "train_300K.xyz")
    found = compared(Trajectories(trained(frames, options.out / "potential", options.labels), frames))
    with (options.out / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=["walker", *found])
        writer.writeheader()
        for w in range(WALKERS):
            writer.writerow({"walker": w, **{name: round(float(values[w]), 4) for name, values in found.items()}})
    ratio, draws = np.log(found["ascent"] / found["best_random"]), 1 + ITERATIONS * (COST + 1)
    means = {name: float(values.mean()) for name, values in found.items()}
    print(f"spread in eV/A: first {means['first']:.3f}, ascent {means['ascent']:.3f}, ", end="")
    print(f"best of {draws} draws {means['best_random']:.3f}; ", end="")
    print(f"ratio {np.exp(ratio.mean()):.2f} (x/ {np.exp(ratio.std() / np.sqrt(WALKERS)):.2f})")


if __name__ == "__main__":
    main()
