"""Spreading the members of an ensemble over devices: one code path from a single CPU to a node of GPUs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import gcd
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from almlip_jax.ensembles.prediction import Prediction
from almlip_jax.models.base import Params
from almlip_jax.structures.graph import Graph

_Evaluate: TypeAlias = Callable[[Params, Graph], Prediction]


def spread_members(members: Any, devices: Sequence[jax.Device] | None = None) -> Any:
    """Arrays with their member axis laid over as many devices as divide the number of members evenly.

    Whatever is computed from them follows: each device trains or evaluates its own members, and only what a committee
    reduces travels.

    Args:
        members: pytree with leading member axis, parameters for instance; groups of a mixed ensemble may differ in
            their length, and all lie on the same devices.
        devices: those to use, all of the default backend where not given.

    Returns:
        the same values; with one device, or members that no number of the devices divides evenly, the same arrays.
    """
    lengths = {leaf.shape[0] for leaf in jax.tree.leaves(members)}
    mesh = _mesh(gcd(*lengths), jax.devices() if devices is None else devices)
    return members if mesh.size == 1 else jax.device_put(members, NamedSharding(mesh, PartitionSpec("members")))


def beside_members(tree: Any, members: int) -> Any:
    """Arrays without a member axis, one copy on every device that holds some of so many members.

    A program of spread members that is given arrays of one device copies them to the others in every call.
    """
    mesh = _mesh(members, jax.devices())
    return tree if mesh.size == 1 else jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def gathered(evaluate: _Evaluate) -> _Evaluate:
    """The same evaluation of spread members, in which all that travels between devices travels at once.

    Each device evaluates its own members (`spread_members`) and is then given what those of the others say; whatever is
    done with it, each does for itself.  Left to the compiler, devices meet at every reduction over members.

    Args:
        evaluate: an ensemble, whose prediction has a leading member axis.

    Returns:
        a function for programs whose other arguments are the same on all devices.  A committee of several
        architectures is left to the compiler.
    """

    def of_all(params: Params, graph: Graph) -> Prediction:
        """The evaluation, shared out where members are spread."""
        mesh = _mesh(jax.tree.leaves(params)[0].shape[0], jax.devices())
        if mesh.size == 1 or isinstance(params, tuple):
            return evaluate(params, graph)
        own, same = PartitionSpec("members"), PartitionSpec()
        # that all devices end with the same arrays is not seen through the packing
        shared = jax.shard_map(_exchanged(evaluate), mesh=mesh, in_specs=(own, same), out_specs=same, check_vma=False)
        found: Prediction = shared(params, graph)
        return found

    return of_all


def _exchanged(evaluate: _Evaluate) -> _Evaluate:
    """What the members of all devices say, from the evaluation of those of one device."""

    def everywhere(own: Params, graph: Graph) -> Prediction:
        said, structure = jax.tree.flatten(evaluate(own, graph))
        of_each = jax.lax.all_gather(jnp.concatenate([array.ravel() for array in said]), "members")
        parts = jnp.split(of_each, np.cumsum([array.size for array in said])[:-1], axis=1)
        # arrays differ in their first axis: features are of models, energies and forces of all their heads
        joined = [part.reshape(-1, *array.shape[1:]) for part, array in zip(parts, said, strict=True)]
        return jax.tree.unflatten(structure, joined)

    return everywhere


def _mesh(members: int, devices: Sequence[jax.Device]) -> Mesh:
    """As many of the devices as can be, each with the same number of members."""
    count = max((n for n in range(1, min(members, len(devices)) + 1) if members % n == 0), default=1)
    return Mesh(np.array(devices[:count]), ("members",))
