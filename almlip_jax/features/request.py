"""Feature maps asked for by name, and all of them from one evaluation of an ensemble."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import get_args

import jax
from flax import struct

from almlip_jax.ensembles.mixed import AnyEnsemble
from almlip_jax.ensembles.prediction import Prediction
from almlip_jax.feature_names import FeatureName
from almlip_jax.features.gradients import GradientFactors, force_gradient, full_gradients, gradient_factors
from almlip_jax.features.maps import committee_energy, composition, last_layer_gradient, latent
from almlip_jax.features.power_spectrum import SpectrumFactors, density_of, power_spectrum, spectrum_factors
from almlip_jax.features.sketch import COLUMNS, sketch
from almlip_jax.keys import named_key
from almlip_jax.models.base import Params
from almlip_jax.structures.graph import Graph

FEATURES: tuple[FeatureName, ...] = get_args(FeatureName)
"""Names of the feature maps."""


@dataclass(frozen=True)
class FeatureRequest:
    """Which feature maps, and the random numbers of their sketches.

    Attributes:
        names: of the maps; none by default.
        seed: of the sketches: structures that are to be compared need the same.
        columns: of a sketch; the other maps keep theirs.
    """

    names: tuple[FeatureName, ...] = ()
    seed: int = 0
    columns: int = COLUMNS

    @classmethod
    def of(cls, names: Iterable[FeatureName], seed: int = 0) -> FeatureRequest:
        """Each of the names once, in the order of `FEATURES`: equal sets are equal requests."""
        wanted = set(names)
        return cls(tuple(name for name in FEATURES if name in wanted), seed)

    @property
    def structure_by_structure(self) -> bool:
        """Whether structures are also looked at one by one."""
        return "full_gradient" in self.names


@struct.dataclass
class FeatureFactors:
    """Random numbers of the sketches that a request needs.

    Attributes:
        gradient: of `full_gradient`.
        spectrum: of `power_spectrum`.
        rows: key of the projection of `force_gradient`.
    """

    gradient: GradientFactors | None
    spectrum: SpectrumFactors | None
    rows: jax.Array | None


def feature_factors(request: FeatureRequest, ensemble: AnyEnsemble, params: Params) -> FeatureFactors:
    """The random numbers of a request, drawn once for any number of structures."""
    gradient = spectrum = rows = None
    if "full_gradient" in request.names:
        gradient = gradient_factors(params, named_key(request.seed, "features", "full_gradient"), request.columns)
    if "power_spectrum" in request.names:
        key, dtype = named_key(request.seed, "features", "power_spectrum"), jax.tree.leaves(params)[0].dtype
        spectrum = spectrum_factors(density_of(ensemble.cutoff, ensemble.species), key, request.columns, dtype)
    if "force_gradient" in request.names:
        rows = named_key(request.seed, "features", "force_gradient")
    return FeatureFactors(gradient, spectrum, rows)


def feature_maps(
    request: FeatureRequest,
    ensemble: AnyEnsemble,
    params: Params,
    prediction: Prediction,
    graph: Graph,
    one_by_one: Graph | None,
    factors: FeatureFactors,
) -> dict[str, jax.Array]:
    """What a request asks for, name -> [S, d].

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
    number = len(ensemble.species)

    def found(name: FeatureName) -> jax.Array:
        match name:
            case "latent":
                return latent(prediction, graph)
            case "last_layer_gradient":
                return last_layer_gradient(prediction, graph, number)
            case "full_gradient":
                assert one_by_one is not None and factors.gradient is not None
                return full_gradients(ensemble, params, one_by_one, factors.gradient)
            case "force_gradient":
                assert factors.rows is not None
                rows = force_gradient(ensemble, params, graph, prediction, number)
                return sketch(rows, factors.rows, request.columns)
            case "committee_energy":
                return committee_energy(prediction, graph)
            case "power_spectrum":
                assert factors.spectrum is not None
                return power_spectrum(density_of(ensemble.cutoff, ensemble.species), graph, factors.spectrum)
            case "composition":
                return composition(graph, number)

    return {name: found(name) for name in request.names}
