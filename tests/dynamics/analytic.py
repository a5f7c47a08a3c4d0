"""Analytic committees and structures that several tests of dynamics share."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from ase import Atoms

from almlip_jax.dynamics import ExplorationSettings, Explorer, SanitySettings, WalkerGroup
from almlip_jax.ensembles import Prediction
from almlip_jax.structures.graph import Graph, Places, forces_and_virial, sum_over_atoms
from almlip_jax.structures.species import SpeciesTable

SPECIES = SpeciesTable((1, 8))
CUTOFF = 6.0
DEPTH, WIDTH, LENGTH = 4.5, 2.0, 1.0  # eV, 1/Angstrom, Angstrom
PARAMS = jnp.asarray([0.9, 1.0, 1.1]) * DEPTH
QUIET = (1e3, 1e4)  # thresholds that nothing reaches


def morse(params: jax.Array, graph: Graph) -> Prediction:
    """Members with depths ``params`` [M]; every pair of atoms within the cutoff is bound."""

    def member(depth: jax.Array) -> Prediction:
        def energies(vectors: jax.Array) -> jax.Array:
            distance = jnp.sqrt(jnp.sum(jnp.where(graph.edge_mask[..., None], vectors, 1.0) ** 2, axis=-1))
            pair = 0.5 * depth * (1 - jnp.exp(-WIDTH * (distance - LENGTH))) ** 2
            return sum_over_atoms(jnp.sum(jnp.where(graph.edge_mask, pair, 0), axis=1), graph)

        energy, pull = jax.vjp(energies, graph.vectors)
        forces, virial = forces_and_virial(Places(pull(jnp.ones_like(energy))[0]), graph)
        return Prediction(energy=energy, forces=forces, virial=virial, features=forces)

    return jax.vmap(member)(params)


def dimer(length: float = LENGTH) -> Atoms:
    """Two bound atoms."""
    return Atoms("OH", [[0, 0, 0], [0, 0, length]], info={"charge": -1})


def settings(**changes) -> ExplorationSettings:
    """Three walkers at 300 K that nothing stops."""
    base = ExplorationSettings(
        walkers=(WalkerGroup(temperature=300.0, count=3),),
        steps=200,
        timestep=0.5,
        chunk=100,
        trace_every=1,
        trajectory_every=50,
        sanity=SanitySettings(max_temperature=1000.0, dissociation=False, closest_contact=0.0, max_force=1e4),
    )
    return base.model_copy(update=changes)


def explorer(dtype=np.float32, evaluate=morse, cutoff=CUTOFF, **changes) -> Explorer:
    """An explorer of an analytic committee."""
    return Explorer(evaluate, SPECIES, cutoff, settings(**changes), dtype=dtype)
