"""Ensembles: members evaluated together, what they say about their errors, and the statistics of their committee."""

from almlip_jax.ensembles.blocks import blocked
from almlip_jax.ensembles.bootstrap import BootstrapSettings
from almlip_jax.ensembles.build import build_ensemble, member_models
from almlip_jax.ensembles.ensemble import Ensemble
from almlip_jax.ensembles.heads import Heads
from almlip_jax.ensembles.judging import (
    Speaking,
    Speaks,
    gives_score,
    has_spread,
    require_score,
    require_spread,
    require_target,
)
from almlip_jax.ensembles.likelihoods import Belief, EvidentialBelief, LikelihoodSettings, Noise, deviations
from almlip_jax.ensembles.mixed import AnyEnsemble, MixedEnsemble
from almlip_jax.ensembles.prediction import Committee, Prediction, Seen, committee_statistics
from almlip_jax.ensembles.settings import EnsembleSettings, VariantSettings
from almlip_jax.ensembles.sharding import (
    batches_at_a_time,
    devices_side_by_side,
    gathered,
    laid_over,
    member_devices,
    side_by_side,
    spread_members,
    training_devices,
    walkers_to_share,
)

__all__ = [
    "AnyEnsemble",
    "Belief",
    "BootstrapSettings",
    "Committee",
    "Ensemble",
    "EnsembleSettings",
    "EvidentialBelief",
    "Heads",
    "LikelihoodSettings",
    "MixedEnsemble",
    "Noise",
    "Prediction",
    "Seen",
    "Speaking",
    "Speaks",
    "VariantSettings",
    "batches_at_a_time",
    "blocked",
    "build_ensemble",
    "committee_statistics",
    "deviations",
    "devices_side_by_side",
    "gathered",
    "gives_score",
    "has_spread",
    "laid_over",
    "member_devices",
    "member_models",
    "require_score",
    "require_spread",
    "require_target",
    "side_by_side",
    "spread_members",
    "training_devices",
    "walkers_to_share",
]
