"""How species enter a model: one by one where they are few, as directions of an embedding where they are many.

Parameters that stand for species lie along leading axes (or leading factors of the first axis) of their arrays, so that
a model can be given more species without losing what it has learned of the old ones: `with_more_species`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ase.data import chemical_symbols
from flax.traverse_util import flatten_dict, unflatten_dict

from almlip_jax.errors import InputError
from almlip_jax.models.base import LastLayer, LinearLast, Params
from almlip_jax.models.constants import CONSTANTS
from almlip_jax.structures.graph import Graph
from almlip_jax.structures.species import SpeciesTable

_SEED = 7  # of the fixed directions; another value would make another model


class CodedLast(LinearLast):
    """A model whose last layer has a weight for each feature and column of the species code, and biases of species."""

    @property
    def last_names(self) -> tuple[str, ...]:
        """See `LinearLast.last_names`."""
        return "last", "species_bias"

    def last_scale(self, params: Params) -> jax.Array:
        """The energy scale over the root of the number of features."""
        return params[CONSTANTS]["energy_scale"] / params["last"].shape[-1] ** 0.5

    def last(self, params: Params) -> LastLayer:
        """One weight for each feature and column of the species code, and a bias for each species."""
        scale = jax.lax.stop_gradient(params[CONSTANTS]["energy_scale"])
        return LastLayer(params["last"].reshape(-1), scale * params["species_bias"])


def exact_code(graph: Graph, species: SpeciesTable, dtype: Any) -> jax.Array:
    """The species of each atom, one-hot, [A, S]."""
    return jax.nn.one_hot(graph.species, len(species), dtype=dtype)


def central_code(module: nn.Module, exact: jax.Array, width: int) -> jax.Array:
    """What tells central species apart, [A, Q]: one by one up to ``width`` of them, else a learned embedding."""
    if exact.shape[-1] <= width:
        return exact
    code = module.param("species_code", nn.initializers.normal(1.0), (exact.shape[-1], width))
    return exact @ code / math.sqrt(width)


def neighbor_code(graph: Graph, species: SpeciesTable, width: int, dtype: Any) -> jax.Array:
    """What tells the species of neighbours apart without a parameter, [A, K, S'].

    One by one up to ``width`` of them, else a fixed direction of unit length for each element, the same in every table.
    """
    if len(species) <= width:
        return jax.nn.one_hot(graph.species[graph.neighbors], len(species), dtype=dtype)
    directions = np.random.default_rng(_SEED).normal(size=(len(chemical_symbols), width))[list(species.numbers)]
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    return jnp.asarray(directions, dtype)[graph.species][graph.neighbors]


def with_more_species(
    old: Params,
    fresh: Params,
    known: SpeciesTable,
    wanted: SpeciesTable,
    width: int,
    leading: Mapping[str, int],
    factor: Callable[[str], jax.Array | float] = lambda _: 1.0,
) -> Params:
    """Parameters for more species that predict the same as before for the old ones.

    Args:
        old: parameters of one model.
        fresh: parameters of the same architecture for the larger table: what new species begin with.
        known: species table of ``old``.
        wanted: that of ``fresh``; holds all of the old ones.
        width: number of species up to which they are told apart one by one.
        leading: how many factors of the first axis run over the species, by a regular expression for a parameter's
            whole path (``/`` between names); those that are not named have none.
        factor: by path, of what new species begin with in parameters whose first axis runs over the species.

    Raises:
        InputError: a species would be lost, or the old species are told apart one by one and the new ones could not be.
    """
    lost = [symbol for symbol, z in zip(known.symbols, known.numbers, strict=True) if z not in wanted.numbers]
    if lost:
        raise InputError(f"the species {', '.join(lost)} of the first potential are missing in the new table.")
    if len(known) <= width < len(wanted):
        raise InputError(
            f"{len(wanted)} species do not fit: the first potential tells its species apart one by one, up to {width} "
            "of them (model.species_channels); train one with a larger number, or start afresh."
        )
    places = wanted.index(np.asarray(known.numbers))
    found, merged = flatten_dict(old, sep="/"), flatten_dict(fresh, sep="/")
    for name, value in found.items():
        factors = next((count for pattern, count in leading.items() if re.fullmatch(pattern, name)), 0)
        if not factors:
            merged[name] = value
            continue
        target = (merged[name] * factor(name)).reshape(*factors * (len(wanted),), -1, *value.shape[1:])
        source = value.reshape(*factors * (len(known),), -1, *value.shape[1:])
        grown = target.at[np.ix_(*factors * (places,))].set(source)
        merged[name] = grown.reshape(merged[name].shape)
    return unflatten_dict(merged, sep="/")
