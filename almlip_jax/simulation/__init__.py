"""Simulation: runs of the compiled exploration on their own, gated or for production, that survive any interruption."""

from almlip_jax.simulation.run import run_exploration, run_md
from almlip_jax.simulation.settings import ExploreConfig, MdConfig

__all__ = ["ExploreConfig", "MdConfig", "run_exploration", "run_md"]
