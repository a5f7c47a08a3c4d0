"""Settings of selectors and filters, told apart by ``kind``, and the functions that build them."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from almlip_jax.errors import InputError
from almlip_jax.feature_names import FeatureName
from almlip_jax.score_names import ScoreName
from almlip_jax.selection.base import Filter, Selector
from almlip_jax.selection.clusters import kmeans_fps
from almlip_jax.selection.compose import chain
from almlip_jax.selection.design import bait, dpp, frank_wolfe, max_det
from almlip_jax.selection.diversity import kmeans_pp, lcmd, max_dist
from almlip_jax.selection.greedy import cost_aware
from almlip_jax.selection.hybrid import adaptive, hybrid
from almlip_jax.selection.maxvol import maxvol
from almlip_jax.selection.rankings import entropy, top_k
from almlip_jax.selection.scores import random, threshold, top_fraction
from almlip_jax.settings import Settings


class _ByScore(Settings):
    score: ScoreName = "force_std_mean"
    """Which score."""


class _ByFeatures(Settings):
    features: FeatureName = "last_layer_gradient"
    """Which feature map stands for a structure."""


class _ByDesign(_ByFeatures):
    sigma: float = Field(default=1e-3, ge=1e-6, le=1000.0)
    """Noise, relative to features of mean square norm 1; below 1e-6, float64 does not resolve it."""


class RandomSettings(Settings):
    """Uniformly at random."""

    kind: Literal["random"] = "random"


class TopKSettings(_ByScore):
    """The highest scores."""

    kind: Literal["top_k"] = "top_k"


class EntropySettings(_ByScore):
    """The largest entropies of a Gaussian whose standard deviation is a score."""

    kind: Literal["entropy"] = "entropy"


class MaxDistSettings(_ByFeatures):
    """Farthest points from everything labelled or chosen."""

    kind: Literal["max_dist"] = "max_dist"


class LcmdSettings(_ByFeatures):
    """The farthest point of the largest cluster around what is labelled or chosen."""

    kind: Literal["lcmd"] = "lcmd"


class KmeansPpSettings(_ByFeatures):
    """At random, with probability proportional to the square distance from everything labelled or chosen."""

    kind: Literal["kmeans_pp"] = "kmeans_pp"


class KmeansFpsSettings(_ByFeatures):
    """Farthest points inside the clusters of the pool, which take turns."""

    kind: Literal["kmeans_fps"] = "kmeans_fps"
    clusters: int = Field(default=15, ge=1, le=100_000)
    """Number of clusters."""
    iterations: int = Field(default=25, ge=0, le=10_000)
    """Rounds of k-means."""


class MaxDetSettings(_ByDesign):
    """Greedy D-optimal design given everything labelled."""

    kind: Literal["max_det"] = "max_det"


class BaitSettings(_ByDesign):
    """Greedy design that lowers most the mean posterior variance over labelled structures and pool."""

    kind: Literal["bait"] = "bait"
    overselect: float = Field(default=1.0, ge=1, le=100.0)
    """Number of choices before the least valuable are given back, over the size of the batch."""


class FrankWolfeSettings(_ByDesign):
    """A sparse weighted sum that stands for the whole pool."""

    kind: Literal["frank_wolfe"] = "frank_wolfe"


class DppSettings(_ByDesign):
    """A sample of a determinantal point process: at random, and diverse."""

    kind: Literal["dpp"] = "dpp"


class MaxvolSettings(_ByFeatures):
    """What enters the active set of largest volume of everything labelled."""

    kind: Literal["maxvol"] = "maxvol"
    threshold: float = Field(default=1.001, gt=1, le=1e6)
    """Grade above which a candidate enters."""
    epsilon: float = Field(default=1e-5, ge=1e-12, le=1.0)
    """Size of the rows for directions that nothing spans, relative to features of mean square norm 1."""


class HybridSettings(_ByScore, _ByFeatures):
    """Greedy in a weighted sum of uncertainty and diversity."""

    kind: Literal["hybrid"] = "hybrid"
    alpha: float = Field(default=0.6, ge=0, le=1)
    """Weight of uncertainty."""


class AdaptiveSettings(_ByScore, _ByFeatures):
    """As hybrid, with a weight that follows progress: the force error on the structures kept for early stopping."""

    kind: Literal["adaptive"] = "adaptive"
    alpha: float = Field(default=0.3, ge=0, le=1)
    """Weight of uncertainty before any progress was measured."""


WeighedSelector = Annotated[
    TopKSettings
    | EntropySettings
    | MaxDistSettings
    | LcmdSettings
    | KmeansPpSettings
    | KmeansFpsSettings
    | MaxDetSettings
    | BaitSettings
    | FrankWolfeSettings
    | HybridSettings
    | AdaptiveSettings,
    Field(discriminator="kind"),
]
"""Selectors whose gains a cost can weigh."""


class CostAwareSettings(Settings):
    """A selector whose gains are divided by the expected cost of the label, in seconds of the label source.

    The cost follows from the labels in the store: the mean over those of the same composition, or a power of the number
    of atoms through the others.  It follows measured times, so that two runs of a campaign may choose otherwise.
    """

    kind: Literal["cost_aware"] = "cost_aware"
    selector: WeighedSelector
    """Whose gains."""
    exponent: float = Field(default=1.0, ge=0, le=10)
    """Cost where the store cannot tell (labels of a file, one size of structures): atoms to this power."""


class UserSettings(Settings):
    """A user's own factory ``(k, **parameters) -> Selector``, or ``(**parameters) -> Filter`` among filters."""

    kind: Literal["user"] = "user"
    function: str
    """Where the factory is, as ``module:function``."""
    parameters: dict[str, Any] = {}
    """Keyword arguments of the factory."""
    features: tuple[FeatureName, ...] = ("latent", "last_layer_gradient")
    """Feature maps that it looks at."""


class ThresholdSettings(Settings):
    """Keeps candidates whose score lies between two bounds."""

    kind: Literal["threshold"] = "threshold"
    score: ScoreName = "force_std_max"
    """Which score."""
    minimum: float | None = Field(default=None, ge=-1e9, le=1e9)
    """Lower bound, kept itself."""
    maximum: float | None = Field(default=None, ge=-1e9, le=1e9)
    """Upper bound, not kept itself."""

    @model_validator(mode="after")
    def _some_score_lies_between(self) -> ThresholdSettings:
        if self.minimum is None and self.maximum is None:
            raise ValueError("a threshold needs a minimum, a maximum or both.")
        if self.minimum is not None and self.maximum is not None and self.minimum >= self.maximum:
            raise ValueError(f"no score lies between minimum {self.minimum} and maximum {self.maximum}; swap them.")
        return self


class TopFractionSettings(Settings):
    """Keeps the candidates with the highest scores."""

    kind: Literal["top_fraction"] = "top_fraction"
    score: ScoreName = "force_std_max"
    """Which score."""
    fraction: float = Field(gt=0, le=1)
    """Share of the pool that is kept."""


FilterSettings = Annotated[ThresholdSettings | TopFractionSettings | UserSettings, Field(discriminator="kind")]
LeafSelector = Annotated[
    RandomSettings | DppSettings | MaxvolSettings | WeighedSelector | CostAwareSettings | UserSettings,
    Field(discriminator="kind"),
]


class ChainSettings(Settings):
    """Filters one after the other, then a selector on what they leave."""

    kind: Literal["chain"] = "chain"
    filters: tuple[FilterSettings, ...] = Field(min_length=1)
    """In their order."""
    selector: LeafSelector
    """Chooses from what is left."""


SelectorSettings = Annotated[
    LeafSelector | ChainSettings,
    Field(discriminator="kind"),
]
"""Settings of any selector."""


def build_selector(settings: SelectorSettings, k: int) -> Selector:
    """The selector that some settings describe, for batches of k.

    Raises:
        InputError: a user's function cannot be imported or built.
    """
    match settings:
        case RandomSettings():
            return random(k)
        case TopKSettings():
            return top_k(k, settings.score)
        case EntropySettings():
            return entropy(k, settings.score)
        case MaxDistSettings():
            return max_dist(k, settings.features)
        case LcmdSettings():
            return lcmd(k, settings.features)
        case KmeansPpSettings():
            return kmeans_pp(k, settings.features)
        case KmeansFpsSettings():
            return kmeans_fps(k, settings.features, settings.clusters, settings.iterations)
        case MaxDetSettings():
            return max_det(k, settings.features, settings.sigma)
        case BaitSettings():
            return bait(k, settings.features, settings.sigma, settings.overselect)
        case FrankWolfeSettings():
            return frank_wolfe(k, settings.features, settings.sigma)
        case DppSettings():
            return dpp(k, settings.features, settings.sigma)
        case MaxvolSettings():
            return maxvol(k, settings.features, settings.threshold, settings.epsilon)
        case HybridSettings():
            return hybrid(k, settings.score, settings.features, settings.alpha)
        case AdaptiveSettings():
            return adaptive(k, settings.score, settings.features, settings.alpha)
        case CostAwareSettings():
            return cost_aware(build_selector(settings.selector, k))
        case ChainSettings():
            filters = [build_filter(one) for one in settings.filters]
            return chain(*filters, selector=build_selector(settings.selector, k))
        case UserSettings():
            return _called(settings, k=k)


def build_filter(settings: FilterSettings) -> Filter:
    """The filter that some settings describe.

    Raises:
        InputError: a user's function cannot be imported or built.
    """
    match settings:
        case ThresholdSettings():
            return threshold(settings.score, settings.minimum, settings.maximum)
        case TopFractionSettings():
            return top_fraction(settings.score, settings.fraction)
        case UserSettings():
            return _called(settings)


def features_of(settings: SelectorSettings) -> tuple[FeatureName, ...]:
    """The feature maps that the selector and the filters of some settings look at, each once."""
    return tuple(dict.fromkeys(name for part in parts_of(settings) for name in _several(part, "features")))


def scores_of(settings: SelectorSettings) -> tuple[ScoreName, ...]:
    """The scores that the selector and the filters of some settings look at, each once; not those of a user's own."""
    found = [name for part in parts_of(settings) for name in _several(part, "score")]
    return tuple(dict.fromkeys(found))


def parts_of(settings: SelectorSettings) -> list[Any]:
    """Settings of the filters and of the selector, without those around them."""
    parts = [*settings.filters, settings.selector] if isinstance(settings, ChainSettings) else [settings]
    return [part.selector if isinstance(part, CostAwareSettings) else part for part in parts]


def _several(part: Any, name: str) -> tuple[Any, ...]:
    """The values of a field that holds one, several or none, or is not there."""
    value = getattr(part, name, ())
    return value if isinstance(value, tuple) else (value,)


def import_function(path: str) -> Callable[..., Any]:
    """The function behind ``module:function``.

    Raises:
        InputError: the path is not of that form, or does not lead to a function.
    """
    module, colon, name = path.partition(":")
    if not (module and colon and name) or module.startswith("."):
        raise InputError(f"'{path}' is not of the form module:function.")
    try:
        holder = import_module(module)
    except ImportError as error:
        raise InputError(f"'{path}' cannot be imported ({error}); is its folder on PYTHONPATH?") from error
    except Exception as error:  # whatever the user's module does while it is imported
        raise InputError(f"'{path}' cannot be imported ({type(error).__name__}: {error}).") from error
    if not hasattr(holder, name):
        raise InputError(f"module '{module}' has no function '{name}'.")
    function = getattr(holder, name)
    if not callable(function):
        raise InputError(f"'{path}' is not a function.")
    return function


def _called(settings: UserSettings, **fixed: int) -> Any:
    factory = import_function(settings.function)
    try:
        made = factory(**fixed, **settings.parameters)
    except TypeError as error:
        raise InputError(f"'{settings.function}' does not take the parameters given ({error}).") from error
    if not callable(made):
        raise InputError(f"'{settings.function}' must return a function, but returns a {type(made).__name__}.")
    return made
