"""A student of a foundation model: ``python experiments/student_of_nequix/run.py --data DIR --weights FILE.nqx``.

Nequix labels the silicon cells of the mlearn set (Zuo et al., J. Phys. Chem. A 124, 731, 2020), whose own labels are
not looked at, and displaced copies of them; a small potential is trained on that; both are held against the PBE labels
of the test set.  ``results.csv`` gets a row a student.  The same command goes on after an interruption; labels are
kept in the folder ``--out``, and a student that is in the table is not trained again.  Times are those of one core:
with an accelerator the row has none, and ``--time FOLDER`` of a distillation fills them in on a machine without.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pandas as pd

from almlip_jax.compilation import prepare_jax
from almlip_jax.distillation import DistilConfig, Distilled, run_distillation
from almlip_jax.generation import GenerationInputs, RattledSettings
from almlip_jax.oracles import NequixSettings
from almlip_jax.oracles.base import bare
from almlip_jax.potential import Potential
from almlip_jax.progress import open_progress
from almlip_jax.structures.carried import carried
from almlip_jax.structures.io import read_structures, write_structures

HERE = Path(__file__).resolve().parent
SHARE, ALLOWED, FASTER, STEPS = 0.1, 0.020, 500.0, 1000
"""Wanted: errors against the teacher of at most this share of its own and these eV/A, and this much faster a step of
dynamics, which is timed over so many."""


NO_LIMITS = {"closest_contact": 0, "max_temperature": 1e15, "max_force": 1e6, "bond_factor": 20, "dissociation": False}
"""Of dynamics that are timed: walkers go on whatever they run into."""


def cells(options: argparse.Namespace) -> Path:
    """A file with every n-th cell of the set and displaced copies of these, without labels, made once.

    Next to it ``to_label`` holds the same and the cells of the test.
    """
    name = f"cells_{options.every}_{options.rattled}_{options.stdev:g}.extxyz"
    chosen = options.out.resolve() / name
    if not chosen.exists():
        silicon = Path(options.data) / "mlearn"
        train, test = (read_structures(silicon / f"Si_{part}.extxyz", ignore_labels=True) for part in ("train", "test"))
        frames = [carried(frame) for frame in train[:: options.every]]
        if options.rattled:
            displace = RattledSettings(count=options.rattled, stdev=options.stdev)
            frames += displace.generate(GenerationInputs(frames, np.random.default_rng(0)))
        (chosen.parent / "to_label").mkdir(parents=True, exist_ok=True)
        write_structures(chosen.parent / "to_label" / name, [*frames, *map(carried, test)])
        write_structures(chosen, frames)
    return chosen


def config(options: argparse.Namespace) -> DistilConfig:
    """The distillation that the options describe."""
    structures, teacher = str(cells(options)), {"kind": "file", "path": str(Path(options.labels or "").resolve())}
    if options.labels is None:
        teacher = {"kind": "nequix", "model": str(options.weights.resolve()), "timeout": 3600}
    return DistilConfig.model_validate(
        {
            "name": "student-of-nequix",
            "seed": options.seed,
            "system": {"structures": structures},
            "teacher": teacher,
            "executor": {"kind": "local", "workers": options.workers},
            "initial": {"structures": structures},
            "held_out": 0.1,
            "test": [{"path": str(Path(options.data).resolve() / "mlearn" / "Si_test.extxyz"), "group": "PBE"}],
            "model": {
                "kind": "shared_density",
                "size": options.size,
                "cutoff": options.cutoff,
                "products": options.products,
                "layers": options.layers,
            },
            "ensemble": {"size": options.members},
            "training": {"max_steps": options.steps, "max_epochs": 10**6, "batch_size": options.batch},
        }
    )


def cpu_seconds(work: Callable[[], object], repeats: int) -> float:
    """Time of processors that some work takes, once it is compiled: other work on the machine does not count."""
    work()
    began = time.process_time()
    for _ in range(repeats):
        work()
    return (time.process_time() - began) / repeats


def speeds(weights: Path, folder: Path) -> dict[str, float]:
    """Seconds of a processor that a cell of 64 atoms takes, and ratios.

    The teacher's are those of a label, which is what a step of dynamics with it through ASE takes at least.  The
    student's are those of a structure of a set, lists of neighbours on the host included, and of a step of dynamics.
    """
    frames = [frame for frame in read_structures(folder / "taught_tests.extxyz") if len(frame) == 64]
    student, label = Potential.load(folder / "potential"), NequixSettings(model=weights).build()
    teacher = cpu_seconds(lambda: label(bare(frames[0])), 3)
    taught = cpu_seconds(lambda: student.evaluate(frames), 20) / len(frames)
    dynamics = student.explorer({"walkers": [{"temperature": 300}], "steps": STEPS, "sanity": NO_LIMITS})

    def move() -> None:
        if (ended := dynamics.run(frames[:1]).end_step.max()) >= 0:
            raise SystemExit(f"the walker ended at step {ended}; its steps cannot be timed.")

    step = cpu_seconds(move, 5) / STEPS
    return {
        "teacher_seconds": round(teacher, 3),
        "student_seconds": round(taught, 6),
        "student_step_seconds": round(step, 6),
        "times_faster": round(teacher / taught, 1),
        "times_faster_step": round(teacher / step, 1),
    }


def row(options: argparse.Namespace, found: Distilled) -> dict[str, str | float]:
    """What came out: mean absolute errors of forces, meV/Angstrom."""
    test, held_out = found.errors["PBE"], found.errors["held_out"]["student_against_teacher"]
    errors = {name.replace("_against_", "_vs_"): values["forces_mae"] for name, values in test.items()}
    wanted = SHARE * test["teacher_against_labels"]["forces_mae"] + ALLOWED
    return {
        "folder": found.out.name,
        "teacher": options.weights.stem,
        "size": options.size,
        "products": options.products,
        "layers": options.layers,
        "cutoff": options.cutoff,
        "members": options.members,
        "every": options.every,
        "rattled": options.rattled,
        "steps": options.steps,
        "seed": options.seed,
        "labels": found.calls,
        **{name: round(1e3 * value, 2) for name, value in errors.items()},
        "held_out": round(1e3 * held_out["forces_mae"], 2),
        "wanted": round(1e3 * wanted, 2),
        "accurate": test["student_against_teacher"]["forces_mae"] <= wanted,
    }


def parsed() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("ALMLIP_DATA_DIR"), help="reference data")
    parser.add_argument("--weights", type=Path, required=True, help="weights of the teacher (.nqx)")
    parser.add_argument("--out", type=Path, default=Path("runs/student_of_nequix"), help="folder of the distillations")
    parser.add_argument("--table", type=Path, default=HERE / "results.csv")
    parser.add_argument("--every", type=int, default=1, help="only every n-th cell is taken")
    parser.add_argument("--rattled", type=int, default=2000, help="displaced copies of the cells")
    parser.add_argument("--stdev", type=float, default=0.1, help="of the displacements, Angstrom")
    parser.add_argument("--size", default="small")
    parser.add_argument("--products", type=int, default=1, help="of the model")
    parser.add_argument("--layers", type=int, default=0, help="of message passing, of the model")
    parser.add_argument("--cutoff", type=float, default=5.0)
    parser.add_argument("--members", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20000)
    parser.add_argument("--batch", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=None, help="processes of the teacher; one a core by default")
    parser.add_argument("--labels", type=Path, help="the file in to_label as labelled by experiments/nequix_labels")
    parser.add_argument("--cells-only", action="store_true", help="write to_label, and nothing else")
    parser.add_argument("--time", type=Path, help="folder of a distillation that is in the table; nothing else is run")
    options = parser.parse_args()
    if options.data is None:
        parser.error("give the folder of the reference data with --data or ALMLIP_DATA_DIR.")
    return options


def main() -> None:
    """Distils what the options describe, unless it is in the table, and takes times."""
    options = parsed()
    if options.cells_only:
        print(cells(options).parent / "to_label" / cells(options).name)
        return
    prepare_jax()
    rows = pd.read_csv(options.table).to_dict("records") if options.table.exists() else []
    keys = ("size", "members", "every", "rattled", "steps", "seed")
    further = {"products": 1, "layers": 0, "cutoff": 5.0}  # in the names of folders where they are others
    others = [f"{key}{getattr(options, key):g}" for key, usual in further.items() if getattr(options, key) != usual]
    name = "-".join([options.weights.stem, *(str(getattr(options, key)) for key in keys), *others])
    folder = options.time or options.out / name
    if options.time is None and name not in {one["folder"] for one in rows}:
        with open_progress() as progress:
            rows.append(row(options, run_distillation(config(options), folder, progress=progress)))
        pd.DataFrame(rows).to_csv(options.table, index=False)
    if jax.default_backend() == "cpu":
        own = next((one for one in rows if one["folder"] == folder.name), None)
        if own is None:
            raise SystemExit(f"{folder.name} is not in {options.table}.")
        own |= speeds(options.weights, folder)
        own["met"] = bool(own["accurate"]) and own["times_faster_step"] >= FASTER
        pd.DataFrame(rows).to_csv(options.table, index=False)
    print(pd.DataFrame(rows).to_string(index=False))


if __name__ == "__main__":
    main()
