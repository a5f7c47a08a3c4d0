"""One cell of the study: strategies and seeds on one set, from the first labels to the last.

Splits, first labels, first parameters and the order of training depend on the seed alone, so strategies are paired.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import numpy as np
from crystals import descriptors
from networks import Runs, predictions
from scipy.stats import spearmanr
from sources import LARGEST_SET, Labelled

from almlip_jax.errors import InputError
from almlip_jax.keys import named_key, numpy_generator
from almlip_jax.selection import WEIGHT, Candidates, Selector, adapt, adaptive, kmeans_fps, random, select, top_k

INITIAL, BUDGET, LARGEST_BATCH = 30, 120, 20
POOL, TEST = LARGEST_SET * 4 // 5, LARGEST_SET // 5
SIDE_BY_SIDE = 8  # runs in a call of the program; its shape is that of every call
ALPHA = 0.6
SCORE = "spread"
KEY = ("set", "test", "descriptors", "members", "batch")
"""Columns that tell cells apart."""


@dataclass(frozen=True)
class Cell:
    """What is compared among itself: strategies on one set, all else equal."""

    set: str
    strategies: tuple[str, ...]
    members: int = 5
    batch: int = 15
    descriptors: str = "paper"
    test: str = ""
    """Set whose test part is predicted; the cell's own where empty."""

    @property
    def key(self) -> tuple[str, str, str, int, int]:
        """What its rows have in common."""
        return self.set, self.test or self.set, self.descriptors, self.members, self.batch


@dataclass(frozen=True)
class Split:
    """A set in the order of a seed: pool [P, d], [P] and test [T, d], [T], standardised with the pool."""

    pool: np.ndarray
    pool_labels: np.ndarray
    test: np.ndarray
    test_labels: np.ndarray


def split(source: Labelled, other: Labelled, kind: str, seed: int) -> Split:
    """80 % of a set as pool, 20 % of another (as a rule the same) as test.

    Raises:
        InputError: there are too few crystals for the labels.
    """
    first, second = (numpy_generator(seed, "split").permutation(len(one.labels)) for one in (source, other))
    pool, test = first[: len(first) * 4 // 5], second[len(second) * 4 // 5 :]
    if len(pool) < BUDGET + LARGEST_BATCH:
        needed = -(-5 * (BUDGET + LARGEST_BATCH) // 4)
        raise InputError(f"{source.name} has {len(first)} crystals; {needed} are needed.")
    rows, others = described(source, kind), described(other, kind)
    mean, scale = rows[pool].mean(axis=0), rows[pool].std(axis=0)
    scale = np.where(scale > 1e-9 * (1 + np.abs(mean)), scale, 1.0)  # what does not vary in the pool is no unit
    x, asked = ((part - mean) / scale for part in (rows[pool], others[test]))
    return Split(x.astype(np.float32), source.labels[pool], asked.astype(np.float32), other.labels[test])


_DESCRIBED: dict[tuple[str, str], np.ndarray] = {}


def described(source: Labelled, kind: str) -> np.ndarray:
    """Descriptors of a set, computed once."""
    if (source.name, kind) not in _DESCRIBED:
        _DESCRIBED[source.name, kind] = descriptors(source.frames, kind)
    return _DESCRIBED[source.name, kind]


class Run:
    """One strategy under one seed: what it has labelled so far, and what it asks for next."""

    def __init__(self, cell: Cell, strategy: str, seed: int, data: Split) -> None:
        """With the first labels, the same for all strategies."""
        self.cell, self.strategy, self.seed, self.data = cell, strategy, seed, data
        self.chosen = list(range(INITIAL))  # the pool is in a random order
        self.weight, self.spread = ALPHA, np.nan

    def keys(self) -> jax.Array:
        """Of its members at this number of labels, [M]."""
        return jax.random.split(named_key(self.seed, "train", len(self.chosen)), self.cell.members)

    def arrays(self) -> Runs:
        """What its committee learns from, in arrays of the size of all."""
        x, y = np.zeros((BUDGET, self.data.pool.shape[1]), np.float32), np.zeros(BUDGET, np.float32)
        centre = self.data.pool_labels[self.chosen].mean()  # total energies are large for single precision
        x[: len(self.chosen)], y[: len(self.chosen)] = (
            self.data.pool[self.chosen],
            self.data.pool_labels[self.chosen] - centre,
        )
        asked = np.zeros((POOL + TEST, x.shape[1]), np.float32)
        asked[: len(self.data.pool)] = self.data.pool
        asked[POOL : POOL + len(self.data.test)] = self.data.test
        return Runs(x, y, np.int32(len(self.chosen)), self.keys(), asked)

    def scored(self, members: np.ndarray) -> dict[str, Any]:
        """Errors of the mean of the members [M, A] on the test part, and how spread and error go together."""
        said = members[:, POOL : POOL + len(self.data.test)].astype(np.float64)
        truth = self.data.test_labels - self.data.pool_labels[self.chosen].mean()
        error = said.mean(axis=0) - truth
        return {
            "labels": len(self.chosen),
            "mae": np.mean(np.abs(error)),
            "r2": 1 - np.sum(error**2) / np.sum((truth - truth.mean()) ** 2),
            "offset_free_mae": np.mean(np.abs(error - np.median(error))),
            "spearman": spearmanr(said.std(axis=0), np.abs(error)).statistic,
        }

    def ask(self, members: np.ndarray) -> None:
        """Labels the next batch, by the spread of the members [M, A]."""
        spread = np.zeros(POOL, np.float32)
        spread[: len(self.data.pool)] = members[:, : len(self.data.pool)].std(axis=0)
        free = np.zeros(POOL, bool)
        free[: len(self.data.pool)] = True
        free[self.chosen] = False
        mean = float(spread[free].mean())
        if self.strategy == "adaptive" and np.isfinite(self.spread):
            self.weight = float(adapt(self.weight, 1 - mean / self.spread))
        self.spread = mean
        key = named_key(self.seed, "select", self.strategy, len(self.chosen))
        found = select(self.selector(), key, self.pool(spread, free), self.labelled())
        wanted = min(self.cell.batch, BUDGET - len(self.chosen))
        self.chosen += [int(n) for n in found.indices[:wanted]]

    def selector(self) -> Selector:
        """For the largest batch: all are greedy, so its first choices are those of smaller ones, of one program."""
        kind = self.strategy
        if kind == "switch":  # to uncertainty, once half of the labels are there
            kind = "kmeans_fps" if len(self.chosen) < (INITIAL + BUDGET) // 2 else "top_k"
        return _selector(kind)

    def alpha(self) -> float:
        """Weight of uncertainty of the hybrid strategies."""
        return float(self.strategy.split()[1]) if " " in self.strategy else self.weight

    def pool(self, spread: np.ndarray, free: np.ndarray) -> Candidates:
        """What may be chosen, in arrays of the size of all."""
        rows = np.zeros((POOL, self.data.pool.shape[1]), np.float32)
        rows[: len(self.data.pool)] = self.data.pool
        found = Candidates.of({"descriptors": rows}, {SCORE: spread})
        return found.replace(valid=free, scalars={WEIGHT: np.float32(self.alpha())})  # type: ignore[attr-defined]

    def labelled(self) -> Candidates:
        """What is labelled, likewise."""
        rows = np.zeros((BUDGET, self.data.pool.shape[1]), np.float32)
        rows[: len(self.chosen)] = self.data.pool[self.chosen]
        found = Candidates.of({"descriptors": rows}, {SCORE: np.zeros(BUDGET, np.float32)})
        return found.replace(valid=np.arange(BUDGET) < len(self.chosen))  # type: ignore[attr-defined]


@lru_cache
def _selector(kind: str) -> Selector:
    if kind == "random":
        return random(LARGEST_BATCH)
    if kind == "top_k":
        return top_k(LARGEST_BATCH, SCORE)
    if kind == "kmeans_fps":
        return kmeans_fps(LARGEST_BATCH, "descriptors", clusters=15)
    if kind.split()[0] in ("hybrid", "adaptive"):
        return adaptive(LARGEST_BATCH, SCORE, "descriptors")  # the hybrid, with a weight that is data
    raise InputError(f"there is no strategy '{kind}'.")


def answers(runs: list[Run], steps: int) -> list[np.ndarray]:
    """Trains the committees of runs: what the members of each say, [M, A].  Equal ones (all begin alike) train once."""
    names = [(run.seed, *run.chosen) for run in runs]
    distinct = dict(zip(names, runs, strict=True))
    said: list[np.ndarray] = []
    for start in range(0, len(distinct), SIDE_BY_SIDE):
        arrays = [run.arrays() for run in list(distinct.values())[start : start + SIDE_BY_SIDE]]
        filled = arrays + arrays[-1:] * (SIDE_BY_SIDE - len(arrays))
        stacked = jax.tree.map(lambda *leaves: jax.numpy.stack(leaves), *filled)
        said += list(np.asarray(predictions(stacked, steps))[: len(arrays)])
    found = dict(zip(distinct, said, strict=True))
    return [found[name] for name in names]


def run_cell(
    cell: Cell, source: Labelled, other: Labelled, wanted: list[tuple[str, int]], steps: int
) -> Iterator[dict[str, Any]]:
    """Rows of the table: strategies and seeds that are wanted, at every number of labels."""
    runs = [Run(cell, strategy, seed, split(source, other, cell.descriptors, seed)) for strategy, seed in wanted]
    names = dict(zip(KEY, cell.key, strict=True)) | {"steps": steps}
    more = True
    while more:
        more = any(len(run.chosen) < BUDGET for run in runs)
        for run, said in zip(runs, answers(runs, steps), strict=True):
            yield names | {"strategy": run.strategy, "seed": run.seed} | run.scored(said)
            if more:
                run.ask(said)
