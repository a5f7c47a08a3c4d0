"""Whether an ensemble can do what an exploration asks of it: one member has no spread to judge or to follow."""

from __future__ import annotations

from collections.abc import Collection

from almlip_jax.dynamics.settings import ExplorationSettings
from almlip_jax.ensembles import EnsembleSettings, Prediction, require_score, require_spread, require_target


def check_exploration(
    settings: ExplorationSettings, members: EnsembleSettings, *, gated: bool = True, further: Collection[str] = ()
) -> None:
    """Refuses a gate, a bias or an ascent that would see no uncertainty anywhere, and scores that will not exist.

    Args:
        settings: of the exploration.
        members: settings of the ensemble.
        gated: whether the gate compares its score with anything.
        further: what the model gives besides the energy.

    Raises:
        ValueError: names the key, and says what to do.
    """
    for score in settings.scores:
        require_target(score, further, "exploration")
    if gated:
        novelty = " (latent_distance and extrapolation_grade need no spread)"
        try:
            require_score(settings.gate.score, members, "exploration.gate")
        except ValueError as error:
            raise ValueError(str(error).removesuffix(".") + novelty + ".") from error
    if settings.integrator.needs_spread:
        require_spread(members, f"exploration.integrator '{settings.integrator.kind}'")
    for bias in settings.biases:
        if bias.needs_spread:
            require_spread(members, f"exploration.biases '{bias.kind}'")


def speaks_as(prediction: Prediction) -> EnsembleSettings:
    """Settings of an ensemble that says as much about its errors as one with this prediction; shapes are enough."""
    if prediction.noise is None:
        return EnsembleSettings(size=prediction.energy.shape[0])
    evidence = prediction.noise.forces.evidence
    likelihood = "mean_variance" if evidence is None else "evidential"
    return EnsembleSettings(size=prediction.energy.shape[0], likelihood=likelihood)
