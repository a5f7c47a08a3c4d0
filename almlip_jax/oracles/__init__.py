"""Label sources, the label store, and labelling in local processes or on a cluster.

Importing this room imports neither jax nor any label source.
"""

from almlip_jax.oracles.base import Label, SourceSettings
from almlip_jax.oracles.executor import (
    ExecutorSettings,
    Labeller,
    LabelResult,
    LocalSettings,
    label_structures,
)
from almlip_jax.oracles.identity import structure_identity
from almlip_jax.oracles.sampling import MDRun, Trajectory, label_md, rattle, run_label_md
from almlip_jax.oracles.settings import OracleSettings
from almlip_jax.oracles.sources.external import PendingLabels
from almlip_jax.oracles.sources.xtb import TBLiteSettings
from almlip_jax.oracles.store import LabelStore, StorageError, StoredLabel

__all__ = [
    "ExecutorSettings",
    "Label",
    "LabelResult",
    "LabelStore",
    "Labeller",
    "LocalSettings",
    "MDRun",
    "OracleSettings",
    "PendingLabels",
    "SourceSettings",
    "StorageError",
    "StoredLabel",
    "TBLiteSettings",
    "Trajectory",
    "label_md",
    "label_structures",
    "rattle",
    "run_label_md",
    "structure_identity",
]
