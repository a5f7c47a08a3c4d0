"""Figures: one function each, data in, matplotlib figure out."""

from almlip_jax.figures.learning_curve import Curve, learning_curve
from almlip_jax.figures.parity import parity
from almlip_jax.figures.reliability import reliability
from almlip_jax.figures.sigma_traces import sigma_traces

__all__ = ["Curve", "learning_curve", "parity", "reliability", "sigma_traces"]
