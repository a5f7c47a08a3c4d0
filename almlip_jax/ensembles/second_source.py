"""Two label sources and one set of features: a last layer for each.

A structure with labels of the second source has the energy that the features give under a last layer of its own.  That
of the model itself does not come into it: neither values nor gradients.
"""

from __future__ import annotations

import jax
from flax import struct

from almlip_jax.models.base import AtomicOutput, LastLayer, LinearLast, Model, Params, linear_rows, silent_last
from almlip_jax.structures.graph import Graph


@struct.dataclass
class SecondSource:
    """What is known of the second label source.

    Attributes:
        last: its last layers, with a leading axis over the models.
        structures: [S] 1 for structures with its labels, 0 for the others.
    """

    last: LastLayer
    structures: jax.Array


def last_layer(model: Model, params: Params) -> LastLayer:
    """The last layer of one model; raises InputError where the model does not say what it is."""
    if not isinstance(model, LinearLast):
        raise silent_last(model)
    return model.last(params)


def energies_by_source(
    model: Model, params: Params, output: AtomicOutput, graph: Graph, last: LastLayer, structures: jax.Array
) -> jax.Array:
    """Energies of atoms [A], each under the last layer of the label source of its structure.

    Args:
        model: the architecture.
        params: of one model.
        output: what it gives.
        graph: the structures.
        last: last layer of the second source.
        structures: [S] 1 for those of the second source.
    """
    own = last_layer(model, params)
    rows = linear_rows(output.features, output.code, graph, model.num_species)
    scale = jax.lax.stop_gradient(model.last_scale(params))
    apart = scale * (rows @ (last.weights - own.weights)) + (last.levels - own.levels)[graph.species]
    return output.energy + structures[graph.structure] * apart
