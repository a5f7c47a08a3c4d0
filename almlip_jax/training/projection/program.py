"""What the device does of a training by projection: all structures as one small triangular matrix."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from almlip_jax.ensembles import Ensemble, Prediction
from almlip_jax.models import Anchored, Model, Params
from almlip_jax.models.around import Around
from almlip_jax.models.separable import Derivatives, Separable
from almlip_jax.models.species_code import exact_code
from almlip_jax.precision import full_precision
from almlip_jax.structures.graph import Graph, Targets, lone_atoms, sum_over_atoms
from almlip_jax.structures.packing import BatchPlan, PackedDataset, take_batch
from almlip_jax.training.loss import penalty_scales
from almlip_jax.training.penalties import LossSettings

_LEAST_ROWS = 4096  # that are decomposed together: fewer keep threads waiting for each other
_VOIGT = np.array([0, 1, 2, 1, 0, 0]), np.array([0, 1, 2, 2, 2, 1])


def separable_part(model: Model) -> Separable | None:
    """The model that is linear in most parameters, within what stands around it; None where there is none."""
    while isinstance(model, Around):
        model = model.inner
    return model if isinstance(model, Separable) else None


@dataclass(frozen=True)
class Reduction:
    """From structures and labels to `algebra.solve`'s matrix, for several searches.

    Attributes:
        model: a separable one, with what stands around it.
        loss: kind and weights of the penalties.
        devices: those that share out the batches.
    """

    model: Model
    loss: LossSettings
    devices: Mesh

    @property
    def inner(self) -> Separable:
        """The separable model."""
        found = separable_part(self.model)
        assert found is not None
        return found

    def reduced(
        self,
        params: Params,
        weights: jax.Array,
        active: jax.Array,
        data: PackedDataset,
        plan: BatchPlan,
        steps: jax.Array,
        counts: dict[str, jax.Array],
    ) -> jax.Array:
        """Triangular factors [C, M, M] of [Phi J y] for parameters with a leading axis over searches C.

        Args:
            params: where the searches stand.
            weights: [C, n] of the structures.
            active: [C] whether a search needs an answer; zeros where not.
            data: structures and labels.
            plan: batches, [devices, steps, ...].
            steps: [devices] how many of them hold structures.
            counts: by target what the sum of its penalties is divided by.
        """

        def on_one(*given: Any) -> jax.Array:
            params, weights, active, data, counts, plan, steps = given
            own = jax.tree.map(lambda x: x[0], plan)
            return self._reduced(params, weights, active, data, counts, own, steps[0])[None]

        same, parts = PartitionSpec(), PartitionSpec("parts")
        shared = jax.shard_map(
            on_one, mesh=self.devices, in_specs=(*(same,) * 5, parts, parts), out_specs=parts, check_vma=False
        )
        found = shared(params, weights, active, data, counts, plan, steps)  # [devices, C, M, M]
        if found.shape[0] == 1:
            return found[0]  # type: ignore[no-any-return]
        stacked = jnp.moveaxis(found, 0, 1).reshape(found.shape[1], -1, found.shape[-1])
        return jax.lax.map(lambda one: jnp.linalg.qr(one, mode="r"), stacked)

    def _reduced(
        self,
        params: Params,
        weights: jax.Array,
        active: jax.Array,
        data: PackedDataset,
        counts: dict[str, jax.Array],
        plan: BatchPlan,
        steps: jax.Array,
    ) -> jax.Array:
        """Those of the batches at hand, one search after the other."""
        size = self._size(params)
        rows = 3 * plan.atoms.shape[-1] + 7 * plan.ids.shape[-1]
        room = min(max(1, _LEAST_ROWS // rows, 4 * size // rows), plan.atoms.shape[0])

        def one(given: tuple[Params, jax.Array, jax.Array]) -> jax.Array:
            """The triangle of one search, or zeros where it is not wanted."""
            own, weight, wanted = given

            def of(step: jax.Array) -> jax.Array:
                graph, targets = take_batch(data, plan, step)
                return self._rows(own, graph, targets, weight[plan.ids[step]], counts)

            def some(group: jax.Array, factor: jax.Array) -> jax.Array:
                def fill(place: jax.Array, filled: jax.Array) -> jax.Array:
                    return jax.lax.dynamic_update_index_in_dim(filled, of(group * room + place), place, 0)

                blank = jnp.zeros((room, rows, size), weights.dtype)
                filled = jax.lax.fori_loop(0, jnp.minimum(room, steps - group * room), fill, blank)
                return jnp.linalg.qr(jnp.concatenate([factor, filled.reshape(-1, size)]), mode="r")

            def whole() -> jax.Array:
                return jax.lax.fori_loop(0, (steps + room - 1) // room, some, jnp.zeros((size, size), weights.dtype))

            return jax.lax.cond(wanted, whole, lambda: jnp.zeros((size, size), weights.dtype))

        return jax.lax.map(one, (params, weights, active))

    def _size(self, params: Params) -> int:
        """Number M of columns, for parameters with a leading axis."""
        linear, others = jax.eval_shape(self.inner.separate, jax.tree.map(lambda x: x[0], params))
        return int(linear.shape[0] + others.shape[0] + 1)

    def _rows(
        self,
        params: Params,
        graph: Graph,
        targets: Targets,
        weights: jax.Array,
        counts: dict[str, jax.Array],
    ) -> jax.Array:
        """Rows [n, M] of energies, force components and virials, whose sum of squares is their part of the loss."""
        found = self._relative(params, self.inner.derivatives(params, graph), graph)
        forces, virial = _forces_and_virial(graph, found.edges)
        predicted = {
            "energy": sum_over_atoms(found.energy, graph),
            "forces": forces,
            "virial": virial[:, *_VOIGT],
        }
        left = self._left(params, graph, targets)
        scales = penalty_scales(self.loss, graph, targets, weights, counts)
        rows = []
        for name, values in predicted.items():
            whole = jnp.concatenate([values, left[name][..., None]], -1)
            if name == "forces":
                scale = jnp.where(graph.atom_mask, scales[name][graph.structure], 0)[:, None]
            elif name == "virial":
                doubled = np.array([1, 1, 1, *(3 * [1 if self.loss.summed else 2])])
                scale = scales[name][:, None] * doubled
            else:
                scale = scales[name]
            rows.append((whole * jnp.sqrt(scale)[..., None]).reshape(-1, whole.shape[-1]))
        return jnp.concatenate(rows)

    def _relative(self, params: Params, found: Derivatives, graph: Graph) -> Derivatives:
        """Energies counted from those of isolated atoms, of elements for which the model does so."""
        model = self.model
        if not isinstance(model, Anchored):
            return found
        lone = lone_atoms(model.num_species, found.energy.dtype)
        alone = self.inner.derivatives(params, lone).energy

        def shares(vectors: jax.Array) -> jax.Array:
            """Of atoms that keep their edges apart, so that the derivative of the sum has that of each."""
            return model.own_shares(graph, model.geometry(graph.replace(vectors=vectors)).bound)  # type: ignore[attr-defined]

        slopes = jax.grad(lambda vectors: jnp.sum(shares(vectors)))(graph.vectors)  # an atom has one species
        code = exact_code(graph, model.species, found.energy.dtype)
        return found.replace(  # type: ignore[attr-defined,no-any-return]
            energy=found.energy - shares(graph.vectors) @ alone,
            edges=found.edges - slopes[..., None] * (code @ alone)[:, None, None],
        )

    def _left(self, params: Params, graph: Graph, targets: Targets) -> dict[str, jax.Array]:
        """Labels less what the model gives without its linear parameters: virials by their six components."""
        labels = dict(targets.values)
        if self.model is not self.inner:
            linear, rest = self.inner.separate(params)
            bare = self.inner.put_together(params, jnp.zeros_like(linear), rest)
            fixed: Prediction = Ensemble(self.model, 1, atom_blocks=False).predict(
                jax.tree.map(lambda x: x[None], bare), graph
            )
            labels = {name: labels[name] - getattr(fixed, name)[0] for name in ("energy", "forces", "virial")}
        return labels | {"virial": labels["virial"][:, *_VOIGT]}


def _forces_and_virial(graph: Graph, edges: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Forces [A, 3, M] and virials [S, 3, 3, M] of derivatives by edges [A, K, 3, M], each of which is read twice."""
    atoms, slots, *rest = edges.shape
    flat = edges.reshape(atoms, slots, -1)
    ways = jnp.concatenate([jnp.ones_like(graph.vectors[..., :1]), -graph.vectors], -1)
    sums = jnp.einsum("akv,akm->avm", ways, flat).reshape(atoms, 4, *rest)
    virial = sum_over_atoms(sums[:, 1:], graph)
    opposite = graph.neighbors * slots + graph.reverse  # those of padding slots are their own, and 0
    rows = flat.reshape(atoms * slots, -1)

    def less(slot: jax.Array, forces: jax.Array) -> jax.Array:
        return forces - rows[opposite[:, slot]]

    forces = jax.lax.fori_loop(0, slots, less, sums[:, 0].reshape(atoms, -1))
    return forces.reshape(atoms, *rest), 0.5 * (virial + jnp.swapaxes(virial, 1, 2))


@lru_cache(maxsize=8)
def reduction(program: Reduction) -> Any:
    """`Reduction.reduced`, compiled once for each shape."""
    return jax.jit(full_precision(program.reduced))
