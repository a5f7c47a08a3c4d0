"""Training: every member of an ensemble in one compiled program."""

from almlip_jax.training.dataset import Capacity, plan_capacity
from almlip_jax.training.reference import reference_energies
from almlip_jax.training.settings import EnsembleSettings, LossSettings, SecondStageSettings, TrainingSettings
from almlip_jax.training.trainer import EpochReport, Trainer, TrainingResult

__all__ = [
    "Capacity",
    "EnsembleSettings",
    "EpochReport",
    "LossSettings",
    "SecondStageSettings",
    "Trainer",
    "TrainingResult",
    "TrainingSettings",
    "plan_capacity",
    "reference_energies",
]
