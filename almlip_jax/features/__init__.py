"""Features: maps from predictions to the vectors in which selectors measure difference, and changes of their kernel."""

from almlip_jax.features.aggregation import aggregate
from almlip_jax.features.maps import FEATURES, last_layer_gradient, latent, sketch
from almlip_jax.kernels import ensemble_sum, posterior, posterior_map, unit_diagonal

__all__ = [
    "FEATURES",
    "aggregate",
    "ensemble_sum",
    "last_layer_gradient",
    "latent",
    "posterior",
    "posterior_map",
    "sketch",
    "unit_diagonal",
]
