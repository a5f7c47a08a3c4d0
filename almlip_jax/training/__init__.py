"""Training: every member of an ensemble in one compiled program."""

from almlip_jax.ensembles.settings import EnsembleSettings
from almlip_jax.training.committee import AnyTrainer, CommitteeTrainer, build_trainer, check_training, params_for
from almlip_jax.training.dataset import Capacity, longest_epoch, plan_capacity, training_part, validation_part
from almlip_jax.training.idle import refuse_idle_judgement, refuse_idle_members, refuse_idle_warmth
from almlip_jax.training.optimisers import OptimiserSettings
from almlip_jax.training.penalties import LossSettings
from almlip_jax.training.reference import (
    References,
    charge_columns,
    doubts,
    find_references,
    fitted_references,
    given_references,
    is_isolated_atom,
    isolated_atom_energies,
    proportions_left_open,
    reference_energies,
    robust_fit,
    untold_charges,
    without_isolated_atoms,
)
from almlip_jax.training.schedules import ScheduleSettings
from almlip_jax.training.settings import SecondStageSettings, TrainingSettings
from almlip_jax.training.side_by_side import Job, SideBySideTrainer
from almlip_jax.training.trainer import (
    VALIDATION_ERROR,
    Again,
    EpochReport,
    Trainer,
    TrainingResult,
    check_two_sources,
    validation_note,
)

__all__ = [
    "VALIDATION_ERROR",
    "Again",
    "AnyTrainer",
    "Capacity",
    "CommitteeTrainer",
    "EnsembleSettings",
    "EpochReport",
    "Job",
    "LossSettings",
    "OptimiserSettings",
    "References",
    "ScheduleSettings",
    "SecondStageSettings",
    "SideBySideTrainer",
    "Trainer",
    "TrainingResult",
    "TrainingSettings",
    "build_trainer",
    "charge_columns",
    "check_training",
    "check_two_sources",
    "doubts",
    "find_references",
    "fitted_references",
    "given_references",
    "is_isolated_atom",
    "isolated_atom_energies",
    "longest_epoch",
    "params_for",
    "plan_capacity",
    "proportions_left_open",
    "reference_energies",
    "refuse_idle_judgement",
    "refuse_idle_members",
    "refuse_idle_warmth",
    "robust_fit",
    "training_part",
    "untold_charges",
    "validation_note",
    "validation_part",
    "without_isolated_atoms",
]
