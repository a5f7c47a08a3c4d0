"""How many labels does a teacher save?  ``python experiments/teacher_labels/run.py --system acac --data DIR``.

An ensemble is pretrained on the cheap labels of a teacher and tuned on few labels of a pool, drawn at random or chosen
by a selector in the features of the pretrained ensemble; the same labels also train one from scratch.  Systems:
acetylacetone (PBE; teacher GFN2-xTB or Nequix), the Zundel cation (FHI-aims; the same) and silicon (PBE; Nequix).
Same frames, seeds and first parameters in all; the seeds of a command train side by side in one program.

One row a training and test set goes into ``--out``; what is in that table already is not trained again, and teacher's
frames and pretrained potentials are kept.  Commands may run next to each other with tables of their own:
``--report TABLE ...`` then puts these together into ``results.csv`` and prints what they say.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from ase import Atoms
from factors import errors, merged, wanted
from systems import SYSTEMS, System

from almlip_jax import Corrected, Learner, Potential, load, select
from almlip_jax.campaign.teacher import PretrainingSettings, TuningSettings
from almlip_jax.compilation import prepare_jax
from almlip_jax.evaluation import error_metrics
from almlip_jax.keys import named_key, numpy_generator
from almlip_jax.origins import Taught
from almlip_jax.training import Job, SideBySideTrainer, TrainingSettings

HERE = Path(__file__).resolve().parent
ERRORS = ("forces_rmse", "forces_mae", "energy_rmse", "energy_offset_free_rmse", "stress_rmse")
MEMBERS = {"size": 4}
SCRATCH = "scratch"
TUNING_STEPS = 2_000
FRAMES, PRETRAINING_STEPS = 2_400, 12_000
SIZE = "small"
NESTED = {"random", "max_dist"}  # of which a smaller choice is the beginning of a larger one


@dataclass
class Study:
    """What all trainings share, and the trainers of each way, which compile once.

    Attributes:
        system: pool, tests and the teacher's frames.
        options: of the command.
    """

    system: System
    options: argparse.Namespace
    trainers: dict[str, SideBySideTrainer] = field(default_factory=dict)

    @property
    def seeds(self) -> range:
        """Those of this command."""
        return range(self.options.first_seed, self.options.first_seed + self.options.seeds)

    @property
    def name(self) -> str:
        """Of the system, in the table; models of another size than `SIZE` are another study."""
        return self.options.system + ("" if self.options.size == SIZE else f", {self.options.size}")

    @property
    def scratch(self) -> TrainingSettings:
        """Of a training from fresh parameters."""
        return TrainingSettings(max_steps=self.options.steps, max_epochs=10**6)

    @property
    def teacher(self) -> str:
        """Which frames taught, where there is a choice, and how long tunings are, where it is not `TUNING_STEPS`."""
        steps = self.options.tuning_steps
        return self.taught if steps == TUNING_STEPS else f"{self.taught}, {steps} steps"

    @property
    def taught(self) -> str:
        """Which frames taught, and how many of them for how long, where that is not the default."""
        options = self.options
        told = {"silicon": options.cells}.get(options.system, options.teacher)
        parts = [] if told == "xtb" else [told]
        if options.system != "silicon" and options.frames != FRAMES:
            parts.append(f"{options.frames} frames")
        if options.pretraining_steps != PRETRAINING_STEPS:
            parts.append(f"for {options.pretraining_steps} steps")
        return f"teacher ({' '.join(parts)})" if parts else "teacher"

    def learner(self, seed: int, training: TrainingSettings, typical: list[Atoms], **more: Any) -> Learner:
        """One for datasets of up to so many structures; model and members are those of what it starts from."""
        own = {"model": self.system.model, "ensemble": MEMBERS} if "start" not in more else {}
        asked = {**own, "training": training, "isolated": {}}
        return Learner(len(typical), typical=typical, seed=seed, **asked, **more)

    @property
    def named_ways(self) -> dict[str, list[str]]:
        """Names of what is compared, in the table, by what the command calls them."""
        options = self.options
        replayed = [f"{self.teacher}, replay {weight:g}" if weight else self.teacher for weight in options.replay]
        corrected = [f"{self.teacher}, correction {size}" for size in options.correction]
        return {SCRATCH: [SCRATCH], "teacher": replayed, "correction": corrected}


@dataclass(frozen=True)
class Task:
    """One training: its seed, how labels were chosen, and which they are."""

    seed: int
    selector: str
    data: list[Atoms]
    learner: Learner


def trained(study: Study, way: str, tasks: Sequence[Task]) -> list[Potential]:
    """Trainings of equal size, whose random numbers follow from seed, size and selector alone, side by side."""
    begun = [one.learner.beginning(one.data, None) for one in tasks]
    keys = [named_key(one.seed, "teacher_labels", str(len(one.data)), one.selector) for one in tasks]
    if any(one.learner.start is not None and one.learner.start.typical for one in tasks):
        results = [  # the teacher's frames are trained on too, which is done one after another
            one.learner.train(one.data, params, key, references)
            for one, (params, references), key in zip(tasks, begun, keys, strict=True)
        ]
    else:
        trainer = study.trainers.setdefault(way, SideBySideTrainer(tasks[0].learner.trainer))
        jobs = [
            Job(one.data, key, references, params, named_key(one.seed, "bootstrap"))
            for one, (params, references), key in zip(tasks, begun, keys, strict=True)
        ]
        results = trainer.train(jobs, say=print)
    return [
        Potential(
            settings=one.learner.model,
            members=result.members(one.learner.settings),
            species=one.learner.species,
            params=result.params,
            reference_energies=references,
            isolated=frozenset(one.learner.isolated),
            metadata={},
        )
        for one, result, (_, references) in zip(tasks, results, begun, strict=True)
    ]


def pretrained(study: Study) -> dict[int, Potential]:
    """What learned from the teacher under each seed, made once."""
    options, frames = study.options, study.system.frames
    name = f"pretrained_{study.name}_{study.taught}_{len(frames)}_{options.pretraining_steps}".replace(" ", "_")
    places = {seed: options.work / f"{name}_{seed}" for seed in study.seeds}
    missing = [seed for seed, place in places.items() if not (place / "potential.json").exists()]
    if missing:
        training = PretrainingSettings(max_steps=options.pretraining_steps).of(study.scratch)
        tasks = [Task(seed, "pretrain", frames, study.learner(seed, training, frames)) for seed in missing]
        for seed, potential in zip(missing, trained(study, "pretrain", tasks), strict=True):
            potential.save(places[seed])
        del study.trainers["pretrain"]
    return {seed: load(place) for seed, place in places.items()}


def choices(study: Study, seed: int, potential: Potential, kind: str) -> dict[int, list[Atoms]]:
    """Labels of each size that are chosen in one way."""
    pool, sizes = study.system.pool, study.options.sizes
    if kind == "random":
        drawn = np.random.default_rng(seed).permutation(len(pool))
        return {size: [pool[n] for n in drawn[:size]] for size in sizes}
    places = {frame.positions.tobytes(): frame for frame in pool}

    def best(size: int) -> list[Atoms]:
        """Structures of the pool as they are in it: what selects gives copies without labels."""
        chosen = select({"kind": kind}, potential, pool, [], size, seed=seed)
        return [places[frame.positions.tobytes()] for frame in chosen]

    partial = [size for size in sizes if size < len(pool)]  # a whole pool is not chosen
    if kind in NESTED:
        ranked = best(max(partial))
        return {size: ranked[:size] for size in partial}
    return {size: best(size) for size in partial}


def ways(study: Study, potentials: dict[int, Potential]) -> dict[str, dict[int, Learner]]:
    """How labels are trained on, by seed.

    From scratch; tuned, with each weight of the teacher's frames, which have a last layer of their own; and as a
    correction of what the teacher taught, of each size.
    """
    options, pool, frames, names = study.options, study.system.pool, study.system.frames, study.named_ways
    largest = pool[: max(options.sizes)]
    tuning = TuningSettings(max_steps=options.tuning_steps).of(study.scratch)
    found: dict[str, dict[int, Learner]] = {}
    if SCRATCH in options.ways:
        found[SCRATCH] = {seed: study.learner(seed, study.scratch, largest) for seed in study.seeds}
    for name, weight in zip(names["teacher"], options.replay, strict=True) if "teacher" in options.ways else ():
        found[name] = {}
        for seed, potential in potentials.items():
            order = numpy_generator(seed, "teacher", "order").permutation(len(frames))
            start = Taught(potential, tuple(frames[n] for n in order), weight, options.replay_share)
            found[name][seed] = study.learner(seed, tuning, largest, start=start)
    for name, size in zip(names["correction"], options.correction, strict=True) if "correction" in options.ways else ():
        model = study.system.model | {"size": size}
        starts = {seed: Corrected.of(potential, frames, model, seed) for seed, potential in potentials.items()}
        found[name] = {seed: study.learner(seed, tuning, largest, start=start) for seed, start in starts.items()}
    return found


def rows_of(study: Study, potential: Potential, about: dict[str, Any]) -> list[dict[str, Any]]:
    """Errors on each test set and group of it: meV/Angstrom, meV/atom and, of stresses, meV/Angstrom^3."""
    found = []
    for name, test in study.system.tests.items():
        whole = error_metrics(test, potential.evaluate(test))
        groups = {name: whole} | {f"{name}, {group}": own for group, own in whole["by_group"].items()}
        for group, own in groups.items():
            found.append(about | {"test": group} | {key: round(1e3 * float(own[key]), 3) for key in ERRORS})
    return found


def asked(study: Study) -> Iterator[tuple[int, str, str]]:
    """Size, way and selector of the trainings, in the order in which they are done."""
    options, names = study.options, study.named_ways
    for size in options.sizes:
        for way in options.ways:
            for name in names[way]:
                for kind in options.scratch_selectors if way == SCRATCH else options.selectors:
                    if kind == "random" or size < len(study.system.pool):
                        yield size, name, kind


def run(study: Study) -> None:
    """Trains what is not in the table yet."""
    out: Path = study.options.out
    rows = pd.read_csv(out).to_dict("records") if out.exists() else []
    done = {(row["seed"], row["labels"], row["selector"], row["way"]) for row in rows}

    def keep(seed: int, size: int, kind: str, way: str, potential: Potential) -> None:
        about = {"system": study.name, "seed": seed, "labels": size, "selector": kind, "way": way}
        rows.extend(rows_of(study, potential, about))
        out.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(rows).to_csv(out, index=False)

    began = time.monotonic()
    potentials = pretrained(study)
    print(f"pretrained, {time.monotonic() - began:.0f} s", flush=True)
    for seed, potential in potentials.items() if "teacher" in study.options.ways else ():
        if (seed, 0, "none", study.taught) not in done:
            keep(seed, 0, "none", study.taught, potential)
    learners = ways(study, potentials)
    chosen: dict[tuple[int, str], dict[int, list[Atoms]]] = {}
    for size, way, kind in asked(study):
        missing = [seed for seed in study.seeds if (seed, size, kind, way) not in done]
        for seed in missing:
            if (seed, kind) not in chosen:
                chosen[seed, kind] = choices(study, seed, potentials[seed], kind)
        tasks = [Task(seed, kind, chosen[seed, kind][size], learners[way][seed]) for seed in missing]
        for one, potential in zip(tasks, trained(study, way, tasks) if tasks else (), strict=True):
            keep(one.seed, size, kind, way, potential)
        print(f"{size} labels, {kind}, {way}: {time.monotonic() - began:.0f} s", flush=True)


def options_given() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--system", choices=SYSTEMS, default="acac")
    parser.add_argument("--data", type=Path, default=os.environ.get("ALMLIP_DATA_DIR"), help="reference data")
    parser.add_argument("--work", type=Path, default=Path("runs/teacher_labels"), help="pretrained potentials")
    parser.add_argument(
        "--teacher-frames", type=Path, help="folder of the teacher's frames; the work folder by default"
    )
    parser.add_argument("--frames-only", action="store_true", help="make the teacher's frames, and nothing else")
    parser.add_argument(
        "--teacher", choices=["xtb", "nequix", "mean"], default="xtb", help="of the molecules: what labels frames"
    )
    parser.add_argument("--cells", choices=["made", "pool"], default="made", help="silicon: what Nequix labels")
    parser.add_argument("--out", type=Path, help="table; in the work folder, named after system and cells, by default")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10, 20, 40, 80, 160], help="in the order of the runs")
    parser.add_argument("--ways", nargs="+", choices=[SCRATCH, "teacher", "correction"], default=[SCRATCH, "teacher"])
    parser.add_argument("--selectors", nargs="+", default=["random", "bait", "max_dist"], help="with a teacher")
    parser.add_argument("--scratch-selectors", nargs="+", default=["random"], help="from scratch")
    parser.add_argument("--replay", type=float, nargs="+", default=[0.0], help="weights of the teacher's frames")
    parser.add_argument("--replay-share", type=float, default=0.5, help="of the teacher's frames in each pass")
    parser.add_argument(
        "--correction", nargs="+", default=["tiny"], help="sizes of corrections, with --ways correction"
    )
    parser.add_argument("--size", default=SIZE, help="of the models, those from scratch too")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--frames", type=int, default=FRAMES, help="of the teacher's dynamics")
    parser.add_argument("--pretraining-steps", type=int, default=PRETRAINING_STEPS)
    parser.add_argument("--tuning-steps", type=int, default=TUNING_STEPS)
    parser.add_argument("--steps", type=int, default=6_000, help="from scratch")
    parser.add_argument("--report", type=Path, nargs="+", help="tables to be put together and told of; nothing is run")
    found = parser.parse_args()
    if found.report is None and found.data is None:
        parser.error("give the folder of the reference data with --data or ALMLIP_DATA_DIR.")
    found.teacher_frames = found.teacher_frames or found.work
    found.out = found.out or found.work / f"{found.system}{'_' + found.cells if found.system == 'silicon' else ''}.csv"
    return found


def main() -> None:
    """Runs the study, or tells of what was run."""
    options = options_given()
    if options.report is not None:
        table = merged(options.report)
        table.to_csv(HERE / "results.csv", index=False)
        print(errors(table), wanted(table), sep="\n\n")
        return
    prepare_jax()
    system = SYSTEMS[options.system](options)
    if options.frames_only:
        print(f"{len(system.frames)} frames of the teacher in {options.teacher_frames}")
        return
    run(Study(system, options))
    table = merged([options.out])
    print(errors(table), wanted(table), sep="\n\n")


if __name__ == "__main__":
    main()
