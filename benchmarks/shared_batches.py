"""What more devices than members gain a training: ``python benchmarks/shared_batches.py``.

One member, and two, are trained on silicon (64 atoms, labels that mean nothing) in batches that 1, 2, 4 and 8 devices
share out, as many as there are: GPUs where jax finds some, otherwise a CPU told to have so many devices
(``--devices 1,2`` for others), of which no more than cores can gain anything.  A process for each number of devices
compiles first; then they are timed in turn, and medians over rounds go to ``benchmarks/results/shared_batches.json``
and ``.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from accelerator import ensemble_of, labelled

from almlip_jax.compilation import prepare_jax
from almlip_jax.training import EnsembleSettings, Trainer, TrainingSettings, plan_capacity

HERE = Path(__file__).resolve().parent
# model, members, structures in a batch, optimiser steps of a timing
CASES = (
    ("small", 1, 5, 60),
    ("small", 1, 64, 10),
    ("medium", 1, 5, 40),
    ("medium", 1, 64, 6),
    ("medium", 2, 64, 6),
    ("mace", 1, 16, 6),
)


def training(model: str, members: int, batch: int, steps: int) -> Callable[[], float]:
    """Seconds of an optimiser step, validations included."""
    data = labelled(4 * batch)
    settings = TrainingSettings(batch_size=batch, max_epochs=10**6, patience=10**6, validate_every=steps)
    ensemble, _ = ensemble_of(model, data[0], members)
    capacity = plan_capacity(data, ensemble.cutoff, settings)
    trainer = Trainer(ensemble, ensemble.species, capacity, settings, EnsembleSettings(size=members))

    def timed() -> float:
        reports: list[tuple[float, int]] = []
        trainer.train(
            data,
            None,
            jax.random.key(0),
            reference_energies={14: 0.0},
            steps=4 * steps,
            on_epoch=lambda report: reports.append((report.seconds, report.step)),
        )
        (first, before), (last, after) = reports[0], reports[-1]
        return (last - first) / (after - before)

    return timed


def work(quick: bool) -> None:
    """A worker: compiles everything, then times what it is asked for."""
    prepare_jax()
    cases = [training(*case) for case in CASES[: 1 if quick else None]]
    for case in cases:
        case()
    print(json.dumps({"number": len(jax.devices()), "device": jax.devices()[0].device_kind}), flush=True)
    for line in sys.stdin:
        print(json.dumps(cases[int(line)]()), flush=True)


def worker(number: int, quick: bool) -> subprocess.Popen[str]:
    """A process that sees so many devices."""
    seen = ",".join(map(str, range(number)))
    variables = {"CUDA_VISIBLE_DEVICES": seen, "HIP_VISIBLE_DEVICES": seen, "JAX_NUM_CPU_DEVICES": str(number)}
    variables["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # they share the devices, one after the other
    command = [sys.executable, __file__, "--worker", *(["--quick"] if quick else [])]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=os.environ | variables, **pipes)


def answer(process: subprocess.Popen[str], question: str = "") -> Any:
    """What a worker says to a line."""
    assert process.stdin is not None and process.stdout is not None
    if question:
        process.stdin.write(f"{question}\n")
        process.stdin.flush()
    return json.loads(process.stdout.readline())


def table(found: dict[str, Any]) -> str:
    """The results as Markdown."""
    numbers = list(found["rows"][0]["ms"])
    lines = [
        "# Batches that devices share out",
        "",
        f"{found['device']}, jax {found['jax']}, {found['cores']} cores, load {found['load']:.1f}: milliseconds of an",
        "optimiser step on so many devices; medians, the processes in turn.",
        "",
        f"| model | members | batch of 64 atoms each | {' | '.join(numbers)} |",
        f"| --- | --- | --- | {' | '.join('---' for _ in numbers)} |",
    ]
    for row in found["rows"]:
        times = " | ".join(f"{row['ms'][number]:.2f}" for number in numbers)
        lines.append(f"| {row['model']} | {row['members']} | {row['batch']} | {times} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Times all numbers of devices and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", default="1,2,4,8", help="numbers of devices")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one case: whether everything works")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.quick)
        return
    workers: dict[int, subprocess.Popen[str]] = {}
    found: dict[str, Any] = {"jax": jax.__version__, "cores": os.cpu_count(), "load": os.getloadavg()[0], "rows": []}
    for number in map(int, options.devices.split(",")):
        process = worker(number, options.quick)
        there = answer(process)
        found["device"] = there["device"]
        if there["number"] in workers:  # there are no more
            process.communicate()
        else:
            workers[there["number"]] = process
    for place, (model, members, batch, _) in enumerate(CASES[: 1 if options.quick else None]):
        seconds: dict[int, list[float]] = {number: [] for number in workers}
        for _ in range(options.rounds):
            for number, process in workers.items():
                seconds[number].append(answer(process, str(place)))
        times = {str(number): 1e3 * statistics.median(values) for number, values in seconds.items()}
        found["rows"].append({"model": model, "members": members, "batch": batch, "ms": times})
        print(found["rows"][-1], flush=True)
    for process in workers.values():
        assert process.stdin is not None
        process.stdin.close()
    options.out.mkdir(exist_ok=True)
    (options.out / "shared_batches.json").write_text(json.dumps(found, indent=1) + "\n")
    (options.out / "shared_batches.md").write_text(table(found))
    print(table(found))


if __name__ == "__main__":
    main()
