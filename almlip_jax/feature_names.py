"""Names of the feature maps of a structure, the same in code, configs, files and figures; `features` declares them."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from almlip_jax.names import Names

FEATURE_NAMES = Names("feature map")
"""Maps from a structure to the vector in which selectors measure difference."""

FeatureName: TypeAlias = Annotated[str, FEATURE_NAMES]
"""A name of one."""
