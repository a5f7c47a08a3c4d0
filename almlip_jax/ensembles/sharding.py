"""Sharing an ensemble's work among devices, members and walkers: one code path from a single CPU to a node of GPUs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import gcd
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from almlip_jax.compilation import cores_are_devices
from almlip_jax.ensembles.blocks import split
from almlip_jax.ensembles.prediction import Prediction
from almlip_jax.models.base import Params
from almlip_jax.structures.graph import Graph

_Evaluate: TypeAlias = Callable[[Params, Graph], Prediction]

MEMBERS, PARTS = "members", "parts"
"""Axes of devices: over the members; and over walkers, or over the structures of a batch, in so many parts."""


def spread_members(members: Any, devices: Sequence[jax.Device] | None = None, *, walkers: int = 1) -> Any:
    """Arrays with their member axis laid over as many devices as possible, each with the same number of members.

    Whatever is computed from them follows: each device trains or evaluates its own members, and only what a committee
    reduces travels.

    Args:
        members: pytree with leading member axis, parameters for instance; groups of a mixed ensemble may differ in
            their length, and all lie on the same devices.
        devices: those to use, all of the default backend where not given.
        walkers: that `gathered` will evaluate at a time, and share out too: members lie on the devices of all.

    Returns:
        the same values; the same arrays where one device does everything.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from almlip_jax.ensembles import spread_members
    >>> params = {"weights": jnp.ones((4, 3))}  # of four members
    >>> spread_members(params, jax.devices()[:1])["weights"].shape  # one device: the same arrays
    (4, 3)
    """
    mesh = _mesh(members, jax.devices() if devices is None else devices, walkers)
    return laid_over(members, mesh, of_members=True)


def training_devices(members: int, structures: int) -> Mesh:
    """The devices that train some members, and share out the structures of their batches where members do not fill all.

    They are chosen as for walkers: those that finish first, and of several ways as fast the one with the fewest.  Cores
    that nobody asked to be devices take whole batches: in each step all would wait for one that another program uses.

    Args:
        members: models that are trained.
        structures: in a batch; 1 where each device takes whole batches.

    Returns:
        with axes ``members`` and ``parts``, the latter of length 1 where each takes whole batches.

    >>> from almlip_jax.ensembles import training_devices
    >>> training_devices(members=4, structures=1).shape["parts"]
    1
    """
    return _mesh(np.zeros(members), jax.devices(), 1 if cores_are_devices() else structures)


def member_devices(members: Any) -> Mesh:
    """The devices that `spread_members` lays members over, for `laid_over` of what they are to share.

    >>> import jax.numpy as jnp
    >>> from almlip_jax.ensembles import member_devices
    >>> member_devices({"weights": jnp.ones((1, 3))}).size  # one member
    1
    """
    return _mesh(members, jax.devices(), 1)


def laid_over(tree: Any, devices: Mesh, *, of_members: bool) -> Any:
    """Arrays on all of some devices, each with its part of the member axis, or with a copy where there is none.

    A program of spread members that is given arrays of one device copies them to the others in every call.

    Args:
        tree: pytree; the same arrays come back where one device does everything.
        devices: see `training_devices`.
        of_members: whether the first axis is that over members.

    >>> import jax.numpy as jnp
    >>> from almlip_jax.ensembles import laid_over, training_devices
    >>> laid_over({"positions": jnp.zeros((5, 3))}, training_devices(4, 1), of_members=False)["positions"].shape
    (5, 3)
    """
    # as programs say it of what they return: an axis over one device is none
    spec = PartitionSpec(MEMBERS) if of_members and devices.shape[MEMBERS] > 1 else PartitionSpec()
    return tree if devices.size == 1 else jax.device_put(tree, NamedSharding(devices, spec))


def gathered(evaluate: _Evaluate) -> _Evaluate:
    """The same evaluation shared out among devices, in which all that travels between them travels at once.

    Each device evaluates its own members (`spread_members`) for its own walkers and is then given what the others
    found; whatever is done with it, each does for itself.  Left to the compiler, devices meet at every reduction over
    members.

    Args:
        evaluate: an ensemble, whose prediction has a leading member axis.

    Returns:
        a function of parameters and the flat graph of W walkers of N atoms each (``WalkerNeighbors.graph``), for
        programs whose other arguments are the same on all devices.  The members of a committee of several
        architectures are left to the compiler where these are more than the walkers.

    >>> import jax
    >>> from almlip_jax.ensembles import EnsembleSettings, gathered, build_ensemble
    >>> from almlip_jax.models import SharedDensitySettings
    >>> from almlip_jax.structures.graph import lone_atom
    >>> from almlip_jax.structures.species import SpeciesTable
    >>> ensemble = build_ensemble(SharedDensitySettings(size="tiny"), EnsembleSettings(size=4), SpeciesTable((1, 8)))
    >>> params = jax.eval_shape(ensemble.init, jax.random.key(0))
    >>> jax.eval_shape(gathered(ensemble.predict), params, lone_atom()).energy.shape
    (4, 1)
    """

    def of_all(params: Params, graph: Graph) -> Prediction:
        """The evaluation, shared out where there are several devices for it."""
        mesh = _mesh(params, jax.devices(), graph.num_structures)
        members, parts = mesh.devices.shape
        if mesh.size == 1 or (isinstance(params, tuple) and members > 1):
            return evaluate(params, graph)
        own, some, same = PartitionSpec(MEMBERS), PartitionSpec(PARTS), PartitionSpec()
        each = -(-graph.num_structures // parts)
        # that all devices end with the same arrays is not seen through the packing
        shared = jax.shard_map(
            _exchanged(evaluate, mesh), mesh=mesh, in_specs=(own, some), out_specs=same, check_vma=False
        )
        found: Prediction = shared(params, split(graph, parts, each))
        rows = jax.tree.map(lambda x: x.shape[1] // (parts * each) * graph.num_structures, found)
        return jax.tree.map(lambda x, n: x[:, :n], found, rows)

    return of_all


def batches_at_a_time(members: Any, batches: int) -> int:
    """On how many devices as many batches are evaluated side by side, by all members each, where that is faster.

    Args:
        members: parameters with leading member axis.
        batches: that there are.

    Returns:
        1 where devices finish earlier that share out the members of one batch after the other (`spread_members`).

    >>> import jax.numpy as jnp
    >>> from almlip_jax.ensembles import batches_at_a_time
    >>> batches_at_a_time({"weights": jnp.ones((4, 3))}, batches=1)  # members share one batch out
    1
    """
    devices = len(jax.devices())
    number = gcd(*(leaf.shape[0] for leaf in jax.tree.leaves(members)))
    of_members = _mesh(members, jax.devices(), 1).size
    side_by_side = -(-batches // devices) * number < batches * (number // of_members)
    return devices if side_by_side else 1


def side_by_side(function: Callable[[Any, Any], Any], common: Any, own: Any) -> Any:
    """A function on several devices, each of which has something of its own.

    Args:
        function: of ``common`` and of one element of ``own``.
        common: pytree, the same for all.
        own: pytree whose leaves have a leading axis over the devices.

    Returns:
        what they found, with that axis.

    >>> import jax.numpy as jnp
    >>> from almlip_jax.ensembles import side_by_side
    >>> side_by_side(lambda scale, rows: scale * rows.sum(), 2.0, jnp.ones((1, 3))).tolist()  # one device
    [6.0]
    """
    parts = jax.tree.leaves(own)[0].shape[0]
    if parts == 1:
        return _with_axis(function(common, jax.tree.map(lambda x: x[0], own)))
    mesh, each = Mesh(np.array(jax.devices()[:parts]), ("batches",)), PartitionSpec("batches")

    def on_one(common: Any, own: Any) -> Any:
        return _with_axis(function(common, jax.tree.map(lambda x: x[0], own)))

    shared = jax.shard_map(on_one, mesh=mesh, in_specs=(PartitionSpec(), each), out_specs=each, check_vma=False)
    return shared(common, own)


def _with_axis(tree: Any) -> Any:
    return jax.tree.map(lambda x: x[None], tree)


def _exchanged(evaluate: _Evaluate, mesh: Mesh) -> Callable[[Params, Graph], Prediction]:
    """The predictions of all devices, from those of the members and walkers of one; graphs have a leading axis 1."""
    members, parts = mesh.devices.shape

    def everywhere(own: Params, graph: Graph) -> Prediction:
        """What all devices find, on each of them."""
        said, structure = jax.tree.flatten(evaluate(own, jax.tree.map(lambda x: x[0], graph)))
        of_each = jax.lax.all_gather(jnp.concatenate([array.ravel() for array in said]), (MEMBERS, PARTS))
        pieces = jnp.split(of_each, np.cumsum([array.size for array in said])[:-1], axis=1)

        def joined(piece: jax.Array, like: jax.Array) -> jax.Array:
            # arrays differ in their first axis: features are of models, energies and forces of all their heads
            apart = jnp.swapaxes(piece.reshape(members, parts, *like.shape), 1, 2)
            return apart.reshape(members * like.shape[0], parts * like.shape[1], *like.shape[2:]).astype(like.dtype)

        return jax.tree.unflatten(structure, list(map(joined, pieces, said)))

    return everywhere


def _mesh(members: Any, devices: Sequence[jax.Device], walkers: int) -> Mesh:
    """The devices that finish first: axes ``members``, with the same number on each, and ``parts`` of the walkers.

    Of several ways that are as fast that with the fewest devices, and of these that which shares out more members.
    Groups of a mixed ensemble share out members or walkers, not both.
    """
    lengths = [leaf.shape[0] for leaf in jax.tree.leaves(members)]
    mixed, number = isinstance(members, tuple), gcd(*lengths)

    def cost(way: tuple[int, int]) -> tuple[int, int, int]:
        of_members, of_walkers = way
        return number // of_members * -(-walkers // of_walkers), of_members * of_walkers, -of_members

    ways = [
        (m, w)
        for m in range(1, len(devices) + 1)
        if number % m == 0
        for w in range(1, min(len(devices) // m, walkers) + 1)
        if not (mixed and m > 1 and w > 1)
    ]
    best = min(ways, key=cost)
    return Mesh(np.array(devices[: best[0] * best[1]]).reshape(best), (MEMBERS, PARTS))
