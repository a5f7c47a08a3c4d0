"""Selection: pure functions from candidates to the batch worth labelling."""

from almlip_jax.selection.base import (
    Candidates,
    Filter,
    Selection,
    Selector,
)
from almlip_jax.selection.clusters import (
    kmeans_fps,
)
from almlip_jax.selection.compose import (
    chain,
    select,
)
from almlip_jax.selection.design import (
    bait,
    dpp,
    frank_wolfe,
    max_det,
)
from almlip_jax.selection.diversity import (
    kmeans_pp,
    lcmd,
    max_dist,
)
from almlip_jax.selection.greedy import (
    Backward,
    Greedy,
    Ranking,
    Rule,
    cost_aware,
)
from almlip_jax.selection.hybrid import (
    WEIGHT,
    adapt,
    adaptive,
    hybrid,
)
from almlip_jax.selection.maxvol import (
    ActiveSet,
    active_set,
    extrapolation_grade,
    maxvol,
)
from almlip_jax.selection.rankings import (
    entropy,
    top_k,
)
from almlip_jax.selection.rows import (
    Rows,
)
from almlip_jax.selection.scores import (
    random,
    threshold,
    top_fraction,
)
from almlip_jax.selection.settings import (
    AdaptiveSettings,
    BaitSettings,
    ChainSettings,
    CostAwareSettings,
    DppSettings,
    EntropySettings,
    FilterSettings,
    FrankWolfeSettings,
    HybridSettings,
    KmeansFpsSettings,
    KmeansPpSettings,
    LcmdSettings,
    MaxDetSettings,
    MaxDistSettings,
    MaxvolSettings,
    RandomSettings,
    SelectorSettings,
    ThresholdSettings,
    TopFractionSettings,
    TopKSettings,
    UserSettings,
    build_filter,
    build_selector,
    features_of,
    import_function,
    parts_of,
    scores_of,
)

__all__ = [
    "WEIGHT",
    "ActiveSet",
    "AdaptiveSettings",
    "Backward",
    "BaitSettings",
    "Candidates",
    "ChainSettings",
    "CostAwareSettings",
    "DppSettings",
    "EntropySettings",
    "Filter",
    "FilterSettings",
    "FrankWolfeSettings",
    "Greedy",
    "HybridSettings",
    "KmeansFpsSettings",
    "KmeansPpSettings",
    "LcmdSettings",
    "MaxDetSettings",
    "MaxDistSettings",
    "MaxvolSettings",
    "RandomSettings",
    "Ranking",
    "Rows",
    "Rule",
    "Selection",
    "Selector",
    "SelectorSettings",
    "ThresholdSettings",
    "TopFractionSettings",
    "TopKSettings",
    "UserSettings",
    "active_set",
    "adapt",
    "adaptive",
    "bait",
    "build_filter",
    "build_selector",
    "chain",
    "cost_aware",
    "dpp",
    "entropy",
    "extrapolation_grade",
    "features_of",
    "frank_wolfe",
    "hybrid",
    "import_function",
    "kmeans_fps",
    "kmeans_pp",
    "lcmd",
    "max_det",
    "max_dist",
    "maxvol",
    "parts_of",
    "random",
    "scores_of",
    "select",
    "threshold",
    "top_fraction",
    "top_k",
]
