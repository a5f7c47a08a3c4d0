"""almlip-jax: active learning of machine-learned interatomic potentials in JAX."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from almlip_jax.compilation import prepare_jax
    from almlip_jax.delta_learning import Corrected
    from almlip_jax.dynamics import Exploration, ExplorationSettings, know
    from almlip_jax.ensembles import EnsembleSettings
    from almlip_jax.evaluation.metrics import error_metrics
    from almlip_jax.learner import Learner
    from almlip_jax.model_check import check_model
    from almlip_jax.oracles import LabelStore, rattle
    from almlip_jax.origins import Taught
    from almlip_jax.potential import Potential
    from almlip_jax.steps import label, select, select_add, thresholds
    from almlip_jax.structures.io import read_structures, write_structures
    from almlip_jax.training import TrainingSettings

_BROKEN_JAX = {
    "0.10.2": "it miscompiles vmapped matrix-vector products on the CPU",
    "0.11.1": "flax does not import with it",
}

try:
    __version__ = version("almlip-jax")
except PackageNotFoundError:  # a source tree that was not installed
    __version__ = "0.0.0"


def _quieten_compiler() -> None:
    """Silences XLA's log unless the user has set its level; comes before jax does anything, since jax looks once.

    Programs from the persistent cache make it compare the names of processor features, and complain at length about its
    own.  jax sets the level to 1 for itself and whatever it starts; any other value is the user's own.
    """
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1":
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"


def _check_jax() -> None:
    found = version("jax")
    if found in _BROKEN_JAX:
        raise ImportError(f"jax {found} cannot be used, since {_BROKEN_JAX[found]}; install another version.")


_check_jax()
_quieten_compiler()


def load(path: Path | str, types: Sequence[str] | None = None) -> Potential:
    """The potential saved in a folder, or of a file of MLIP-2 (``.mtp``).

    Args:
        path: of the folder or file.
        types: element of each type of a file, from type 0 on.

    Raises:
        InputError: the folder is missing, incomplete or damaged; or the file is, or its types are not known.
    """
    from almlip_jax.potential import Potential  # jax is slow to import, and only potentials need it

    return Potential.load(path, types)


_PUBLIC = {
    "Corrected": "delta_learning",
    "EnsembleSettings": "ensembles",
    "Exploration": "dynamics",
    "ExplorationSettings": "dynamics",
    "LabelStore": "oracles",
    "Learner": "learner",
    "Potential": "potential",
    "Taught": "origins",
    "TrainingSettings": "training",
    "check_model": "model_check",
    "error_metrics": "evaluation.metrics",
    "know": "dynamics",
    "label": "steps",
    "prepare_jax": "compilation",
    "rattle": "oracles",
    "read_structures": "structures.io",
    "select": "steps",
    "select_add": "steps",
    "thresholds": "steps",
    "write_structures": "structures.io",
}
"""Where the names of the Python interface are: imported when they are first used."""


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'almlip_jax' has no attribute '{name}'")
    found = getattr(import_module(f"almlip_jax.{_PUBLIC[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})


__all__ = [
    "Corrected",
    "EnsembleSettings",
    "Exploration",
    "ExplorationSettings",
    "LabelStore",
    "Learner",
    "Potential",
    "Taught",
    "TrainingSettings",
    "__version__",
    "check_model",
    "error_metrics",
    "know",
    "label",
    "load",
    "prepare_jax",
    "rattle",
    "read_structures",
    "select",
    "select_add",
    "thresholds",
    "write_structures",
]
