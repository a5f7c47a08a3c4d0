"""What many atoms cost: ``python benchmarks/large.py``.

Gated steps of dynamics, recording nothing, of silicon with 64 to 4,096 atoms, cutoff 5 Angstrom, skin 0.5 Angstrom:
time for each atom and step, as medians over rounds in which the programs take turns, and its ratio to that of 64 atoms.
Atoms move as at 300 K with random forces of next to nothing, so that lists are rebuilt as often as they would be.  Then
one build of the neighbour list, through bins and over all pairs, and that of jax-md's cell list where it is installed;
the share that builds have in a step.  Last, 50,000 atoms in a process of their own: its highest resident memory, which
is meant to stay below 24 GB.  All on one device, since with several the smallest structures mostly wait for each other.
Results go to ``benchmarks/results/large.json`` and ``.md``.
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

if "--devices" not in sys.argv:
    os.environ.setdefault("JAX_NUM_CPU_DEVICES", "1")

import jax
import jax.numpy as jnp
import numpy as np
from ase import Atoms
from ase.build import bulk

from almlip_jax.compilation import prepare_jax
from almlip_jax.dynamics import ExplorationSettings, Explorer, WalkerGroup
from almlip_jax.ensembles import Ensemble
from almlip_jax.models import SharedDensitySettings, build_model
from almlip_jax.models.constants import with_constants
from almlip_jax.structures import walkers
from almlip_jax.structures.species import SpeciesTable

HERE = Path(__file__).resolve().parent
CUTOFF, SKIN, KELVIN = 5.0, 0.5, 300.0
SIDES = (2, 4, 8)  # cubic cells of 8 atoms along each side: 64, 512 and 4,096 atoms
CASES = (("tiny", 1), ("tiny", 4), ("small", 1), ("small", 4))  # size of the model, members
STEPS = (200, 200, 100)
LARGEST = (18, 18, 20)  # 51,840 atoms
MOST_BYTES = 24e9


def silicon(cells: tuple[int, int, int]) -> Atoms:
    """Rattled diamond."""
    atoms = bulk("Si", "diamond", a=5.43, cubic=True) * cells
    atoms.rattle(0.05, seed=0)
    return atoms


def explorer_of(ensemble: Ensemble, steps: int) -> Explorer:
    """One walker that nothing stops and nothing records."""
    group = WalkerGroup(temperature=KELVIN)
    settings = ExplorationSettings(
        walkers=(group,), steps=steps, chunk=steps, trajectory_every=steps, buffer=1, skin=SKIN
    )
    return Explorer(ensemble.predict, ensemble.species, ensemble.cutoff, settings)


def ensemble_of(size: str, members: int) -> tuple[Ensemble, Any]:
    """An ensemble whose forces are next to nothing."""
    ensemble = Ensemble(build_model(SharedDensitySettings(size=size, cutoff=CUTOFF), SpeciesTable((14,))), members)
    params = ensemble.init(jax.random.key(0))
    return ensemble, with_constants(params, energy_scale=1e-6)


def steps_of(ensemble: Ensemble, params: Any, atoms: Atoms, steps: int) -> Callable[[], float]:
    """Seconds for each atom and step of a run."""
    explorer = explorer_of(ensemble, steps)
    session = explorer.begin(params, [atoms], (np.inf, np.inf), jax.random.key(0))
    run = partial(session._run_chunk, session.params, session.state, session.setup)

    def timed() -> float:
        began = time.perf_counter()
        state, _ = jax.block_until_ready(run())
        seconds = time.perf_counter() - began
        assert int(state.step) == steps and not bool(state.neighbors.overflow)
        return seconds / steps / len(atoms)

    return timed


def builds_of(atoms: Atoms, many: int) -> Callable[[], float]:
    """Seconds of a build for each atom, through bins or over all pairs."""
    kept, walkers._MANY = walkers._MANY, many
    positions, mask = jnp.asarray(atoms.positions[None], jnp.float32), np.ones((1, len(atoms)), bool)
    found = walkers.walker_neighbors(positions, atoms.cell.array[None], atoms.pbc[None], mask, CUTOFF, SKIN)
    walkers._MANY = kept

    def timed() -> float:
        began = time.perf_counter()
        jax.block_until_ready(walkers._rebuilt(found, positions))
        return (time.perf_counter() - began) / len(atoms)

    return timed


def build_of_jax_md(atoms: Atoms) -> Callable[[], float]:
    """Seconds of a build of its dense list for each atom; the cube of silicon is what its cell list serves."""
    from jax_md import partition, space

    side = float(atoms.cell.array[0, 0])
    displacement, _ = space.periodic(side)
    positions = jnp.asarray(atoms.get_positions(wrap=True), jnp.float32)
    lists = partition.neighbor_list(displacement, side, CUTOFF + SKIN, 0.0, format=partition.Dense)
    held = lists.allocate(positions)
    update = jax.jit(lambda held, positions: held.update(positions))
    moved = positions + 1e-3

    def timed() -> float:
        began = time.perf_counter()
        jax.block_until_ready(update(held, moved).idx)
        return (time.perf_counter() - began) / len(atoms)

    return timed


def medians(programs: dict[Any, Callable[[], float]], rounds: int) -> dict[Any, float]:
    """Microseconds, the programs in turn; the first round does not count."""
    seconds: dict[Any, list[float]] = {name: [] for name in programs}
    for _ in range(rounds + 1):
        for name, program in programs.items():
            seconds[name].append(program())
    return {name: 1e6 * statistics.median(values[1:]) for name, values in seconds.items()}


def rebuilds_of(atoms: Atoms) -> float:
    """Steps of dynamics between two builds."""
    ensemble, params = ensemble_of("tiny", 1)
    explorer = explorer_of(ensemble, 10)
    session = explorer.begin(params, [atoms], (np.inf, np.inf), jax.random.key(0))
    step = jax.jit(explorer.loop(find_fragments=False).moved)
    state, builds, steps = session.state, 0, 100
    at = session.setup.drive.at(jnp.zeros(()))
    for _ in range(steps):
        done = step(session.params, state, session.setup, at)
        builds += int(jnp.any(done.neighbors.built_at != state.neighbors.built_at))
        state = state.replace(motion=done.motion, neighbors=done.neighbors, step=state.step + 1)
    return steps / max(builds, 1)


def largest() -> dict[str, Any]:
    """A child's work: some steps of many atoms."""
    import resource

    ensemble, params = ensemble_of("small", 4)
    atoms, steps = silicon(LARGEST), 10
    began = time.perf_counter()
    timed = steps_of(ensemble, params, atoms, steps)
    ready = time.perf_counter() - began
    timed()
    seconds = statistics.median(timed() for _ in range(3))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "atoms": len(atoms),
        "model": "small",
        "members": 4,
        "us_per_atom_and_step": 1e6 * seconds,
        "start_seconds": ready,
        "peak_bytes": most,
    }


def table(found: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "# Many atoms",
        "",
        f"{found['device']}, {found['cpus']} cpus, jax {found['jax']}, load {found['load']:.1f}: silicon, cutoff 5",
        "Angstrom, skin 0.5 Angstrom, float32, one device.  Written by `benchmarks/large.py`, whose text says what is",
        "measured.",
        "",
        "| model | members | " + " | ".join(f"{n} atoms, us/atom" for n in found["sizes"]) + " | last to first |",
        "| --- | --- |" + " --- |" * (len(found["sizes"]) + 1),
    ]
    for row in found["steps"]:
        times = " | ".join(f"{value:.2f}" for value in row["us"])
        lines.append(f"| {row['model']} | {row['members']} | {times} | {row['us'][-1] / row['us'][0]:.2f} |")
    lines += [
        "",
        f"A list is built anew every {found['steps_between_builds']:.0f} steps at 300 K; builds, us an atom:",
        "",
    ]
    lines += ["| atoms | through bins | all pairs | jax-md's cell list |", "| --- | --- | --- | --- |"]
    for row in found["builds"]:
        cells = [f"{row[name]:.1f}" if name in row else "-" for name in ("bins", "pairs", "jax_md")]
        lines.append(f"| {row['atoms']} | " + " | ".join(cells) + " |")
    most = found["largest"]
    lines += [
        "",
        f"{most['atoms']:,} atoms, {most['members']} members of `{most['model']}`: {most['us_per_atom_and_step']:.1f}"
        f" us an atom and step, highest resident memory {most['peak_bytes'] / 1e9:.1f} GB of {MOST_BYTES / 1e9:.0f}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measures and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--devices", action="store_true", help="all devices there are, not one")
    parser.add_argument("--largest", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    prepare_jax()
    if options.largest:
        print(json.dumps(largest()))
        return
    systems = [silicon((n, n, n)) for n in SIDES]
    sizes = [len(atoms) for atoms in systems]
    device = jax.devices()[0].device_kind
    found: dict[str, Any] = {
        "device": device,
        "cpus": os.cpu_count(),
        "jax": jax.__version__,
        "load": os.getloadavg()[0],
    }
    found |= {"sizes": sizes, "steps": [], "builds": []}
    for size, members in CASES:
        ensemble, params = ensemble_of(size, members)
        cases = zip(sizes, systems, STEPS, strict=True)
        programs = {n: steps_of(ensemble, params, atoms, steps) for n, atoms, steps in cases}
        row = {"model": size, "members": members, "us": list(medians(programs, options.rounds).values())}
        found["steps"].append(row)
        print(row, flush=True)
    builds: dict[tuple[int, str], Callable[[], float]] = {}
    for n, atoms in zip(sizes, systems, strict=True):
        builds[n, "bins"], builds[n, "pairs"] = builds_of(atoms, 1), builds_of(atoms, 10**9)
        if n > 64:
            builds[n, "jax_md"] = build_of_jax_md(atoms)
    measured = medians(builds, options.rounds)
    found["builds"] = [{"atoms": n, **{kind: us for (of, kind), us in measured.items() if of == n}} for n in sizes]
    found["steps_between_builds"] = rebuilds_of(systems[1])
    command = [sys.executable, __file__, "--largest", *(["--devices"] if options.devices else [])]
    found["largest"] = json.loads(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    )
    options.out.mkdir(exist_ok=True)
    (options.out / "large.json").write_text(json.dumps(found, indent=1) + "\n")
    (options.out / "large.md").write_text(table(found))
    print(table(found))


if __name__ == "__main__":
    main()
