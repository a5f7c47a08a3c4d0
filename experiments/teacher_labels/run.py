"""How many labels does a teacher save?  ``python experiments/teacher_labels/run.py --data DIR --work DIR``.

Acetylacetone with PBE labels (pool: dynamics at 600 K, tests at 300 K and 600 K).  An ensemble is pretrained on
GFN2-xTB labels of dynamics with that method at 300, 600 and 900 K, and tuned on 10 to 160 labels of the pool, drawn at
random or chosen by a selector in the features of the pretrained ensemble; the same labels also train one from scratch.
Same frames, seeds and first parameters in all.  One row a training and test set in ``results.csv``; what is in the
table already is not trained again, and pretrained potentials are kept in the work folder.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from ase import Atoms
from scipy import stats

from almlip_jax import Learner, load, select
from almlip_jax.campaign.teacher import PretrainingSettings, TuningSettings
from almlip_jax.compilation import prepare_jax
from almlip_jax.evaluation import error_metrics
from almlip_jax.keys import named_key, numpy_generator
from almlip_jax.oracles import Labeller, LabelStore, MDRun, TBLiteSettings, run_label_md
from almlip_jax.origins import Taught
from almlip_jax.potential import Potential
from almlip_jax.structures.io import read_structures, write_structures
from almlip_jax.training import TrainingSettings

HERE = Path(__file__).resolve().parent
TESTS = {"300K": "test_MD_300K.xyz", "600K": "test_MD_600K.xyz"}
ERRORS = ("forces_rmse", "energy_rmse", "energy_offset_free_rmse")
TEMPERATURES, EVERY = (300.0, 600.0, 900.0), 20
MODEL, MEMBERS = {"size": "small"}, {"size": 4}


@dataclass(frozen=True)
class Study:
    """What all trainings share: pool, tests and the teacher's frames; the options of the command."""

    pool: list[Atoms]
    tests: dict[str, list[Atoms]]
    frames: list[Atoms]
    options: argparse.Namespace

    @property
    def scratch(self) -> TrainingSettings:
        """Of a training from fresh parameters."""
        return TrainingSettings(max_steps=self.options.steps, max_epochs=10**6)

    def learner(self, seed: int, training: TrainingSettings, frames: list[Atoms], **more: Any) -> Learner:
        """One for some structures, whose programs are shared."""
        asked = {"model": MODEL, "ensemble": MEMBERS, "training": training, "seed": seed, "isolated": {}}
        return Learner(len(frames), typical=frames, **asked, **more)


def teacher_frames(folder: Path, start: Atoms, count: int) -> list[Atoms]:
    """Frames of dynamics with GFN2-xTB, made once."""
    file = folder / f"teacher_{count}.extxyz"
    if not file.exists():
        runs = [MDRun(t, -(-count // len(TEMPERATURES)) * EVERY, every=EVERY, equilibration=200) for t in TEMPERATURES]
        folder.mkdir(parents=True, exist_ok=True)
        with LabelStore(folder / "teacher.db") as store, Labeller(TBLiteSettings(), store) as labeller:
            found = run_label_md(start, labeller, runs, seed=0, purpose="teacher")
        write_structures(file, [frame for trajectory in found for frame in trajectory.frames])
    return read_structures(file, require_labels=True)


def trained(learner: Learner, data: list[Atoms], *names: Any) -> Potential:
    """A training whose random numbers follow from seed and names alone, whatever was trained before."""
    key = named_key(learner.seed, "teacher_labels", *map(str, names))
    params, references = learner.beginning(data, None)
    result = learner.train(data, params, key, references)
    return learner.potential(result, data, references, numpy_generator(learner.seed, "replay"), {})


def pretrained(study: Study, seed: int) -> Potential:
    """What learned from the teacher under a seed, made once."""
    options = study.options
    place = options.work / f"pretrained_{len(study.frames)}_{options.pretraining_steps}_{seed}"
    if not (place / "potential.json").exists():
        training = PretrainingSettings(max_steps=options.pretraining_steps).of(study.scratch)
        trained(study.learner(seed, training, study.frames), study.frames, "pretrain").save(place)
    return load(place)


def choices(study: Study, seed: int, potential: Potential) -> Iterator[tuple[str, int, list[Atoms]]]:
    """Labels of each size: their selector, their number, and they themselves."""
    drawn = np.random.default_rng(seed).permutation(len(study.pool))
    for size in study.options.sizes:
        for kind in study.options.selectors:
            if kind == "random":
                yield kind, size, [study.pool[n] for n in drawn[:size]]
            else:
                yield kind, size, select({"kind": kind}, potential, study.pool, [], size, seed=seed)


def labelled(study: Study, chosen: list[Atoms]) -> list[Atoms]:
    """Structures of the pool as they are in it: what selects gives copies without labels."""
    places = {frame.positions.tobytes(): frame for frame in study.pool}
    return [places[frame.positions.tobytes()] for frame in chosen]


def ways(study: Study, seed: int, potential: Potential) -> dict[str, Learner]:
    """How the labels are trained on: from scratch, and tuned with each weight of the teacher's frames."""
    largest = [study.pool[n] for n in range(max(study.options.sizes))]
    tuning = TuningSettings(max_steps=study.options.tuning_steps).of(study.scratch)
    order = numpy_generator(seed, "teacher", "order").permutation(len(study.frames))
    shuffled = tuple(study.frames[n] for n in order)
    found = {"scratch": study.learner(seed, study.scratch, largest)}
    for weight in study.options.replay:
        start = Taught(potential, shuffled, weight)
        found[f"teacher, replay {weight:g}"] = study.learner(seed, tuning, largest, start=start)
    return found


def rows_of(study: Study, potential: Potential, about: dict[str, Any]) -> list[dict[str, Any]]:
    """Errors on each test set, meV."""
    found = []
    for name, test in study.tests.items():
        errors = error_metrics(test, potential.evaluate(test))
        found.append(about | {"test": name} | {key: round(1e3 * float(errors[key]), 3) for key in ERRORS})
    return found


def factor(scratch: pd.Series, labels: int, error: float) -> tuple[float, bool]:
    """How many times as many labels a training from scratch needs for an error, and whether it needs more than known.

    Its errors, by the number of labels, are interpolated in logarithms.
    """
    x, y = np.log(scratch.index.to_numpy(float)), np.minimum.accumulate(np.log(scratch.to_numpy(float)))
    if np.log(error) < y[-1]:
        return float(np.exp(x[-1])) / labels, True
    return float(np.exp(np.interp(-np.log(error), -y, x))) / labels, False


def summary(table: pd.DataFrame) -> str:
    """Mean errors, and label factors against random labels from scratch with 95 % intervals (paired seeds)."""
    head = ("test", "labels", "chosen by", "trained", "forces RMSE, meV/A", "seeds", "label factor")
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for test, own in table.groupby("test", sort=False):
        random = own[(own.way == "scratch") & (own.selector == "random")]
        curves = {seed: one.set_index("labels").forces_rmse.sort_index() for seed, one in random.groupby("seed")}
        for (size, kind, way), cell in own.groupby(["labels", "selector", "way"], sort=True):
            pairs = [factor(curves[r.seed], size, r.forces_rmse) for r in cell.itertuples() if r.seed in curves]
            cells = [test, str(size), kind, way, f"{cell.forces_rmse.mean():.1f}", str(len(cell))]
            lines.append(f"| {' | '.join([*cells, told(pairs)])} |")
    return "\n".join(lines)


def told(pairs: list[tuple[float, bool]]) -> str:
    """Geometric mean and interval of factors; a lower bound where some are."""
    if not pairs:
        return "-"
    logs = np.log([value for value, _ in pairs])
    text = f"{'at least ' if any(beyond for _, beyond in pairs) else ''}{np.exp(logs.mean()):.2f}"
    if len(logs) < 2:
        return text
    width = stats.t.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / np.sqrt(len(logs))
    return f"{text} ({np.exp(logs.mean() - width):.2f} to {np.exp(logs.mean() + width):.2f})"


def options_given() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("ALMLIP_DATA_DIR"), help="reference data")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/teacher_labels"), help="frames and pretrained potentials"
    )
    parser.add_argument("--out", type=Path, default=HERE / "results.csv")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10, 20, 40, 80, 160])
    parser.add_argument("--selectors", nargs="+", default=["random", "bait"])
    parser.add_argument("--replay", type=float, nargs="+", default=[0.0], help="weights of the teacher's frames")
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--frames", type=int, default=2400, help="of the teacher")
    parser.add_argument("--pretraining-steps", type=int, default=12_000)
    parser.add_argument("--tuning-steps", type=int, default=2_000)
    parser.add_argument("--steps", type=int, default=4_000, help="from scratch")
    found = parser.parse_args()
    if found.data is None:
        parser.error("give the folder of the reference data with --data or ALMLIP_DATA_DIR.")
    return found


def main() -> None:
    """Trains what is not in the table yet, and prints the summary."""
    options = options_given()
    prepare_jax()
    folder = Path(options.data) / "acac"
    pool = read_structures(folder / "train_600K.xyz", require_labels=True)
    tests = {name: read_structures(folder / file, require_labels=True) for name, file in TESTS.items()}
    study = Study(pool, tests, teacher_frames(options.work, pool[0], options.frames), options)
    rows = pd.read_csv(options.out).to_dict("records") if options.out.exists() else []
    done = {(r["seed"], r["labels"], r["selector"], r["way"]) for r in rows}
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        potential = pretrained(study, seed)
        learners = ways(study, seed, potential)
        for kind, size, chosen in choices(study, seed, potential):
            for way, learner in learners.items():
                if (seed, size, kind, way) in done:
                    continue
                tuned = trained(learner, labelled(study, chosen), size, kind)
                rows += rows_of(study, tuned, {"seed": seed, "labels": size, "selector": kind, "way": way})
                print(*rows[-len(TESTS) :], sep="\n", flush=True)
                pd.DataFrame(rows).to_csv(options.out, index=False)
    print(summary(pd.DataFrame(rows)))


if __name__ == "__main__":
    main()
