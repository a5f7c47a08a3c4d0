"""Biases: energies that take walkers where the plain potential would not, each with its exact force and virial."""

from almlip_jax.dynamics.biases.base import Bias, BiasForce, BiasInput, Ramp, RampState, Sum, combine, no_force
from almlip_jax.dynamics.biases.collective import CollectiveVariable
from almlip_jax.dynamics.biases.metadynamics import Hills, HillState, Metadynamics, free_energy
from almlip_jax.dynamics.biases.restraints import Restraint, Sphere, Steered, SteeredState, Wall
from almlip_jax.dynamics.biases.settings import (
    BiasSettings,
    MetadynamicsSettings,
    VariableSettings,
    build_bias,
    build_variable,
)
from almlip_jax.dynamics.biases.uncertainty import BoundedUncertaintyBias, UncertaintyBias

__all__ = [
    "Bias",
    "BiasForce",
    "BiasInput",
    "BiasSettings",
    "BoundedUncertaintyBias",
    "CollectiveVariable",
    "HillState",
    "Hills",
    "Metadynamics",
    "MetadynamicsSettings",
    "Ramp",
    "RampState",
    "Restraint",
    "Sphere",
    "Steered",
    "SteeredState",
    "Sum",
    "UncertaintyBias",
    "VariableSettings",
    "Wall",
    "build_bias",
    "build_variable",
    "combine",
    "free_energy",
    "no_force",
]
