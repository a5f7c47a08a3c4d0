"""What a gated exploration step costs: ``python benchmarks/exploration.py --data DIR``.

Programs move the same walkers with the same four members: the whole gated step (every committee score, sanity as it is
by default with its search for dissociation, gate, recorder, traces), a plain step on the mean of the member forces, and
a step on the gradient of the mean energy alone; a fourth is the gated step with one of the members.  Floating-point
work is what XLA counts in one compiled step, on one device (both branches of every condition counted); times are of
loops of many steps, the programs in turn, as medians over rounds.  Then the throughput for 1, 8 and 64 walkers.
Systems: one acetylacetone molecule (acac, 15 atoms), eight of them (120 atoms, open) and 64 atoms of silicon, cutoff 5
Angstrom, 0.5 fs, float32;
parameters are random and energies scaled to next to nothing, since the time of a step does not depend on their values.
``--systems`` and ``--models`` choose.  Results go to ``benchmarks/results/exploration.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.io import read

from almlip_jax.compilation import prepare_jax
from almlip_jax.dynamics import ExplorationSettings, Explorer, Status, WalkerGroup
from almlip_jax.dynamics.motion import Evaluation
from almlip_jax.dynamics.sanity import looks_for_fragments
from almlip_jax.dynamics.state import Setup, State
from almlip_jax.ensembles import Ensemble, gathered
from almlip_jax.models import Params, SharedDensitySettings, build_model
from almlip_jax.structures.graph import Graph, Places, forces_and_virial
from almlip_jax.structures.species import SpeciesTable
from almlip_jax.structures.walkers import walker_neighbors

HERE = Path(__file__).resolve().parent
MEMBERS, WALKERS = 4, (1, 8, 64)
STEPS = {"acac": 2000, "Si64": 500, "acac8": 300}
KELVIN = 0.1  # walkers hardly move


def system(name: str, data: Path) -> Atoms:
    """Start structure."""
    if name.startswith("acac"):
        molecule = read(data / "acac" / "test_MD_300K.xyz", "0")
        molecule = Atoms(molecule.numbers, molecule.positions)
        if name == "acac":
            return molecule
        molecule.set_cell(np.ptp(molecule.positions, axis=0) + 3.0)
        eight = molecule.repeat((2, 2, 2))
        return Atoms(eight.numbers, eight.positions)
    return bulk("Si", "diamond", a=5.43, cubic=True) * (2, 2, 2)


def mean_of_forces(ensemble: Ensemble) -> Callable[[Params, Graph], jax.Array]:
    """Mean member forces, from one reverse pass for each member."""

    def forces(params: Params, graph: Graph) -> jax.Array:
        return jnp.mean(gathered(ensemble.predict)(params, graph).forces, axis=0)

    return forces


def forces_of_mean(ensemble: Ensemble) -> Callable[[Params, Graph], jax.Array]:
    """Forces of the mean energy, from one reverse pass for all members."""

    def forces(params: Params, graph: Graph) -> jax.Array:
        def energy(vectors: jax.Array) -> jax.Array:
            return jnp.sum(jnp.mean(ensemble.energies(params, replace(graph, vectors=vectors)), axis=0))

        return forces_and_virial(Places(jax.grad(energy)(graph.vectors)), graph)[0]

    return forces


def graph_of(start: Atoms, ensemble: Ensemble) -> Graph:
    """The graph of one structure, off its symmetric places, where some features would not vary."""
    start = start.copy()
    start.rattle(0.1, seed=0)
    one = np.ones((1, len(start)), bool)
    positions = jnp.asarray(start.positions[None], jnp.float32)
    neighbors = walker_neighbors(positions, start.cell.array[None], start.pbc[None], one, ensemble.cutoff, 0.5)
    neutral = jnp.zeros(1, positions.dtype)
    return neighbors.graph(positions, jnp.asarray(ensemble.species.index(start.numbers))[None], neutral, neutral + 1)


def plain_step(explorer: Explorer, forces: Callable[..., Any]) -> Callable[..., State]:
    """A step of the same integrator and neighbour list, and nothing else."""
    loop = explorer.loop(find_fragments=False)

    def step(params: Params, state: State, setup: Setup) -> State:
        at = setup.drive.at(jnp.zeros((), state.motion.position.dtype))
        moved = loop.integrator.to_force(state.motion, at, state.step)
        neighbors = state.neighbors.update(moved.position)
        mean = forces(params, neighbors.graph(moved.position, setup.species, setup.charge, setup.spin))
        none = jnp.zeros(0)
        found = Evaluation(none, mean.reshape(moved.position.shape), jnp.zeros_like(moved.virial), none, none)
        moved = loop.integrator.from_force(moved, found, at)
        return replace(state, motion=moved, neighbors=neighbors, step=state.step + 1)

    return step


def gated_step(explorer: Explorer, start: Atoms) -> Callable[..., State]:
    """A step of the exploration, with all that it does by default."""
    loop = explorer.loop(find_fragments=looks_for_fragments(explorer.settings.sanity, start.pbc[None], len(start)))

    def step(params: Params, state: State, setup: Setup) -> State:
        return loop._step(params, state, setup, loop.tracing.empty(state), jnp.zeros((), jnp.int32))[0]

    return step


def many(step: Callable[..., State], steps: int) -> Callable[..., State]:
    """A loop of steps, compiled."""

    def run(params: Params, state: State, setup: Setup) -> State:
        return jax.lax.while_loop(
            lambda s: s.step < steps, lambda s: step(params, s, setup), replace(state, step=jnp.zeros_like(state.step))
        )

    return jax.jit(run)


def explorer_of(ensemble: Ensemble, walkers: int, steps: int) -> Explorer:
    """An explorer of some walkers that hardly move."""
    settings = ExplorationSettings(
        walkers=(WalkerGroup(temperature=KELVIN, count=walkers),),
        steps=steps,
        chunk=500,
    )
    return Explorer(ensemble.predict, ensemble.species, ensemble.cutoff, settings)


def cost_of_a_step(ensemble: Ensemble, params: Params, start: Atoms, steps: int, rounds: int) -> dict[str, Any]:
    """Work and time of the steps, and the ratios to the plain one and to the gated one of a single member."""
    explorer = explorer_of(ensemble, 1, steps)
    session = explorer.begin(params, [start], (np.inf, np.inf), jax.random.key(0))
    single = replace(ensemble, size=1)
    explorer_of_one = explorer_of(single, 1, steps)
    first = jax.tree.map(lambda x: x[:1], params)
    session_of_one = explorer_of_one.begin(first, [start], (np.inf, np.inf), jax.random.key(0))
    programs = {
        "gated": (gated_step(explorer, start), session),
        "plain": (plain_step(explorer, mean_of_forces(ensemble)), session),
        "mean_energy": (plain_step(explorer, forces_of_mean(ensemble)), session),
        "one_member": (gated_step(explorer_of_one, start), session_of_one),
    }
    row: dict[str, Any] = {}
    loops = {}
    for name, (step, run) in programs.items():
        arguments = (run.params, run.state, run.setup)
        row[f"flops_{name}"] = jax.jit(step).lower(*arguments).compile().cost_analysis()["flops"]
        loops[name] = partial(many(step, steps), *arguments)
        jax.block_until_ready(loops[name]())
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, loop in loops.items():
            began = time.perf_counter()
            jax.block_until_ready(loop())
            seconds[name].append(time.perf_counter() - began)
    for name, values in seconds.items():
        row[f"steps_per_second_{name}"] = steps / statistics.median(values)
    row["work_ratio"] = row["flops_gated"] / row["flops_plain"]
    row["time_ratio"] = row["steps_per_second_plain"] / row["steps_per_second_gated"]
    row["time_ratio_to_mean_energy"] = row["steps_per_second_mean_energy"] / row["steps_per_second_gated"]
    row["time_ratio_to_one_member"] = row["steps_per_second_one_member"] / row["steps_per_second_gated"]
    return row


def throughput(ensemble: Ensemble, params: Params, start: Atoms, steps: int, rounds: int) -> dict[str, float]:
    """Walker-steps per second of whole runs, results on the host included."""
    row = {}
    for walkers in WALKERS:
        planned = max(steps // walkers, 100)
        explorer = explorer_of(ensemble, walkers, planned)
        seconds = []
        for n in range(rounds + 1):
            began = time.perf_counter()
            found = explorer.run(params, [start] * walkers, (np.inf, np.inf), jax.random.key(n))
            seconds.append(time.perf_counter() - began)
            assert set(found.status) == {Status.COMPLETED}
        row[f"walkers_{walkers}"] = walkers * planned / statistics.median(seconds[1:])
    return row


def table(found: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "# A step of exploration",
        "",
        f"{found['device']}, {found['cpus']} cpus, jax {found['jax']}, load {found['load']:.1f}; four members, work of "
        "one device.",
        "",
        "| system | model | MFLOP gated / plain | work ratio | steps/s gated | time ratio to plain "
        "| to the mean energy | four members to one | walker-steps/s for 1 / 8 / 64 walkers |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in found["rows"]:
        rates = " / ".join(f"{row[f'walkers_{w}']:.0f}" for w in WALKERS)
        lines.append(
            f"| {row['system']} | {row['model']} | {row['flops_gated'] / 1e6:.2f} / {row['flops_plain'] / 1e6:.2f} "
            f"| {row['work_ratio']:.3f} | {row['steps_per_second_gated']:.0f} | {row['time_ratio']:.3f} "
            f"| {row['time_ratio_to_mean_energy']:.3f} | {row['time_ratio_to_one_member']:.3f} | {rates} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("ALMLIP_DATA_DIR"), help="reference data")
    parser.add_argument("--models", nargs="*", default=["tiny", "small", "medium"])
    parser.add_argument("--systems", nargs="*", default=list(STEPS), choices=list(STEPS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--label", default="exploration", help="name of the result files")
    options = parser.parse_args()
    if options.data is None:
        parser.error("give the folder of the reference data with --data or ALMLIP_DATA_DIR.")
    prepare_jax()
    found: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "cpus": os.cpu_count(),
        "jax": jax.__version__,
        "load": os.getloadavg()[0],
        "rows": [],
    }
    for name in options.systems:
        steps = STEPS[name]
        start = system(name, Path(options.data))
        for size in options.models:
            model = build_model(SharedDensitySettings(size=size, cutoff=5.0), SpeciesTable.of([start]))
            ensemble = Ensemble(model, MEMBERS)
            params = ensemble.standardise(
                ensemble.init(jax.random.key(0)), ensemble.survey(graph_of(start, ensemble)), 1e-6
            )
            row = {"system": name, "model": size}
            row |= cost_of_a_step(ensemble, params, start, steps, options.rounds)
            row |= throughput(ensemble, params, start, steps, max(options.rounds // 2, 1))
            found["rows"].append(row)
            print({key: round(v, 3) if isinstance(v, float) else v for key, v in row.items()}, flush=True)
    path = HERE / "results" / f"{options.label}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    path.with_suffix(".md").write_text(table(found))


if __name__ == "__main__":
    main()
