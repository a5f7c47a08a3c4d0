"""Draws the learning curves of ``results.csv`` into ``docs/images/learning_curve.png``: ``python figure.py``."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from almlip_jax.figures.learning_curve import Curve, learning_curve

HERE = Path(__file__).resolve().parent
OUT = HERE.parents[1] / "docs" / "images" / "learning_curve.png"


def main() -> None:
    """Reads the table, draws, saves."""
    table: dict[str, dict[int, dict[int, float]]] = {}
    with (HERE / "results.csv").open() as file:
        for row in csv.DictReader(file):
            seeds = table.setdefault(row["selector"], {}).setdefault(int(row["labels"]), {})
            seeds[int(row["seed"])] = 1e3 * float(row["forces_rmse"])
    curves = []
    for selector, points in table.items():
        labels = sorted(points)
        seeds = sorted(points[labels[-1]])
        errors = np.array([[points[n].get(seed, np.nan) for n in labels] for seed in seeds])
        curves.append(Curve(selector, "Zundel cation, DFT, 50 held-out frames", labels, errors))
    OUT.parent.mkdir(parents=True, exist_ok=True)
    learning_curve(curves).savefig(OUT, dpi=150, bbox_inches="tight")


if __name__ == "__main__":
    main()
