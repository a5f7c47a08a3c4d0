"""Names of the feature maps of a structure, the same in code, configs, files and figures (see `features`)."""

from __future__ import annotations

from typing import Literal, TypeAlias

FeatureName: TypeAlias = Literal[
    "latent",
    "last_layer_gradient",
    "full_gradient",
    "force_gradient",
    "committee_energy",
    "power_spectrum",
    "composition",
]
"""Maps from a structure to the vector in which selectors measure difference."""
