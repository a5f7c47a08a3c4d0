"""Analytic committees and structures that several tests of dynamics share."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from ase import Atoms

from almlip_jax.dynamics import (
    ExplorationSettings,
    Explorer,
    Observables,
    RunContext,
    SanitySettings,
    Seen,
    Thresholds,
    WalkerGroup,
)
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


def context(record=(1.0,), stop=(3.0,), atoms: int = 1, dtype=np.float32, **more) -> RunContext:
    """A run before its first step, with a walker for each threshold."""
    thresholds = Thresholds(record=jnp.asarray(record, dtype), stop=jnp.asarray(stop, dtype))
    return RunContext(len(record), atoms, dtype, thresholds, **more)


def nothing_seen(walkers: int = 1, atoms: int = 1) -> Seen:
    """A step of open walkers without padding, of unit mass at 0.02 eV, with one member that feels nothing."""
    return Seen(
        positions=jnp.zeros((walkers, atoms, 3)),
        cells=jnp.zeros((walkers, 3, 3)),
        pbc=jnp.zeros((walkers, 3), bool),
        atom_mask=jnp.ones((walkers, atoms), bool),
        masses=jnp.ones((walkers, atoms)),
        kt=jnp.full(walkers, 0.02),
        step=jnp.asarray(0),
        progress=jnp.asarray(0.0),
        strength=jnp.ones(walkers),
        member_energy=jnp.zeros((1, walkers)),
        member_forces=jnp.zeros((1, walkers, atoms, 3)),
        member_virial=jnp.zeros((1, walkers, 3, 3)),
    )


def observed(score: str, value, **changes) -> Observables:
    """What a gate is shown of one walker whose score has a value; nothing is wrong with it."""
    one = jnp.asarray(value, jnp.float32).reshape(1)
    return Observables(
        **{name: getattr(nothing_seen(), name) for name in Seen.__dataclass_fields__},
        scores={score: one},
        atom_scores={},
        energy=one,
        max_force=one,
        closest_contact=jnp.ones(1),
        temperature=jnp.full(1, 300.0),
        bath_temperature=jnp.full(1, 300.0),
        new_fragments=jnp.zeros(1, int),
        finite=jnp.ones(1, bool),
    ).replace(**changes)
