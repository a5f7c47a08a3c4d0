"""From the Zundel cation to the Eigen cation: how many labels until the larger ion is known as well as the smaller one?

``python experiments/eigen_from_zundel/run.py --data DIR --out runs/eigen_from_zundel`` does for each seed

- ``zundel``: a committee trained on frames of the Zundel cation H5O2+, labelled anew by the oracle, so that one level
  of theory holds for both ions; its error on frames that it did not see is the one that is wanted of the Eigen cation
  H9O4+;
- ``qbc``: it begins with that committee, keeps the labels of the Zundel cation, and selects from unlabelled frames of
  the Eigen cation those that its members disagree on most; they are labelled on the fly;
- ``random``: the same with frames drawn at random;
- ``scratch``: query by committee on the same frames with fresh parameters and no label of the Zundel cation;
- ``explore``: the committee of the Zundel cation explores the Eigen cation from one geometry with gated dynamics.

A campaign ends when its error is the one of the Zundel cation (`stopping.target_error`), or after `ROUNDS` rounds.
All campaigns of a seed share their tests: frames of the pool that nobody may select, and the oracle's own dynamics at
300 K.  What is finished is not run again, the rest goes on.  One row a campaign, round and test goes into ``--table``;
``--report TABLE ...`` prints what tables say and runs nothing.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from ase import Atoms
from scipy.sparse.csgraph import connected_components

import almlip_jax as al
from almlip_jax.campaign.config import ExperimentConfig
from almlip_jax.compilation import prepare_jax
from almlip_jax.evaluation.statistics import labels_to_target, t_interval
from almlip_jax.keys import numpy_generator
from almlip_jax.oracles import Labeller, LabelStore, SourceSettings
from almlip_jax.oracles.sampling import label_md
from almlip_jax.structures.io import read_structures, write_structures

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import add, errors_of, finished, parsed, parser_of, put_together, seeds_of

HERE = Path(__file__).resolve().parent

EIGEN = HERE.parent / "exploration_strategies" / "eigen.xyz"
ORACLES: dict[str, dict[str, Any]] = {
    "tblite": {"kind": "tblite", "method": "GFN2-xTB"},
    "pyscf": {"kind": "pyscf", "xc": "pbe", "basis": "def2-svp"},
}
ARMS = ("qbc", "random", "scratch", "explore")
ZUNDEL, HELD_OUT, BATCH, ROUNDS = 170, 50, 25, 4
STEPS, WARM_STEPS = 2000, 3000
TOGETHER = 2.5  # Angstrom; the longest gap of an ion that has not fallen apart, that of a hydrogen bond
KEYS = ["oracle", "seed", "arm", "round", "test"]


# ------------------------------------------------------------------------------------------------------------- inputs


def charged(frames: list[Atoms]) -> list[Atoms]:
    """Without what was known of them, as singly charged singlets."""
    for frame in frames:
        frame.calc, frame.info = None, {"charge": 1, "spin": 1}
    return frames


def whole(atoms: Atoms) -> bool:
    """Whether an ion has not fallen apart."""
    return bool(connected_components(atoms.get_all_distances() < TOGETHER, directed=False)[0] == 1)


def executor(options: argparse.Namespace) -> dict[str, Any]:
    """Where labels are made."""
    return {"kind": "local", "workers": options.workers}


def dynamics(options: argparse.Namespace, folder: Path) -> Path:
    """Frames of the oracle's own dynamics of the Eigen cation at 300 K, made once for all seeds."""
    path = folder / "dynamics.extxyz"
    if not path.exists():
        (start,) = charged(read_structures(EIGEN))
        source = SourceSettings.parse(ORACLES[options.oracle])
        with LabelStore(folder / "labels.db") as store, Labeller(source, store) as labeller:
            frames = label_md(
                start, labeller, temperature=300, timestep=1.0, **options.dynamics, seed=0, purpose="test"
            )
        write_structures(path, frames)
    return path


def split(options: argparse.Namespace, folder: Path, seed: int) -> tuple[Path, Path]:
    """Frames of the Eigen cation that may be selected, without labels, and held-out ones with theirs."""
    place = folder / f"{seed}"
    place.mkdir(parents=True, exist_ok=True)
    pool, held_out = place / "pool.extxyz", place / "held_out.extxyz"
    if not held_out.exists():
        frames = [frame for frame in charged(read_structures(options.eigen)) if whole(frame)]
        order = numpy_generator(seed, "held out").permutation(len(frames))
        write_structures(pool, [frames[n] for n in sorted(order[HELD_OUT:])])
        kept = [frames[n] for n in order[:HELD_OUT]]
        labelled = al.label(
            ORACLES[options.oracle],
            kept,
            store=folder / "labels.db",
            executor=executor(options),
            failed="leave_out",
        )
        write_structures(held_out, labelled)
    return pool, held_out


# ---------------------------------------------------------------------------------------------------------- campaigns


def common(options: argparse.Namespace, seed: int, name: str) -> dict[str, Any]:
    """What all campaigns share."""
    return {
        "name": f"eigen-{name}",
        "seed": seed,
        "oracle": ORACLES[options.oracle],
        "executor": executor(options),
        "model": {"kind": "shared_density", "size": "tiny"},
        "ensemble": {"size": 4},
        "training": {
            "max_steps": options.steps,
            "warm_steps": options.warm_steps,
            "warm_start": True,
            "max_epochs": 10**6,
            "validation_fraction": 0.05,
        },
    }


def zundel(options: argparse.Namespace, seed: int) -> ExperimentConfig:
    """The committee that knows the Zundel cation."""
    return ExperimentConfig.model_validate(
        common(options, seed, "zundel")
        | {
            "system": {"charge": 1},
            "initial": {"from_pool": ZUNDEL},
            "test": {"from_pool": HELD_OUT},
            "exploration": {"kind": "pool", "files": str(options.zundel)},
            "stopping": {"max_rounds": 0, "share_below": None},
        }
    )


def eigen(options: argparse.Namespace, seed: int, arm: str, folder: Path, wanted: float) -> ExperimentConfig:
    """A campaign for the Eigen cation, which ends at a wanted error."""
    pool, held_out = split(options, folder, seed)
    known = folder / f"{seed}" / "zundel" / "rounds" / "000"
    tests = [{"path": str(held_out), "group": "pool"}, {"path": str(dynamics(options, folder)), "group": "300K"}]
    stopping = {"metric": "forces_rmse", "value": wanted, "group": "300K" if arm == "explore" else "pool"}
    content = common(options, seed, arm) | {
        "system": {"charge": 1},
        "test": {"files": tests},
        "initial": {"potential": str(known / "potential"), "dataset": str(known / "dataset.extxyz")},
        "exploration": {"kind": "pool", "files": str(pool)},
        "selection": {"batch": BATCH, "selector": {"kind": "top_k", "score": "force_std_mean"}},
        "stopping": {"max_rounds": options.rounds, "share_below": None, "target_error": stopping},
    }
    if arm == "random":
        content["selection"] |= {"selector": {"kind": "random"}}
    elif arm == "scratch":
        content["initial"] = {"from_pool": BATCH}
        content["stopping"] |= {"max_rounds": options.rounds - 1}
    elif arm == "explore":
        content["system"] |= {"structures": str(EIGEN)}
        content["selection"] |= {"selector": {"kind": "max_det"}}
        content["exploration"] = {
            "kind": "md",
            "walkers": [{"temperature": 300, "count": 4}, {"temperature": 600, "count": 4}],
            "steps": 1000,
            "record_every": 10,
            "buffer": 16,
            "when_full": "go_on",
            "gate": {"kind": "absolute", "score": "force_std_max"},
            "thresholds": {"kind": "fixed", "record": 0.05, "stop": 1.0},
            "admission": {"kind": "log_det"},
        }
    return ExperimentConfig.model_validate(content)


def run_seed(options: argparse.Namespace, folder: Path, seed: int) -> None:
    """All campaigns of a seed, whose rows are added to the table."""
    about = {"oracle": options.oracle, "seed": seed}
    history = finished(folder / f"{seed}" / "zundel", zundel(options, seed))

    def add_rounds(history: list[dict[str, Any]], arm: str) -> None:
        add(options.table, errors_of(history, about | {"arm": arm}, ("pool", "300K"), seconds=True), KEYS)

    add_rounds(history, "zundel")
    wanted = history[-1]["errors"]["forces_rmse_pool"]
    for arm in options.arms:
        campaign = eigen(options, seed, arm, folder, wanted)
        add_rounds(finished(folder / f"{seed}" / arm, campaign), arm)


# -------------------------------------------------------------------------------------------------------------- table


def courses(table: pd.DataFrame, test: str) -> dict[tuple[str, int], pd.Series]:
    """Force error against labels of each campaign."""
    own = table[table.test == test]
    return {
        (str(arm), int(seed)): one.set_index("labels").forces_rmse.sort_index()
        for (arm, seed), one in own.groupby(["arm", "seed"])
    }


def report(table: pd.DataFrame) -> str:
    """Errors by labels, labels for the error of the Zundel cation, and ratios to `qbc` with as many labels."""
    lines = []
    for oracle, own in table.groupby("oracle"):
        wanted = courses(own, "pool")
        zundel_errors = {seed: errors.iloc[-1] for (arm, seed), errors in wanted.items() if arm == "zundel"}
        told = t_interval(list(zundel_errors.values()))
        lines += [f"{oracle}: Zundel {told:.3g} meV/A, {len(zundel_errors)} seeds", ""]
        head = ("test", "arm", "seeds", "labels: force RMSE, meV/A", "labels for the error of Zundel", "over `qbc`")
        lines += [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
        for test in ("pool", "300K"):
            found = courses(own, test)
            for arm in ARMS:
                mine = {seed: errors for (name, seed), errors in found.items() if name == arm}
                if mine:
                    lines.append(row(test, arm, mine, zundel_errors, found))
    return "\n".join(lines)


def row(
    test: str,
    arm: str,
    mine: dict[int, pd.Series],
    wanted: dict[int, float],
    found: dict[tuple[str, int], pd.Series],
) -> str:
    """Of one arm and test."""
    counts = sorted({int(count) for errors in mine.values() for count in errors.index})
    by_count = {n: [errors[n] for errors in mine.values() if n in errors.index] for n in counts}
    told = ", ".join(
        f"{n}: {np.exp(np.mean(np.log(some))):.3g}" + f" ({len(some)})" * (len(some) < len(mine))
        for n, some in by_count.items()
    )
    ends = [labels_to_target(errors.index, errors, wanted[seed]) for seed, errors in mine.items()]
    labels = ", ".join(f"{'>' if end.beyond else ''}{float(end.finite):.0f}" for end in ends)
    ratios = [over(errors, found["qbc", seed]) for seed, errors in mine.items() if ("qbc", seed) in found]
    paired = f"{t_interval([one for one in ratios if one]):.3g}" if arm != "qbc" and any(ratios) else "-"
    return f"| {test} | `{arm}` | {len(mine)} | {told} | {labels} | {paired} |"


def over(errors: pd.Series, others: pd.Series) -> float | None:
    """The error relative to that of another campaign, with the most labels that both had."""
    both = sorted(set(errors.index) & set(others.index))
    return float(errors[both[-1]] / others[both[-1]]) if both and both[-1] else None


def options_given() -> argparse.Namespace:
    """Of the command line."""
    parser = parser_of(__doc__, Path("runs/eigen_from_zundel"), seeds=4)
    parser.add_argument("--oracle", default="tblite", choices=ORACLES)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--steps", type=int, default=STEPS, help="of a training with fresh parameters")
    parser.add_argument("--warm-steps", type=int, default=WARM_STEPS, help="of one that goes on from another")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--workers", type=int, default=1, help="processes of the oracle")
    return parsed(parser)


def main() -> None:
    """Runs what is not finished, and writes the table."""
    options = options_given()
    if options.report:
        print(report(put_together(options.report, HERE / "results.csv", KEYS)))
        return
    prepare_jax()
    ions = (options.data / "protonated_water").resolve()
    options.zundel, options.eigen = ions / "zundel.extxyz", ions / "eigen_unlabelled.extxyz"
    options.dynamics = {"steps": 1000, "every": 25, "equilibration": 300}
    folder = (options.out / options.oracle).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for seed in seeds_of(options):
        run_seed(options, folder, seed)


if __name__ == "__main__":
    main()
