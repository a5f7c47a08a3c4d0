"""The ensemble: one model, a member axis on its parameters, and one evaluation that yields everything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp

from almlip_jax.ensembles.prediction import Committee, Prediction, committee_statistics
from almlip_jax.models.base import Geometry, Model, Params
from almlip_jax.structures.graph import Graph, forces_and_virial, sum_over_atoms


@dataclass(frozen=True)
class Ensemble:
    """Members of one architecture with parameters of their own.

    The geometry, which holds no parameter, is computed once; only the maps that hold parameters, and the transposed
    geometry in the backward pass, carry the member axis.

    Attributes:
        model: the architecture.
        size: number of members M.
        mapping: how the members are evaluated: ``vmap``, side by side in every operation; ``map``, one after the other;
            or ``auto``, what was measured to be faster: one after the other on a CPU for models that keep arrays of
            edges and channels, since several members of these do not fit into its caches, and side by side elsewhere.
    """

    model: Model
    size: int
    mapping: Literal["auto", "vmap", "map"] = "auto"

    @property
    def _one_by_one(self) -> bool:
        if self.mapping == "auto":
            return jax.default_backend() == "cpu" and not self.model.small_members
        return self.mapping == "map"

    def _over_members(self, function: Callable[[Params], Any], params: Params) -> Any:
        return jax.lax.map(function, params) if self._one_by_one else jax.vmap(function)(params)

    def init(self, key: jax.Array) -> Params:
        """Independent fresh parameters, every leaf with a leading axis M."""
        return jax.vmap(self.model.init)(jax.random.split(key, self.size))

    def standardise(self, params: Params, sample: Graph, energy_scale: float) -> Params:
        """The parameters with the constants of every member set from typical structures and an energy scale in eV."""
        return jax.vmap(lambda one: self.model.standardise(one, sample, energy_scale))(params)

    def predict(self, params: Params, graph: Graph) -> Prediction:
        """Energy, forces, virial and features of every member, from one forward and one reverse pass.

        Args:
            params: pytree with a leading member axis.
            graph: the structures.

        Returns:
            `Prediction` with a leading member axis.
        """

        def geometry_of(vectors: jax.Array) -> Geometry:
            return self.model.geometry(replace(graph, vectors=vectors))

        geometry, pull_back = jax.vjp(geometry_of, graph.vectors)

        def member(one: Params) -> Prediction:
            def total(shared: Geometry) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
                output = self.model.apply(one, shared, graph)
                energy = sum_over_atoms(output.energy, graph)
                return jnp.sum(energy), (energy, output.features)

            gradient, (energy, features) = jax.grad(total, has_aux=True)(geometry)
            forces, virial = forces_and_virial(pull_back(gradient)[0], graph)
            return Prediction(energy=energy, forces=forces, virial=virial, features=features)

        return self._over_members(member, params)

    def energies(self, params: Params, graph: Graph) -> jax.Array:
        """Energy of every member and structure, [M, S] eV, without forces; differentiable in ``graph.vectors``."""
        geometry = self.model.geometry(graph)

        def member(one: Params) -> jax.Array:
            return sum_over_atoms(self.model.apply(one, geometry, graph).energy, graph)

        return self._over_members(member, params)

    def committee(self, params: Params, graph: Graph) -> Committee:
        """Mean and spread of the members, from the same single evaluation."""
        return committee_statistics(self.predict(params, graph), graph)
