"""Potentials: a trained ensemble and its faces, evaluations of structures, the ASE calculator, folders on disk."""

from almlip_jax.potential.calculator import PotentialCalculator
from almlip_jax.potential.evaluator import Evaluated
from almlip_jax.potential.fitted import Calibration, Fitted, FittedKind, TrainingSet, fitted_kind
from almlip_jax.potential.novelty import Novelty, novelty_names
from almlip_jax.potential.potential import NO_FEATURES, Potential
from almlip_jax.potential.storage import check_place

__all__ = [
    "NO_FEATURES",
    "Calibration",
    "Evaluated",
    "Fitted",
    "FittedKind",
    "Novelty",
    "Potential",
    "PotentialCalculator",
    "TrainingSet",
    "check_place",
    "fitted_kind",
    "novelty_names",
]
