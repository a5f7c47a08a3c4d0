"""Figures: one function each, data in, matplotlib figure out; `save` writes them as PDF and PNG."""

from almlip_jax.figures.evolution import calibration_evolution, uncertainty_evolution
from almlip_jax.figures.learning_curve import Curve, learning_curve
from almlip_jax.figures.learning_curves import learning_curves
from almlip_jax.figures.paired_ratio import paired_ratio
from almlip_jax.figures.parity import parity
from almlip_jax.figures.profiles import profiles
from almlip_jax.figures.reliability import reliability
from almlip_jax.figures.sigma_traces import sigma_traces
from almlip_jax.figures.style import save

__all__ = [
    "Curve",
    "calibration_evolution",
    "learning_curve",
    "learning_curves",
    "paired_ratio",
    "parity",
    "profiles",
    "reliability",
    "save",
    "sigma_traces",
    "uncertainty_evolution",
]
