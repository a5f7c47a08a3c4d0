"""What moves walkers: dynamics, relaxation and ascent, each in two halves around the one evaluation of a step."""

from almlip_jax.dynamics.integrators.adversarial import AdversarialSettings
from almlip_jax.dynamics.integrators.barostat import NptSettings
from almlip_jax.dynamics.integrators.base import Integrator, IntegratorSettings, UserIntegrator
from almlip_jax.dynamics.integrators.minimise import FireSettings
from almlip_jax.dynamics.integrators.swaps import Swaps, SwapSettings
from almlip_jax.dynamics.integrators.thermostats import (
    AndersenSettings,
    LangevinSettings,
    NoseHooverSettings,
    NveSettings,
    VelocityRescalingSettings,
)

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
    "UserIntegrator",
    "VelocityRescalingSettings",
]
