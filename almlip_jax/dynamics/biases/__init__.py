"""Biases: energies that take walkers where the plain potential would not, each with its exact force and virial."""

from almlip_jax.dynamics.biases.base import (
    Bias,
    BiasForce,
    BiasSettings,
    Ramp,
    RampState,
    Sum,
    UserBias,
    build_bias,
    combine,
    no_force,
)
from almlip_jax.dynamics.biases.collective import CollectiveVariable, UserVariable, VariableSettings
from almlip_jax.dynamics.biases.metadynamics import Hills, HillState, Metadynamics, MetadynamicsSettings, free_energy
from almlip_jax.dynamics.biases.restraints import (
    Restraint,
    RestraintSettings,
    Sphere,
    SphereSettings,
    Steered,
    SteeredSettings,
    SteeredState,
    Wall,
    WallSettings,
)
from almlip_jax.dynamics.biases.uncertainty import (
    BoundedUncertaintyBias,
    BoundedUncertaintySettings,
    UncertaintyBias,
    UncertaintySettings,
)
from almlip_jax.dynamics.biases.variables import Angle, Coordination, Dihedral, Distance, DistanceDifference

__all__ = [
    "Angle",
    "Bias",
    "BiasForce",
    "BiasSettings",
    "BoundedUncertaintyBias",
    "BoundedUncertaintySettings",
    "CollectiveVariable",
    "Coordination",
    "Dihedral",
    "Distance",
    "DistanceDifference",
    "HillState",
    "Hills",
    "Metadynamics",
    "MetadynamicsSettings",
    "Ramp",
    "RampState",
    "Restraint",
    "RestraintSettings",
    "Sphere",
    "SphereSettings",
    "Steered",
    "SteeredSettings",
    "SteeredState",
    "Sum",
    "UncertaintyBias",
    "UncertaintySettings",
    "UserBias",
    "UserVariable",
    "VariableSettings",
    "Wall",
    "WallSettings",
    "build_bias",
    "combine",
    "free_energy",
    "no_force",
]
