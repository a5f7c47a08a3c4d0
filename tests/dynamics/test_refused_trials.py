"""Trajectories and traces with Monte Carlo swaps show where a walker is, not the trial that it refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from ase import Atoms

from almlip_jax.dynamics import ExplorationSettings, Explorer
from almlip_jax.ensembles import Prediction
from almlip_jax.structures.graph import Graph, Places, forces_and_virial, sum_over_atoms
from almlip_jax.structures.species import SpeciesTable


def springs(params: jax.Array, graph: Graph) -> Prediction:
    """Springs of stiffness ``params`` [M] between unlike atoms alone: O between two H likes to stay there."""

    def member(stiffness: jax.Array) -> Prediction:
        def energies(vectors: jax.Array) -> jax.Array:
            unlike = graph.edge_mask & (graph.species[:, None] != graph.species[graph.neighbors])
            distance = jnp.sqrt(jnp.sum(jnp.where(unlike[..., None], vectors, 1.0) ** 2, axis=-1))
            pair = 0.25 * stiffness * (distance - 1.0) ** 2
            return sum_over_atoms(jnp.sum(jnp.where(unlike, pair, 0), axis=1), graph)

        energy, pull = jax.vjp(energies, graph.vectors)
        forces, virial = forces_and_virial(Places(pull(jnp.ones_like(energy))[0]), graph)
        return Prediction(energy=energy, forces=forces, virial=virial, features=forces)

    return jax.vmap(member)(params)


def test_a_refused_trial_leaves_no_trace():
    settings = ExplorationSettings.model_validate(
        {
            "walkers": [{"temperature": 50}],
            "swaps": {"every": 2},
            "steps": 20,
            "chunk": 20,
            "trace_every": 1,
            "trajectory_every": 1,
            "sanity": {"dissociation": False, "max_temperature": 1e6},
        }
    )
    start = Atoms("HOH", [[-1, 0, 0], [0, 0, 0], [1, 0, 0]])
    explorer = Explorer(springs, SpeciesTable((1, 8)), 6.0, settings)
    found = explorer.run(jnp.asarray([20.0, 30.0]), [start], (1e3, 1e4), jax.random.key(0))
    frames, energy = found.trajectories[0], found.energy[:, 0]
    assert len(frames) == 20
    trials = [n for n in range(20) if np.isnan(energy[n])]
    assert trials == list(range(0, 20, 2)), "every second step is a trial, and none is taken: 12 eV against 4 meV"
    for n, frame in enumerate(frames):
        assert abs(frame.positions[1]).max() < 0.4, "the oxygen is where it was"
        assert ("force_std" in frame.arrays) == (n not in trials)
        if n in trials and n > 0:
            np.testing.assert_array_equal(frame.positions, frames[n - 1].positions)
    assert np.isfinite(found.temperature).all()
