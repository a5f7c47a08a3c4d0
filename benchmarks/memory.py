"""Peak memory of training on a large set and of scoring a large pool: ``python benchmarks/memory.py``.

Training: 10,000 periodic structures of 100 atoms with 54 neighbours each and made-up labels are packed, and a small
ensemble trains for one epoch.  Scoring: ``almlip score`` on pools of 10,000 and 100,000 frames of 15 atoms, medians of
several runs.  Every case runs in a fresh process, whose peak resident memory the operating system tells.
``--beside NAME=DIR`` measures another checkout of the package too.  The tables go to ``benchmarks/results/memory.json``
and ``memory.md``.
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
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

# The parent process imports nothing heavy: its own memory would count as a floor under that of its children.
if TYPE_CHECKING:
    from ase import Atoms

THIS = str(Path(__file__).resolve())
HERE = Path(THIS).parent
CUTOFF = 5.0
MIB = 2**20


# ------------------------------------------------------------------------------------------------------------- children


def crystals(count: int) -> list[Atoms]:
    """Rattled copper crystals of 100 atoms with labels that mean nothing."""
    import numpy as np
    from ase.build import bulk
    from ase.calculators.singlepoint import SinglePointCalculator

    structures, rng = [], np.random.default_rng(0)
    perfect = bulk("Cu", a=3.4) * (5, 5, 4)
    for _ in range(count):
        atoms = perfect.copy()
        atoms.positions += rng.normal(scale=0.1, size=(100, 3))
        labels = {"energy": rng.normal(), "forces": rng.normal(size=(100, 3)), "stress": rng.normal(size=6)}
        atoms.calc = SinglePointCalculator(atoms, **labels)
        structures.append(atoms)
    return structures


def clusters(count: int) -> Iterator[Atoms]:
    """Rattled rows of five water molecules."""
    import numpy as np
    from ase.build import molecule

    rng = np.random.default_rng(0)
    perfect = molecule("H2O")
    for n in range(1, 5):
        perfect += _moved(molecule("H2O"), 2.9 * n)
    for _ in range(count):
        atoms = perfect.copy()
        atoms.positions += rng.normal(scale=0.05, size=(15, 3))
        yield atoms


def _moved(atoms: Atoms, by: float) -> Atoms:
    atoms.positions[:, 0] += by
    return atoms


def train(frames: int) -> dict[str, Any]:
    """Packs and trains; the figures of both."""
    import jax

    from almlip_jax.ensembles import Ensemble
    from almlip_jax.models import SharedDensitySettings, build_model
    from almlip_jax.structures.packing import pack
    from almlip_jax.structures.species import SpeciesTable
    from almlip_jax.training import EnsembleSettings, Trainer, TrainingSettings, plan_capacity

    structures, species = crystals(frames), SpeciesTable((29,))
    found: dict[str, Any] = {"structures_mib": resident()}
    began = time.perf_counter()
    settings = TrainingSettings(batch_size=10, max_steps=1, validate_every=1, validation_fraction=0.01)
    capacity = plan_capacity(structures, CUTOFF, settings)
    found["plan_seconds"] = time.perf_counter() - began
    jax.devices()
    before, began = resident(), time.perf_counter()
    packed = pack(
        structures,
        species,
        CUTOFF,
        neighbors=capacity.batch.neighbors,
        atoms=capacity.atoms,
        slots=capacity.structures,
    )
    jax.block_until_ready(packed.data)
    found["pack_seconds"] = time.perf_counter() - began
    found["neighbor_slots"] = capacity.batch.neighbors
    found["bytes_an_atom"] = sum(leaf.nbytes for leaf in jax.tree.leaves(packed.data)) / capacity.atoms
    found["packed_mib"] = resident() - before
    found["peak_of_packing_mib"] = peak()
    del packed
    model = SharedDensitySettings(cutoff=CUTOFF, size="small", channels=4, l_max=1, hidden=(16,))
    trainer = Trainer(Ensemble(build_model(model, species), 2), species, capacity, settings, EnsembleSettings(size=2))
    began = time.perf_counter()
    result = trainer.train(structures, None, jax.random.key(0), reference_energies={29: 0.0})
    found["train_seconds"] = time.perf_counter() - began
    found["steps"] = result.history[-1].step
    return found


def make_pool(frames: int, folder: Path) -> dict[str, Any]:
    """Writes a pool, and a potential with random parameters."""
    import jax
    import numpy as np
    from ase.io import write

    from almlip_jax.ensembles import Ensemble
    from almlip_jax.models import SharedDensitySettings, build_model
    from almlip_jax.potential import Potential
    from almlip_jax.structures.species import SpeciesTable

    with (folder / "pool.extxyz").open("w") as file:
        for atoms in clusters(frames):
            write(file, atoms, format="extxyz")
    model, species = SharedDensitySettings(cutoff=CUTOFF, size="small"), SpeciesTable((1, 8))
    params = jax.tree.map(np.asarray, Ensemble(build_model(model, species), 4).init(jax.random.key(0)))
    Potential(model, species, params, {1: 0.0, 8: 0.0}).save(folder / "potential")
    return {}


def resident() -> float:
    """Resident memory of this process now, MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MIB


def peak() -> float:
    """Highest resident memory of this process so far, MiB."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# --------------------------------------------------------------------------------------------------------------- parent


def measured(command: list[str], package: Path) -> tuple[str, float, float]:
    """Standard output, peak memory in MiB and seconds of a process that uses the package in a folder."""
    environment = {**os.environ, "PYTHONPATH": str(package), "ALMLIP_CACHE_DIR": os.devnull}
    # `python -m` looks into the working folder before anywhere else
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen([sys.executable, *command], env=environment, cwd=package, stdout=output)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - began
        if process.returncode:
            sys.exit(f"{command} failed")
        output.seek(0)
        return output.read(), usage.ru_maxrss / 1024, seconds


def measure_training(frames: int, package: Path) -> dict[str, Any]:
    """One row of the table of trainings."""
    text, most, _ = measured([THIS, "--child", "train", "--frames", str(frames)], package)
    return {"frames": frames, **json.loads(text.splitlines()[-1]), "peak_mib": most}


def measure_scoring(frames: int, package: Path, repeats: int) -> dict[str, Any]:
    """One row of the table of pools."""
    with tempfile.TemporaryDirectory() as folder:
        pool, potential, out = (str(Path(folder) / name) for name in ("pool.extxyz", "potential", "scored.extxyz"))
        measured([THIS, "--child", "pool", "--frames", str(frames), "--folder", folder], package)
        command = ["-m", "almlip_jax.cli", "score", potential, pool, "--out", out]
        runs = [measured(command, package)[1:] for _ in range(repeats)]
    peaks, times = zip(*runs, strict=True)
    seconds = statistics.median(times)
    found = {"frames": frames, "seconds": seconds, "frames_per_second": frames / seconds}
    return found | {"peak_mib": statistics.median(peaks), "lowest_peak_mib": min(peaks), "highest_peak_mib": max(peaks)}


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table."""
    names = list(rows[0])
    lines = ["| " + " | ".join(name.replace("_", " ") for name in names) + " |", "|" + " --- |" * len(names)]
    for row in rows:
        cells = [f"{row[name]:.1f}" if isinstance(row[name], float) else str(row[name]) for name in names]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measures and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--training", type=int, nargs="*", default=[10_000], help="structures to train on")
    parser.add_argument("--scoring", type=int, nargs="*", default=[10_000, 100_000], help="frames to score")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each scoring")
    parser.add_argument("--beside", action="append", default=[], metavar="NAME=DIR", help="another checkout")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--child", choices=["train", "pool"], help=argparse.SUPPRESS)
    parser.add_argument("--frames", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        found = train(options.frames) if options.child == "train" else make_pool(options.frames, options.folder)
        print(json.dumps(found))
        return
    packages = dict(one.split("=", 1) for one in options.beside) | {"this": str(HERE.parent)}
    result: dict[str, list[dict[str, Any]]] = {"training": [], "scoring": []}
    for name, package in packages.items():
        for frames in options.training:
            result["training"].append({"package": name, **measure_training(frames, Path(package))})
        for frames in options.scoring:
            result["scoring"].append({"package": name, **measure_scoring(frames, Path(package), options.repeats)})
    options.out.mkdir(exist_ok=True)
    (options.out / "memory.json").write_text(json.dumps(result, indent=2) + "\n")
    text = "\n\n".join(table(rows) for rows in result.values() if rows) + "\n"
    (options.out / "memory.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
