"""What extrapolation grades cost in a step of exploration: ``python benchmarks/grades.py``.

Three programs move the same walker with the same potential: an exploration whose gate looks at the extrapolation grade,
with thresholds that nothing reaches; the same exploration without it (the gate compares the spread with infinite
thresholds); and a bare step of the integrator with mean forces, which no exploration is.  They take turns, in loops of
many steps; times are of the process (CPU seconds, so that neighbours on the machine count for less) and of the clock,
as medians and minima over rounds.  Active sets are made of rattled structures.  Results go to
``benchmarks/results/grades.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ase import Atoms
from ase.build import bulk, molecule
from exploration import KELVIN, gated_step, graph_of, many, mean_of_forces, plain_step

from almlip_jax.compilation import prepare_jax
from almlip_jax.dynamics import ExplorationSettings, Explorer, Knowledge
from almlip_jax.ensembles import Ensemble, EnsembleSettings, build_ensemble
from almlip_jax.models import ModelSettings
from almlip_jax.potential import Potential
from almlip_jax.structures.species import SpeciesTable

HERE = Path(__file__).resolve().parent
STEPS = {"Si64": 100, "ethanol": 500}
MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "mtp, level 8": ({"kind": "mtp", "level": 8}, 1),
    "mtp, level 16": ({"kind": "mtp", "level": 16}, 1),
    "shared_density": ({"kind": "shared_density"}, 4),
    "shared_density, one member": ({"kind": "shared_density"}, 1),
}
GRADE = "extrapolation_grade"


def system(name: str) -> Atoms:
    """Start structure."""
    if name == "Si64":
        return bulk("Si", "diamond", a=5.43, cubic=True) * (2, 2, 2)
    return molecule("CH3CH2OH")


def potential_of(settings: dict[str, Any], members: int, start: Atoms) -> Potential:
    """A potential of random parameters, whose energies are next to nothing."""
    model, of = ModelSettings.parse({"cutoff": 5.0, **settings}), EnsembleSettings(size=members)
    species = SpeciesTable.of([start])
    ensemble = build_ensemble(model, of, species)
    assert isinstance(ensemble, Ensemble)
    drawn = ensemble.init(jax.random.key(0))
    params = ensemble.standardise(drawn, ensemble.survey(graph_of(start, ensemble)), 1e-6)
    return Potential(model, species, jax.tree.map(np.asarray, params), dict.fromkeys(species.numbers, 0.0), members=of)


def rattled(start: Atoms, count: int) -> list[Atoms]:
    """Structures that active sets are made of."""
    frames = [start.copy() for _ in range(count)]
    for seed, frame in enumerate(frames):
        frame.rattle(0.1, seed=seed)
    return frames


def settings_of(steps: int, gate: dict[str, Any]) -> ExplorationSettings:
    """Walkers that hardly move."""
    walkers = [{"temperature": KELVIN}]
    return ExplorationSettings.model_validate({"walkers": walkers, "steps": steps, "chunk": 500, "gate": gate})


def measured(potential: Potential, start: Atoms, steps: int, rounds: int) -> dict[str, Any]:
    """Times of a step, microseconds, and the ratios."""
    graded = potential.spanning(rattled(start, 40 if len(start) < 20 else 8))
    assert graded.active_set is not None
    ensemble, loops, row = potential.ensemble, {}, {"columns": graded.active_set.matrix.shape[-1]}
    for name, gate, levels in (("graded", {"score": GRADE}, (1e6, 1e6)), ("plain", {}, (np.inf, np.inf))):
        explorer = Explorer(ensemble.predict, potential.species, potential.cutoff, settings_of(steps, gate))
        known = Knowledge({GRADE: graded.novelty[GRADE]} if name == "graded" else {})
        run = explorer.begin(potential.params, [start], levels, jax.random.key(0), known)
        loops[name] = partial(many(gated_step(explorer, start), steps), run.params, run.state, run.setup)
    assert isinstance(ensemble, Ensemble)
    bare = plain_step(explorer, mean_of_forces(ensemble))
    loops["bare"] = partial(many(bare, steps), run.params, run.state, run.setup)
    for loop in loops.values():
        jax.block_until_ready(loop())
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in loops}
    for _ in range(rounds):
        for name, loop in loops.items():
            began = time.process_time(), time.perf_counter()
            jax.block_until_ready(loop())
            seconds[name].append((time.process_time() - began[0], time.perf_counter() - began[1]))
    for place, kind in enumerate(("cpu", "clock")):
        values = {name: [one[place] * 1e6 / steps for one in found] for name, found in seconds.items()}
        for how, reduce in (("median", statistics.median), ("least", min)):
            of = {name: reduce(one) for name, one in values.items()}
            row |= {f"{kind}_{how}_{name}": value for name, value in of.items()}
            row[f"{kind}_{how}_ratio"] = of["graded"] / of["plain"]
        each = [a / b for a, b in zip(values["graded"], values["plain"], strict=True)]
        row[f"{kind}_ratio_of_turns"] = statistics.median(each)
    return row


def table(found: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "# Extrapolation grades in a step of exploration",
        "",
        f"{found['device']}, {found['cpus']} cpus, jax {found['jax']}, float32, load {found['load']:.1f} at the start.",
        "CPU time of a step, medians of rounds in turn; the ratio is that of the gate with the grade to the same",
        "exploration without.",
        "",
        "| system | model | columns | with the grade, us | without, us | bare step, us | ratio of medians | of minima "
        "| median of turns | of medians by the clock |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in found["rows"]:
        times = " | ".join(f"{row[f'cpu_median_{name}']:.0f}" for name in ("graded", "plain", "bare"))
        names = ("cpu_median_ratio", "cpu_least_ratio", "cpu_ratio_of_turns", "clock_median_ratio")
        ratios = " | ".join(f"{row[name]:.3f}" for name in names)
        lines.append(f"| {row['system']} | {row['model']} | {row['columns']} | {times} | {ratios} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--systems", nargs="*", default=list(STEPS), choices=list(STEPS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--label", default="grades", help="name of the result files")
    options = parser.parse_args()
    prepare_jax()
    found: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "cpus": os.cpu_count(),
        "jax": jax.__version__,
        "load": os.getloadavg()[0],
        "rows": [],
    }
    for system_name in options.systems:
        start = system(system_name)
        for model_name in options.models:
            potential = potential_of(*MODELS[model_name], start)
            row: dict[str, Any] = {"system": system_name, "model": model_name}
            row |= measured(potential, start, STEPS[system_name], options.rounds)
            found["rows"].append(row)
            print({key: round(v, 3) if isinstance(v, float) else v for key, v in row.items()}, flush=True)
            path = HERE / "results" / f"{options.label}.json"
            path.write_text(json.dumps(found, indent=1) + "\n")
            path.with_suffix(".md").write_text(table(found))


if __name__ == "__main__":
    main()
