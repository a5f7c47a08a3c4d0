"""From one geometry: how many labels do a teacher and selection in the loop save?

``python experiments/one_geometry/run.py --data DIR --out runs/one_geometry`` runs campaigns that know one geometry of a
system and a label source:

- ``plain``: from scratch; dynamics at 600 K (silicon: 1000 and 3000 K), frames drawn at random, whatever the spread;
- ``taught``: pretrained on a teacher's dynamics, tuned on frames that a gate and ``log_det`` admission keep in the
  loop, and `max_det` selects;
- ``stratified``: the same, where the temperatures of the walkers have equal shares of the labels (``--strategies``);
  frames are recorded from ``--record`` on;
- ``apart``: the same as ``stratified``, with equal shares of the buffer, too.

What labels here is a stand-in for density functional theory, which would take weeks for so many campaigns: the Eigen
cation has GFN2-xTB (its teacher is GFN1-xTB), acetylacetone a potential trained on PBE labels (teacher GFN2-xTB),
silicon one trained on PBE labels (teacher: a potential that learned from Nequix, ``--silicon-teacher``).

Seeds are paired, tests shared.  What is finished is not run again, the rest goes on.  One row a campaign, round and
test goes into ``--table``.  Processes for some seeds each may run next to each other with tables of their own, once
``--prepare`` has made what they share; ``--report TABLE ...`` puts these together and prints what they say.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from ase import Atoms
from ase.build import bulk

from almlip_jax.campaign.config import ExperimentConfig
from almlip_jax.campaign.rundir import RunDirectory
from almlip_jax.campaign.state import read_state
from almlip_jax.campaign.teacher import PretrainingSettings, TuningSettings
from almlip_jax.compilation import prepare_jax
from almlip_jax.ensembles import EnsembleSettings
from almlip_jax.evaluation import error_metrics
from almlip_jax.evaluation.statistics import labels_to_target, t_interval
from almlip_jax.fitting import fit_potential
from almlip_jax.learner import Learner
from almlip_jax.models import SharedDensitySettings
from almlip_jax.oracles import Labeller, LabelStore, SourceSettings
from almlip_jax.oracles.sampling import label_md
from almlip_jax.origins import Taught
from almlip_jax.potential import Potential
from almlip_jax.structures.io import read_structures, write_structures
from almlip_jax.training import TrainingSettings

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import add, errors_of, finished, parsed, parser_of, put_together, read, seeds_of

HERE = Path(__file__).resolve().parent

STARTS = HERE.parent / "exploration_strategies"
BATCH = {"plain": 12, "taught": 5, "stratified": 5, "apart": 5}
ROUNDS = {"plain": 12, "taught": 7, "stratified": 7, "apart": 7}


@dataclass(frozen=True)
class Case:
    """A system.

    Attributes:
        start: its geometry.
        truth: source of the labels that are counted.
        teacher: source of those that are not.
        temperatures: K, of the teacher's dynamics.
        walkers: of the exploration.
        tests: name -> geometry, temperature (K) and settings of the dynamics of a test; the hottest last.
        timestep: fs.
        model: settings of the architecture.
    """

    start: Atoms
    truth: dict[str, Any]
    teacher: dict[str, Any]
    temperatures: list[float]
    walkers: list[dict[str, Any]]
    tests: dict[str, tuple[Atoms, float, dict[str, int]]]
    timestep: float
    model: dict[str, Any]


def eigen(options: argparse.Namespace) -> Case:
    """H9O4+ with GFN2-xTB; teacher GFN1-xTB."""
    start = read_structures(STARTS / "eigen.xyz")[0]
    start.info |= {"charge": 1, "spin": 1}
    truth, teacher = ({"kind": "tblite", "method": method} for method in ("GFN2-xTB", "GFN1-xTB"))
    return molecule(start, truth, teacher, options.size)


def acetylacetone(options: argparse.Namespace) -> Case:
    """C5H8O2 with a potential trained on 1,000 PBE labels; teacher GFN2-xTB."""
    folder = Path(options.data) / "acac"
    files = [folder / f"train_{kelvin}K.xyz" for kelvin in (300, 600)]
    known = trained(options, "acetylacetone", read_structures(files, require_labels=True), {"size": options.truth_size})
    start = read_structures(STARTS / "acetylacetone.xyz")[0]
    return molecule(start, known, {"kind": "tblite", "method": "GFN2-xTB"}, options.size)


def molecule(start: Atoms, truth: dict[str, Any], teacher: dict[str, Any], size: str) -> Case:
    """With tests at 300 and 600 K."""
    tests = {"300K": (start, 300.0, {"steps": 2000, "equilibration": 500})}
    tests["600K"] = (start, 600.0, {"steps": 4000, "equilibration": 1000})
    walkers = [{"temperature": 600, "count": 8}]
    return Case(start, truth, teacher, [300.0, 600.0, 900.0], walkers, tests, 0.5, {"size": size})


def silicon(options: argparse.Namespace) -> Case:
    """A crystal of 32 atoms with a potential trained on 239 PBE labels; teacher a student of Nequix."""
    if options.silicon_teacher is None:
        raise SystemExit("silicon needs --silicon-teacher, a folder of a potential.")
    model = {"size": options.size, "cutoff": 5.0}
    files = [Path(options.data) / "mlearn" / f"Si_{part}.extxyz" for part in ("train", "test")]
    known = trained(options, "silicon", read_structures(files, require_labels=True), model | {"size": "tiny"})
    start = bulk("Si", a=5.469, cubic=True).repeat((2, 2, 1))
    strained = start.copy()
    strained.set_cell(start.cell.array @ np.diag([1.05, 1.0, 0.97]), scale_atoms=True)
    length = {"steps": 1000, "equilibration": 300}
    tests = {"solid": (start, 600.0, length), "strained": (strained, 600.0, length)}
    tests["liquid"] = (start, 3000.0, {"steps": 1000, "equilibration": 1000})
    walkers = [{"temperature": 1000, "count": 4}, {"temperature": 3000, "count": 4}]
    teacher = {"kind": "potential", "path": str(options.silicon_teacher.resolve())}
    return Case(start, known, teacher, [600.0, 1500.0, 3000.0], walkers, tests, 1.0, model)


CASES: dict[str, Callable[[argparse.Namespace], Case]] = {
    "eigen": eigen,
    "acetylacetone": acetylacetone,
    "silicon": silicon,
}


def trained(options: argparse.Namespace, name: str, frames: list[Atoms], model: dict[str, Any]) -> dict[str, Any]:
    """A potential that stands in for the method of some labels, made once, as a label source."""
    place = options.out / "truth" / name
    if not (place / "potential.json").exists():
        settings = TrainingSettings(max_steps=options.truth_steps, max_epochs=10**6)
        potential, _ = fit_potential(frames, SharedDensitySettings(**model), EnsembleSettings(size=2), settings, 0)
        potential.save(place)
    return {"kind": "potential", "path": str(place.resolve())}


def tested(options: argparse.Namespace, name: str, case: Case) -> list[dict[str, str]]:
    """Files of dynamics with the truth, made once for all campaigns of a system."""
    folder = (options.out / "tests").resolve()
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for test, (start, kelvin, length) in case.tests.items():
        path = folder / f"{name}-{test}.extxyz"
        files.append({"path": str(path), "group": test})
        if path.exists():
            continue
        source = SourceSettings.parse(case.truth)
        with LabelStore(folder / f"{name}.db") as store, Labeller(source, store) as labeller:
            frames = label_md(
                start, labeller, temperature=kelvin, timestep=1.0, every=20, **length, seed=0, purpose="test"
            )
        write_structures(path, frames)
    return files


def config(options: argparse.Namespace, name: str, case: Case, strategy: str, seed: int) -> ExperimentConfig:
    """A campaign."""
    start = (options.out / f"{name}.extxyz").resolve()
    if not start.exists():
        write_structures(start, [case.start])
    exploration = {
        "kind": "md",
        "walkers": case.walkers,
        "steps": 1500,
        "timestep": case.timestep,
        "record_every": 10,
        "buffer": 16,
        "when_full": "go_on",
    }
    content: dict[str, Any] = {
        "name": f"one-geometry-{strategy}",
        "seed": seed,
        "system": {"structures": str(start)},
        "oracle": case.truth,
        "executor": {"kind": "local", "workers": 1},
        "test": {"files": tested(options, name, case)},
        "model": case.model,
        "ensemble": {"size": 4},
        "training": {"max_steps": 1500, "max_epochs": 10**6},
        "stopping": {"max_rounds": ROUNDS[strategy], "share_below": None},
    }
    if strategy == "plain":
        content |= {
            "initial": {
                "rattle": {"count": 10, "stdev": 0.06},
                "md": [{"temperature": 300, "steps": 10, "every": 1, "timestep": 1.0}],
            },
            "exploration": exploration
            | {"thresholds": {"kind": "fixed", "record": 1e-9, "stop": 1e3}, "admission": {"kind": "reservoir"}},
            "selection": {"batch": BATCH[strategy], "selector": {"kind": "random"}},
        }
    else:
        chooses: dict[str, Any] = {"kind": "max_det"}
        record, kept = 0.05, {"kind": "log_det"}
        if strategy in ("stratified", "apart"):
            chooses, record = {"kind": "stratified", "by": "bath_temperature", "selector": chooses}, options.record
        if strategy == "apart":
            kept |= {"by": "bath_temperature"}
        content |= {
            "teacher": {
                "source": case.teacher,
                "executor": {"kind": "local", "workers": options.workers},
                "temperatures": case.temperatures,
                "frames": 1200,
                "every": 10,
                "timestep": case.timestep,
                "training": {"max_steps": 6000},
                "tuning": {"max_steps": 1000},
            },
            "initial": {"from_teacher": {"count": 5, "selector": {"kind": "bait"}}},
            "exploration": exploration
            | {"thresholds": {"kind": "fixed", "record": record, "stop": 1.0}, "admission": kept},
            "selection": {"batch": BATCH[strategy], "selector": chooses},
        }
    return ExperimentConfig.model_validate(content)


def at_length(folder: Path, campaign: ExperimentConfig, about: dict[str, Any]) -> list[dict[str, Any]]:
    """Errors of what a campaign had labelled in its rounds, by trainings as long as they are by default.

    From fresh parameters on the last labels; with a teacher of those of each round, from a pretraining on its frames.
    """
    run, seed = RunDirectory(folder), about["seed"]
    rounds = [record.round for record in read_state(run).history]
    data = {n: read_structures(run.round(n).dataset, require_labels=True) for n in rounds}
    whole = campaign.training.model_copy(update={"max_steps": TrainingSettings().max_steps})
    if campaign.teacher is None:
        found = {rounds[-1]: fit_potential(data[rounds[-1]], campaign.model, campaign.ensemble, whole, seed)[0]}
    else:
        frames = read_structures(run.teacher.frames, require_labels=True)
        pretraining, tuning = PretrainingSettings().of(whole), TuningSettings().of(whole)
        taught, _ = fit_potential(frames, campaign.model, campaign.ensemble, pretraining, seed)
        learner = Learner(len(data[rounds[-1]]), start=Taught(taught), training=tuning, seed=seed, isolated={})
        found = {n: learner.fit(data[n]) for n in rounds}
    return [row for n, potential in found.items() for row in tested_with(potential, campaign, about, n, len(data[n]))]


def tested_with(
    potential: Potential, campaign: ExperimentConfig, about: dict[str, Any], index: int, labels: int
) -> list[dict[str, Any]]:
    """Errors of a potential on each test."""
    found = []
    for file in campaign.test.files:
        test = read_structures(Path(file.path), require_labels=True)
        errors = error_metrics(test, potential.evaluate(test))
        told = {name: round(1e3 * float(errors[name]), 3) for name in ("forces_rmse", "energy_rmse")}
        found.append(about | {"round": index, "labels": labels, "test": file.group} | told)
    return found


def report(table: pd.DataFrame) -> str:
    """Labels of plain dynamics over those of the others, for the final error of plain dynamics; seeds paired.

    Of trainings `at_length`, where there are some.
    """
    head = ("system", "test", "plain, final", "labels", "against", "final", "labels", "label factor", "seeds")
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    cases = product(table.groupby(["system", "test"], sort=False), ("taught", "stratified", "apart"))
    for ((system, test), own), other in cases:
        curves = {
            (strategy, seed): one.set_index("labels").forces_rmse.sort_index()
            for (strategy, seed), one in own.groupby(["strategy", "seed"])
        }
        seeds = [seed for strategy, seed in curves if strategy == "plain" and (other, seed) in curves]
        if not seeds:
            continue
        plain, taught = ([curves[strategy, seed] for seed in seeds] for strategy in ("plain", other))
        if all((strategy + LONGER, seed) in curves for strategy in ("plain", other) for seed in seeds):
            plain, taught = ([curves[strategy + LONGER, seed] for seed in seeds] for strategy in ("plain", other))
        found = [labels_to_target(new.index, new, old.iloc[-1]) for old, new in zip(plain, taught, strict=True)]
        factors = [old.index[-1] / labels.finite for old, labels in zip(plain, found, strict=True)]
        text = f"{t_interval(factors):.1f}"
        missed = sum(bool(labels.beyond) for labels in found)
        at_once = sum(bool(labels.low == 0) for labels in found)
        text += f"; not reached in {missed}" * bool(missed) + f"; with the first labels in {at_once}" * bool(at_once)
        ends = [f"{np.mean([one.iloc[-1] for one in some]):.1f} | {some[0].index[-1]}" for some in (plain, taught)]
        lines.append(f"| {system} | {test} | {ends[0]} | {other} | {ends[1]} | {text} | {len(seeds)} |")
    return "\n".join(lines)


def options_given() -> argparse.Namespace:
    """Of the command line."""
    parser = parser_of(__doc__, Path("runs/one_geometry"), seeds=8)
    parser.add_argument("--systems", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--strategies", nargs="+", default=["plain", "taught"], choices=BATCH)
    parser.add_argument("--record", type=float, default=0.05, help="spread from which shares record, eV/Angstrom")
    parser.add_argument("--size", default="tiny", help="of what the campaigns train")
    parser.add_argument("--truth-size", default="small", help="of what stands in for PBE for acetylacetone")
    parser.add_argument("--truth-steps", type=int, default=6000, help="of the potentials that stand in for PBE")
    parser.add_argument("--silicon-teacher", type=Path, help="folder of a potential that learned from Nequix")
    parser.add_argument("--workers", type=int, default=1, help="processes of a teacher")
    parser.add_argument("--prepare", action="store_true", help="make tests and what labels, and run nothing")
    return parsed(parser)


LONGER = ", at length"
KEYS = ["system", "strategy", "seed", "round", "test"]


def main() -> None:
    """Runs what is not finished, and writes the table."""
    options = options_given()
    if options.report:
        table = put_together(options.report, HERE / "results.csv", KEYS)
        print(report(table.sort_values(KEYS[:4], kind="stable")))
        return
    prepare_jax()
    options.out.mkdir(parents=True, exist_ok=True)
    cases = {name: CASES[name](options) for name in options.systems}
    if options.prepare:
        for name, case in cases.items():
            config(options, name, case, "plain", 0)
        return
    for seed in seeds_of(options):
        for name, case in cases.items():
            for strategy in options.strategies:
                folder = options.out / f"{name}-{strategy}-{seed}"
                campaign = config(options, name, case, strategy, seed)
                about = {"system": name, "strategy": strategy, "seed": seed}
                longer = about | {"strategy": strategy + LONGER}
                found = errors_of(finished(folder, campaign), about, list(case.tests))
                before = read(options.table, KEYS)
                if not (before[list(longer)] == pd.Series(longer)).all(axis=1).any():
                    found += at_length(folder, campaign, longer)
                add(options.table, found, KEYS)


if __name__ == "__main__":
    main()
