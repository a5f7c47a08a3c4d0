"""Settings of selectors and filters, told apart by ``kind``, and the functions that build them."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from almlip_jax.errors import InputError
from almlip_jax.score_names import ScoreName
from almlip_jax.selection.base import Filter, Selector
from almlip_jax.selection.compose import chain
from almlip_jax.selection.diversity import max_det, max_dist
from almlip_jax.selection.scores import random, threshold, top_fraction, top_k
from almlip_jax.settings import Settings

FeatureName = Literal["latent", "last_layer_gradient"]
"""Names of the feature maps of a potential."""


class RandomSettings(Settings):
    """Uniformly at random."""

    kind: Literal["random"] = "random"


class TopKSettings(Settings):
    """The highest scores."""

    kind: Literal["top_k"] = "top_k"
    score: ScoreName = "force_std_mean"
    """Which score."""


class MaxDistSettings(Settings):
    """Farthest points from everything labelled or chosen."""

    kind: Literal["max_dist"] = "max_dist"
    features: FeatureName = "last_layer_gradient"
    """In which features distance is measured."""


class MaxDetSettings(Settings):
    """Greedy D-optimal design given everything labelled."""

    kind: Literal["max_det"] = "max_det"
    features: FeatureName = "last_layer_gradient"
    """Rows of the design matrix."""
    sigma: float = Field(default=1e-2, ge=1e-6)
    """Regularisation, relative to features of mean square norm 1; below 1e-6, float64 does not resolve it."""


class UserSettings(Settings):
    """A user's own factory ``(k, **parameters) -> Selector``, or ``(**parameters) -> Filter`` among filters."""

    kind: Literal["user"] = "user"
    function: str
    """Where the factory is, as ``module:function``."""
    parameters: dict[str, Any] = {}
    """Keyword arguments of the factory."""


class ThresholdSettings(Settings):
    """Keeps candidates whose score lies between two bounds."""

    kind: Literal["threshold"] = "threshold"
    score: ScoreName = "force_std_max"
    """Which score."""
    minimum: float | None = None
    """Lower bound, kept itself."""
    maximum: float | None = None
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
    RandomSettings | TopKSettings | MaxDistSettings | MaxDetSettings | UserSettings, Field(discriminator="kind")
]


class ChainSettings(Settings):
    """Filters one after the other, then a selector on what they leave."""

    kind: Literal["chain"] = "chain"
    filters: tuple[FilterSettings, ...] = Field(min_length=1)
    """In their order."""
    selector: LeafSelector
    """Chooses from what is left."""


SelectorSettings = Annotated[
    RandomSettings | TopKSettings | MaxDistSettings | MaxDetSettings | UserSettings | ChainSettings,
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
        case MaxDistSettings():
            return max_dist(k, settings.features)
        case MaxDetSettings():
            return max_det(k, settings.features, settings.sigma)
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
