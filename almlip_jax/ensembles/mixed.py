"""A committee of architectures: ensembles that differ in their model, evaluated on one graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import jax
import jax.numpy as jnp

from almlip_jax.ensembles.ensemble import Ensemble
from almlip_jax.ensembles.prediction import Committee, Prediction, committee_statistics
from almlip_jax.models.base import Params, Survey
from almlip_jax.models.species_code import exact_code
from almlip_jax.precision import full_precision
from almlip_jax.structures.graph import Graph
from almlip_jax.structures.species import SpeciesTable


@dataclass(frozen=True)
class MixedEnsemble:
    """Ensembles side by side; parameters are a tuple with one entry for each.

    A graph reaches as far as the farthest sighted model; the others see their own edges of it alone, since their radial
    functions vanish beyond their cutoffs.

    Attributes:
        groups: the ensembles; same species, same kind of heads.
    """

    groups: tuple[Ensemble, ...]

    @property
    def members(self) -> int:
        """Number of members M."""
        return sum(group.members for group in self.groups)

    @property
    def cutoff(self) -> float:
        """The longest, Angstrom."""
        return max(group.cutoff for group in self.groups)

    @property
    def species(self) -> SpeciesTable:
        """The elements it knows."""
        return self.groups[0].species

    @property
    def targets(self) -> tuple[str, ...]:
        """As of each of its models."""
        return self.groups[0].targets

    @property
    def sees_state(self) -> bool:
        """Whether all members tell structures apart that differ in charge and spin alone."""
        return all(group.sees_state for group in self.groups)

    def init(self, key: jax.Array) -> Params:
        """Independent fresh parameters."""
        keys = jax.random.split(key, len(self.groups))
        return tuple(group.init(k) for group, k in zip(self.groups, keys, strict=True))

    def survey(self, graph: Graph) -> tuple[Survey, ...]:
        """See `Ensemble.survey`; one for each of the ensembles."""
        return tuple(group.survey(graph) for group in self.groups)

    def standardise(self, params: Params, survey: tuple[Survey, ...], energy_scale: float) -> Params:
        """See `Ensemble.standardise`."""
        three = zip(self.groups, params, survey, strict=True)
        return tuple(group.standardise(one, seen, energy_scale) for group, one, seen in three)

    def with_species(self, params: Params, fresh: Params, wanted: SpeciesTable) -> Params:
        """Parameters for more species; see `Ensemble.with_species`."""
        three = zip(self.groups, params, fresh, strict=True)
        return tuple(group.with_species(old, new, wanted) for group, old, new in three)

    @full_precision
    def predict(self, params: Params, graph: Graph) -> Prediction:
        """Predictions of all members; features and codes are padded with zeros to the widest of them."""
        parts = [group.predict(one, graph) for group, one in zip(self.groups, params, strict=True)]
        features = _padded([part.features for part in parts])
        codes = self._codes(parts, graph)
        alike = [replace(part, features=x, code=q) for part, x, q in zip(parts, features, codes, strict=True)]
        return jax.tree.map(lambda *x: jnp.concatenate(x), *alike)

    def _codes(self, parts: Sequence[Prediction], graph: Graph) -> Sequence[jax.Array | None]:
        """Codes of one width; none where every model tells species apart one by one."""
        if all(part.code is None for part in parts):
            return [None for _ in parts]

        def code(part: Prediction) -> jax.Array:
            exact = exact_code(graph, self.species, part.features.dtype)
            return jnp.broadcast_to(exact, (len(part.features), *exact.shape)) if part.code is None else part.code

        return _padded([code(part) for part in parts])

    def linear(self, params: Params, graph: Graph) -> jax.Array:
        """Gradient of each atom's energy with respect to the last layer of each model; see `Ensemble.linear`.

        Rows are padded with zeros to the longest.
        """
        rows = [group.linear(one, graph) for group, one in zip(self.groups, params, strict=True)]
        return jnp.concatenate(_padded(rows))

    @full_precision
    def energies(self, params: Params, graph: Graph) -> jax.Array:
        """Energy of every member and structure, [M, S] eV; see `Ensemble.energies`."""
        return jnp.concatenate([group.energies(one, graph) for group, one in zip(self.groups, params, strict=True)])

    @full_precision
    def atom_energies(self, params: Params, graph: Graph) -> jax.Array:
        """What every member says that each atom adds to the energy, [M, A] eV; see `Ensemble.atom_energies`."""
        parts = zip(self.groups, params, strict=True)
        return jnp.concatenate([group.atom_energies(one, graph) for group, one in parts])

    def committee(self, params: Params, graph: Graph) -> Committee:
        """Mean and spread of the members, from one evaluation of each."""
        return committee_statistics(self.predict(params, graph), graph)


def _padded(parts: Sequence[jax.Array]) -> list[jax.Array]:
    """Arrays with zeros at the end of their last axis, up to the longest of them."""
    widest = max(part.shape[-1] for part in parts)
    return [jnp.pad(part, ((0, 0),) * (part.ndim - 1) + ((0, widest - part.shape[-1]),)) for part in parts]


AnyEnsemble: TypeAlias = Ensemble | MixedEnsemble
"""Members of one architecture, or of several."""


def joined(groups: Sequence[Ensemble]) -> AnyEnsemble:
    """One ensemble as it is, several as a `MixedEnsemble`."""
    return groups[0] if len(groups) == 1 else MixedEnsemble(tuple(groups))
