"""Spreading the members of an ensemble over devices: one code path from a single CPU to a node of GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def spread_members(members: Any, devices: Sequence[jax.Device] | None = None) -> Any:
    """Arrays with their member axis laid over as many devices as divide the number of members evenly.

    Whatever is computed from them follows: each device trains or evaluates its own members, and only what a committee
    reduces travels.

    Args:
        members: pytree with leading member axis, parameters for instance; the groups of a mixed ensemble may differ
            in their length.
        devices: those to use, all of the default backend where not given.

    Returns:
        the same values; with one device, or members that share no divisor with the devices, the same arrays.
    """
    found = list(devices) if devices is not None else jax.devices()

    def spread(leaf: jax.Array) -> jax.Array:
        count = gcd(leaf.shape[0], len(found))
        if count == 1:
            return leaf
        mesh = Mesh(np.array(found[:count]), ("members",))
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec("members")))

    return jax.tree.map(spread, members)
