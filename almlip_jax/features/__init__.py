"""Features: maps from predictions to the vectors in which selectors measure difference."""

from almlip_jax.features.maps import FEATURES, last_layer_gradient, latent, sketch

__all__ = ["FEATURES", "last_layer_gradient", "latent", "sketch"]
