"""What cores gain as devices that share out members: ``python benchmarks/devices.py --data DIR``.

The same loops of gated steps, with shared-density models, and the same trainings are timed in two processes in turn:
one has a single device, which divides every operation among the cores, the other a device for each core, which takes
some of the members, or of many atoms' walkers where there is one member (`compilation.use_cores`).  Systems as in
``exploration.py``, and silicon with 512 atoms; training is on acetylacetone, batches of 5.  Medians over rounds go to
``benchmarks/results/devices.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from exploration import explorer_of, gated_step, graph_of, many, system

from almlip_jax.compilation import prepare_jax
from almlip_jax.ensembles import Ensemble
from almlip_jax.models import SharedDensitySettings, build_model
from almlip_jax.structures.io import read_structures
from almlip_jax.structures.species import SpeciesTable
from almlip_jax.training import Trainer, TrainingSettings, plan_capacity, reference_energies

HERE = Path(__file__).resolve().parent
MEMBERS = 4
# system, walkers, size of the model, members, steps of a timing
DYNAMICS = (
    ("acac", 1, "tiny", 4, 2000),
    ("acac", 1, "small", 4, 2000),
    ("acac", 1, "medium", 4, 1000),
    ("acac", 8, "tiny", 1, 1000),
    ("acac", 8, "medium", 1, 300),
    ("acac", 8, "medium", 4, 200),
    ("acac", 64, "medium", 4, 30),
    ("Si64", 1, "tiny", 4, 1000),
    ("Si64", 1, "small", 4, 500),
    ("Si64", 1, "medium", 4, 300),
    ("Si64", 1, "medium", 1, 500),
    ("Si64", 8, "medium", 1, 100),
    ("Si64", 8, "medium", 4, 50),
    ("Si512", 1, "medium", 4, 40),
)
TRAINED = ("small", "medium")
TRAINING_STEPS = 120


def dynamics(data: Path, name: str, walkers: int, size: str, members: int, steps: int) -> Callable[[], float]:
    """Seconds of a gated step."""
    start = system("acac", data) if name == "acac" else system("Si64", data)
    start = start.repeat(2) if name == "Si512" else start
    ensemble = Ensemble(build_model(SharedDensitySettings(size=size, cutoff=5.0), SpeciesTable.of([start])), members)
    params = ensemble.standardise(ensemble.init(jax.random.key(0)), ensemble.survey(graph_of(start, ensemble)), 1e-6)
    explorer = explorer_of(ensemble, walkers, steps)
    session = explorer.begin(params, [start] * walkers, (np.inf, np.inf), jax.random.key(0))
    loop = partial(many(gated_step(explorer, start), steps), session.params, session.state, session.setup)

    def timed() -> float:
        began = time.perf_counter()
        jax.block_until_ready(loop())
        return (time.perf_counter() - began) / steps

    return timed


def training(data: Path, size: str) -> Callable[[], float]:
    """Seconds of an optimiser step, validations included."""
    frames = read_structures(data / "acac" / "train_300K.xyz")
    species = SpeciesTable.of(frames)
    settings = TrainingSettings(max_steps=TRAINING_STEPS, max_epochs=10**6, patience=10**6, validate_every=60)
    model = build_model(SharedDensitySettings(size=size, cutoff=5.0), species)
    trainer = Trainer(Ensemble(model, MEMBERS), species, plan_capacity(frames, 5.0, settings), settings)
    references = reference_energies(frames, species)

    def timed() -> float:
        reports: list[tuple[float, int]] = []
        trainer.train(
            frames,
            None,
            jax.random.key(0),
            reference_energies=references,
            steps=TRAINING_STEPS,
            on_epoch=lambda report: reports.append((report.seconds, report.step)),
        )
        (first, before), (last, after) = reports[0], reports[-1]
        return (last - first) / (after - before)

    return timed


def work(data: Path) -> None:
    """A worker: compiles everything, then times what it is asked for."""
    prepare_jax()
    cases = [dynamics(data, *case) for case in DYNAMICS] + [training(data, size) for size in TRAINED]
    for case in cases:
        case()
    print(json.dumps({"devices": len(jax.devices())}), flush=True)
    for line in sys.stdin:
        print(json.dumps(cases[int(line)]()), flush=True)


def table(found: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines = [
        "# Cores as devices",
        "",
        f"jax {found['jax']}, {found['devices']} cores, load {found['load']:.1f}: one device that divides operations,",
        "and a device for each core that takes some members; medians, the two in turn.",
        "",
        "| what | members | model | one device, ms | a device each, ms | ratio |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        one, each = row["one_ms"], row["each_ms"]
        lines.append(
            f"| {row['what']} | {row['members']} | {row['model']} | {one:.3f} | {each:.3f} | {each / one:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Times both and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("ALMLIP_DATA_DIR"), help="reference data")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.data is None:
        parser.error("give the folder of the reference data with --data or ALMLIP_DATA_DIR.")
    if options.worker:
        work(options.data)
        return
    command = [sys.executable, __file__, "--worker", "--data", str(options.data)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    found: dict[str, Any] = {"jax": jax.__version__, "load": os.getloadavg()[0]}
    workers = {}
    for kind, environment in (("one", {"JAX_NUM_CPU_DEVICES": "1"}), ("each", {})):
        workers[kind] = subprocess.Popen(command, env=os.environ | environment, **pipes)
        found["devices"] = json.loads(workers[kind].stdout.readline())["devices"]
    rows: list[dict[str, Any]] = [
        {"what": f"step of {walkers} x {name}", "members": members, "model": size}
        for name, walkers, size, members, _ in DYNAMICS
    ] + [{"what": "training step, acac", "members": MEMBERS, "model": size} for size in TRAINED]
    for number, row in enumerate(rows):
        seconds: dict[str, list[float]] = {kind: [] for kind in workers}
        for _ in range(options.rounds):
            for kind, worker in workers.items():
                worker.stdin.write(f"{number}\n")
                worker.stdin.flush()
                seconds[kind].append(json.loads(worker.stdout.readline()))
        row |= {f"{kind}_ms": statistics.median(values) * 1e3 for kind, values in seconds.items()}
        row |= {f"{kind}_range_ms": [min(values) * 1e3, max(values) * 1e3] for kind, values in seconds.items()}
        print(row, flush=True)
    for worker in workers.values():
        worker.stdin.close()
    folder = HERE / "results"
    (folder / "devices.json").write_text(json.dumps(found | {"rows": rows}, indent=1) + "\n")
    (folder / "devices.md").write_text(table(found, rows))
    print(table(found, rows))


if __name__ == "__main__":
    main()
