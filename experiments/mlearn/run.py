"""Silicon and lithium, errors by group: ``python experiments/mlearn/run.py --data DIR --out runs/mlearn``.

Trains ensembles of four, and moment tensor potentials by variable projection, on energies, forces and stresses of the
mlearn sets (Zuo et al., J. Phys. Chem. A 124, 731, 2020) and, where ``--motep-python`` names the interpreter of an
environment with motep, moment tensor potentials of ``--motep-levels`` by motep, with bases of ours.  One row a
material, model, group and committee or member goes into ``results.csv``, errors by group with a column a model into
``table.md``; what is in the output folder already is not trained again, and a training that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ase import Atoms
from ase.neighborlist import neighbor_list

from almlip_jax.compilation import prepare_jax
from almlip_jax.fitting import fit_potential
from almlip_jax.models import ModelSettings
from almlip_jax.models.mtp.text import template
from almlip_jax.potential import Potential
from almlip_jax.structures.io import read_structures
from almlip_jax.training import EnsembleSettings, TrainingSettings, checkpoint

HERE = Path(__file__).resolve().parent
MODELS: dict[str, dict[str, Any]] = {
    **{size: {"size": size} for size in ("tiny", "small", "medium", "large")},
    "medium_layers_1": {"layers": 1},
    "mace": {"kind": "mace"},
    **{f"mtp_{level}": {"kind": "mtp", "level": level} for level in range(8, 22, 2)},
}
PROJECTION = {"projection": {"iterations": 200, "starts": 4}, "loss": {"kind": "mlip"}, "validation_fraction": 0.0}
"""How moment tensor potentials are trained: by least squares and one model, where others are committees of four."""
GPA = 160.21766208  # of 1 eV/Angstrom^3
GROUPS = {"AIMD-NVT": "dynamics", "Elastic": "strained", "Surface": "surfaces", "Vacancy": "vacancies"}
QUANTITIES = {"energy": ("energy, meV/atom", 1), "forces": ("forces, meV/Angstrom", 0), "stress": ("stress, GPa", 2)}


def train(frames: list[Atoms], name: str, steps: int, folder: Path) -> tuple[Potential, float]:
    """The potential, trained unless it is there already, and the seconds that took."""
    if (folder / "potential.json").exists():
        found = Potential.load(folder)
        return found, float(found.metadata.get("seconds", float("nan")))
    given: dict[str, Any] = {"cutoff": 5.0, **MODELS[name]}
    settings = TrainingSettings(max_steps=steps, max_epochs=10**6, patience=10**6, validate_every=200)
    alone = given.get("kind") == "mtp"
    if alone:
        given["min_dist"] = 0.95 * min(float(np.min(neighbor_list("d", atoms, 4.0))) for atoms in frames)
        settings = TrainingSettings.model_validate(PROJECTION)
    model, members = ModelSettings.parse(given), EnsembleSettings(size=1 if alone else 4)
    began = time.monotonic()
    unfinished = folder.with_name(f"{folder.name}.training")
    potential, _ = fit_potential(frames, model, members, settings, 0, checkpoint=unfinished)
    seconds = time.monotonic() - began
    found = replace(potential, metadata={**potential.metadata, "seconds": seconds})
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


def moment_tensor_potential(
    options: argparse.Namespace, data: Path, material: str, level: int
) -> dict[str, np.ndarray]:
    """What the potential of a level predicts after its training."""
    basis, out = options.out / f"level_{level}.mtp", options.out / f"{material}_level_{level}.npz"
    if not out.exists():
        basis.write_text(template(level))
        paths = [data / f"{material}_train.extxyz", data / f"{material}_test.extxyz", basis, out]
        command = [options.motep_python, HERE / "motep_worker.py", *paths, options.motep_seconds]
        subprocess.run([str(part) for part in command], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return dict(np.load(out))


def markdown(found: list[dict[str, Any]]) -> str:
    """Root mean square errors of committees and single potentials by group, a column a quantity and model."""
    models = list(dict.fromkeys(row["model"] for row in found))
    whole = [row for row in found if not row["who"].startswith("member")]
    errors = {(row["material"], row["group"], row["model"]): row for row in whole}
    materials = list(dict.fromkeys(row["material"] for row in whole))
    table = [["", *(label for name, _ in QUANTITIES.values() for label in (name, *[""] * (len(models) - 1)))]]
    table.append(["---"] * len(table[0]))
    for material in materials:
        names = [model.replace("_", " ") if material == materials[0] else "" for model in models]
        table.append([f"**{material}**", *names * len(QUANTITIES)])
        of_material = {group: row for (one, group, _), row in errors.items() if one == material}
        for group, row in of_material.items():
            line = [f"{GROUPS.get(group, group)} ({row['structures']})"]
            for name, (_, digits) in QUANTITIES.items():
                chosen = (errors.get((material, group, model)) for model in models)
                line += [f"{float(one[f'{name}_rmse']):.{digits}f}" if one else "" for one in chosen]
            table.append(line)
    seconds = [[errors.get((one, "all", model), {"seconds": "-"})["seconds"] for one in materials] for model in models]
    line = ["training, s", *(" / ".join(map(str, one)) for one in seconds)]
    table.append(line + [""] * (len(table[0]) - len(line)))
    return "".join("".join(f"| {cell} " if cell else "| " for cell in cells) + "|\n" for cells in table)


def main() -> None:
    """Trains and evaluates what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("ALMLIP_DATA_DIR"), help="reference data")
    parser.add_argument("--out", type=Path, required=True, help="folder for the potentials")
    parser.add_argument("--materials", nargs="*", default=["Si", "Li"], choices=["Si", "Li"])
    parser.add_argument("--models", nargs="*", default=["small", "medium"], choices=MODELS)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--motep-python", help="interpreter of an environment with motep")
    parser.add_argument("--motep-levels", nargs="*", type=int, default=[10, 16], help="of moment tensor potentials")
    parser.add_argument("--motep-seconds", type=float, default=900, help="for each of these and material")
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
            several = potential.member_settings.size > 1
            one_by_one = (
                {f"member {m}": member(potential, m) for m in range(potential.member_settings.size)} if several else {}
            )
            for who, one in {"committee" if several else "alone": potential, **one_by_one}.items():
                labels = {"material": material, "model": name, "steps": options.steps, "seconds": round(seconds)}
                table = rows(test, predictions(one, test))
                found += [labels | {"who": who} | row for row in table]
                print(labels | {"who": who} | table[0], flush=True)
        for level in options.motep_levels if options.motep_python else ():
            predicted = moment_tensor_potential(options, data, material, level)
            labels = {"material": material, "model": f"level_{level}", "steps": int(predicted["iterations"])}
            labels |= {"seconds": round(float(predicted["seconds"])), "who": "alone"}
            table = rows(test, predicted)
            found += [labels | row for row in table]
            print(labels | table[0], flush=True)
    with (options.out / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(found[0]))
        writer.writeheader()
        writer.writerows(found)
    (options.out / "table.md").write_text(markdown(found))


def member(potential: Potential, m: int) -> Potential:
    """One member as a potential of its own."""
    params = jax.tree.map(lambda x: x[m : m + 1], potential.params)
    return Potential(potential.settings, potential.species, params, potential.reference_energies)


if __name__ == "__main__":
    main()
