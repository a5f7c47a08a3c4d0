"""What one evaluation of an ensemble costs beside what it must: ``python benchmarks/floor.py [--results DIR]``.

For each system and model: floating-point operations of the compiled evaluation (four members, forces, virials and
every committee score) and the bytes that its operations read and write, as XLA counts them; the time of the evaluation;
and the floor, the larger of operations over the measured rate of large matrix products and of compulsory bytes
(parameters, inputs and results, each once) over the measured bandwidth.  What XLA counts as bytes passes through caches
where arrays are small: it says how much is moved between operations, not from memory.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ase import Atoms
from ase.build import bulk, molecule
from pydantic import TypeAdapter

from almlip_jax.compilation import prepare_jax
from almlip_jax.ensembles import Ensemble
from almlip_jax.models import ModelSettings, build_model
from almlip_jax.structures.graph import Graph
from almlip_jax.structures.species import SpeciesTable
from almlip_jax.structures.walkers import walker_neighbors

MODELS: dict[str, dict[str, Any]] = {
    "tiny": {"size": "tiny"},
    "small": {"size": "small"},
    "medium": {},
    "large": {"size": "large"},
    "medium, layers 1": {"layers": 1},
    "mace": {"kind": "mace"},
    "nequip": {"kind": "nequip"},
}


def best_time(function: Callable[..., Any], *arguments: Any, seconds: float = 1.0) -> float:
    """Shortest mean time of a call, s, over batches of calls."""
    jax.block_until_ready(function(*arguments))
    began = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    calls = max(1, int(0.1 * seconds / (time.perf_counter() - began)))
    times = []
    while sum(times) * calls < seconds:
        began = time.perf_counter()
        for _ in range(calls):
            result = function(*arguments)
        jax.block_until_ready(result)
        times.append((time.perf_counter() - began) / calls)
    return min(times)


def machine() -> dict[str, float]:
    """Rate of large matrix products, floating-point operations/s, and bandwidth of a large addition, bytes/s."""
    size = 2048 if jax.default_backend() == "cpu" else 8192
    a = jnp.ones((size, size), jnp.float32)
    rate = 2 * size**3 / best_time(jax.jit(jnp.matmul), a, a)
    long = jnp.ones((2**26,), jnp.float32)
    passes = 8  # inside one program, whose result takes new pages only once
    several = jax.jit(lambda x: jax.lax.fori_loop(0, passes, lambda _, y: y + 1, x))
    bandwidth = 2 * passes * long.nbytes / best_time(several, long)
    return {"flops_per_second": rate, "bytes_per_second": bandwidth}


def systems() -> dict[str, tuple[Atoms, int]]:
    """Structures and numbers of walkers."""
    ethanol = molecule("CH3CH2OH")
    silicon = bulk("Si", cubic=True) * (2, 2, 2)
    for atoms in (ethanol, silicon):
        atoms.rattle(0.05, seed=0)
    return {
        "ethanol": (ethanol, 1),
        "ethanol x 64": (ethanol, 64),
        "Si64": (silicon, 1),
        "Si64 x 8": (silicon, 8),
    }


def graph_of(atoms: Atoms, walkers: int, species: SpeciesTable, cutoff: float) -> Graph:
    """The graph of equal walkers, as dynamics would make it."""
    positions = np.repeat(atoms.positions[None], walkers, 0).astype(np.float32)
    cells, pbc = np.repeat(atoms.cell.array[None], walkers, 0), np.repeat(atoms.pbc[None], walkers, 0)
    neighbors = walker_neighbors(positions, cells, pbc, np.ones(positions.shape[:2], bool), cutoff, 0.5)
    index = np.repeat(species.index(atoms.numbers)[None], walkers, 0)
    neutral = jnp.zeros(walkers, jnp.float32)
    return neighbors.graph(jnp.asarray(positions), jnp.asarray(index), neutral, neutral + 1)


def measure(name: str, members: int, atoms: Atoms, walkers: int, limits: dict[str, float]) -> dict[str, float]:
    """One row: work, bytes, time and floor of an evaluation."""
    species = SpeciesTable.of([atoms])
    settings = TypeAdapter(ModelSettings).validate_python({"cutoff": 5.0, **MODELS[name]})
    ensemble = Ensemble(build_model(settings, species), members)
    params = jax.jit(ensemble.init)(jax.random.key(0))
    graph = graph_of(atoms, walkers, species, settings.cutoff)
    compiled = jax.jit(ensemble.committee).lower(params, graph).compile()
    cost = compiled.cost_analysis()
    seconds = best_time(compiled, params, graph)
    compulsory = sum(leaf.nbytes for leaf in jax.tree.leaves((params, graph, compiled(params, graph))))
    work, bytes_of_operations = float(cost["flops"]), float(cost["bytes accessed"])
    by_work, by_bytes = work / limits["flops_per_second"], compulsory / limits["bytes_per_second"]
    return {
        "members": members,
        "mflop": work / 1e6,
        "mbytes_moved": bytes_of_operations / 1e6,
        "mbytes_compulsory": compulsory / 1e6,
        "microseconds": 1e6 * seconds,
        "floor_microseconds": 1e6 * max(by_work, by_bytes),
        "share_of_rate": by_work / seconds,
        "bandwidth_between_operations": bytes_of_operations / seconds / limits["bytes_per_second"],
    }


def main() -> None:
    """Measures every row and writes JSON and a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, help="folder for floor.json and floor.md")
    options = parser.parse_args()
    prepare_jax()
    limits, rows = machine(), []
    for system, (atoms, walkers) in systems().items():
        for name in MODELS:
            for members in (1, 4):
                rows.append({"system": system, "model": name} | measure(name, members, atoms, walkers, limits))
                print({key: round(v, 3) if isinstance(v, float) else v for key, v in rows[-1].items()}, flush=True)
    text = table(rows, limits)
    print(text)
    if options.results is not None:
        name = "floor" if jax.default_backend() == "cpu" else f"floor_{jax.devices()[0].device_kind.replace(' ', '_')}"
        (options.results / f"{name}.json").write_text(json.dumps({"machine": limits, "rows": rows}, indent=1) + "\n")
        (options.results / f"{name}.md").write_text(text)


def table(rows: list[dict[str, Any]], limits: dict[str, float]) -> str:
    """The rows as Markdown; one and four members side by side."""
    lines = [
        f"One evaluation of an ensemble (`benchmarks/floor.py`): {jax.devices()[0].device_kind}, matrix products at "
        f"{limits['flops_per_second'] / 1e9:.0f} GFLOP/s, memory at {limits['bytes_per_second'] / 1e9:.1f} GB/s.",
        "",
        "| system | model | 1 member, us | 4 members, us | ratio | MFLOP (4) | MB between operations | floor, us | "
        "share of the matrix-product rate |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one, four in zip(rows[::2], rows[1::2], strict=True):
        times = one["microseconds"], four["microseconds"]
        lines.append(
            f"| {four['system']} | {four['model']} | {times[0]:.0f} | {times[1]:.0f} | {times[1] / times[0]:.2f} "
            f"| {four['mflop']:.2f} | {four['mbytes_moved']:.2f} | {four['floor_microseconds']:.0f} "
            f"| {100 * four['share_of_rate']:.0f} % |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
