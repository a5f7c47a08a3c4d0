"""Constants of models: numbers that are set from data once, and that training leaves alone.

They are a part of a model's parameters that lies apart from what is learned, under the name ``constants``; to flax they
are a collection of their own.  Optimisers, moving averages and gradients by all parameters pass them over.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from almlip_jax.models.base import Params

CONSTANTS = "constants"
"""Name of the part of the parameters that holds them."""

BASE, CORRECTION = "base", "correction"
"""Names of the parameters of a model that is corrected, which lie among the constants, and of what corrects it."""


def constant(module: nn.Module, name: str, shape: tuple[int, ...] = ()) -> jax.Array:
    """A constant of a module, 1 until it is set."""
    if module.is_initializing():
        module.make_rng("params")  # random numbers of what is learned stay as if this were a parameter among them
    return jax.lax.stop_gradient(module.variable(CONSTANTS, name, jnp.ones, shape).value)


def with_constants(params: Params, **values: jax.Array | float) -> Params:
    """Parameters with some constants set to a value of their own shape and type, or to one number throughout."""
    held = params[CONSTANTS]
    changed = {
        name: jnp.broadcast_to(jnp.asarray(value, held[name].dtype), held[name].shape) for name, value in values.items()
    }
    return params | {CONSTANTS: held | changed}


def with_constants_of(params: Params, others: Params) -> Params:
    """Parameters with the constants that others have under the same names, where their shapes are the same."""
    held = {path: leaf for path, leaf in jax.tree_util.tree_leaves_with_path(others) if not _learned(path)}

    def taken(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        other = held.get(path, leaf)
        return other if other.shape == leaf.shape else leaf

    return jax.tree_util.tree_map_with_path(taken, params)


def with_levels_of(params: Params, name: str, energies: npt.ArrayLike, *, added: bool) -> Params:
    """Parameters of models or ensembles with the energies that a wrapper holds under a name, where there are any.

    Those of a base that is corrected, and of its correction, are left alone.

    Args:
        params: of the models.
        name: of the constant.
        energies: in place of those that are there.
        added: to those that are there, instead.
    """

    def changed(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        if not _holds(path, name):
            return leaf
        given = jnp.broadcast_to(jnp.asarray(energies, leaf.dtype), leaf.shape)
        return leaf + given if added else given

    return jax.tree_util.tree_map_with_path(changed, params)


def mean_level(params: Params, name: str, width: int) -> np.ndarray:
    """Energies [width] that wrappers hold under a name, mean over the models; 0 where there are none."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    held = [np.asarray(leaf, np.float64).reshape(-1, width) for path, leaf in leaves if _holds(path, name)]
    return np.concatenate(held).mean(axis=0) if held else np.zeros(width)


def _holds(path: tuple[Any, ...], name: str) -> bool:
    names = [getattr(key, "key", None) for key in path]
    return names[-2:] == [CONSTANTS, name] and names.count(CONSTANTS) == 1 and CORRECTION not in names


def as_variables(params: Params) -> dict[str, Any]:
    """Parameters as the collections of a flax module."""
    learned = {name: value for name, value in params.items() if name != CONSTANTS}
    return {"params": learned, CONSTANTS: params.get(CONSTANTS, {})}


def as_params(variables: Any) -> Params:
    """The collections of a flax module as parameters."""
    return dict(variables["params"]) | {CONSTANTS: dict(variables.get(CONSTANTS, {}))}


def learned_leaves(params: Params) -> list[jax.Array]:
    """The arrays that are learned, in the order of ``jax.tree.leaves``."""
    pairs = zip(jax.tree.leaves(is_learned(params)), jax.tree.leaves(params), strict=True)
    return [leaf for learned, leaf in pairs if learned]


def is_learned(params: Params) -> Any:
    """A pytree of the structure of some parameters: whether a leaf is learned, or a constant."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _learned(path), params)


def _learned(path: tuple[Any, ...]) -> bool:
    return all(getattr(key, "key", None) != CONSTANTS for key in path)
