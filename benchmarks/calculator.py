"""What a call of the ASE calculator takes above the model: ``python benchmarks/calculator.py``.

In one run and one process, in turn for each number of atoms and each committee:

- the model's own time: the compiled ensemble on a graph that lies on the device, energies, forces and virials of all
  members, with the slots that the structure needs and none more;
- a call of the calculator that moves all atoms by a hundredth of an Angstrom at a time, as a step of dynamics, and asks
  for forces; the same with every score; and for the energy alone;
- what `Potential.evaluate` takes for the same structure, which is what the calculator did before.

Members are not trained, which changes no time.  The tables go to ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from ase import Atoms
from ase.build import bulk, molecule

from almlip_jax.compilation import prepare_jax
from almlip_jax.ensembles import Ensemble
from almlip_jax.models import SharedDensitySettings, build_model
from almlip_jax.potential import Potential
from almlip_jax.precision import full_precision
from almlip_jax.structures.followed import Follower, followed_graph
from almlip_jax.structures.species import SpeciesTable

HERE = Path(__file__).resolve().parent
MEMBERS = 4


def systems() -> dict[str, Atoms]:
    """Name -> a structure near its minimum."""
    return {
        "ethanol, 9 atoms": molecule("CH3CH2OH"),
        "copper, 32 atoms": bulk("Cu", cubic=True) * (2, 2, 2),
        "silicon, 64 atoms": bulk("Si", cubic=True) * (2, 2, 2),
        "silicon, 216 atoms": bulk("Si", cubic=True) * (3, 3, 3),
    }


def potential_of(atoms: Atoms, size: str) -> Potential:
    """An untrained committee for a structure."""
    species, settings = SpeciesTable.of([atoms]), SharedDensitySettings(size=size)
    ensemble = Ensemble(build_model(settings, species), MEMBERS)
    params = jax.tree.map(np.asarray, jax.jit(ensemble.init)(jax.random.key(0)))
    return Potential(settings, species, params, dict.fromkeys(species.numbers, 0.0))


def usual_ms(call: Callable[[], object], calls: int) -> float:
    """A tenth of the calls took less than this, after some that compile: others may work on the machine."""
    for _ in range(3):
        call()
    seconds = []
    for _ in range(calls):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return 1e3 * float(np.quantile(seconds, 0.1))


def model_call(potential: Potential, atoms: Atoms) -> Callable[[], object]:
    """The ensemble alone, on a graph that is there already: no atom slot and no neighbour slot more than needed."""
    follower = Follower(potential.species, potential.cutoff, 0.0, np.dtype(np.float32))
    listed, place = follower.look(atoms, (0, 1))
    graph = jax.jit(lambda listed, place: followed_graph(listed, place, potential.cutoff))(listed, place)
    slots = int(np.asarray(graph.edge_mask).sum(axis=1).max())
    cut = {name: getattr(graph, name)[: len(atoms)] for name in ("species", "atom_mask", "structure", "positions")}
    cut |= {
        name: getattr(graph, name)[: len(atoms), :slots] for name in ("vectors", "neighbors", "edge_mask", "reverse")
    }
    graph, params = graph.replace(**cut), jax.device_put(potential.params)

    @jax.jit
    @full_precision
    def predict(params, graph):
        found = potential.ensemble.predict(params, graph)
        return found.energy, found.forces, found.virial

    return lambda: jax.block_until_ready(predict(params, graph))


def mover(atoms: Atoms) -> Callable[[], None]:
    """Moves atoms as dynamics do: to and fro, about a hundredth of an Angstrom at a time."""
    rng, home = np.random.default_rng(0), atoms.positions.copy()
    velocity = 0.005 * rng.normal(size=home.shape)

    def move() -> None:
        nonlocal velocity
        velocity = 0.98 * velocity - 0.004 * (atoms.positions - home) + 0.001 * rng.normal(size=home.shape)
        atoms.positions += velocity

    return move


def measured(name: str, start: Atoms, size: str, calls: int) -> dict[str, object]:
    """One row."""
    potential = potential_of(start, size)
    row: dict[str, object] = {"system": name, "size": size}
    row["model_ms"] = usual_ms(model_call(potential, start), calls)
    for what, ask in (
        ("forces", lambda atoms: atoms.get_forces()),
        ("scores", lambda atoms: (atoms.get_forces(), atoms.calc.results["force_std_max"])),
        ("energy", lambda atoms: atoms.get_potential_energy()),
    ):
        atoms = start.copy()
        atoms.calc = potential.calculator()
        move = mover(atoms)

        def call(atoms=atoms, move=move, ask=ask) -> None:
            move()
            ask(atoms)

        row[f"{what}_ms"] = usual_ms(call, calls)
        if what == "forces":
            row["builds_per_100_calls"] = 100 * atoms.calc.following.follower.builds / (calls + 3)
    atoms, move = start.copy(), mover(start.copy())
    row["evaluate_ms"] = usual_ms(lambda: potential.evaluate([atoms]), max(calls // 10, 5))
    row["model_again_ms"] = usual_ms(model_call(potential, start), calls)
    own = 0.5 * (row["model_ms"] + row["model_again_ms"])
    row["above_ms"], row["above_with_scores_ms"] = row["forces_ms"] - own, row["scores_ms"] - own
    row["faster_than_before"] = row["evaluate_ms"] / row["scores_ms"]
    return row


def main() -> None:
    """Measures and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=300)
    parser.add_argument("--sizes", default="tiny,medium")
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    prepare_jax()
    rows = [
        measured(name, atoms, size, options.calls)
        for size in options.sizes.split(",")
        for name, atoms in systems().items()
        if options.only in name
    ]
    result = {"cpus": os.cpu_count(), "machine": platform.processor(), "jax": jax.__version__, "members": MEMBERS}
    result["device"] = f"{len(jax.devices())} x {jax.devices()[0].device_kind}"
    (HERE / "results" / "calculator.json").write_text(json.dumps(result | {"rows": rows}, indent=2) + "\n")
    (HERE / "results" / "calculator.md").write_text(table(rows, result["device"]))
    print(table(rows, result["device"]))


def table(rows: list[dict[str, object]], device: str) -> str:
    """The page."""
    lines = [
        "# The ASE calculator",
        "",
        f"Milliseconds a call, {MEMBERS} members, {device}; a tenth of the calls took less.  `above` is what",
        "a call for forces takes above the model, `calls/s` with scores now and as `Potential.evaluate` would give",
        "them; `python benchmarks/calculator.py`.",
        "",
        "| system | model | the model itself | forces | forces, scores | energy | above | calls/s | before |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        own = 0.5 * (row["model_ms"] + row["model_again_ms"])
        times = [own, row["forces_ms"], row["scores_ms"], row["energy_ms"], row["above_ms"]]
        rates = [1e3 / row["scores_ms"], 1e3 / row["evaluate_ms"]]
        cells = [row["system"], row["size"], *(f"{x:.2f}" for x in times), *(f"{x:.0f}" for x in rates)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
