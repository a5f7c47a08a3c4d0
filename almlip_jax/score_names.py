"""Names of the scores of a structure, the same in code, configs, files and figures (see `ensembles.prediction`)."""

from __future__ import annotations

from typing import Literal, TypeAlias

ScoreName: TypeAlias = Literal[
    "energy_std",
    "energy_std_per_atom",
    "force_std_mean",
    "force_std_max",
    "force_std_rel",
    "max_disagreement",
    "energy_epistemic",
    "energy_total",
    "force_epistemic_mean",
    "force_epistemic_max",
    "force_total_mean",
    "force_total_max",
]
"""Scores that a committee gives each structure."""
