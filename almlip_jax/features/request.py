"""Feature maps asked for by name, and all of them from one evaluation of an ensemble."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax

from almlip_jax.ensembles.mixed import AnyEnsemble
from almlip_jax.ensembles.prediction import Prediction
from almlip_jax.errors import InputError
from almlip_jax.feature_names import AtomFeatureName, FeatureName, atom_feature_names
from almlip_jax.features.declared import Evaluation, declared
from almlip_jax.features.sketch import COLUMNS
from almlip_jax.keys import named_key
from almlip_jax.models.base import Params
from almlip_jax.structures.graph import Graph


@dataclass(frozen=True)
class FeatureRequest:
    """Which feature maps, and the random numbers of their sketches.

    Attributes:
        names: of the maps of structures; none by default.
        seed: of the sketches: structures that are to be compared need the same.
        columns: of a sketch; the other maps keep theirs.
        atoms: names of the maps of atoms.
    """

    names: tuple[FeatureName, ...] = ()
    seed: int = 0
    columns: int = COLUMNS
    atoms: tuple[AtomFeatureName, ...] = ()

    @classmethod
    def of(
        cls, names: Iterable[FeatureName], seed: int = 0, *, atoms: Iterable[AtomFeatureName] = ()
    ) -> FeatureRequest:
        """Each of the names once, in the order of the alphabet: equal sets are equal requests."""
        return cls(tuple(sorted(set(names))), seed, atoms=tuple(sorted(set(atoms))))

    @property
    def structure_by_structure(self) -> bool:
        """Whether structures are also looked at one by one."""
        return any(declared(name).one_by_one for name in self.names)

    @property
    def of_prediction(self) -> bool:
        """Whether a prediction that is there already is all that the maps ask of the models."""
        return not any(declared(name).derives for name in (*self.names, *self.atoms))


FeatureFactors: TypeAlias = Mapping[str, Any]
"""Random numbers of the sketches that a request needs, by the name of the map."""


def feature_factors(request: FeatureRequest, ensemble: AnyEnsemble, params: Params) -> FeatureFactors:
    """The random numbers of a request, drawn once for any number of structures."""
    found = {}
    for name in dict.fromkeys((*request.names, *request.atoms)):
        draw = declared(name).factors
        if draw is not None:
            found[name] = draw(ensemble, params, named_key(request.seed, "features", name), request.columns)
    return found


def feature_maps(
    request: FeatureRequest,
    ensemble: AnyEnsemble,
    params: Params,
    prediction: Prediction,
    graph: Graph,
    one_by_one: Graph | None,
    factors: FeatureFactors,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """What a request asks for: of structures, name -> [S, d], and of atoms, name -> [A, d].

    Args:
        request: the names.
        ensemble: models and members.
        params: of the ensemble.
        prediction: of the ensemble for the graph.
        graph: the structures.
        one_by_one: the same structures with a leading axis S, a graph of one structure each, where
            `FeatureRequest.structure_by_structure`.
        factors: what `feature_factors` gives for the request.
    """
    seen = Evaluation(ensemble, params, prediction, graph, one_by_one, request.columns)
    rows = {name: declared(name).rows(seen, factors.get(name)) for name in request.names}
    return rows, {name: _atom_rows(name)(seen, factors.get(name)) for name in request.atoms}


def _atom_rows(name: AtomFeatureName) -> Callable[[Evaluation, Any], jax.Array]:
    rows = declared(name).atoms
    if rows is None:
        known = ", ".join(atom_feature_names())
        raise InputError(f"feature map '{name}' has no rows of atoms; those that have: {known}.")
    return rows
