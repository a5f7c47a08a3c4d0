"""Dynamics: exploration inside one compiled program, with gates on the committee of every step."""

from almlip_jax.dynamics.explore import Explorer
from almlip_jax.dynamics.gates import Decision, Gate, Observables, Thresholds, build_gate
from almlip_jax.dynamics.knowledge import Knowledge, know
from almlip_jax.dynamics.relaxation import RelaxationSettings, Relaxed, relax, relaxation_summary, relaxing
from almlip_jax.dynamics.results import Exploration
from almlip_jax.dynamics.sanity import Cause
from almlip_jax.dynamics.session import Session
from almlip_jax.dynamics.settings import ExplorationSettings, GateSettings, SanitySettings, WalkerGroup
from almlip_jax.dynamics.state import Status

__all__ = [
    "Cause",
    "Decision",
    "Exploration",
    "ExplorationSettings",
    "Explorer",
    "Gate",
    "GateSettings",
    "Knowledge",
    "Observables",
    "RelaxationSettings",
    "Relaxed",
    "SanitySettings",
    "Session",
    "Status",
    "Thresholds",
    "WalkerGroup",
    "build_gate",
    "know",
    "relax",
    "relaxation_summary",
    "relaxing",
]
