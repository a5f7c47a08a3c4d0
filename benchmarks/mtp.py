"""The moment tensor potential beside motep: ``python benchmarks/mtp.py --envs DIR``.

The peer has a virtual environment of its own, made from PyPI where it is missing, and reads the files that we write.
Energy, forces and stress of 64 atoms of silicon (rattled by 0.1 Angstrom, cutoff 5 Angstrom), one thread, in calls that
move the atoms a little, so that lists of neighbours stay: ours compiled from positions on, with one and four members;
the peer's ASE calculator, and what is inside it, its C code with neighbours given.  Both processes are held to one core
(``--core``, the last one by default), on which they take turns: leave it to them, and the machine idle.  Times are of
the process, in rounds that take turns; of each the least over rounds of the median of its calls.  Results go to
``benchmarks/results/mtp.json`` and ``mtp.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false"

import jax
import jax.numpy as jnp
import numpy as np
from ase import Atoms
from ase.build import bulk

from almlip_jax.compilation import prepare_jax
from almlip_jax.ensembles import EnsembleSettings, build_ensemble
from almlip_jax.models import MtpSettings
from almlip_jax.potential import Potential
from almlip_jax.potential.mtp_files import save_mtp
from almlip_jax.precision import full_precision
from almlip_jax.structures.species import SpeciesTable
from almlip_jax.structures.walkers import walker_neighbors

HERE = Path(__file__).resolve().parent
MOTEP, SPECIES, CUTOFF, SKIN = "0.2.0", SpeciesTable((14,)), 5.0, 0.3


def environment(folder: Path) -> Path:
    """Python of the peer's environment, which is made where it is missing."""
    python = folder / "motep" / "bin" / "python"
    if not python.exists() or subprocess.run([str(python), "-c", "import motep"], capture_output=True).returncode:
        subprocess.run([sys.executable, "-m", "venv", str(folder / "motep")], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", f"motep=={MOTEP}"], check=True)
    return python


def held_to(core: int | None) -> str:
    """Holds this process, and those that it starts, to one core; says what was done, where the system can do it."""
    if not hasattr(os, "sched_setaffinity"):
        return "not held to a core, which this system does not do"
    os.sched_setaffinity(0, [max(os.sched_getaffinity(0)) if core is None else core])
    return "both processes held to one core, on which they take turns"


def silicon() -> Atoms:
    """64 atoms."""
    atoms = bulk("Si", "diamond", a=5.43, cubic=True) * 2
    atoms.rattle(0.1, seed=0)
    return atoms


def potential_of(level: int, members: int) -> Potential:
    """With random coefficients, the same for the first member of each."""
    settings, ensemble = MtpSettings(level=level, cutoff=CUTOFF, min_dist=1.8), EnsembleSettings(size=members)
    built = build_ensemble(settings, ensemble, SPECIES)
    params = built.standardise(built.init(jax.random.key(0)), built.survey(graph_of(built, jnp.float64)), 1.0)
    rng = np.random.default_rng(level)
    fresh = {name: 0.3 * rng.normal(size=(4, *params[name].shape[1:]))[:members] for name in ("radial", "moment")}
    return Potential(settings, SPECIES, params | fresh, {14: -5.0}, members=ensemble)


def graph_of(ensemble: Any, dtype: Any) -> Any:
    """The structure, as it stands."""
    return lists(ensemble.cutoff, dtype).graph(*arguments(silicon().positions, dtype))


def lists(cutoff: float, dtype: Any) -> Any:
    """Its neighbours."""
    atoms = silicon()
    cell, everywhere = jnp.asarray(atoms.cell.array[None], dtype), np.ones((1, 3), bool)
    places = jnp.asarray(atoms.positions[None], dtype)
    return walker_neighbors(places, cell, everywhere, np.ones((1, len(atoms)), bool), cutoff, SKIN)


def arguments(positions: np.ndarray, dtype: Any) -> tuple[jax.Array, ...]:
    """Positions, species, charge and spin of the one walker."""
    places = jnp.asarray(positions[None], dtype)
    return places, jnp.zeros(places.shape[:2], jnp.int32), jnp.zeros(1, dtype), jnp.ones(1, dtype)


def compiled(potential: Potential, dtype: Any) -> tuple[Callable[[np.ndarray], Any], float]:
    """Energy, forces and virial of all members as a function of positions, and seconds of its compilation."""
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), potential.params)
    neighbors, ensemble = lists(potential.cutoff, dtype), potential.ensemble

    def evaluate(params: Any, places: jax.Array, *rest: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        found = ensemble.predict(params, neighbors.graph(places, *rest))
        return found.energy, found.forces, found.virial

    given = arguments(silicon().positions, dtype)
    began = time.process_time()
    program = jax.jit(full_precision(evaluate)).lower(params, *given).compile()
    seconds = time.process_time() - began
    return lambda positions: jax.block_until_ready(
        program(params, jnp.asarray(positions[None], dtype), *given[1:])
    ), seconds


def timed(call: Callable[[np.ndarray], Any], calls: int) -> float:
    """Median seconds of the process."""
    start, seconds = silicon().positions, []
    for n in range(calls):
        positions = start + 1e-4 * np.sin(n + np.arange(start.size).reshape(start.shape))
        began = time.process_time()
        call(positions)
        seconds.append(time.process_time() - began)
    return statistics.median(seconds)


class Peer:
    """A process of the peer, which is asked for calls."""

    def __init__(self, python: Path) -> None:
        command = [str(python), str(HERE / "mtp_worker.py")]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, file: Path, calls: int) -> dict[str, Any]:
        """What ``mtp_worker.py`` answers."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{file} {calls}\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer


def measured(peer: Peer, folder: Path, level: int, rounds: int, calls: int) -> dict[str, Any]:
    """One row of the table, in microseconds an atom."""
    atoms, one, four = silicon(), potential_of(level, 1), potential_of(level, 4)
    (file,) = save_mtp(one, folder / f"level_{level}.mtp")
    structure = {"numbers": atoms.numbers, "positions": atoms.positions, "cell": atoms.cell.array}
    told = {name: values.tolist() for name, values in structure.items()} | {"pbc": True}
    (folder / "structure.json").write_text(json.dumps(told))
    theirs = peer.ask(file, 1)
    single, seconds = compiled(one, jnp.float64)
    energy, forces, virial = (np.asarray(found)[0] for found in single(atoms.positions))
    stress = -virial[0][[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]] / atoms.get_volume()
    ours = {"energy": energy - 5.0 * len(atoms), "forces": forces, "stress": stress}
    apart = {name: np.max(np.abs(value - theirs[name])) / np.max(np.abs(value)) for name, value in ours.items()}
    candidates = {
        "ours": single,
        "ours, 4 members": compiled(four, jnp.float64)[0],
        "ours, float32": compiled(one, jnp.float32)[0],
    }
    times: dict[str, list[float]] = {name: [] for name in [*candidates, "motep, calculator", "motep, inside"]}
    for _ in range(rounds):
        for name, call in candidates.items():
            times[name].append(timed(call, calls))
        answer = peer.ask(file, calls)
        times["motep, calculator"].append(statistics.median(answer["seconds"]))
        times["motep, inside"].append(statistics.median(answer["inside"]))
    least = {name: 1e6 * min(found) / len(atoms) for name, found in times.items()}
    return {
        "level": level,
        **least,
        "ours / motep inside": least["ours"] / least["motep, inside"],
        "4 members / 1": least["ours, 4 members"] / least["ours"],
        "compilation, s": seconds,
        "largest relative difference": float(max(apart.values())),
        "motep": answer["version"],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "cores of motep": answer["cores"],
        "jax": jax.__version__,
    }


def main() -> None:
    """Measures every level and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--envs", type=Path, required=True, help="folder for the peer's environment")
    parser.add_argument("--levels", type=int, nargs="*", default=[8, 16, 20])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--calls", type=int, default=20)
    parser.add_argument("--core", type=int, help="number of the core; the last one that there is by default")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    options = parser.parse_args()
    held = held_to(options.core)  # before jax counts cores
    prepare_jax("float64")
    peer = Peer(environment(options.envs.resolve()))
    with tempfile.TemporaryDirectory() as name:
        rows = [measured(peer, Path(name), level, options.rounds, options.calls) for level in options.levels]
    (options.results / "mtp.json").write_text(json.dumps(rows, indent=2) + "\n")
    shown = [name for name in rows[0] if name not in ("motep", "jax", "cores", "cores of motep")]
    lines = ["# The moment tensor potential beside motep", ""]
    versions = f"motep {rows[0]['motep']}, jax {rows[0]['jax']}"
    lines += [f"{versions}; {held}.  Microseconds of the process an atom and call.", ""]
    lines += ["| " + " | ".join(shown) + " |", "| --- " * len(shown) + "|"]
    for row in rows:
        cells = (f"{row[name]:.3g}" if isinstance(row[name], float) else str(row[name]) for name in shown)
        lines.append("| " + " | ".join(cells) + " |")
    (options.results / "mtp.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
