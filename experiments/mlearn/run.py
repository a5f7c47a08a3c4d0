"""Silicon and lithium, errors by group: ``python experiments/mlearn/run.py --data DIR --out runs/mlearn``.

Trains ensembles of four on energies, forces and stresses of the mlearn sets (Zuo et al., J. Phys. Chem. A 124, 731,
2020) and, where ``--motep-python`` names the interpreter of an environment with motep and ``--template`` a moment
tensor potential whose basis is to be taken, trains one of these beside them.  One row a material, model, group and
committee or member goes into ``results.csv``; what is in the output folder already is not trained again.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ase import Atoms
from pydantic import TypeAdapter

from almlip_jax.compilation import prepare_jax
from almlip_jax.fitting import fit_potential
from almlip_jax.models import ModelSettings
from almlip_jax.potential import Potential
from almlip_jax.structures.io import read_structures
from almlip_jax.training import EnsembleSettings, TrainingSettings, checkpoint

HERE = Path(__file__).resolve().parent
MODELS: dict[str, dict[str, Any]] = {"small": {"size": "small"}, "medium": {}, "medium_layers_1": {"layers": 1}}
GPA = 160.21766208  # of 1 eV/Angstrom^3


def train(frames: list[Atoms], name: str, steps: int, folder: Path) -> tuple[Potential, float]:
    """The potential, trained unless it is there already, and the seconds that took."""
    if (folder / "potential.json").exists():
        found = Potential.load(folder)
        return found, float(found.metadata.get("seconds", float("nan")))
    settings = TrainingSettings(max_steps=steps, max_epochs=10**6, patience=10**6, validate_every=200)
    model = TypeAdapter(ModelSettings).validate_python({"cutoff": 5.0, **MODELS[name]})
    began = time.monotonic()
    unfinished = folder.with_name(f"{folder.name}.training")
    potential, _ = fit_potential(frames, model, EnsembleSettings(size=4), settings, 0, checkpoint=unfinished)
    seconds = time.monotonic() - began
    metadata = {**potential.metadata, "seconds": seconds}
    members = EnsembleSettings(size=4)
    found = Potential(model, potential.species, potential.params, potential.reference_energies, {}, metadata, members)
    found.save(folder)
    checkpoint.discard(unfinished)
    return found, seconds


def predictions(potential: Potential, frames: list[Atoms]) -> dict[str, np.ndarray]:
    """Energies [n], forces [N, 3] and stresses [n, 6]."""
    found = potential.evaluate(frames)
    return {"energy": found.energy, "forces": np.concatenate(found.forces), "stress": found.stress}


def rows(frames: list[Atoms], predicted: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """Errors of all structures and of each group: meV/atom, meV/Angstrom, GPa."""
    counts = np.array([len(atoms) for atoms in frames])
    groups = np.array([str(atoms.info["group"]) for atoms in frames])
    energy = 1e3 * (predicted["energy"] - [atoms.calc.results["energy"] for atoms in frames]) / counts
    forces = 1e3 * (predicted["forces"] - np.concatenate([atoms.calc.results["forces"] for atoms in frames]))
    stress = GPA * (predicted["stress"] - np.array([atoms.calc.results["stress"] for atoms in frames]))
    of_atoms, table = np.repeat(groups, counts), []
    for group in ("all", *sorted(set(groups))):
        chosen, atoms = (np.ones(len(x), bool) if group == "all" else x == group for x in (groups, of_atoms))
        row: dict[str, Any] = {"group": group, "structures": int(chosen.sum())}
        for name, errors in (("energy", energy[chosen]), ("forces", forces[atoms]), ("stress", stress[chosen])):
            row[f"{name}_mae"] = round(float(np.mean(np.abs(errors))), 3)
            row[f"{name}_rmse"] = round(float(np.sqrt(np.mean(errors**2))), 3)
        table.append(row)
    return table


def moment_tensor_potential(options: argparse.Namespace, data: Path, material: str) -> dict[str, np.ndarray]:
    """What the potential of the template predicts after its training."""
    out = options.out / f"{material}_{options.template.stem}.npz"
    if not out.exists():
        paths = [data / f"{material}_train.extxyz", data / f"{material}_test.extxyz", options.template, out]
        command = [options.motep_python, HERE / "motep_worker.py", *paths, options.motep_seconds]
        subprocess.run([str(part) for part in command], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return dict(np.load(out))


def main() -> None:
    """Trains and evaluates what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("ALMLIP_DATA_DIR"), help="reference data")
    parser.add_argument("--out", type=Path, required=True, help="folder for the potentials")
    parser.add_argument("--materials", nargs="*", default=["Si", "Li"], choices=["Si", "Li"])
    parser.add_argument("--models", nargs="*", default=["small", "medium"], choices=MODELS)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--motep-python", help="interpreter of an environment with motep")
    parser.add_argument("--template", type=Path, help="moment tensor potential (.mtp) whose basis is taken")
    parser.add_argument("--motep-seconds", type=float, default=900)
    options = parser.parse_args()
    if options.data is None:
        parser.error("give the folder of the reference data with --data or ALMLIP_DATA_DIR.")
    prepare_jax()
    options.out.mkdir(parents=True, exist_ok=True)
    data, found = Path(options.data) / "mlearn", []
    for material in options.materials:
        frames, test = (read_structures(data / f"{material}_{part}.extxyz") for part in ("train", "test"))
        for name in options.models:
            potential, seconds = train(frames, name, options.steps, options.out / f"{material}_{name}")
            one_by_one = {f"member {m}": member(potential, m) for m in range(4)}
            for who, one in {"committee": potential, **one_by_one}.items():
                labels = {"material": material, "model": name, "steps": options.steps, "seconds": round(seconds)}
                table = rows(test, predictions(one, test))
                found += [labels | {"who": who} | row for row in table]
                print(labels | {"who": who} | table[0], flush=True)
        if options.motep_python and options.template:
            predicted = moment_tensor_potential(options, data, material)
            labels = {"material": material, "model": options.template.stem, "steps": int(predicted["iterations"])}
            labels |= {"seconds": round(float(predicted["seconds"])), "who": "alone"}
            found += [labels | row for row in rows(test, predicted)]
    with (options.out / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(found[0]))
        writer.writeheader()
        writer.writerows(found)


def member(potential: Potential, m: int) -> Potential:
    """One member as a potential of its own."""
    params = jax.tree.map(lambda x: x[m : m + 1], potential.params)
    return Potential(potential.settings, potential.species, params, potential.reference_energies)


if __name__ == "__main__":
    main()
