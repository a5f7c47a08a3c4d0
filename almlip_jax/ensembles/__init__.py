"""Ensembles: members of one architecture, evaluated together, and the statistics of their committee."""

from almlip_jax.ensembles.ensemble import Ensemble
from almlip_jax.ensembles.prediction import SCORES, Committee, Prediction, committee_statistics
from almlip_jax.ensembles.sharding import spread_members

__all__ = ["SCORES", "Committee", "Ensemble", "Prediction", "committee_statistics", "spread_members"]
