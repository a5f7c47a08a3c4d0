"""Accuracy of the shared-density model against its cost: ``python benchmarks/sizes.py --data DIR --out runs/sizes``.

Trains four members of each candidate on 450 frames of acetylacetone at 300 K (cutoff 5 Angstrom, batch 5, 9,000 steps)
and on the silicon of the mlearn set (1,500 steps), and tests them on trajectories at 300 and 600 K and on the test set.
The cost is the time of a gated step of exploration with four members, acetylacetone (15 atoms) and 64 atoms of silicon,
all candidates in turn, as the median over rounds.  A candidate is on the front of a test where no cheaper one errs
less.  One training of each, one seed; the errors of single members, whose scatter stands beside, say how far that goes.

Errors go to the output folder, a file a candidate, system and seed.  What is there is not trained again, so that two
calls with different candidates can train side by side; the seconds of training noted there are then upper bounds.  The
table is written where the times are measured, to ``benchmarks/results/sizes.md`` and ``.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ase import Atoms
from exploration import explorer_of, gated_step, graph_of, many, system

from almlip_jax.compilation import prepare_jax
from almlip_jax.ensembles import Ensemble
from almlip_jax.files import read_json, write_json
from almlip_jax.fitting import fit_potential
from almlip_jax.models import SharedDensitySettings, build_model
from almlip_jax.potential import Potential
from almlip_jax.structures.io import read_structures
from almlip_jax.structures.species import SpeciesTable
from almlip_jax.training import EnsembleSettings, TrainingSettings

HERE = Path(__file__).resolve().parent
MEMBERS = 4
SIZES = ("tiny", "small", "medium", "large")
OTHERS: dict[str, dict[str, Any]] = {
    "small, l_max 3, products to 1": {"size": "small", "l_max": 3, "coupled_l_max": 1},
    "small, products to 1": {"size": "small", "coupled_l_max": 1},
    "small, 24 channels, 8 coupled": {"size": "small", "channels": 24, "coupled_channels": 8},
    "medium, products to 1": {"coupled_l_max": 1},
    "medium, 8 coupled": {"coupled_channels": 8},
    "medium, 12 coupled": {"coupled_channels": 12},
    "medium, 12 radial, 8 coupled": {"radial": 12, "coupled_channels": 8},
    "small, 1 layer": {"size": "small", "layers": 1},
    "medium, 2 products": {"products": 2},
    "medium, 32 channels, 8 coupled": {"channels": 32, "coupled_channels": 8},
}
CANDIDATES: dict[str, dict[str, Any]] = {size: {"size": size} for size in SIZES} | OTHERS
TESTS = {"300 K": "acac", "600 K": "acac", "Si": "Si64"}
TRAINING = {"acac": {"max_steps": 9000, "validate_every": 450}, "Si64": {"max_steps": 1500, "validate_every": 150}}
STEPS = {"acac": 1000, "Si64": 300}


def sets(data: Path, name: str) -> tuple[list[Atoms], dict[str, list[Atoms]]]:
    """Training frames and tests of a system."""
    if name == "acac":
        tests = {f"{t} K": read_structures(data / "acac" / f"test_MD_{t}K.xyz") for t in (300, 600)}
        return read_structures(data / "acac" / "train_300K.xyz"), tests
    frames, test = (read_structures(data / "mlearn" / f"Si_{part}.extxyz") for part in ("train", "test"))
    return frames, {"Si": test}


def force_errors(potential: Potential, frames: list[Atoms]) -> np.ndarray:
    """Differences of force components, meV/Angstrom."""
    pairs = zip(potential.evaluate(frames).forces, frames, strict=True)
    return 1e3 * np.concatenate([f - a.calc.results["forces"] for f, a in pairs])


def errors(data: Path, name: str, fields: dict[str, Any], seed: int) -> dict[str, float]:
    """Mean absolute and root mean square errors of a committee, and the scatter of its members' errors."""
    row: dict[str, float] = {}
    frames, tests = sets(data, name)
    settings = TrainingSettings.model_validate(TRAINING[name] | {"max_epochs": 10**6, "patience": 10**6})
    model = SharedDensitySettings.model_validate({"cutoff": 5.0, **fields})
    began = time.monotonic()
    potential, _ = fit_potential(frames, model, EnsembleSettings(size=MEMBERS), settings, seed=seed)
    row[f"seconds {name}"] = round(time.monotonic() - began)
    for test, structures in tests.items():
        found = force_errors(potential, structures)
        of_members = [np.mean(np.abs(force_errors(one, structures))) for one in members(potential)]
        row[f"mae {test}"] = round(float(np.mean(np.abs(found))), 2)
        row[f"rmse {test}"] = round(float(np.sqrt(np.mean(found**2))), 2)
        row[f"member mae {test}"] = round(float(np.mean(of_members)), 2)
        row[f"scatter {test}"] = round(float(np.std(of_members, ddof=1)), 2)
    return row


def members(potential: Potential) -> list[Potential]:
    """The members, each as a potential of its own."""
    pick = [jax.tree.map(lambda x, m=m: x[m : m + 1], potential.params) for m in range(MEMBERS)]
    return [Potential(potential.settings, potential.species, one, potential.reference_energies) for one in pick]


def train(data: Path, out: Path, names: list[str], seed: int) -> None:
    """Errors of the candidates for which the output folder holds none yet, a file for each and system."""
    for name in names:
        for of_system in TRAINING:
            path = errors_file(out, name, of_system, seed)
            if not path.exists():
                row = errors(data, of_system, CANDIDATES[name], seed)
                print(name, row, flush=True)
                write_json(path, row)


def errors_file(out: Path, name: str, of_system: str, seed: int) -> Path:
    """Where the errors of a candidate lie."""
    return out / f"{name.replace(', ', '-').replace(' ', '_')}.{of_system}.{seed}.json"


def loop_of(start: Atoms, fields: dict[str, Any], steps: int, count: int) -> Callable[[], Any]:
    """A compiled loop of gated steps of the first ``count`` members."""
    model = build_model(SharedDensitySettings.model_validate({"cutoff": 5.0, **fields}), SpeciesTable.of([start]))
    four = Ensemble(model, MEMBERS)
    params = four.standardise(four.init(jax.random.key(0)), four.survey(graph_of(start, four)), 1e-6)
    explorer = explorer_of(Ensemble(model, count), 1, steps)
    session = explorer.begin(jax.tree.map(lambda x: x[:count], params), [start], (np.inf, np.inf), jax.random.key(0))
    loop = partial(many(gated_step(explorer, start), steps), session.params, session.state, session.setup)
    jax.block_until_ready(loop())
    return loop


def times(data: Path, names: list[str], rounds: int) -> dict[str, dict[str, float]]:
    """Microseconds of a gated step of each candidate: four members on both systems, one on the second."""
    found: dict[str, dict[str, float]] = {name: {} for name in names}
    for of_system, counts in {"acac": (MEMBERS,), "Si64": (MEMBERS, 1)}.items():
        start, steps = system(of_system, data), STEPS[of_system]
        loops = {(name, n): loop_of(start, CANDIDATES[name], steps, n) for name in names for n in counts}
        seconds: dict[tuple[str, int], list[float]] = {key: [] for key in loops}
        for _ in range(rounds):
            for key, loop in loops.items():
                began = time.perf_counter()
                jax.block_until_ready(loop())
                seconds[key].append(time.perf_counter() - began)
        for (name, n), values in seconds.items():
            label = of_system if n == MEMBERS else f"{of_system}, one member"
            found[name][label] = round(1e6 * statistics.median(values) / steps, 1)
        print({name: row for name, row in found.items()}, flush=True)
    return found


def on_front(rows: list[dict[str, Any]], row: dict[str, Any], test: str) -> bool:
    """Whether no cheaper candidate errs less."""
    cost, error = f"us {TESTS[test]}", f"mae {test}"
    return not any(other[cost] < row[cost] and other[error] <= row[error] for other in rows if other is not row)


def markdown(found: dict[str, Any]) -> str:
    """The table, cheapest first; bold where a candidate is on the front of that test."""
    rows = sorted(found["rows"], key=lambda row: row["us Si64"])
    lines = [
        "# Sizes of the shared-density model",
        "",
        "Written by `benchmarks/sizes.py`, whose text says what is measured.  Force MAE of four members, meV/Angstrom,",
        "and after ± the standard deviation of single members' errors; bold where no cheaper candidate errs less.",
        f"{found['device']}, {found['cpus']} cpus, jax {found['jax']}.",
        "",
        "| model | us a step, acac | Si64 | one member, Si64 | " + " | ".join(TESTS) + " |",
        "| --- " * (4 + len(TESTS)) + "|",
    ]
    for row in rows:
        cells = [row["candidate"], *(f"{row[key]:.0f}" for key in ("us acac", "us Si64", "us Si64, one member"))]
        for test in TESTS:
            mark = "**" if on_front(rows, row, test) else ""
            cells.append(f"{mark}{row[f'mae {test}']:.1f}{mark} ± {row[f'scatter {test}']:.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Trains, measures and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("ALMLIP_DATA_DIR"), help="reference data")
    parser.add_argument("--out", type=Path, required=True, help="folder for the errors")
    parser.add_argument("--candidates", nargs="*", default=list(CANDIDATES), choices=CANDIDATES, metavar="NAME")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=9, help="of the timing; 0 leaves it out")
    options = parser.parse_args()
    if options.data is None:
        parser.error("give the folder of the reference data with --data or ALMLIP_DATA_DIR.")
    prepare_jax()
    options.out.mkdir(parents=True, exist_ok=True)
    train(Path(options.data), options.out, options.candidates, options.seed)
    if not options.rounds:
        return
    cost = times(Path(options.data), options.candidates, options.rounds)
    rows: list[dict[str, Any]] = []
    for name in options.candidates:
        row: dict[str, Any] = {"candidate": name} | {f"us {key}": value for key, value in cost[name].items()}
        for of_system in TRAINING:
            row |= read_json(errors_file(options.out, name, of_system, options.seed))
        rows.append(row)
    found = {"device": jax.devices()[0].device_kind, "cpus": os.cpu_count(), "jax": jax.__version__, "rows": rows}
    (HERE / "results" / "sizes.json").write_text(json.dumps(found, indent=1) + "\n")
    (HERE / "results" / "sizes.md").write_text(markdown(found))


if __name__ == "__main__":
    main()
