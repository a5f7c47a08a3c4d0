"""Does it find more?  Labels needed to reach a fixed error at 600 K, for five ways of exploring, with paired seeds.

Two systems with GFN2-xTB labels, from one geometry each: the Eigen cation H9O4+ and acetylacetone.  The first set is
rattled geometries and a few steps at 300 K; eight walkers explore at 600 K; each round labels ten frames.  Strategies
differ in exploration alone, but for ``plain``, which records at fixed intervals whatever the uncertainty and selects at
random:

- ``plain``: dynamics at 600 K, frames at random;
- ``gate``: dynamics at 600 K, frames above a threshold of the largest force spread, a walker stops far above it;
- ``bias``: the same with an uncertainty bias of automatic strength;
- ``in_loop``: the same gate, but the buffer keeps what adds most to the log-determinant over all that is known;
- ``adversarial``: ascent on the energy variance at bounded energy, from labelled frames.

Strategies of one seed share first set and test set.  Points that are finished are not run again.

    python experiments/exploration_strategies/run.py --out runs/strategies --seeds 8
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

import numpy as np

from almlip_jax.campaign import resume_campaign, run_campaign
from almlip_jax.campaign.progress import open_progress
from almlip_jax.compilation import prepare_jax
from almlip_jax.config import load_config

HERE = Path(__file__).resolve().parent
SYSTEMS = {
    "eigen": ["system={structures: eigen.xyz, charge: 1}"],
    "acetylacetone": ["system={structures: acetylacetone.xyz, charge: 0}"],
}
TARGETS = {"eigen": 0.08, "acetylacetone": 0.20}  # eV/Angstrom, force RMSE at 600 K
STRATEGIES = {
    "plain": [
        "exploration.thresholds={kind: fixed, record: 1.0e-9, stop: 1.0e3}",
        "exploration.admission={kind: reservoir}",
        "selection.selector={kind: random}",
    ],
    "gate": [],
    "bias": ["exploration.biases=[{kind: uncertainty, relative: 0.25}]"],
    "in_loop": ["exploration.admission={kind: log_det, sigma: 0.01}"],
    "adversarial": ["exploration.integrator={kind: adversarial}", "exploration.steps=300"],
}


def finished(folder: Path, system: str, strategy: str, seed: int) -> list[dict[str, object]]:
    """Runs a campaign unless it is finished; its learning curve as rows."""
    config = load_config(HERE / "base.yaml", [f"seed={seed}", *SYSTEMS[system], *STRATEGIES[strategy]])
    state = folder / "state.json"
    if not (state.exists() and json.loads(state.read_text())["finished"]):
        with open_progress() as progress:
            (resume_campaign if state.exists() else run_campaign)(config, folder, progress=progress)
    rows = []
    for record in json.loads(state.read_text())["history"]:
        row = {"system": system, "strategy": strategy, "seed": seed, "labels": record["labels"]}
        row |= {f"forces_rmse_{t}": record["errors"][f"forces_rmse_{t}"] for t in ("300K", "600K")}
        rows.append(row | {"seconds": round(sum(record["seconds"].values()), 1)})
    return rows


def labels_to(curve: list[dict], target: float) -> float:
    """Labels at which the error at 600 K first falls below a target, between rounds in proportion to its logarithm."""
    labels = np.array([row["labels"] for row in curve], float)
    errors = np.log([row["forces_rmse_600K"] for row in curve])
    below = np.flatnonzero(errors <= np.log(target))
    if not len(below):
        return float("inf")
    n = below[0]
    if n == 0:
        return float(labels[0])
    share = (errors[n - 1] - np.log(target)) / (errors[n - 1] - errors[n])
    return float(labels[n - 1] + share * (labels[n] - labels[n - 1]))


def summary(rows: list[dict]) -> list[str]:
    """Markdown: medians of the labels needed, and ratios to ``gate`` over common seeds."""
    lines = ["| system | strategy | seeds | labels to the target, median (range) | ratio to gate, geometric mean |"]
    lines.append("| --- | --- | --- | --- | --- |")
    curves: dict[tuple, list[dict]] = {}
    for row in rows:
        curves.setdefault((row["system"], row["strategy"], row["seed"]), []).append(row)
    needed = {key: labels_to(curve, TARGETS[key[0]]) for key, curve in curves.items()}
    for system in SYSTEMS:
        for strategy in STRATEGIES:
            mine = {seed: n for (sys_, strat, seed), n in needed.items() if (sys_, strat) == (system, strategy)}
            if not mine:
                continue
            values = sorted(mine.values())
            pairs = [(n, needed.get((system, "gate", seed), np.inf)) for seed, n in mine.items()]
            ratios = [np.log(a / b) for a, b in pairs if np.isfinite(a) and np.isfinite(b)]
            ratio = f"{np.exp(np.mean(ratios)):.2f} ({len(ratios)} pairs)" if ratios else "-"
            spread = f"{np.median(values):.0f} ({values[0]:.0f} - {values[-1]:.0f})"
            lines.append(f"| {system} | {strategy} | {len(mine)} | {spread} | {ratio} |")
    return lines


def main() -> None:
    """Runs what is not finished and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/strategies"))
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--systems", nargs="*", default=list(SYSTEMS), choices=SYSTEMS)
    parser.add_argument("--strategies", nargs="*", default=list(STRATEGIES), choices=STRATEGIES)
    options = parser.parse_args()
    prepare_jax()
    rows: list[dict] = []
    for seed in range(options.seeds):
        for system in options.systems:
            for strategy in options.strategies:
                rows += finished(options.out / f"{system}-{strategy}-{seed}", system, strategy, seed)
                with (HERE / "results.csv").open("w", newline="") as file:
                    writer = csv.DictWriter(file, list(rows[0]))
                    writer.writeheader()
                    writer.writerows(rows)
                (HERE / "results.md").write_text("\n".join(summary(rows)) + "\n")


if __name__ == "__main__":
    main()
