"""The power spectrum beside dscribe's SOAP: ``python benchmarks/descriptors.py --data DIR --envs DIR``.

The peer has a virtual environment of its own, made from PyPI where it is missing.  Both describe the same structures
with the same cutoff and the same numbers of radial functions and degrees, one row a structure (mean over its atoms), on
one thread; seconds are medians.  What a row is worth is asked of a ridge regression of the energy per atom on the rows
of the training structures, its penalty from five-fold cross-validation: the error on test structures.  Results go to
``benchmarks/results/descriptors.json`` and ``descriptors.md``.
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
from pathlib import Path
from typing import Any

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false"

import jax
import numpy as np
from ase import Atoms

from almlip_jax.compilation import prepare_jax
from almlip_jax.ensembles import EnsembleSettings, build_ensemble
from almlip_jax.features import FeatureRequest
from almlip_jax.features.power_spectrum import L_MAX, RADIAL
from almlip_jax.models import SharedDensitySettings
from almlip_jax.potential import Potential
from almlip_jax.structures.io import read_structures
from almlip_jax.structures.species import SpeciesTable

HERE = Path(__file__).resolve().parent
SYSTEMS = {
    "acac": ("acac/train_600K.xyz", "acac/test_MD_600K.xyz"),
    "Si": ("mlearn/Si_train.extxyz", "mlearn/Si_test.extxyz"),
}
CUTOFF, REPEATS = 5.0, 5
PENALTIES = 10.0 ** np.arange(-12, 1)


def environment(folder: Path) -> Path:
    """Python of the peer's environment, which is made where it is missing."""
    python = folder / "dscribe" / "bin" / "python"
    if not python.exists() or subprocess.run([str(python), "-c", "import dscribe"], capture_output=True).returncode:
        subprocess.run([sys.executable, "-m", "venv", str(folder / "dscribe")], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", "dscribe"], check=True)
    return python


def peer(python: Path, frames: list[Atoms]) -> tuple[np.ndarray, float, str]:
    """Rows [n, d], median seconds and version of dscribe."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        species = sorted({symbol for frame in frames for symbol in frame.get_chemical_symbols()})
        request = {"species": species, "cutoff": CUTOFF, "radial": RADIAL, "l_max": L_MAX, "repeats": REPEATS}
        (folder / "request.json").write_text(json.dumps(request))
        plain = [
            {
                "numbers": frame.numbers.tolist(),
                "positions": frame.positions.tolist(),
                "cell": frame.cell.array.tolist(),
                "pbc": frame.pbc.tolist(),
            }
            for frame in frames
        ]
        (folder / "structures.json").write_text(json.dumps(plain))
        command = [str(python), str(HERE / "descriptors_worker.py"), str(folder)]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        found = json.loads((folder / "seconds.json").read_text())
        return np.load(folder / "rows.npy"), statistics.median(found["seconds"]), found["version"]


def ours(frames: list[Atoms]) -> tuple[np.ndarray, float, float]:
    """Rows [n, 512], median seconds of a whole evaluation that gives them, and of the same without them.

    Neighbours are found in both; the ensemble is the smallest there is, so that the difference is the descriptor's.
    """
    model = SharedDensitySettings(cutoff=CUTOFF, size="tiny")
    species = SpeciesTable(tuple(sorted({int(z) for frame in frames for z in frame.numbers})))
    params = build_ensemble(model, EnsembleSettings(size=1), species).init(jax.random.key(0))
    potential = Potential(model, species, params, dict.fromkeys(species.numbers, 0.0))
    request = FeatureRequest(("power_spectrum",))
    times: dict[bool, list[float]] = {True: [], False: []}
    rows = np.zeros(0)
    for _ in range(REPEATS + 1):  # the first compiles
        for described in (True, False):
            began = time.perf_counter()
            found = potential.evaluate(frames, features=request if described else FeatureRequest())
            times[described].append(time.perf_counter() - began)
            rows = found.features.get("power_spectrum", rows)
    return rows, statistics.median(times[True][1:]), statistics.median(times[False][1:])


def energies(frames: list[Atoms]) -> np.ndarray:
    """Energy per atom, eV."""
    return np.array([frame.get_potential_energy() / len(frame) for frame in frames])


def regression_error(rows: np.ndarray, values: np.ndarray, test_rows: np.ndarray, test_values: np.ndarray) -> float:
    """Root mean square test error of a ridge regression whose penalty five-fold cross-validation chose."""
    x, scale = rows.astype(float), np.sqrt(np.mean(np.sum((rows - rows.mean(0)) ** 2, axis=1)))
    folds = np.arange(len(x)) % 5

    def predict(train: np.ndarray, y: np.ndarray, wanted: np.ndarray, penalty: float) -> np.ndarray:
        centre = train.mean(0)
        a = (train - centre) / scale
        weights = np.linalg.solve(a @ a.T + penalty * len(a) * np.eye(len(a)), y - y.mean())
        return (wanted - centre) / scale @ a.T @ weights + y.mean()

    def validated(penalty: float) -> float:
        parts = [predict(x[folds != f], values[folds != f], x[folds == f], penalty) for f in range(5)]
        return float(np.mean([np.mean((p - values[folds == f]) ** 2) for f, p in enumerate(parts)]))

    best = min(PENALTIES, key=validated)
    return float(np.sqrt(np.mean((predict(x, values, test_rows.astype(float), best) - test_values) ** 2)))


def measured(python: Path, data: Path, system: str) -> dict[str, Any]:
    """One row of the table."""
    train, test = (read_structures(data / file) for file in SYSTEMS[system])
    frames = [*train, *test]
    theirs, seconds, version = peer(python, frames)
    own, described, plain = ours(frames)
    number = len(train)
    values = energies(train), energies(test)
    return {
        "system": system,
        "structures": len(frames),
        "atoms": sum(len(frame) for frame in frames),
        "ours_seconds": described - plain,
        "ours_with_neighbours_and_energies_seconds": described,
        "dscribe_seconds": seconds,
        "ours_columns": own.shape[1],
        "dscribe_columns": theirs.shape[1],
        "ours_mev_per_atom": 1e3 * regression_error(own[:number], values[0], own[number:], values[1]),
        "dscribe_mev_per_atom": 1e3 * regression_error(theirs[:number], values[0], theirs[number:], values[1]),
        "energy_std_mev_per_atom": 1e3 * float(np.std(values[1])),
        "dscribe": version,
        "jax": jax.__version__,
    }


def main() -> None:
    """Measures every system and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("ALMLIP_DATA_DIR"), help="reference data")
    parser.add_argument("--envs", type=Path, required=True, help="folder for the peer's environment")
    parser.add_argument("--systems", nargs="*", default=list(SYSTEMS), choices=SYSTEMS)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    options = parser.parse_args()
    if options.data is None:
        parser.error("give the folder of the reference data with --data or ALMLIP_DATA_DIR.")
    prepare_jax()
    python = environment(options.envs.resolve())
    rows = [measured(python, Path(options.data), system) for system in options.systems]
    (options.results / "descriptors.json").write_text(json.dumps(rows, indent=2) + "\n")
    lines = ["# The power spectrum beside dscribe's SOAP", "", f"dscribe {rows[0]['dscribe']}, one thread.", ""]
    shown = [name for name in rows[0] if name not in ("dscribe", "jax")]
    lines += ["| " + " | ".join(name.replace("_", " ") for name in shown) + " |", "| --- " * len(shown) + "|"]
    for row in rows:
        cells = (f"{row[name]:.3g}" if isinstance(row[name], float) else str(row[name]) for name in shown)
        lines.append("| " + " | ".join(cells) + " |")
    (options.results / "descriptors.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
