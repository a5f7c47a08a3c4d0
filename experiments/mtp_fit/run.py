"""Fits of a moment tensor potential to silicon: ``python experiments/mtp_fit/run.py --data DIR --out runs/mtp_fit``.

Level 16, or another, on the 214 structures of the mlearn set (Zuo et al., J. Phys. Chem. A 124, 731, 2020) with the
loss of MLIP-2.  Each part of ``--parts`` writes files of its own into the output folder, and what is there already is
not done again; an interrupted fit goes on.

- ``fit``: variable projection from one random start; ``long``: from ``--starts`` of them, to a smaller tolerance;
- ``one`` and ``committee``: one model, and four with weights of their own, from the same start;
- ``gradients``: the usual trainer on the same loss, for ``--steps``;
- ``motep``: motep's own BFGS from the same start as ``fit``, in the environment that ``--motep-python`` names, for
  ``--motep-seconds`` of processor time.

Courses (``NAME.jsonl``, ``motep.csv``) tell the loss, a mean over structures, against processor seconds;
``results.csv`` holds losses, as sums, and test errors.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ase import Atoms
from ase.neighborlist import neighbor_list

from almlip_jax.compilation import prepare_jax
from almlip_jax.fitting import fit_potential
from almlip_jax.models.mtp import MtpSettings
from almlip_jax.models.mtp.text import template
from almlip_jax.potential import Potential
from almlip_jax.structures.io import read_structures
from almlip_jax.structures.species import SpeciesTable
from almlip_jax.training import EnsembleSettings, EpochReport, TrainingSettings, checkpoint

HERE = Path(__file__).resolve().parent
CUTOFF, RADIAL = 5.0, 8
SCALING = 0.01  # of the start
LOSS = {"kind": "mlip"}


def model_of(frames: list[Atoms], level: int) -> MtpSettings:
    """The model, whose interval begins a little below the shortest distance."""
    shortest = min(float(np.min(neighbor_list("d", atoms, 4.0))) for atoms in frames)
    return MtpSettings(level=level, cutoff=CUTOFF, radial_basis_size=RADIAL, min_dist=0.95 * shortest, scaling=SCALING)


def start_of(frames: list[Atoms], settings: MtpSettings, seed: int) -> Potential:
    """A potential with random radial coefficients; references are the mean energy."""
    species = SpeciesTable.of(frames)
    model = settings.build(species)
    params = jax.tree.map(np.asarray, model.init(jax.random.key(0)))
    shape = params["radial"].shape
    params["radial"] = np.random.default_rng(seed).normal(size=shape) / np.sqrt(shape[-1])
    mean = float(np.mean([atoms.calc.results["energy"] / len(atoms) for atoms in frames]))
    single = jax.tree.map(lambda x: x[None], params)
    return Potential(settings, species, single, {species.numbers[0]: mean}, members=EnsembleSettings(size=1))


def fitted(
    frames: list[Atoms],
    model: MtpSettings,
    folder: Path,
    training: dict[str, Any],
    members: int = 1,
    start: Potential | None = None,
) -> Potential:
    """A potential that is kept in a folder, and next to it the course of its fit as JSON lines."""
    if (folder / "potential.json").exists():
        return Potential.load(folder)
    settings = TrainingSettings.model_validate({"loss": LOSS, "validation_fraction": 0.0, "replay": 0, **training})
    course = folder.with_name(f"{folder.name}.jsonl")
    spent = json.loads(course.read_text().splitlines()[-1])["cpu_seconds"] if course.exists() else 0.0
    began = time.process_time()

    def on_epoch(report: EpochReport) -> None:
        line = {"cpu_seconds": round(spent + time.process_time() - began, 2), "step": report.step}
        with course.open("a") as file:
            file.write(json.dumps(line | {"loss": [float(x) for x in report.train_loss]}) + "\n")

    unfinished = folder.with_name(f"{folder.name}.training")
    options: dict[str, Any] = {"on_epoch": on_epoch, "checkpoint": unfinished, "start": start, "say": print}
    potential, _ = fit_potential(frames, model, EnsembleSettings(size=members), settings, 0, **options)
    potential.save(folder)
    checkpoint.discard(unfinished)
    return potential


def losses(frames: list[Atoms], energy: np.ndarray, forces: list[np.ndarray], stress: np.ndarray) -> dict[str, float]:
    """The loss of MLIP-2, a sum over structures, and what motep minimises: off-diagonal virials count twice."""
    found = {"loss": 0.0, "loss_motep": 0.0}
    for n, atoms in enumerate(frames):
        label = atoms.calc.results
        virial = atoms.cell.volume * (stress[n] - label["stress"])
        both = (energy[n] - label["energy"]) ** 2 + 0.01 * np.sum((forces[n] - label["forces"]) ** 2)
        found["loss"] += both + 0.001 * np.sum(virial**2)
        found["loss_motep"] += both + 0.001 * np.sum(virial**2 * [1, 1, 1, 2, 2, 2])
    return found


def errors(frames: list[Atoms], energy: np.ndarray, forces: list[np.ndarray], stress: np.ndarray) -> dict[str, float]:
    """MAE and RMSE: meV/atom, meV/Angstrom, GPa."""
    counts = np.array([len(atoms) for atoms in frames])
    of_energy = 1e3 * (energy - [atoms.calc.results["energy"] for atoms in frames]) / counts
    of_forces = 1e3 * (np.concatenate(forces) - np.concatenate([atoms.calc.results["forces"] for atoms in frames]))
    of_stress = 160.21766208 * (stress - np.array([atoms.calc.results["stress"] for atoms in frames]))
    found = {}
    for name, values in (("energy", of_energy), ("forces", of_forces), ("stress", of_stress)):
        found[f"{name}_mae"] = round(float(np.mean(np.abs(values))), 3)
        found[f"{name}_rmse"] = round(float(np.sqrt(np.mean(values**2))), 3)
    return found


def row(name: str, potential: Potential, train: list[Atoms], test: list[Atoms]) -> dict[str, Any]:
    """A line of the table."""
    own, other = potential.evaluate(train), potential.evaluate(test)
    return {
        "fit": name,
        **losses(train, own.energy, own.forces, own.stress),
        **errors(test, other.energy, other.forces, other.stress),
    }


def by_motep(options: argparse.Namespace, frames: list[Atoms], begun: Potential) -> Potential:
    """What motep's fit from the same start had come to in the given time."""
    out, model = options.out, begun.settings
    assert isinstance(model, MtpSettings)
    found = out / "motep.npz"
    there = dict(np.load(found)) if found.exists() else {"seconds": 0.0, "converged": False}
    if there["seconds"] < options.motep_seconds and not there["converged"]:
        (out / "level.mtp").write_text(template(model.level, RADIAL, (model.min_dist, CUTOFF)))
        radial = begun.params["radial"][0]
        np.savez(out / "start.npz", radial=radial, scaling=SCALING, min_dist=model.min_dist)
        files = [options.data / f"mlearn/{options.material}_train.extxyz", out / "level.mtp", out / "start.npz", found]
        command = [options.motep_python, HERE / "motep_worker.py", *files, options.motep_seconds]
        one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
        subprocess.run([str(part) for part in command], check=True, env=os.environ | one_thread)
    given = np.load(found)
    constants = begun.params["constants"] | {"scaling": np.full(1, SCALING)}
    names = ("radial", "moment", "species")
    params = {name: given[name].reshape(begun.params[name].shape) for name in names} | {"constants": constants}
    return replace(begun, params=params, reference_energies=dict.fromkeys(begun.reference_energies, 0.0))


def projection(**given: Any) -> dict[str, Any]:
    """Settings of a training by projection."""
    return {"projection": {"iterations": 400, **given}}


def parts(options: argparse.Namespace, frames: list[Atoms]) -> dict[str, Callable[[], Potential]]:
    """What can be done, by name."""
    out, model = options.out, model_of(frames, options.level)
    start = start_of(frames, model, options.seed)
    one = projection(starts=1, tolerance=options.tolerance)
    several = projection(starts=options.starts, tolerance=options.tolerance / 10)
    steps = {"max_steps": options.steps, "max_epochs": 10**6, "patience": 10**6, "clip_norm": 1e3}
    return {
        "fit": lambda: fitted(frames, model, out / "fit", one, start=start),
        "long": lambda: fitted(frames, model, out / "long", several),
        "one": lambda: fitted(frames, model, out / "one", one),
        "committee": lambda: fitted(frames, model, out / "committee", one, members=4),
        "gradients": lambda: fitted(frames, model, out / "gradients", steps, start=start),
        "motep": lambda: by_motep(options, frames, start),
    }


def main() -> None:
    """Fits and evaluates what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("ALMLIP_DATA_DIR"), help="reference data")
    parser.add_argument("--out", type=Path, required=True, help="folder for the potentials")
    parser.add_argument("--material", default="Si", choices=["Si", "Li"])
    parser.add_argument("--parts", nargs="*", default=["fit", "long", "one", "committee", "gradients"])
    parser.add_argument("--level", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0, help="of the start of fit, gradients and motep")
    parser.add_argument("--starts", type=int, default=8)
    parser.add_argument("--tolerance", type=float, default=1e-4)
    parser.add_argument("--steps", type=int, default=4000, help="of gradients")
    parser.add_argument("--motep-python", help="interpreter of an environment with motep")
    parser.add_argument("--motep-seconds", type=float, default=1200)
    options = parser.parse_args()
    if options.data is None:
        parser.error("give the folder of the reference data with --data or ALMLIP_DATA_DIR.")
    options.data = Path(options.data)
    prepare_jax("float64")
    options.out.mkdir(parents=True, exist_ok=True)
    train, test = (
        read_structures(options.data / f"mlearn/{options.material}_{part}.extxyz") for part in ("train", "test")
    )
    done, table = parts(options, train), options.out / "results.csv"
    rows = {one["fit"]: one for one in csv.DictReader(table.open())} if table.exists() else {}
    for name in options.parts:
        rows[name] = row(name, done[name](), train, test)
        print(rows[name], flush=True)
        with table.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[name]))
            writer.writeheader()
            writer.writerows(rows.values())


if __name__ == "__main__":
    main()
