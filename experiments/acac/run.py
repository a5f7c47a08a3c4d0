"""Accuracy of named models on acetylacetone: ``python experiments/acac/run.py --data DIR --out runs/acac``.

Trains an ensemble (of four, or of ``--members``) on 450 frames at 300 K (50 more validate) and tests on trajectories at
300 K and 600 K, on the scan of a dihedral angle and on a transfer of the hydrogen; the committee and its members one by
one.  ``mixed`` is a committee of two architectures: members of ``thorough`` and MACE-type models in turn.  A model
whose potential lies in the output folder already is only evaluated.  One row a model, set and committee or member goes
into ``results.csv``.
"""

from __future__ import annotations

import argparse
import csv
import os
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from pydantic import TypeAdapter

from almlip_jax.compilation import prepare_jax
from almlip_jax.ensembles import member_models
from almlip_jax.fitting import fit_potential
from almlip_jax.models import ModelSettings
from almlip_jax.potential import Potential
from almlip_jax.structures.io import read_structures
from almlip_jax.training import EnsembleSettings, EpochReport, TrainingSettings

HERE = Path(__file__).resolve().parent
MODELS: dict[str, dict[str, Any]] = {
    "small": {"size": "small"},
    "medium": {"size": "medium"},
    "large": {"size": "large"},
    "medium_products_2": {"products": 2},
    "small_layers_1": {"size": "small", "layers": 1},
    "medium_layers_1": {"layers": 1},
    "mace": {"kind": "mace"},
    "nequip": {"kind": "nequip"},
    "thorough": {"cutoff": 6.0, "layers": 1, "radial": 6, "hidden": (64,)},
}
MODELS["mixed"] = MODELS["thorough"]
MACE = {"kind": "mace", "cutoff": 6.0, "radial": 6}
VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {"mixed": ({}, {"model": MACE, "training": {"max_steps": 60000}})}
THOROUGH = {"batch_size": 2, "clip_norm": 0.3, "loss": {"energy": 1.0}, "validate_every": 4500}
TRAINING: dict[str, dict[str, Any]] = {"thorough": THOROUGH, "mixed": THOROUGH}
SETS = {"300K": "test_MD_300K", "600K": "test_MD_600K", "dihedral": "test_dihedral", "H_transfer": "test_H_transfer"}


def train(data: Path, name: str, members: int, steps: int, folder: Path) -> tuple[Potential, float]:
    """The potential, trained unless it is there already, and the seconds that took (NaN where it was there)."""
    if (folder / "potential.json").exists():
        return Potential.load(folder), float("nan")
    plain = {"max_steps": steps, "max_epochs": 10**6, "patience": 10**6, "validate_every": 450}
    settings = TrainingSettings.model_validate(plain | TRAINING.get(name, {}))
    frames = read_structures(data / "acac" / "train_300K.xyz")
    began = time.monotonic()
    model = TypeAdapter(ModelSettings).validate_python({"cutoff": 5.0, **MODELS[name]})
    potential, _ = fit_potential(
        frames,
        model,
        EnsembleSettings.model_validate({"size": members, "variants": VARIANTS.get(name, ())}),
        settings,
        seed=0,
        on_epoch=report,
        checkpoint=folder.with_name(f"{folder.name}.training"),
    )
    seconds = time.monotonic() - began
    potential.save(folder)
    return potential, seconds


def report(record: EpochReport) -> None:
    """One line on a training under way."""
    print(f"step {record.step}, {record.seconds:.0f} s, {record.validation_forces_rmse} eV/Angstrom", flush=True)


def errors(potential: Potential, path: Path) -> dict[str, float]:
    """Errors on the frames of a file: energies in meV, offset-free too, forces in meV/Angstrom where there are any."""
    frames = read_structures(path)
    found = potential.evaluate(frames)
    energy = 1e3 * (found.energy - np.array([a.calc.results["energy"] for a in frames]))
    row = {
        "energy_rmse": np.sqrt(np.mean(energy**2)),
        "energy_mae": np.mean(np.abs(energy)),
        "energy_offset_free_rmse": np.std(energy),
    }
    if "forces" in frames[0].calc.results:
        pairs = zip(found.forces, frames, strict=True)
        forces = 1e3 * np.concatenate([f - a.calc.results["forces"] for f, a in pairs])
        row |= {"forces_rmse": np.sqrt(np.mean(forces**2)), "forces_mae": np.mean(np.abs(forces))}
    return {key: round(float(value), 2) for key, value in row.items()}


def one_by_one(potential: Potential) -> dict[str, Potential]:
    """The members, each as a potential of its own."""
    members = potential.members or EnsembleSettings(size=jax.tree.leaves(potential.params)[0].shape[0])
    groups = potential.params if members.variants else (potential.params,)
    found: dict[str, Potential] = {}
    for (model, _, count), params in zip(member_models(potential.settings, members), groups, strict=True):
        for m in range(count):
            one = jax.tree.map(lambda x, m=m: x[m : m + 1], params)
            found[f"member {len(found)}"] = Potential(model, potential.species, one, potential.reference_energies)
    return found


def main() -> None:
    """Trains and evaluates what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("ALMLIP_DATA_DIR"), help="reference data")
    parser.add_argument("--out", type=Path, required=True, help="folder for the potentials")
    parser.add_argument("--models", nargs="*", default=["small", "medium", "small_layers_1"], choices=MODELS)
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--steps", type=int, default=9000)
    options = parser.parse_args()
    if options.data is None:
        parser.error("give the folder of the reference data with --data or ALMLIP_DATA_DIR.")
    prepare_jax()
    rows = []
    for name in options.models:
        label = name if options.members == 4 else f"{name}_x{options.members}"
        potential, seconds = train(Path(options.data), name, options.members, options.steps, options.out / label)
        for who, one in {"committee": potential, **one_by_one(potential)}.items():
            for test, file in SETS.items():
                found = errors(one, Path(options.data) / "acac" / f"{file}.xyz")
                rows.append(
                    {"model": label, "steps": options.steps, "seconds": seconds, "who": who} | {"set": test} | found
                )
                print(rows[-1], flush=True)
    with (options.out / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
