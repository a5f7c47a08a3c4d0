"""What a feature map declares about itself, once: its name, what it needs, and the function behind it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from almlip_jax.ensembles.mixed import AnyEnsemble
from almlip_jax.ensembles.prediction import Prediction
from almlip_jax.errors import InputError, nearest
from almlip_jax.feature_names import declare, feature_names
from almlip_jax.models.base import Params
from almlip_jax.structures.graph import Graph


@dataclass(frozen=True)
class Evaluation:
    """What feature maps are made of.

    Attributes:
        ensemble: models and members.
        params: of the ensemble.
        prediction: of the ensemble for the graph.
        graph: S structures.
        one_by_one: the same structures with a leading axis S, where a map asks for it.
        columns: of a sketch.
    """

    ensemble: AnyEnsemble
    params: Params
    prediction: Prediction
    graph: Graph
    one_by_one: Graph | None
    columns: int

    @property
    def num_species(self) -> int:
        """Length of the species table."""
        return len(self.ensemble.species)


@dataclass(frozen=True)
class FeatureMap:
    """A feature map, known by its name from the moment it is made.

    Attributes:
        name: in configs and files.
        meaning: in a few words.
        rows: the rows [S, d] of an evaluation, given the random numbers of the map.
        factors: draws these for an ensemble, parameters, a key and the columns of a sketch; None where there are none.
        of_members: whether it is made of differences between members, and 0 where there is one.
        one_by_one: whether it looks at `Evaluation.one_by_one`.
        atoms: the rows [A, d] of the atoms of an evaluation, likewise; None where it has none.
        learned: whether it looks at a potential, rather than at structures, cutoff and species alone.
        derives: whether it differentiates the models once more, which shares work with the prediction.
    """

    name: str
    meaning: str
    rows: Callable[[Evaluation, Any], jax.Array]
    factors: Callable[[AnyEnsemble, Params, jax.Array, int], Any] | None = None
    of_members: bool = False
    one_by_one: bool = False
    atoms: Callable[[Evaluation, Any], jax.Array] | None = None
    learned: bool = True
    derives: bool = False

    def __post_init__(self) -> None:
        declare(self.name, self.meaning, of_atoms=self.atoms is not None)
        _MAPS[self.name] = self


_MAPS: dict[str, FeatureMap] = {}


def declared(name: str) -> FeatureMap:
    """The feature map of a name.

    Raises:
        InputError: there is none.
    """
    known = feature_names()
    if name not in known:
        raise InputError(f"'{name}' is not a feature map{nearest(name, known)}")
    return _MAPS[name]


def unlearned_names() -> tuple[str, ...]:
    """Feature maps that need no potential, in the order of the alphabet."""
    return tuple(name for name in feature_names() if not declared(name).learned)
