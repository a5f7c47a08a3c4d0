"""Small pools of one shape, so that every selector is compiled once."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from almlip_jax.selection import (
    Candidates,
    Selector,
    bait,
    chain,
    cost_aware,
    dpp,
    frank_wolfe,
    hybrid,
    kmeans_fps,
    kmeans_pp,
    lcmd,
    max_det,
    max_dist,
    maxvol,
    random,
    threshold,
    top_k,
)

KEY = jax.random.key(0)
COLUMNS = 5
CAPACITY = 40
K = 6
BY_FEATURES: dict[str, Selector] = {
    "max_dist": max_dist(K, "x"),
    "lcmd": lcmd(K, "x"),
    "kmeans_pp": kmeans_pp(K, "x"),
    "kmeans_fps": kmeans_fps(K, "x", clusters=3, iterations=20),
    "max_det": max_det(K, "x", sigma=0.1),
    "bait": bait(K, "x", sigma=0.1),
    "bait_backward": bait(K, "x", sigma=0.1, overselect=2),
    "frank_wolfe": frank_wolfe(K, "x", sigma=0.1),
    "dpp": dpp(3, "x", sigma=0.1),  # fewer than columns, or the context has no say
    "maxvol": maxvol(K, "x"),
    "hybrid": hybrid(K, "score", "x", alpha=0.2),
}
SELECTORS: dict[str, Selector] = BY_FEATURES | {
    "random": random(K),
    "top_k": top_k(K, "score"),
    "cost_aware": cost_aware(BY_FEATURES["max_det"]),
    "chain": chain(threshold("score", minimum=-0.5), selector=BY_FEATURES["max_det"]),
}


def candidates(
    x: np.ndarray,
    score: np.ndarray | None = None,
    *,
    ids: Any = None,
    valid: Any = None,
    cost: np.ndarray | None = None,
    more: dict[str, np.ndarray] | None = None,
    capacity: int = CAPACITY,
) -> Candidates:
    """Candidates with rubbish in the rows up to the capacity."""
    n = len(x)
    missing = max(capacity - n, 0)

    def padded(values: Any, rubbish: float, dtype: Any) -> np.ndarray:
        values = np.asarray(values, dtype)
        return np.concatenate([values, np.full((missing, *values.shape[1:]), rubbish, dtype)])

    return Candidates(
        features={"x": padded(x, 1e3, np.float64)},
        scores={"score": padded(np.zeros(n) if score is None else score, 1e9, np.float64)}
        | {name: padded(values, np.nan, np.float64) for name, values in (more or {}).items()},
        cost=padded(np.ones(n) if cost is None else cost, 1e-9, np.float64),
        valid=padded(np.ones(n, bool) if valid is None else valid, 0, bool),
        id=padded(np.arange(n) if ids is None else ids, -1, np.int32),
    )


def sample(seed: int, n: int = 30, d: int = COLUMNS) -> tuple[np.ndarray, np.ndarray]:
    """Features and scores at random."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)), rng.normal(size=n)


def chosen(selection: Any) -> list[int]:
    """Rows of the valid choices."""
    return [int(i) for i, ok in zip(selection.indices, selection.valid, strict=True) if ok]


def scaled(x: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows scaled to a mean square norm of 1 over the labelled ones, or over the pool."""
    factor = 1 / np.sqrt(np.mean(np.sum((known if len(known) else x) ** 2, axis=1)))
    return factor * x, factor * known


def distances(x: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """[n, c]."""
    return np.linalg.norm(x[:, None] - np.asarray(centres)[None], axis=-1)
