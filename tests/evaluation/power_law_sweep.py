"""A sweep made up: errors fall with a power of the labels, and selectors save a known share of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from almlip_jax.evaluation.tidy import columns

SAVING = {"random": 1.0, "lcmd": 1.6, "top_k": 0.8}
"""Labels of random over labels of the selector, at any error."""


def sweep(
    *,
    systems: tuple[str, ...] = ("water", "Zundel cation"),
    tests: tuple[str, ...] = ("300K", "600K"),
    seeds: int = 6,
    rounds: int = 6,
    noise: float = 0.03,
    saving: dict[str, float] = SAVING,
) -> pd.DataFrame:
    """One row per point, round and test; the error of a test set depends on the seed more than on the selector."""
    rng = np.random.default_rng(7)
    rows = []
    for system in systems:
        for seed in range(seeds):
            shared = 0.3 * rng.normal(size=len(tests))
            for selector, factor in saving.items():
                for n in range(rounds):
                    labels = 20 + 15 * n
                    for test, own in zip(tests, shared, strict=True):
                        error = 0.5 * (factor * labels) ** -0.7 * np.exp(own + noise * rng.normal())
                        values = {name: 0.1 + 0.01 * rng.random() for name in columns()[8:]}
                        values |= {"forces_rmse": error, "sigma_batch": 3 / labels, "sigma_pool": 1 / labels}
                        values["monitor"] = "force_std_mean"
                        key = (system, selector, seed, 4, 15, n, labels, test)
                        rows.append(dict(zip(columns(), key, strict=False)) | values)
    return pd.DataFrame(rows, columns=list(columns()))


def written(path: Path, table: pd.DataFrame) -> Path:
    """The table as the file of a sweep."""
    table.to_csv(path, index=False)
    return path
