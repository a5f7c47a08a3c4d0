"""Label sources, the label store, and labelling in local processes or on a cluster.

Importing this room imports neither jax nor any label source.
"""

from almlip_jax.cluster import ExecutorSettings
from almlip_jax.oracles.affordable import evenly, label_within
from almlip_jax.oracles.base import Delivery, Label, PendingLabels, Results, SourceSettings
from almlip_jax.oracles.executor import (
    Labeller,
    LabelResult,
    LocalSettings,
    label_structures,
)
from almlip_jax.oracles.identity import structure_identity
from almlip_jax.oracles.md import is_spent
from almlip_jax.oracles.sampling import MDRun, Trajectory, label_md, rattle, run_label_md
from almlip_jax.oracles.sources.calculator import CalculatorSettings
from almlip_jax.oracles.sources.dft import PySCFSettings
from almlip_jax.oracles.sources.external import ExternalSettings
from almlip_jax.oracles.sources.labelled_file import FileSettings
from almlip_jax.oracles.sources.mean import MeanSettings
from almlip_jax.oracles.sources.nequix import NequixSettings
from almlip_jax.oracles.sources.own import OwnSource, is_own_source
from almlip_jax.oracles.sources.potential import PotentialSourceSettings
from almlip_jax.oracles.sources.user import UserSourceSettings
from almlip_jax.oracles.sources.xtb import TBLiteSettings
from almlip_jax.oracles.store import LabelStore, StorageError, StoredLabel

__all__ = [
    "CalculatorSettings",
    "Delivery",
    "ExecutorSettings",
    "ExternalSettings",
    "FileSettings",
    "Label",
    "LabelResult",
    "LabelStore",
    "Labeller",
    "LocalSettings",
    "MDRun",
    "MeanSettings",
    "NequixSettings",
    "OwnSource",
    "PendingLabels",
    "PotentialSourceSettings",
    "PySCFSettings",
    "Results",
    "SourceSettings",
    "StorageError",
    "StoredLabel",
    "TBLiteSettings",
    "Trajectory",
    "UserSourceSettings",
    "evenly",
    "is_own_source",
    "is_spent",
    "label_md",
    "label_structures",
    "label_within",
    "rattle",
    "run_label_md",
    "structure_identity",
]
