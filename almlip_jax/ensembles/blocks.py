"""Many walkers in blocks: on a CPU, what one evaluation holds at a time stays within its caches."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp

from almlip_jax.ensembles.prediction import Prediction
from almlip_jax.materialise import materialised
from almlip_jax.models.base import Params
from almlip_jax.precision import full_precision
from almlip_jax.structures.graph import Graph

_Evaluate: TypeAlias = Callable[[Params, Graph], Prediction]

_ATOMS = 256  # of a block on a CPU


def blocked(evaluate: _Evaluate, atoms_per_block: int | None = None) -> _Evaluate:
    """The same evaluation, of one block of walkers after the other; all blocks are of one shape.

    Args:
        evaluate: an ensemble, whose prediction has a leading member axis.
        atoms_per_block: padding included, at least one walker; where not given, what was measured to be fast on a
            CPU, and everything at once elsewhere.

    Returns:
        a function of parameters and the flat graph of W walkers of N atoms each (``WalkerNeighbors.graph``), which
        gives the same as ``evaluate``, up to rounding.

    >>> import jax
    >>> from almlip_jax.ensembles import EnsembleSettings, blocked, build_ensemble
    >>> from almlip_jax.models import SharedDensitySettings
    >>> from almlip_jax.structures.graph import lone_atom
    >>> from almlip_jax.structures.species import SpeciesTable
    >>> ensemble = build_ensemble(SharedDensitySettings(size="tiny"), EnsembleSettings(size=4), SpeciesTable((1, 8)))
    >>> params = jax.eval_shape(ensemble.init, jax.random.key(0))
    >>> jax.eval_shape(blocked(ensemble.predict, atoms_per_block=256), params, lone_atom()).energy.shape
    (4, 1)
    """
    evaluate = jax.jit(full_precision(evaluate))  # traced once, for its shapes and for the blocks

    def in_blocks(params: Params, graph: Graph) -> Prediction:
        """The evaluation, block by block where there is more than one."""
        walkers = graph.num_structures
        atoms = graph.atom_mask.shape[0] // walkers
        limit = _default_limit() if atoms_per_block is None else atoms_per_block
        blocks = 1 if limit is None else -(-walkers // max(1, limit // atoms))
        if blocks == 1:
            return evaluate(params, graph)
        each = -(-walkers // blocks)

        def of_block(block: Graph) -> Prediction:
            # all blocks hold structures; but as pieces of the arrays of all they would be read by loops that are not
            # vectorised, and a block of 64 atoms took 1.5 to 2 times as long
            found: Prediction = materialised(evaluate, jnp.any(block.structure_mask), params, block)
            return found

        found = jax.lax.map(of_block, split(graph, blocks, each))

        def joined(values: jax.Array) -> jax.Array:
            """[blocks, M, each (* N), ...] -> [M, W (* N), ...]."""
            rows = values.shape[2] // each * walkers
            together = jnp.moveaxis(values, 0, 1).reshape(values.shape[1], -1, *values.shape[3:])
            return together[:, :rows]

        return jax.tree.map(joined, found)

    return in_blocks


def _default_limit() -> int | None:
    return _ATOMS if jax.default_backend() == "cpu" else None


def split(graph: Graph, blocks: int, each: int) -> Graph:
    """Graphs of ``each`` walkers along a new first axis; the last ones are filled up with walkers of padding atoms."""
    walkers = graph.num_structures
    atoms = graph.atom_mask.shape[0] // walkers
    missing = blocks * each - walkers

    def parts(values: jax.Array, rows: int, fill: float = 0) -> jax.Array:
        more = ((0, missing * rows),) + ((0, 0),) * (values.ndim - 1)
        full = jnp.pad(values, more, constant_values=fill) if missing else values
        return full.reshape(blocks, each * rows, *values.shape[1:])

    walker = jnp.arange(blocks * each, dtype=graph.neighbors.dtype).reshape(blocks, each)
    first = walker[:, :1, None] * atoms  # of each block; what pads the last one points at that atom
    return Graph(
        species=parts(graph.species, atoms),
        vectors=parts(graph.vectors, atoms),
        neighbors=jnp.maximum(parts(graph.neighbors, atoms) - first, 0),
        edge_mask=parts(graph.edge_mask, atoms),
        reverse=parts(graph.reverse, atoms),
        atom_mask=parts(graph.atom_mask, atoms),
        structure=jnp.repeat(walker - walker[:, :1], atoms, axis=1),
        structure_mask=parts(graph.structure_mask, 1),
        volume=parts(graph.volume, 1, fill=1),
        positions=parts(graph.positions, atoms),
        cell=parts(graph.cell, 1),
        charge=parts(graph.charge, 1),
        spin=parts(graph.spin, 1, fill=1),
    )
