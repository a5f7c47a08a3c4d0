"""Sharing an ensemble's work among devices, members and walkers: one code path from a single CPU to a node of GPUs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from math import gcd, prod
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from almlip_jax.compilation import cores_are_devices
from almlip_jax.ensembles.blocks import split
from almlip_jax.ensembles.prediction import Prediction
from almlip_jax.materialise import materialised
from almlip_jax.models.base import Params
from almlip_jax.structures.graph import Graph

_Evaluate: TypeAlias = Callable[[Params, Graph], Prediction]

TRAININGS, MEMBERS, PARTS = "trainings", "members", "parts"
"""Axes of devices: over whole trainings; over the members; and over walkers, or over the structures of a batch, in so
many parts."""

_WORTH_SHARING = 512
"""Atoms of all walkers, padding included, from which on cores that nobody asked to be devices share walkers out: two
cores took 1.3 times as long as one device for 72 atoms, and 0.85 of the time for 512."""


def walkers_to_share(walkers: int, atoms: int) -> int:
    """How many walkers devices may share out: all, or 1 where these would wait longer for each other than they gain.

    Args:
        walkers: that are evaluated at a time.
        atoms: of all of them, padding included.

    >>> from almlip_jax.ensembles import walkers_to_share
    >>> walkers_to_share(8, 8 * 64)
    8
    """
    return 1 if cores_are_devices() and atoms < _WORTH_SHARING else walkers


def spread_members(members: Any, devices: Sequence[jax.Device] | None = None, *, walkers: int = 1) -> Any:
    """Arrays with their member axis laid over as many devices as possible, each with the same number of members.

    Whatever is computed from them follows: each device trains or evaluates its own members, and only what a committee
    reduces travels.

    Args:
        members: pytree with leading member axis, parameters for instance; groups of a mixed ensemble may differ in
            their length, and all lie on the same devices.
        devices: those to use, all of the default backend where not given.
        walkers: that `gathered` will evaluate at a time, and share out too (`walkers_to_share`): members lie on the
            devices of all.

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


def devices_side_by_side(trainings: int, members: int, structures: int) -> Mesh:
    """The devices of trainings side by side, which share out these, then their members, then their batches.

    They are chosen as by `training_devices`; cores that nobody asked to be devices take whole batches.

    Args:
        trainings: that run side by side.
        members: models of each.
        structures: in a batch.

    Returns:
        with axes ``trainings``, ``members`` and ``parts``.

    >>> from almlip_jax.ensembles import devices_side_by_side
    >>> devices_side_by_side(trainings=1, members=1, structures=1).size  # nothing to share out
    1
    """
    devices, parts = jax.devices(), 1 if cores_are_devices() else structures
    best = min(_ways((trainings, members), parts, len(devices)), key=_cost)
    return _laid_out(devices, best, (TRAININGS, MEMBERS, PARTS))


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
        devices: see `training_devices` and `devices_side_by_side`.
        of_members: whether the first axis is that over members; of trainings side by side the second, after theirs.

    >>> import jax.numpy as jnp
    >>> from almlip_jax.ensembles import laid_over, training_devices
    >>> laid_over({"positions": jnp.zeros((5, 3))}, training_devices(4, 1), of_members=False)["positions"].shape
    (5, 3)
    """
    axes = [name for name in (TRAININGS, MEMBERS) if name in devices.shape and (of_members or name != MEMBERS)]
    # as programs say it of what they return: an axis over one device is none, and nothing is said of the last ones
    spec = [name if devices.shape[name] > 1 else None for name in axes]
    while spec and spec[-1] is None:
        spec.pop()
    return tree if devices.size == 1 else jax.device_put(tree, NamedSharding(devices, PartitionSpec(*spec)))


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
        walkers = walkers_to_share(graph.num_structures, graph.atom_mask.shape[0])
        mesh = _mesh(params, jax.devices(), walkers)
        members, parts = mesh.devices.shape
        if mesh.size == 1 or (isinstance(params, tuple) and members > 1):
            return evaluate(params, graph)
        own, same = PartitionSpec(MEMBERS), PartitionSpec()
        each = -(-graph.num_structures // parts)
        # that all devices end with the same arrays is not seen through the packing
        shared = jax.shard_map(
            _exchanged(evaluate, mesh), mesh=mesh, in_specs=(own, same), out_specs=same, check_vma=False
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
        if parts == 1:
            found = evaluate(own, jax.tree.map(lambda x: x[0], graph))
        else:  # as with `blocks.blocked`, pieces of larger arrays would keep loops from being vectorised
            place = jax.lax.axis_index(PARTS)
            mine = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, place, 0, keepdims=False), graph)
            found = materialised(evaluate, jnp.any(mine.structure_mask), own, mine)
        said, structure = jax.tree.flatten(found)
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
    ways = _ways((gcd(*lengths),), walkers, len(devices))
    mixed = isinstance(members, tuple)
    best = min((way for way in ways if not (mixed and min(way.devices) > 1)), key=_cost)
    return _laid_out(devices, best, (MEMBERS, PARTS))


class _Way(NamedTuple):
    """How devices share work out."""

    devices: tuple[int, ...]  # along each axis
    left: int  # work of the device that has most


def _ways(even: Sequence[int], parts: int, devices: int) -> list[_Way]:
    """All ways of sharing out numbers of which each device gets as many, and parts of which some may get one less."""
    choices = [[n for n in range(1, devices + 1) if number % n == 0] for number in even]
    found = product(*choices, range(1, min(devices, parts) + 1))
    return [
        _Way(way, prod(even) // prod(way[:-1]) * -(-parts // way[-1])) for way in found if prod(way) <= devices
    ]


def _cost(way: _Way) -> tuple[int, ...]:
    """The least of ways is the best: the first to finish, with the fewest devices, more of them along earlier axes."""
    return way.left, prod(way.devices), *(-n for n in way.devices[:-1])


def _laid_out(devices: Sequence[jax.Device], way: _Way, axes: tuple[str, ...]) -> Mesh:
    return Mesh(np.array(devices[: prod(way.devices)]).reshape(way.devices), axes)
