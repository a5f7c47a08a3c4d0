"""Dynamics: exploration inside one compiled program, with gates on the committee of every step."""

from almlip_jax.dynamics.explore import Explorer
from almlip_jax.dynamics.further import begins_alike, dealt_further
from almlip_jax.dynamics.gates import Decision, Gate, GateSettings
from almlip_jax.dynamics.knowledge import Knowledge, know
from almlip_jax.dynamics.relaxation import RelaxationSettings, Relaxed, relax, relaxation_summary, relaxing
from almlip_jax.dynamics.results import Exploration
from almlip_jax.dynamics.sanity import Cause, SanitySettings
from almlip_jax.dynamics.seen import Observables, RunContext, Seen, Thresholds
from almlip_jax.dynamics.session import Session
from almlip_jax.dynamics.settings import ExplorationSettings, WalkerGroup
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
    "RunContext",
    "SanitySettings",
    "Seen",
    "Session",
    "Status",
    "Thresholds",
    "WalkerGroup",
    "begins_alike",
    "dealt_further",
    "know",
    "relax",
    "relaxation_summary",
    "relaxing",
]
