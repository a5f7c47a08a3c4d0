"""Does it find more?  Force errors at 600 K against labels, for seven ways of exploring, with paired seeds.

Two systems with GFN2-xTB labels, from one geometry each: the Eigen cation H9O4+ and acetylacetone.  The first set is
rattled geometries and a few steps at 300 K; eight walkers explore at 600 K; each round labels ten frames.  Strategies
differ in exploration alone, but for ``plain``, which records at fixed intervals whatever the uncertainty and selects at
random:

- ``plain``: dynamics at 600 K, frames at random;
- ``gate``: dynamics at 600 K, frames above a threshold of the largest force spread, a walker stops far above it;
- ``bias``: the same with an uncertainty bias of automatic strength;
- ``in_loop``: the same gate, but the buffer keeps what adds most to the log-determinant over all that is known;
- ``adversarial``: ascent on the energy variance at bounded energy, from labelled frames;
- ``stop``: as ``in_loop`` with its defaults, but thresholds follow the training set, and a walker stops at twice the
  largest spread in it;
- ``correct``: the same, and a batch begins with the most uncertain of 20 displaced copies of where walkers stopped.

Strategies of one seed share their first set, all share the tests.  What is finished is not run again.  The table is
``results.csv`` of the output folder.

    python experiments/exploration_strategies/run.py --out runs/strategies --seeds 8
"""

from __future__ import annotations

import argparse
from pathlib import Path

from almlip_jax.campaign import finish_campaign
from almlip_jax.campaign.config import load_config
from almlip_jax.compilation import prepare_jax
from almlip_jax.evaluation.tidy import columns, error_columns
from almlip_jax.files import Cell, write_csv
from almlip_jax.oracles.executor import Labeller
from almlip_jax.oracles.sampling import label_md
from almlip_jax.oracles.sources.xtb import TBLiteSettings
from almlip_jax.oracles.store import LabelStore
from almlip_jax.progress import open_progress
from almlip_jax.structures.io import read_structures, write_structures

HERE = Path(__file__).resolve().parent
CHARGES = {"eigen": 1, "acetylacetone": 0}
TESTS = {300: {"steps": 2000, "equilibration": 500}, 600: {"steps": 4000, "equilibration": 1000}}  # K: of the label MD
FOLLOWING = [
    "exploration.thresholds={kind: relative, record_factor: 1.0, stop_factor: 2.0}",
    "exploration.admission={kind: log_det}",
]
STRATEGIES = {
    "plain": [
        "exploration.thresholds={kind: fixed, record: 1.0e-9, stop: 1.0e3}",
        "exploration.admission={kind: reservoir}",
        "selection.selector={kind: random}",
    ],
    "gate": [],
    "bias": ["exploration.biases=[{kind: uncertainty, relative: 0.25}]"],
    "in_loop": ["exploration.admission={kind: log_det, sigma: 0.01, least_gain: 0.7}"],
    "stop": FOLLOWING,
    "correct": [*FOLLOWING, "exploration.correct={around: 20, stdev: 0.05, count: 3}"],
    "adversarial": ["exploration.integrator={kind: adversarial}", "exploration.steps=300"],
}


def held_out(folder: Path, system: str) -> list[Path]:
    """Frames of dynamics with the label source at each test temperature, every 40 fs, made once for all campaigns."""
    paths = [folder / f"{system}-{kelvin}K.extxyz" for kelvin in TESTS]
    folder.mkdir(parents=True, exist_ok=True)
    for path, (kelvin, run) in zip(paths, TESTS.items(), strict=True):
        if path.exists():
            continue
        start = read_structures(HERE / f"{system}.xyz")[0]
        start.info |= {"charge": CHARGES[system], "spin": 1}
        with LabelStore(folder / "labels.db") as store, Labeller(TBLiteSettings(kind="tblite"), store) as labeller:
            frames = label_md(
                start, labeller, temperature=kelvin, timestep=1.0, every=40, **run, seed=0, purpose="test"
            )
        write_structures(path, frames)
    return paths


def finished(folder: Path, tests: list[Path], system: str, strategy: str, seed: int) -> list[dict[str, Cell]]:
    """Runs a campaign unless it is finished; its learning curve as rows of a sweep's table."""
    files = ", ".join(
        f"{{path: {path.resolve()}, group: {kelvin}K}}" for path, kelvin in zip(tests, TESTS, strict=True)
    )
    where = f"system={{structures: {HERE}/{system}.xyz, charge: {CHARGES[system]}}}"
    config = load_config(
        HERE / "base.yaml", [f"seed={seed}", where, f"test={{files: [{files}]}}", *STRATEGIES[strategy]]
    )
    with open_progress() as progress:
        history = [record.model_dump() for record in finish_campaign(config, folder, progress=progress).history]
    rows = []
    for number, record in enumerate(history):
        for kelvin in TESTS:
            key = (system, strategy, seed, config.ensemble.size, config.selection.batch, number, record["labels"])
            row = dict.fromkeys(columns()) | dict(zip(columns(), (*key, f"{kelvin}K"), strict=False))
            errors = {name: record["errors"].get(f"{name}_{kelvin}K") for name in error_columns()}
            seconds = {"seconds_train": record["seconds"]["train"], "seconds": sum(record["seconds"].values())}
            rows.append(row | errors | {name: round(value, 2) for name, value in seconds.items()})
    return rows


def main() -> None:
    """Runs what is not finished and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/strategies"))
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--systems", nargs="*", default=list(CHARGES), choices=CHARGES)
    parser.add_argument("--strategies", nargs="*", default=list(STRATEGIES), choices=STRATEGIES)
    options = parser.parse_args()
    prepare_jax()
    rows: list[dict[str, Cell]] = []
    for seed in range(options.seeds):
        for system in options.systems:
            tests = held_out(options.out / "tests", system)
            for strategy in options.strategies:
                rows += finished(options.out / f"{system}-{strategy}-{seed}", tests, system, strategy, seed)
                write_csv(options.out / "results.csv", rows)


if __name__ == "__main__":
    main()
