"""almlip-jax: trains an ensemble on acac and runs gated dynamics with it; one JSON task in, one JSON line out."""

from __future__ import annotations

import json
import resource
import sys
import time

BEGAN = time.perf_counter()

import jax
import numpy as np
from ase.io import read
from pydantic import TypeAdapter

from almlip_jax.compilation import prepare_jax
from almlip_jax.dynamics import ExplorationSettings, Explorer, WalkerGroup
from almlip_jax.ensembles import Ensemble
from almlip_jax.fitting import fit_potential
from almlip_jax.models import ModelSettings, build_model
from almlip_jax.structures.species import SpeciesTable
from almlip_jax.training import EnsembleSettings, TrainingSettings


def train(task: dict) -> dict:
    frames = read(task["train"], ":500")
    reached: dict[str, float] = {}
    model = TypeAdapter(ModelSettings).validate_python(task["model"])
    settings = TrainingSettings(max_steps=task["steps"], max_epochs=10**6, patience=10**6, validate_every=450)
    reports = []
    potential, _ = fit_potential(
        frames, model, EnsembleSettings(size=task["members"]), settings, seed=0, on_epoch=reports.append
    )
    seconds = time.perf_counter() - BEGAN
    steps = reports[-1].step - reports[0].step
    per_epoch = 90 * (reports[-1].seconds - reports[0].seconds) / steps
    potential.save(task["out"])
    for name, path in task["tests"].items():
        test = read(path, ":")
        found = potential.evaluate(test)
        errors = np.concatenate([f - a.get_forces() for f, a in zip(found.forces, test, strict=True)])
        energies = found.energy - np.array([a.get_potential_energy() for a in test])
        reached[f"forces_mae_{name}"] = 1e3 * float(np.mean(np.abs(errors)))
        reached[f"energy_mae_{name}"] = 1e3 * float(np.mean(np.abs(energies)))
    return {"seconds": seconds, "seconds_per_epoch": per_epoch, "first_report": reports[0].seconds, **reached}


def dynamics(task: dict) -> dict:
    from almlip_jax.potential import Potential

    start = read(task["start"], "0")
    if task.get("potential"):
        potential = Potential.load(task["potential"])
        ensemble, params, species = potential.ensemble, potential.params, potential.species
        params = jax.tree.map(lambda x: x[: task["members"]], params)
        ensemble = Ensemble(ensemble.model, task["members"])
    else:
        species = SpeciesTable.of([start])
        model = TypeAdapter(ModelSettings).validate_python(task["model"])
        ensemble = Ensemble(build_model(model, species), task["members"])
        params = jax.jit(ensemble.init)(jax.random.key(0))
        params = params | {"energy_scale": 0 * params["energy_scale"]}  # harmless: atoms do not feel each other
    walkers, steps = task.get("walkers", 1), task["steps"]
    groups = (WalkerGroup(temperature=task["temperature"], count=walkers),)
    settings = ExplorationSettings(walkers=groups, steps=steps, timestep=0.5)
    explorer = Explorer(ensemble.committee, species, ensemble.model.cutoff, settings)
    seconds = []
    for n in range(task["repeats"] + 1):
        began = time.perf_counter()
        run = explorer.run(params, [start] * walkers, (1e3, 1e4), jax.random.key(n))
        seconds.append(time.perf_counter() - began)
        if n == 0:
            start_up = time.perf_counter() - BEGAN
    assert all(status.name == "COMPLETED" for status in run.status), run.status
    return {"steps_per_second": [walkers * steps / s for s in seconds[1:]], "start_up": start_up}


if __name__ == "__main__":
    prepare_jax()
    task = json.loads(sys.argv[1])
    result = {"train": train, "md": dynamics}[task["part"]](task)
    result["memory_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print("RESULT " + json.dumps(result))
