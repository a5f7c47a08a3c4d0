"""What accelerators do: ``python benchmarks/accelerator.py``, unedited on a machine with one GPU or with eight.

It takes the devices that jax finds and measures, on one of them and on all: gated steps of dynamics (small
molecules and silicon; 1 to 512 walkers; 1, 4 and 8 members), optimiser steps of a training, evaluation of a pool, and
the largest silicon crystal of a list that still fits, in steps and with its peak of device memory.  Every figure comes
with the device it was measured on; a case that does not fit is written down as such and the rest goes on.  With
``--quick`` each case is small and runs once: a check that everything works, on a CPU too.  With ``--limit SECONDS``,
for a machine that is lent for minutes, no case begins after that time; those that were left out are named.  There,
``--compile-first N`` has N processes side by side compile the programs, which are then found in the cache, and
``--only PATTERN`` leaves cases out whose name does not hold the regular expression.  Results go to
``benchmarks/results/accelerator-<device>-x<number>.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
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
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from exploration import graph_of

from almlip_jax.compilation import prepare_jax
from almlip_jax.dynamics import ExplorationSettings, Explorer, WalkerGroup
from almlip_jax.dynamics.state import Status
from almlip_jax.ensembles import Ensemble
from almlip_jax.models import MaceSettings, SharedDensitySettings, build_model
from almlip_jax.potential import Potential
from almlip_jax.structures.species import SpeciesTable
from almlip_jax.training import EnsembleSettings, Trainer, TrainingSettings, plan_capacity

HERE = Path(__file__).resolve().parent
MODELS = {
    "small": SharedDensitySettings(size="small"),
    "medium": SharedDensitySettings(size="medium"),
    "mace": MaceSettings(cutoff=5.0),
}
# system, walkers, members
DYNAMICS = (
    *(("molecule", walkers, 4) for walkers in (1, 64, 512)),
    *(("Si64", walkers, members) for walkers in (1, 8, 64) for members in (1, 4, 8)),
    ("Si4096", 1, 4),
)
LARGEST = (8, 12, 16, 20, 25, 32, 40)  # cubic cells along each side: 4,096 to 512,000 atoms


def system(name: str) -> Atoms:
    """Start structure."""
    if name == "molecule":
        return molecule("CH3CH2OCH3")
    side = round((int(name.removeprefix("Si")) / 8) ** (1 / 3))
    return silicon(side)


def silicon(side: int) -> Atoms:
    """Rattled diamond."""
    atoms = bulk("Si", "diamond", a=5.43, cubic=True) * (side, side, side)
    atoms.rattle(0.05, seed=0)
    return atoms


def ensemble_of(model: str, start: Atoms, members: int) -> tuple[Ensemble, Any]:
    """An ensemble for the elements of a structure whose forces are next to nothing."""
    ensemble = Ensemble(build_model(MODELS[model], SpeciesTable.of([start])), members)
    survey = ensemble.survey(graph_of(start, ensemble))
    return ensemble, ensemble.standardise(ensemble.init(jax.random.key(0)), survey, 1e-6)


def median_of(timed: Callable[[], float], rounds: int) -> float:
    """Of some calls after a first one, which compiles."""
    timed()
    return statistics.median(timed() for _ in range(rounds))


def dynamics(model: str, name: str, walkers: int, members: int, steps: int, rounds: int) -> dict[str, Any]:
    """Gated steps in a second, of all walkers together."""
    start = system(name)
    ensemble, params = ensemble_of(model, start, members)
    return {"walker_steps_per_second": walkers / seconds_a_step(ensemble, params, start, walkers, steps, rounds)}


def seconds_a_step(ensemble: Ensemble, params: Any, start: Atoms, walkers: int, steps: int, rounds: int) -> float:
    """Of a run that records nothing; walkers hardly move, as no forces hold their atoms together."""
    group = WalkerGroup(temperature=0.1, count=walkers)
    settings = ExplorationSettings(walkers=(group,), steps=steps, chunk=steps, trajectory_every=steps, buffer=1)
    explorer = Explorer(ensemble.predict, ensemble.species, ensemble.cutoff, settings)
    session = explorer.begin(params, [start] * walkers, (np.inf, np.inf), jax.random.key(0))
    run = partial(session._run_chunk, session.params, session.state, session.setup)

    def timed() -> float:
        began = time.perf_counter()
        state, _ = jax.block_until_ready(run())
        seconds = time.perf_counter() - began
        statuses = set(state.ends.status.tolist())
        assert statuses <= {Status.RUNNING, Status.COMPLETED}, "walkers ended before their last step"
        return seconds / steps

    return median_of(timed, rounds)


def labelled(count: int) -> list[Atoms]:
    """Silicon with labels that mean nothing."""
    found, rng = [], np.random.default_rng(0)
    for seed in range(count):
        atoms = bulk("Si", "diamond", a=5.43, cubic=True) * (2, 2, 2)
        atoms.rattle(0.1, seed=seed)
        labels = {"energy": rng.normal(), "forces": rng.normal(size=(64, 3)), "stress": rng.normal(size=6)}
        atoms.calc = SinglePointCalculator(atoms, **labels)
        found.append(atoms)
    return found


def training(model: str, members: int, frames: int, steps: int, batch: int) -> dict[str, Any]:
    """Optimiser steps in a second, validations included."""
    data = labelled(frames)
    settings = TrainingSettings(
        batch_size=batch, max_steps=3 * steps, validate_every=steps, max_epochs=10**6, patience=10**6
    )
    ensemble, _ = ensemble_of(model, data[0], members)
    capacity = plan_capacity(data, ensemble.cutoff, settings)
    trainer = Trainer(ensemble, ensemble.species, capacity, settings, EnsembleSettings(size=members))
    reports: list[tuple[float, int]] = []
    trainer.train(
        data,
        None,
        jax.random.key(0),
        reference_energies={14: 0.0},
        on_epoch=lambda report: reports.append((report.seconds, report.step)),
    )
    (first, before), (last, after) = reports[0], reports[-1]
    return {"steps_per_second": (after - before) / (last - first)}


def evaluation(model: str, members: int, frames: int, rounds: int) -> dict[str, Any]:
    """Frames of 64 atoms in a second, neighbour lists on the host included."""
    pool = labelled(frames)
    ensemble, params = ensemble_of(model, pool[0], members)
    potential = Potential(MODELS[model], ensemble.species, params, {14: 0.0})

    def timed() -> float:
        began = time.perf_counter()
        potential.evaluate(pool)
        return (time.perf_counter() - began) / frames

    return {"frames_per_second": 1 / median_of(timed, rounds)}


def largest(model: str, members: int, sides: tuple[int, ...], steps: int) -> dict[str, Any]:
    """The largest crystal that fits, its time for an atom and step, and the most memory that a device held so far."""
    found: dict[str, Any] = {}
    ensemble, params = ensemble_of(model, silicon(2), members)
    for side in sides:
        start = silicon(side)
        try:
            seconds = seconds_a_step(ensemble, params, start, 1, steps, 1)
        except (jax.errors.JaxRuntimeError, MemoryError) as error:
            found["beyond"] = f"{len(start)} atoms: {' '.join(str(error).split())[:200]}"
            break
        statistics_of_device = jax.devices()[0].memory_stats() or {}
        found |= {"atoms": len(start), "us_per_atom_and_step": 1e6 * seconds / len(start)}
        found["peak_bytes"] = statistics_of_device.get("peak_bytes_in_use")
    return found


def cases(quick: bool, rounds: int = 5) -> list[tuple[str, Callable[[], dict[str, Any]]]]:
    """What is measured, by name; each the median of some rounds after a first one."""
    if quick:
        return [
            ("dynamics small, 8 x molecule, 1 members", partial(dynamics, "small", "molecule", 8, 1, 20, 1)),
            ("training small, 4 members", partial(training, "small", 4, 6, 4, 2)),
            ("training small, 1 members", partial(training, "small", 1, 6, 4, 2)),
            ("evaluation small, 1 members", partial(evaluation, "small", 1, 12, 1)),
            ("largest small, 1 members", partial(largest, "small", 1, (2, 4), 10)),
        ]
    found: list[tuple[str, Callable[[], dict[str, Any]]]] = []
    for name, walkers, members in DYNAMICS:
        for model in MODELS:
            work = partial(dynamics, model, name, walkers, members, 200, rounds)
            found.append((f"dynamics {model}, {walkers} x {name}, {members} members", work))
    for members, batch in ((4, 5), (4, 64), (1, 64)):
        for model in MODELS:
            work = partial(training, model, members, 320, 200, batch)
            found.append((f"training {model}, {members} members, batches of {batch}", work))
    for members in (1, 4):
        for model in MODELS:
            work = partial(evaluation, model, members, 4096, min(rounds, 3))
            found.append((f"evaluation {model}, {members} members", work))
    found += [(f"largest {model}, 4 members", partial(largest, model, 4, LARGEST, 20)) for model in MODELS]
    return found


def work(quick: bool, limit: float, only: str, share: tuple[int, int]) -> None:
    """A child's work: everything, on the devices that it is shown; a line of JSON for each case.

    Args:
        quick: see the options.
        limit: likewise.
        only: likewise.
        share: of how many children it is which; several compile programs only, each one round of its cases.
    """
    began = time.perf_counter()
    prepare_jax()
    print(json.dumps({"device": jax.devices()[0].device_kind, "number": len(jax.devices())}), flush=True)
    number, of = share
    chosen = [case for case in cases(quick, 5 if of == 1 else 1) if re.search(only, case[0])]
    for name, case in chosen[number::of]:
        if time.perf_counter() - began > limit:
            print(json.dumps({"case": name, "left_out": f"{limit:g} s were over"}), flush=True)
            continue
        try:
            row = {"case": name, **case()}
        except Exception as error:  # it goes on with the next
            row = {"case": name, "failed": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
        print(json.dumps(row), flush=True)


def child(options: argparse.Namespace, share: tuple[int, int], variables: dict[str, str]) -> subprocess.Popen[str]:
    """A process that does a share of the work."""
    command = [sys.executable, __file__, "--work", *map(str, share), "--limit", str(options.limit)]
    command += ["--only", options.only, *(["--quick"] if options.quick else [])]
    return subprocess.Popen(command, env=os.environ | variables, stdout=subprocess.PIPE, text=True)


def compile_first(options: argparse.Namespace) -> None:
    """Has processes side by side fill the cache of compiled programs; the largest systems are left out."""
    number = options.compile_first
    changed = {"only": f"^(?!largest).*(?:{options.only})", "limit": float("inf")}
    options = argparse.Namespace(**(vars(options) | changed))
    part = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / number:.3f}"}
    for process in [child(options, (n, number), part) for n in range(number)]:
        found, _ = process.communicate()
        print("compiled: " + ", ".join(json.loads(line).get("case", "") for line in found.splitlines()[1:]), flush=True)


def measured(options: argparse.Namespace, alone: bool) -> dict[str, Any]:
    """What a child found on one device or on all."""
    one = {"CUDA_VISIBLE_DEVICES": "0", "HIP_VISIBLE_DEVICES": "0", "JAX_NUM_CPU_DEVICES": "1"} if alone else {}
    process = child(options, (0, 1), one)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        print(("one device: " if alone else "all devices: ") + line, end="", flush=True)
        lines.append(json.loads(line))
    if process.wait():
        sys.exit(f"a measurement failed with status {process.returncode}.")
    return {**lines[0], "rows": lines[1:]}


def table(found: dict[str, Any]) -> str:
    """The results as Markdown."""
    head = f"{found['all']['number']} x {found['all']['device']}, jax {found['jax']}, {found['cpus']} cpus of the host"
    lines = ["# Accelerators", "", head + ".", "", "| case | quantity | one device | all devices |"]
    lines.append("| --- | --- | --- | --- |")
    of_all = {row["case"]: row for row in found["all"]["rows"]}
    for row in found["one"]["rows"]:
        other = of_all[row["case"]]
        for name in dict.fromkeys([*row, *other]):
            if name != "case":
                lines.append(f"| {row['case']} | {name} | {shown(row.get(name))} | {shown(other.get(name))} |")
    return "\n".join(lines) + "\n"


def shown(value: Any) -> str:
    """A number for people."""
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)


def main() -> None:
    """Measures on one device and on all, and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small cases, once each: whether everything works")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds after which no case begins")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--only", default="", metavar="PATTERN", help="cases whose name holds this")
    parser.add_argument("--compile-first", type=int, default=0, metavar="N", help="in N processes side by side")
    parser.add_argument("--work", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.quick, options.limit, options.only, tuple(options.work))
        return
    if options.compile_first:
        compile_first(options)
    everything = measured(options, alone=False)  # the parent takes no device itself
    one = everything if everything["number"] == 1 else measured(options, alone=True)
    found = {"jax": jax.__version__, "cpus": os.cpu_count(), "one": one, "all": everything}
    name = re.sub(r"[^a-z0-9]+", "-", everything["device"].lower()).strip("-")
    target = options.out / f"accelerator-{name}-x{everything['number']}"
    options.out.mkdir(exist_ok=True)
    target.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    target.with_suffix(".md").write_text(table(found))
    print(table(found))


if __name__ == "__main__":
    main()
