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


def trained(frames: list, folder: Path, labels: int) -> Potential:
    """The committee, from the folder where it is there already."""
    if (folder / "potential.json").exists():
        return Potential.load(folder)
    training = TrainingSettings(max_steps=3000, max_epochs=10**6, patience=10**6)
    potential, _ = fit_potential(frames[:labels], SharedDensitySettings(size="small"), EnsembleSettings(), training, 0)
    potential.save(folder)
    return potential


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
    potential = trained(frames, options.out / "potential", options.labels)
    settings = ExplorationSettings(
        walkers=(WalkerGroup(temperature=KELVIN, count=WALKERS),), integrator=NveSettings(), steps=STEPS
    )
    explorer = Explorer(potential.ensemble.predict, potential.species, potential.cutoff, settings)
    starts = [frames[n] for n in range(WALKERS)]
    session = explorer.begin(potential.params, starts, (1e9, 1e9), jax.random.key(0))
    loop = explorer.loop(find_fragments=False)
    motion, drive = session.state.motion, session.setup.drive

    def spread(momentum: jax.Array) -> jax.Array:
        state = replace(session.state, motion=motion.set(momentum=momentum))
        found = rollout(loop, session.params, state, session.setup, STEPS)
        return jnp.mean(found.scores["force_std_max"][-LAST:], axis=0)

    def kinetic(momentum: jax.Array) -> jax.Array:
        return jnp.sum(momentum**2 / motion.mass, axis=(1, 2), keepdims=True)

    forward = jax.jit(spread)
    slope = jax.jit(jax.grad(lambda momentum: jnp.sum(jnp.log(spread(momentum)))))

    @jax.jit
    def ascend(momentum: jax.Array, gradient: jax.Array) -> jax.Array:
        """A step along the gradient, scaled to the momentum, then back to the kinetic energy and to rest."""
        weighted = gradient * motion.mass  # steepest in the metric of the kinetic energy
        size = jnp.sqrt(kinetic(momentum) / jnp.maximum(kinetic(weighted), 1e-30))
        moved = without_drift(momentum + RATE * size * weighted, motion.mass, drive.mobile)
        return moved * jnp.sqrt(kinetic(momentum) / kinetic(moved))

    momentum = first = motion.momentum
    best = np.asarray(forward(first))
    begin = best
    for _ in range(ITERATIONS):
        momentum = ascend(momentum, slope(momentum))
        best = np.maximum(best, np.asarray(forward(momentum)))
    draws = [np.asarray(forward(first))]
    for n in range(ITERATIONS * (COST + 1)):
        keys = jax.random.split(jax.random.key(100 + n), WALKERS)
        drawn = maxwell_boltzmann(keys, motion.mass, drive.mobile, drive.kt[:, 0])
        drawn = without_drift(drawn, motion.mass, drive.mobile)
        draws.append(np.asarray(forward(drawn * jnp.sqrt(kinetic(first) / kinetic(drawn)))))
    random = np.max(draws, axis=0)
    rows = [
        {
            "walker": w,
            "first": begin[w],
            "ascent": best[w],
            "best_random": random[w],
            "mean_random": np.mean(draws, 0)[w],
        }
        for w in range(WALKERS)
    ]
    with (options.out / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows([{k: round(float(v), 4) for k, v in row.items()} for row in rows])
    ratio = np.log(best / random)
    print(f"spread in eV/A: first {begin.mean():.3f}, ascent {best.mean():.3f}, best of {len(draws)} draws ", end="")
    print(f"{random.mean():.3f}; ratio {np.exp(ratio.mean()):.2f} (x/ {np.exp(ratio.std() / np.sqrt(WALKERS)):.2f})")


if __name__ == "__main__":
    main()
