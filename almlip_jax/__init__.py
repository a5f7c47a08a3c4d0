"""almlip-jax: active learning of machine-learned interatomic potentials in JAX."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from almlip_jax.potential import Potential

_BROKEN_JAX = {
    "0.10.2": "it miscompiles vmapped matrix-vector products on the CPU",
    "0.11.1": "flax does not import with it",
}

try:
    __version__ = version("almlip-jax")
except PackageNotFoundError:  # a source tree that was not installed
    __version__ = "0.0.0"


def _quieten_compiler() -> None:
    """Has XLA keep quiet, unless the user wants to hear it; before jax does anything, since it asks once.

    Programs from the persistent cache make it compare the names of processor features, and complain at length of its
    own ones.  jax sets the level to 1 for itself and whatever it starts; any other value is the user's own.
    """
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1":
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"


def _check_jax() -> None:
    found = version("jax")
    if found in _BROKEN_JAX:
        raise ImportError(f"jax {found} cannot be used, since {_BROKEN_JAX[found]}; install another version.")


_check_jax()
_quieten_compiler()


def load(path: Path | str) -> Potential:
    """The potential saved in a folder.

    Raises:
        InputError: the folder is missing, incomplete or damaged.
    """
    from almlip_jax.potential import Potential  # jax is slow to import, and only potentials need it

    return Potential.load(path)


__all__ = ["__version__", "load"]
