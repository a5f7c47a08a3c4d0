"""The ensemble: one model, a member axis on its parameters, and one evaluation that yields everything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import jax
import jax.numpy as jnp

from almlip_jax.compilation import backend
from almlip_jax.ensembles.atom_blocks import number_of_blocks, over_blocks
from almlip_jax.ensembles.heads import Heads
from almlip_jax.ensembles.prediction import Committee, Prediction, committee_statistics
from almlip_jax.ensembles.second_source import SecondSource, energies_by_source
from almlip_jax.keys import in_a_row, named_stream
from almlip_jax.models import corrects
from almlip_jax.models.base import AtomicOutput, Geometry, LastLayer, Model, Params, Survey, linear_rows
from almlip_jax.precision import full_precision
from almlip_jax.structures.graph import (
    Graph,
    Places,
    displacement,
    forces_and_virial,
    lone_atom,
    places,
    sum_over_atoms,
    without_places,
)
from almlip_jax.structures.species import SpeciesTable


@dataclass(frozen=True)
class Ensemble:
    """Models of one architecture with parameters of their own, each with one or more heads: the members.

    The geometry, which holds no parameter, is computed once; only the maps that hold parameters, and the transposed
    geometry in the backward pass, carry the member axis.

    Attributes:
        model: the architecture.
        size: number of models L, each with a set of parameters.
        mapping: how the models are evaluated: ``vmap``, side by side in every operation; ``map``, one after the other;
            or ``auto``, what was measured to be faster: one after the other on a CPU for models that keep arrays of
            edges and channels, since several members of these do not fit into its caches, and side by side elsewhere.
        heads: last layers and error models that stand on each model.
        atom_blocks: whether predictions of many atoms may be made in blocks (`atom_blocks`).
    """

    model: Model
    size: int
    mapping: Literal["auto", "vmap", "map"] = "auto"
    heads: Heads = field(default_factory=Heads)
    atom_blocks: bool = True

    @property
    def members(self) -> int:
        """Number of members M: models times heads."""
        return self.size * self.heads.count

    @property
    def cutoff(self) -> float:
        """Angstrom."""
        return self.model.cutoff

    @property
    def species(self) -> SpeciesTable:
        """The elements it knows."""
        return self.model.species

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of what it gives besides the energy and what is derived from it (`targets`)."""
        given: tuple[str, ...] = getattr(self.model, "targets", ())  # models of users need not say so
        return given

    @property
    def sees_state(self) -> bool:
        """Whether it tells structures apart that differ in charge and spin alone."""
        sees: bool = getattr(self.model, "sees_state", False)  # models of users need not say so
        return sees

    @property
    def one_by_one(self) -> bool:
        """Whether models are evaluated one after the other."""
        if self.mapping == "auto":
            return backend() == "cpu" and not self.model.small_members
        return self.mapping == "map"

    def _over_models(self, function: Callable[[Any], Any], params: Any) -> Any:
        return jax.lax.map(function, params) if self.one_by_one else jax.vmap(function)(params)

    def _model_part(self, one: Params) -> Params:
        """Parameters of the model itself, which has some company where there are heads."""
        return one if self.heads.plain else one["model"]

    @cached_property
    def _num_features(self) -> int:
        def features(key: jax.Array) -> jax.Array:
            graph = lone_atom()
            return self.model.apply(self.model.init(key), self.model.geometry(graph), graph).features

        return int(jax.eval_shape(features, jax.random.key(0)).shape[-1])

    def init(self, key: jax.Array) -> Params:
        """Independent fresh parameters, every leaf with a leading axis L."""
        keys = in_a_row(jax.random.split(key, self.size))
        if self.heads.plain:
            return jax.vmap(self.model.init)(keys)
        models = jax.vmap(lambda k: self.model.init(named_stream(k, "model")))(keys)
        of_heads = jax.vmap(lambda k: named_stream(k, "heads"))(keys)
        count, width = len(self.species), self._num_features
        return {"model": models, "heads": jax.vmap(lambda k: self.heads.init(k, count, width))(of_heads)}

    @full_precision
    def survey(self, graph: Graph) -> Survey:
        """What `standardise` has to know of some structures; the surveys of several graphs add up."""
        return self.model.survey(graph)

    @full_precision
    def standardise(self, params: Params, survey: Survey, energy_scale: float) -> Params:
        """The parameters with the constants of every model set from a survey of data and an energy scale in eV."""
        models = jax.vmap(lambda one: self.model.standardise(one, survey, energy_scale))(self._model_part(params))
        if self.heads.plain:
            return models
        return {"model": models, "heads": self.heads.standardise(params["heads"], energy_scale)}

    def with_species(self, params: Params, fresh: Params, wanted: SpeciesTable) -> Params:
        """Parameters for more species that predict the same as before for the old ones; see `Model.with_species`."""
        models = jax.vmap(lambda old, new: self.model.with_species(old, new, wanted))(
            self._model_part(params), self._model_part(fresh)
        )
        if self.heads.plain:
            return models
        heads = jax.vmap(lambda old, new: self.heads.with_species(old, new, self.species, wanted))
        return {"model": models, "heads": heads(params["heads"], fresh["heads"])}

    @full_precision
    def predict(self, params: Params, graph: Graph, second: SecondSource | None = None) -> Prediction:
        """Energy, forces, virial and features of every member, from one forward and one reverse pass of each.

        Args:
            params: pytree with a leading axis over the models.
            graph: the structures.
            second: last layers of a second label source, and which structures are of it; of models without further
                heads, not in blocks of atoms.

        Returns:
            `Prediction` with a leading member axis, the heads of a model side by side.
        """
        local = self.model.local and self.atom_blocks and not self.targets
        blocks = 1 if self.model.long_range else number_of_blocks(graph, local)
        if blocks > 1:
            return self._predict_in_blocks(params, graph, blocks)
        geometry, pull_back = jax.vjp(*self._geometry_of(graph))

        def derivatives(gradient: Geometry) -> tuple[jax.Array, jax.Array]:
            return forces_and_virial(pull_back(gradient)[0], graph)

        if second is not None:
            structures = second.structures

            def of_two_sources(given: tuple[Params, LastLayer]) -> Prediction:
                one, last = given
                return self._with_one_head(one, geometry, derivatives, graph, (last, structures))

            return self._over_models(of_two_sources, (params, second.last))  # type: ignore[no-any-return]

        def one_model(one: Params) -> Prediction:
            if self.heads.count == 1:
                return self._with_one_head(one, geometry, derivatives, graph)
            return self._with_heads(one, geometry, derivatives, graph)

        return self._by_member(self._over_models(one_model, params))

    def _by_member(self, prediction: Prediction) -> Prediction:
        """Predictions of models, [L, ...] or with several heads [L, H, ...], as predictions of members."""
        if self.heads.count == 1:
            return prediction
        return replace(
            prediction,
            energy=_flatten(prediction.energy),
            forces=_flatten(prediction.forces),
            virial=_flatten(prediction.virial),
        )

    def _geometry_of(self, graph: Graph) -> tuple[Callable[[Places], Geometry], Places]:
        """The geometry as a function of the places of a graph, and these.

        A model that is not of long range is shown no positions and no cell: reading them fails, where its forces would
        be wrong.
        """
        return (lambda moved: self.model.geometry(moved.of(graph))), places(graph, self.model.long_range)

    def _told(self, graph: Graph) -> Graph:
        """What of a graph the parts of the model that hold parameters are shown.

        Not where atoms lie, since forces would not follow what they made of it; further targets, also those of a model
        that is corrected, may be made of that.
        """
        return graph if self.targets or corrects(self.model) else without_places(graph)

    def _predict_in_blocks(self, params: Params, graph: Graph, blocks: int) -> Prediction:
        """`predict` of a local model, one block of atoms after the other."""

        def of_block(params: Params, block: Graph) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
            """Energies, gradients by edges, features and codes of the atoms of a block."""
            geometry, pull_back = jax.vjp(*self._geometry_of(block))

            def by_edge(gradient: Geometry) -> tuple[jax.Array, jax.Array]:
                return pull_back(gradient)[0].vectors, jnp.zeros(())

            one_model = self._with_one_head if self.heads.count == 1 else self._with_heads
            found = self._over_models(lambda one: one_model(one, geometry, by_edge, block), params)
            found = self._by_member(found)
            return found.energy, found.forces, found.features, found.code

        energy, gradient, features, code = over_blocks(of_block, params, graph, blocks, len(self.species))
        forces, virial = jax.vmap(lambda one: forces_and_virial(Places(one), graph))(gradient)
        noise = None
        if not self.heads.plain:
            noise = jax.vmap(lambda one, x: self.heads.noise(one, x, graph))(params["heads"], features)
        energy = jax.vmap(lambda one: sum_over_atoms(one, graph))(energy)
        return Prediction(energy, forces, virial, features, noise, code)

    def _with_one_head(
        self,
        one: Params,
        geometry: Geometry,
        derivatives: _Derivatives,
        graph: Graph,
        second: tuple[LastLayer, jax.Array] | None = None,
    ) -> Prediction:
        """A forward and a reverse pass; ``second`` is the last layer of another source, and which structures [S]."""

        def total(shared: Geometry) -> tuple[jax.Array, tuple[jax.Array, AtomicOutput]]:
            """The energy of all structures, that of each, and what the model gives."""
            output = self.model.apply(self._model_part(one), shared, self._told(graph))
            of_atoms = output.energy
            if second is not None:
                of_atoms = energies_by_source(self.model, self._model_part(one), output, graph, *second)
            energy = sum_over_atoms(of_atoms, graph)
            return jnp.sum(energy), (energy, output)

        gradient, (energy, output) = jax.grad(total, has_aux=True)(geometry)
        forces, virial = derivatives(gradient)
        noise = None if self.heads.plain else self.heads.noise(one["heads"], output.features, graph)
        return Prediction(energy, forces, virial, output.features, noise, output.code, self._further(output))

    def _further(self, output: AtomicOutput) -> dict[str, jax.Array]:
        """What the model says that it gives besides the energy."""
        return {name: output.further[name] for name in self.targets}

    def _with_heads(self, one: Params, geometry: Geometry, derivatives: _Derivatives, graph: Graph) -> Prediction:
        """One forward pass of the model, and a reverse pass for each of its heads: leading axis H."""

        def outputs(shared: Geometry) -> tuple[jax.Array, jax.Array]:
            output = self.model.apply(one["model"], shared, self._told(graph))
            return output.energy, output.features

        (own, features), pull_back = jax.vjp(outputs, geometry)
        weights = self.heads.weights(one["heads"], graph)
        ones = graph.atom_mask.astype(own.dtype)

        def head(weight: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            energy = sum_over_atoms(own + jnp.sum(features * weight, axis=-1), graph)
            return energy, *derivatives(pull_back((ones, weight))[0])

        energy, forces, virial = jax.vmap(head)(weights)
        noise = self.heads.noise(one["heads"], features, graph)
        return Prediction(energy=energy, forces=forces, virial=virial, features=features, noise=noise)

    @full_precision
    def energies(self, params: Params, graph: Graph) -> jax.Array:
        """Energy of every member and structure, [M, S] eV, without forces; differentiable in the graph's places."""
        return jax.vmap(lambda of_atoms: sum_over_atoms(of_atoms, graph))(self.atom_energies(params, graph))

    @full_precision
    def atom_energies(self, params: Params, graph: Graph) -> jax.Array:
        """What every member says that each atom adds to the energy of its structure, [M, A] eV; `energies` of atoms."""
        geometry_of, here = self._geometry_of(graph)
        geometry = geometry_of(here)

        def one_model(one: Params) -> jax.Array:
            output = self.model.apply(self._model_part(one), geometry, self._told(graph))
            if self.heads.count == 1:
                return output.energy[None]
            return output.energy + jnp.sum(self.heads.weights(one["heads"], graph) * output.features, axis=-1)

        return _flatten(self._over_models(one_model, params))

    def linear(self, params: Params, graph: Graph) -> jax.Array:
        """Gradient of each atom's energy with respect to the last layer of each model, [L, A, d] eV.

        Of several heads, the energy is that of a head and the layer its own; all heads of a model have the same rows.
        """
        geometry_of, here = self._geometry_of(graph)
        geometry = geometry_of(here)

        def one_model(one: Params) -> jax.Array:
            if self.heads.count == 1:
                return self.model.linear(self._model_part(one), geometry, self._told(graph))
            features = self.model.apply(one["model"], geometry, self._told(graph)).features
            return self.heads.last_scale(one["heads"]) * linear_rows(features, None, graph, len(self.species))

        found: jax.Array = self._over_models(one_model, params)
        return found

    def feature_change(self, params: Params, graph: Graph, moves: jax.Array) -> jax.Array:
        """How the features of each model change while the atoms move, each model along a displacement of its own.

        Args:
            params: pytree with a leading axis over the models.
            graph: the structures.
            moves: [L, A, 3] Angstrom, displacement of each atom; 0 for padding atoms.

        Returns:
            [L, A, F], directional derivative of `Prediction.features`.
        """

        def one_model(given: tuple[Params, jax.Array]) -> jax.Array:
            """Directional derivative [A, F] of one of the models."""
            one, move = given
            along = displacement(graph, move, self.model.long_range)
            geometry_of, here = self._geometry_of(graph)

            def features(at: Places) -> jax.Array:
                return self.model.apply(self._model_part(one), geometry_of(at), self._told(graph)).features

            def slope(cotangent: jax.Array) -> jax.Array:
                products = jax.tree.map(lambda x, y: jnp.sum(x * y), pull_back(cotangent)[0], along)
                return jax.tree.reduce(jnp.add, products)

            # the derivative of a pull-back by its cotangent: models spell out reverse derivatives, not forward ones
            found, pull_back = jax.vjp(features, here)
            return jax.grad(slope)(jnp.zeros_like(found))

        return self._over_models(one_model, (params, moves))

    def committee(self, params: Params, graph: Graph) -> Committee:
        """Mean and spread of the members, from the same single evaluation."""
        return committee_statistics(self.predict(params, graph), graph)


_Derivatives = Callable[[Geometry], tuple[jax.Array, jax.Array]]


def _flatten(values: jax.Array) -> jax.Array:
    """[L, H, ...] -> [L * H, ...]."""
    return values.reshape(-1, *values.shape[2:])
