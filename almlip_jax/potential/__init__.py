"""Potentials: a trained ensemble and its faces, evaluations of structures, the ASE calculator, folders on disk."""

from almlip_jax.potential.active_set import GRADES, ActiveSetSettings, ActiveStructures, Grades
from almlip_jax.potential.calculator import PotentialCalculator
from almlip_jax.potential.evaluator import Evaluated
from almlip_jax.potential.fitted import Calibration, Fitted, FittedKind, TrainingSet, fitted_kind
from almlip_jax.potential.novelty import FittedScore, Novelty, novelty_names
from almlip_jax.potential.potential import NO_FEATURES, Potential
from almlip_jax.potential.spanning import Offer
from almlip_jax.potential.storage import check_place

__all__ = [
    "GRADES",
    "NO_FEATURES",
    "ActiveSetSettings",
    "ActiveStructures",
    "Calibration",
    "Evaluated",
    "Fitted",
    "FittedKind",
    "FittedScore",
    "Grades",
    "Novelty",
    "Offer",
    "Potential",
    "PotentialCalculator",
    "TrainingSet",
    "check_place",
    "fitted_kind",
    "novelty_names",
]
