"""Selection: pure functions from candidates to the batch worth labelling."""

from almlip_jax.selection.base import (
    Candidates,
    Environments,
    Filter,
    FilterSettings,
    LeafSelector,
    Selection,
    Selector,
    SelectorSettings,
    UserFilter,
    UserSelector,
    WeighedSelector,
)
from almlip_jax.selection.clusters import KmeansFpsSettings, kmeans_fps
from almlip_jax.selection.compose import ChainSettings, chain, select
from almlip_jax.selection.cover import CoverSettings, NewEnvironmentsSettings, cover, new_environments
from almlip_jax.selection.design import (
    BaitSettings,
    DppSettings,
    FrankWolfeSettings,
    MaxDetSettings,
    bait,
    dpp,
    frank_wolfe,
    max_det,
)
from almlip_jax.selection.diversity import KmeansPpSettings, LcmdSettings, MaxDistSettings, kmeans_pp, lcmd, max_dist
from almlip_jax.selection.environment_entropy import (
    EnvironmentEntropySettings,
    SurprisingSettings,
    environment_entropy,
    surprising,
)
from almlip_jax.selection.greedy import Backward, CostAwareSettings, Greedy, Ranking, Rule, cost_aware
from almlip_jax.selection.hybrid import WEIGHT, AdaptiveSettings, HybridSettings, adapt, adaptive, hybrid
from almlip_jax.selection.maxvol import ActiveSet, MaxvolSettings, active_set, extrapolation_grade, maxvol
from almlip_jax.selection.rankings import EntropySettings, TopKSettings, entropy, top_k
from almlip_jax.selection.rows import Rows
from almlip_jax.selection.scores import (
    RandomSettings,
    ThresholdSettings,
    TopFractionSettings,
    random,
    threshold,
    top_fraction,
)
from almlip_jax.selection.sites import Sites

__all__ = [
    "WEIGHT",
    "ActiveSet",
    "AdaptiveSettings",
    "Backward",
    "BaitSettings",
    "Candidates",
    "ChainSettings",
    "CostAwareSettings",
    "CoverSettings",
    "DppSettings",
    "EntropySettings",
    "EnvironmentEntropySettings",
    "Environments",
    "Filter",
    "FilterSettings",
    "FrankWolfeSettings",
    "Greedy",
    "HybridSettings",
    "KmeansFpsSettings",
    "KmeansPpSettings",
    "LcmdSettings",
    "LeafSelector",
    "MaxDetSettings",
    "MaxDistSettings",
    "MaxvolSettings",
    "NewEnvironmentsSettings",
    "RandomSettings",
    "Ranking",
    "Rows",
    "Rule",
    "Selection",
    "Selector",
    "SelectorSettings",
    "Sites",
    "SurprisingSettings",
    "ThresholdSettings",
    "TopFractionSettings",
    "TopKSettings",
    "UserFilter",
    "UserSelector",
    "WeighedSelector",
    "active_set",
    "adapt",
    "adaptive",
    "bait",
    "chain",
    "cost_aware",
    "cover",
    "dpp",
    "entropy",
    "environment_entropy",
    "extrapolation_grade",
    "frank_wolfe",
    "hybrid",
    "kmeans_fps",
    "kmeans_pp",
    "lcmd",
    "max_det",
    "max_dist",
    "maxvol",
    "new_environments",
    "random",
    "select",
    "surprising",
    "threshold",
    "top_fraction",
    "top_k",
]
