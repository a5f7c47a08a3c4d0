"""Spreading the members of an ensemble over devices: one code path from a single CPU to a node of GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from almlip_jax.models.base import Params


def spread_members(params: Params, devices: Sequence[jax.Device] | None = None) -> Params:
    """Parameters with their member axis laid over as many devices as divide the number of members evenly.

    Whatever is computed from them follows: each device trains or evaluates its own members, and only what a committee
    reduces travels.

    Args:
        params: pytree with leading member axis.
        devices: those to use, all of the default backend where not given.

    Returns:
        the same values; with one device, or members that share no divisor with the devices, the same arrays.
    """
    if isinstance(params, tuple):  # the groups of a mixed ensemble
        return tuple(spread_members(group, devices) for group in params)
    found = list(devices) if devices is not None else jax.devices()
    count = gcd(jax.tree.leaves(params)[0].shape[0], len(found))
    if count == 1:
        return params
    mesh = Mesh(np.array(found[:count]), ("members",))
    return jax.device_put(params, NamedSharding(mesh, PartitionSpec("members")))
