"""Features: maps from structures to the vectors in which selectors measure difference, and changes of their kernel."""

from almlip_jax.features.declared import Evaluation, FeatureMap, declared, unlearned_names
from almlip_jax.features.gradients import (
    force_gradient,
    full_gradient,
    full_gradients,
    gradient_factors,
    parameter_rows,
)
from almlip_jax.features.maps import committee_energy, composition, last_layer_gradient, latent
from almlip_jax.features.power_spectrum import atom_spectra, density_of, power_spectrum, spectrum_factors
from almlip_jax.features.request import FeatureRequest, feature_factors, feature_maps
from almlip_jax.features.sketch import random_factors, sketch, sketch_matrices
from almlip_jax.features.unlearned import Described, described
from almlip_jax.kernels import ensemble_sum, posterior, posterior_map, unit_diagonal

__all__ = [
    "Described",
    "Evaluation",
    "FeatureMap",
    "FeatureRequest",
    "atom_spectra",
    "committee_energy",
    "composition",
    "declared",
    "density_of",
    "described",
    "ensemble_sum",
    "feature_factors",
    "feature_maps",
    "force_gradient",
    "full_gradient",
    "full_gradients",
    "gradient_factors",
    "last_layer_gradient",
    "latent",
    "parameter_rows",
    "posterior",
    "posterior_map",
    "power_spectrum",
    "random_factors",
    "sketch",
    "sketch_matrices",
    "spectrum_factors",
    "unit_diagonal",
    "unlearned_names",
]
