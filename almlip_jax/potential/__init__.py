"""Potentials: a trained ensemble and its faces, evaluations of structures, the ASE calculator, folders on disk."""

from almlip_jax.potential.calculator import PotentialCalculator
from almlip_jax.potential.evaluator import Evaluated
from almlip_jax.potential.potential import NO_FEATURES, Potential
from almlip_jax.potential.storage import check_place

__all__ = ["NO_FEATURES", "Evaluated", "Potential", "PotentialCalculator", "check_place"]
