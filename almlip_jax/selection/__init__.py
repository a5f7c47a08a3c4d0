"""Selection: pure functions from candidates to the batch worth labelling."""

from almlip_jax.selection.base import Candidates, Filter, Selection, Selector
from almlip_jax.selection.compose import chain, select
from almlip_jax.selection.diversity import max_det, max_dist
from almlip_jax.selection.scores import random, threshold, top_fraction, top_k
from almlip_jax.selection.settings import (
    ChainSettings,
    FilterSettings,
    MaxDetSettings,
    MaxDistSettings,
    RandomSettings,
    SelectorSettings,
    ThresholdSettings,
    TopFractionSettings,
    TopKSettings,
    UserSettings,
    build_filter,
    build_selector,
    import_function,
)

__all__ = [
    "Candidates",
    "ChainSettings",
    "Filter",
    "FilterSettings",
    "MaxDetSettings",
    "MaxDistSettings",
    "RandomSettings",
    "Selection",
    "Selector",
    "SelectorSettings",
    "ThresholdSettings",
    "TopFractionSettings",
    "TopKSettings",
    "UserSettings",
    "build_filter",
    "build_selector",
    "chain",
    "import_function",
    "max_det",
    "max_dist",
    "random",
    "select",
    "threshold",
    "top_fraction",
    "top_k",
]
