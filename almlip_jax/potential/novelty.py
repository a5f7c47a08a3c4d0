"""Novelty in latent space: which atom has left the training distribution, and how far; one small product a step.

A score judges an atom by the features of the last hidden layer, against the atoms of its species in the training set.
It is fitted on the host, and arrays in the compiled loop.  Grades of extrapolation have a place of their own
(`active_set`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar, Protocol, Self, TypeAlias, TypeVar, cast, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from almlip_jax.ensembles import Prediction
from almlip_jax.errors import InputError
from almlip_jax.potential.fitted import FittedKind, fitted_kind
from almlip_jax.scores import names as names_of
from almlip_jax.scores import scores
from almlip_jax.structures.graph import Graph

_RIDGE = 1e-4  # of the mean variance; directions in which training atoms never differ count for little
_FEWEST = 1e-12


@runtime_checkable
class FittedScore(Protocol):
    """What gives a score that was fitted to a training set, from predictions; a pytree, whose arrays are data."""

    def of(self, prediction: Prediction, graph: Graph) -> jax.Array:
        """The score of each atom, [A], 0 for padding atoms; of a score of structures alone, [S]."""
        ...


class KeptScore(FittedScore, FittedKind, Protocol):
    """One that potentials keep; `fits` makes known what fits it, and `fitted_kind` what it is."""


@fitted_kind
@struct.dataclass
class Novelty:
    """A novelty score, fitted; L models, Z species, F features.

    Attributes:
        centre: [L, Z, F].
        whiten: [L, Z, F, F], applied to the difference from the centre on the right.
        unit: [Z], the value that counts as 1.
    """

    kind: ClassVar[str] = "novelty"
    version: ClassVar[int] = 2

    centre: jax.Array
    whiten: jax.Array
    unit: jax.Array

    def arrays(self) -> Mapping[str, np.ndarray]:
        """What is saved as arrays."""
        return {name: np.asarray(getattr(self, name)) for name in ("centre", "whiten", "unit")}

    def numbers(self) -> Mapping[str, Any]:
        """None."""
        return {}

    @classmethod
    def restored(cls, arrays: Mapping[str, np.ndarray], numbers: Mapping[str, Any]) -> Self:
        """From what was saved."""
        if numbers.get("largest"):
            raise ValueError("grades of an earlier version have no active set; fit again")
        # left on the host, where float64 stays what it is
        centre, whiten, unit = (cast(jax.Array, arrays[name]) for name in ("centre", "whiten", "unit"))
        if whiten.shape != (*centre.shape, centre.shape[-1]) or unit.shape != centre.shape[1:2]:
            raise ValueError("centre, whiten and unit do not fit each other")
        return cls(centre, whiten, unit)

    def of(self, prediction: Prediction, graph: Graph) -> jax.Array:
        """The score of each atom, [A]; 0 for padding atoms, not a number where features are none."""
        return jnp.where(graph.atom_mask, self.of_features(prediction.features, graph.species), 0)

    def of_features(self, features: jax.Array, species: jax.Array) -> jax.Array:
        """The score of each atom, [A], from features [L, A, F] and species [A]."""

        def one_model(features: jax.Array, centre: jax.Array, whiten: jax.Array) -> jax.Array:
            # species one after the other: few products of matrices instead of a gather of one matrix for each atom
            squared = jnp.zeros(features.shape[0], features.dtype)
            for z in range(whiten.shape[0]):
                vector = (features - centre[z]) @ whiten[z]
                squared = jnp.where(species == z, jnp.mean(vector**2, axis=1), squared)
            return squared

        over_models = jax.vmap(one_model)(features, self.centre, self.whiten)
        return jnp.sqrt(jnp.mean(over_models, axis=0)) / self.unit[species]


def fit_novelty(
    names: Collection[str], features: np.ndarray, species: np.ndarray, num_species: int
) -> dict[str, KeptScore]:
    """Novelty scores by name, from the features [L, A, F] and species [A] of the atoms of the training set.

    Raises:
        InputError: no function is known that fits a score (`fits`).
    """
    missing = set(names) - set(_FITS)
    if missing:
        raise InputError(f"novelty score '{min(missing)}' is declared, but there is no function that fits it.")
    return {name: _FITS[name](features, species, num_species) for name in novelty_names() if name in names}


def novelty_names() -> tuple[str, ...]:
    """Names of all novelty scores of a structure, each the largest value of its atoms (`scores`)."""
    return tuple(name for name in names_of(scores(fitted=True)) if name in _FITS)


_Fit: TypeAlias = Callable[[np.ndarray, np.ndarray, int], KeptScore]
_FITS: dict[str, _Fit] = {}


Fit = TypeVar("Fit", bound=Callable[..., KeptScore])


def fits(name: str) -> Callable[[Fit], Fit]:
    """Makes a function of features [L, A, F], species [A] and Z the fit of a declared novelty score."""

    def remember(fit: Fit) -> Fit:
        _FITS[name] = fit
        return fit

    return remember


@fits("latent_distance")
def fit_latent_distance(features: np.ndarray, species: np.ndarray, num_species: int, quantile: float = 0.99) -> Novelty:
    """Mahalanobis distance from the training atoms of a species, averaged over models; 1 at a quantile of them.

    Args:
        features: [L, A, F] of the atoms of the training set; those of narrower models are padded with zeros.
        species: [A] int.
        num_species: Z; a species without atoms has no distribution, and its atoms are infinitely far.
        quantile: of the training atoms of each species, that lies at distance 1.

    Returns:
        `Novelty` in the precision of the features.  Source: Lee et al., NeurIPS 2018 (Mahalanobis detector).
    """
    models, _, widest = features.shape
    centre, whiten = np.zeros((models, num_species, widest)), np.zeros((models, num_species, widest, widest))
    widths = [_width(features[m]) for m in range(models)]
    unit = np.full(num_species, _FEWEST)
    for z in range(num_species):
        mine = features[:, species == z].astype(np.float64)
        if mine.shape[1] == 0:
            whiten[:, z] = np.eye(widest)
            continue
        centre[:, z] = mine.mean(axis=1)
        moved = mine - centre[:, z, None]
        for m, width in enumerate(widths):
            own = moved[m, :, :width]
            covariance = own.T @ own / moved.shape[1]
            ridge = _RIDGE * max(np.trace(covariance) / width, _FEWEST)
            values, vectors = np.linalg.eigh(covariance + ridge * np.eye(width))
            # of the mean over all columns, which padding would dilute, to that over the model's own
            whiten[m, z, :width, :width] = vectors / np.sqrt(values) * np.sqrt(widest / width)
        distance = np.sqrt(np.mean(np.mean((moved @ whiten[:, z]) ** 2, axis=2), axis=0))
        unit[z] = max(np.quantile(distance, quantile), _FEWEST)
    return _as_arrays(centre, whiten, unit, features.dtype)


def _width(features: np.ndarray) -> int:
    """Columns of the features [A, F] of a model without those that pad them to the widest, which are 0 throughout."""
    return int(np.flatnonzero(features.any(axis=0)).max(initial=0)) + 1


def _as_arrays(centre: np.ndarray, whiten: np.ndarray, unit: np.ndarray, dtype: np.dtype) -> Novelty:
    def array(x: np.ndarray) -> jax.Array:
        return jnp.asarray(x.astype(dtype))

    return Novelty(array(centre), array(whiten), array(unit))
