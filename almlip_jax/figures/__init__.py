"""Figures: one function each, data in, matplotlib figure out; `save` writes them as PDF and PNG."""

from almlip_jax.figures.errors import calibration, parity
from almlip_jax.figures.evolution import calibration_evolution, uncertainty_evolution
from almlip_jax.figures.learning_curves import learning_curves
from almlip_jax.figures.paired_ratio import paired_ratio
from almlip_jax.figures.profiles import profiles
from almlip_jax.figures.style import save
from almlip_jax.figures.training import training

__all__ = [
    "calibration",
    "calibration_evolution",
    "learning_curves",
    "paired_ratio",
    "parity",
    "profiles",
    "save",
    "training",
    "uncertainty_evolution",
]
