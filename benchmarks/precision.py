"""What float32 costs on this device: ``python benchmarks/precision.py``, against float64 on the CPU.

Forces and stresses of committees of random parameters on a rattled crystal of silicon whose cell is smaller than the
neighbour list, and the drift of the total energy in dynamics at constant energy; once as this package compiles, and
once with matrices multiplied as the device does unless it is told otherwise (TF32 on GPUs, bfloat16 on TPUs, float32
on CPUs).  Results go to ``benchmarks/results/precision-<device>.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from accelerator import HERE, MODELS, silicon
from ase import Atoms

from almlip_jax.compilation import prepare_jax
from almlip_jax.dynamics import ExplorationSettings, Explorer
from almlip_jax.ensembles import Ensemble
from almlip_jax.models import build_model
from almlip_jax.structures.graph import Graph
from almlip_jax.structures.species import SpeciesTable
from almlip_jax.structures.walkers import walker_neighbors

COARSE = "tensorfloat32"
STEPS, WALKERS, KELVIN = 200, 8, 10


def graph_of(atoms: Atoms, ensemble: Ensemble, dtype: Any) -> Graph:
    """The graph of one structure."""
    every = np.ones((1, len(atoms)), bool)
    positions = jnp.asarray(atoms.positions[None], dtype)
    neighbors = walker_neighbors(positions, atoms.cell.array[None], atoms.pbc[None], every, ensemble.cutoff, 0.5)
    neutral = jnp.zeros(1, positions.dtype)
    return neighbors.graph(positions, jnp.asarray(ensemble.species.index(atoms.numbers))[None], neutral, neutral + 1)


def deviations(model: str) -> dict[str, float]:
    """Root mean squares of what differs from float64, relative to those of what is compared."""
    ensemble = Ensemble(build_model(MODELS[model], SpeciesTable((14,))), 4)
    atoms = silicon(2)
    with jax.default_device(jax.local_devices(backend="cpu")[0]), jax.enable_x64(True):
        fresh = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), ensemble.init(jax.random.key(0)))
        graph = graph_of(atoms, ensemble, np.float64)
        params = ensemble.standardise(fresh, ensemble.survey(graph), 1.0)
        exact = jax.device_get(jax.jit(ensemble.predict)(params, graph))
    params = jax.tree.map(lambda x: np.asarray(x, np.float32), params)
    found = jax.device_get(jax.jit(ensemble.predict)(params, graph_of(atoms, ensemble, np.float32)))
    compared = {name: (getattr(found, name), getattr(exact, name)) for name in ("forces", "virial", "features")}
    return {name: float(np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2))) for name, (a, b) in compared.items()}


def dynamics(model: str) -> dict[str, float]:
    """Drift of the total energy at constant energy, meV for an atom and picosecond, and milliseconds of a step."""
    start = silicon(2)
    ensemble = Ensemble(build_model(MODELS[model], SpeciesTable((14,))), 4)
    params = ensemble.init(jax.random.key(0))
    params = ensemble.standardise(params, ensemble.survey(graph_of(start, ensemble, np.float32)), 2e-4)
    settings = ExplorationSettings.model_validate(
        {"walkers": [{"temperature": KELVIN, "count": WALKERS}], "steps": STEPS, "chunk": STEPS, "timestep": 1.0}
        | {"integrator": {"kind": "nve"}, "buffer": 1, "trajectory_every": STEPS}
    )
    explorer = Explorer(ensemble.predict, ensemble.species, ensemble.cutoff, settings)
    session = explorer.begin(params, [start] * WALKERS, (np.inf, np.inf), jax.random.key(0))
    for _ in range(2):  # the first one compiles
        began = time.perf_counter()
        _, traces = jax.block_until_ready(session._run_chunk(session.params, session.state, session.setup))
        seconds = time.perf_counter() - began
    total = np.asarray(traces.energy + traces.kinetic, np.float64)[1:]
    picoseconds = 1e-3 * settings.trace_every * np.arange(len(total))
    slopes = 1000 * np.polyfit(picoseconds, total, 1)[0] / len(start)
    return {"drift": float(np.sqrt(np.mean(slopes**2))), "ms_a_step": 1000 * seconds / STEPS}


def work() -> None:
    """A child's work: a line of JSON for each model."""
    prepare_jax()
    print(json.dumps({"device": jax.devices()[0].device_kind}), flush=True)
    for model in MODELS:
        print(json.dumps({"model": model, **deviations(model), **dynamics(model)}), flush=True)


def measured(coarse: bool) -> list[dict[str, Any]]:
    """What a child found, with matrices multiplied exactly or coarsely."""
    environment = os.environ | ({"JAX_DEFAULT_MATMUL_PRECISION": COARSE} if coarse else {})
    command = [sys.executable, __file__, "--work"]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def main() -> None:
    """Measures both ways and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work()
        return
    (head, *exact), (_, *coarse) = measured(False), measured(True)
    lines = [f"# float32 on {head['device']}, jax {jax.__version__}", ""]
    lines += ["Relative deviations from float64; drift in meV/atom/ps.", ""]
    names = [name for name in exact[0] if name != "model"]
    lines += [f"| model | products | {' | '.join(names)} |", "| --- " * (2 + len(names)) + "|"]
    for rows in zip(exact, coarse, strict=True):
        for how, row in zip(("float32, as shipped", "as the device does"), rows, strict=True):
            lines.append(f"| {row['model']} | {how} | {' | '.join(f'{row[name]:.2g}' for name in names)} |")
    text = "\n".join(lines) + "\n"
    print(text)
    options.out.mkdir(exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", head["device"].lower()).strip("-")
    (options.out / f"precision-{name}.md").write_text(text)


if __name__ == "__main__":
    main()
