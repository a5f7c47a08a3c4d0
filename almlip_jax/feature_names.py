"""Names of the feature maps of a structure, the same in code, configs, files and figures; `features` declares them."""

from __future__ import annotations

from importlib import import_module
from typing import Annotated, TypeAlias

from almlip_jax.kinds import load_plugins
from almlip_jax.names import Known

_DECLARED: dict[str, str] = {}


def declare(name: str, meaning: str) -> None:
    """Makes the name of a feature map known.

    Raises:
        ValueError: it is taken.
    """
    if name in _DECLARED:
        raise ValueError(f"there is another feature map '{name}'.")
    _DECLARED[name] = meaning


def feature_names() -> dict[str, str]:
    """What each name means, in the order of the alphabet, those of other packages too."""
    import_module("almlip_jax.features")  # where ours declare themselves
    load_plugins()
    return dict(sorted(_DECLARED.items()))


FeatureName: TypeAlias = Annotated[str, Known("feature map", feature_names)]
"""A map from a structure to the vector in which selectors measure difference."""
