"""Gates: what decides on each new frame whether a walker goes on, is recorded or stops."""

from almlip_jax.dynamics.gates.base import GateSettings, UserGate
from almlip_jax.dynamics.gates.fixed import AbsoluteGate, BandGate, ThresholdGate, TrustBandGate
from almlip_jax.dynamics.gates.following import AdaptiveGate, DecayGate, DecayingGate, RunningMeanGate
from almlip_jax.dynamics.gates.hysteresis import Hysteresis
from almlip_jax.dynamics.gates.protocol import Decision, Gate

__all__ = [
    "AbsoluteGate",
    "AdaptiveGate",
    "BandGate",
    "DecayGate",
    "DecayingGate",
    "Decision",
    "Gate",
    "GateSettings",
    "Hysteresis",
    "RunningMeanGate",
    "ThresholdGate",
    "TrustBandGate",
    "UserGate",
]
