"""Names of feature maps, of structures and of atoms, the same in code, configs and files; `features` declares them."""

from __future__ import annotations

from importlib import import_module
from typing import Annotated, TypeAlias

from almlip_jax.kinds import load_plugins
from almlip_jax.names import Known

_DECLARED: dict[str, str] = {}
_OF_ATOMS: dict[str, str] = {}


def declare(name: str, meaning: str, *, of_atoms: bool = False) -> None:
    """Makes the name of a feature map known.

    Args:
        name: in configs and files.
        meaning: in a few words.
        of_atoms: whether it has a row for each atom too.

    Raises:
        ValueError: it is taken.
    """
    if name in _DECLARED:
        raise ValueError(f"there is another feature map '{name}'.")
    _DECLARED[name] = meaning
    if of_atoms:
        _OF_ATOMS[name] = meaning


def feature_names() -> dict[str, str]:
    """What each name means, in the order of the alphabet, those of other packages too."""
    import_module("almlip_jax.features")  # where ours declare themselves
    load_plugins()
    return dict(sorted(_DECLARED.items()))


def atom_feature_names() -> dict[str, str]:
    """The same of those that have a row for each atom too."""
    feature_names()
    return dict(sorted(_OF_ATOMS.items()))


FeatureName: TypeAlias = Annotated[str, Known("feature map", feature_names)]
"""A map from a structure to the vector in which selectors measure difference."""

AtomFeatureName: TypeAlias = Annotated[str, Known("feature map of atoms", atom_feature_names)]
"""A map from an atom's surroundings to the vector in which selectors measure difference."""
