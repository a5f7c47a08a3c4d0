"""Distillation: a student trained on what a teacher says about generated structures, and how both compare."""

from almlip_jax.distillation.run import Distilled, run_distillation
from almlip_jax.distillation.settings import DistilConfig, TaughtSettings

__all__ = ["DistilConfig", "Distilled", "TaughtSettings", "run_distillation"]
