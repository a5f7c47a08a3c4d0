"""A committee of architectures: ensembles that differ in their model, evaluated on one graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import jax
import jax.numpy as jnp

from almlip_jax.ensembles.ensemble import Ensemble
from almlip_jax.ensembles.prediction import Committee, Prediction, committee_statistics
from almlip_jax.models.base import Params
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

    def init(self, key: jax.Array) -> Params:
        """Independent fresh parameters."""
        keys = jax.random.split(key, len(self.groups))
        return tuple(group.init(k) for group, k in zip(self.groups, keys, strict=True))

    def with_species(self, params: Params, fresh: Params, wanted: SpeciesTable) -> Params:
        """Parameters for more species; see `Ensemble.with_species`."""
        three = zip(self.groups, params, fresh, strict=True)
        return tuple(group.with_species(old, new, wanted) for group, old, new in three)

    def predict(self, params: Params, graph: Graph) -> Prediction:
        """Predictions of all members; features are padded with zeros to the widest of them."""
        parts = [group.predict(one, graph) for group, one in zip(self.groups, params, strict=True)]
        widest = max(part.features.shape[-1] for part in parts)

        def padded(part: Prediction) -> Prediction:
            missing = widest - part.features.shape[-1]
            return replace(part, features=jnp.pad(part.features, ((0, 0), (0, 0), (0, missing))))

        return jax.tree.map(lambda *x: jnp.concatenate(x), *[padded(part) for part in parts])

    def energies(self, params: Params, graph: Graph) -> jax.Array:
        """Energy of every member and structure, [M, S] eV; see `Ensemble.energies`."""
        return jnp.concatenate([group.energies(one, graph) for group, one in zip(self.groups, params, strict=True)])

    def committee(self, params: Params, graph: Graph) -> Committee:
        """Mean and spread of the members, from one evaluation of each."""
        return committee_statistics(self.predict(params, graph), graph)


AnyEnsemble: TypeAlias = Ensemble | MixedEnsemble
"""Members of one architecture, or of several."""


def joined(groups: Sequence[Ensemble]) -> AnyEnsemble:
    """One ensemble as it is, several as a `MixedEnsemble`."""
    return groups[0] if len(groups) == 1 else MixedEnsemble(tuple(groups))
