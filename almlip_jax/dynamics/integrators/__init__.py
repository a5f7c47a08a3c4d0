"""What moves walkers: dynamics, relaxation and ascent, each in two halves around the one evaluation of a step."""

from almlip_jax.dynamics.integrators.base import Integrator
from almlip_jax.dynamics.integrators.settings import (
    AdversarialSettings,
    AndersenSettings,
    FireSettings,
    IntegratorSettings,
    LangevinSettings,
    NoseHooverSettings,
    NptSettings,
    NveSettings,
    SwapSettings,
    VelocityRescalingSettings,
    build_integrator,
    integrator_numbers,
)
from almlip_jax.dynamics.integrators.swaps import Swaps

__all__ = [
    "AdversarialSettings",
    "AndersenSettings",
    "FireSettings",
    "Integrator",
    "IntegratorSettings",
    "LangevinSettings",
    "NoseHooverSettings",
    "NptSettings",
    "NveSettings",
    "SwapSettings",
    "Swaps",
    "VelocityRescalingSettings",
    "build_integrator",
    "integrator_numbers",
]
