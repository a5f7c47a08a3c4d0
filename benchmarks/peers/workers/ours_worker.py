"""almlip-jax: trains an ensemble and runs gated dynamics with it; one JSON task in, one JSON line out."""

from __future__ import annotations

from common import elapsed, errors, work, dynamics_result  # isort: skip

import time
from typing import Any

import jax
import numpy as np
from ase import Atoms
from ase.io import read
from pydantic import TypeAdapter

from almlip_jax.compilation import prepare_jax
from almlip_jax.dynamics import ExplorationSettings, Explorer, WalkerGroup
from almlip_jax.ensembles import Ensemble
from almlip_jax.fitting import fit_potential
from almlip_jax.models import ModelSettings, Params, build_model
from almlip_jax.models.constants import with_constants
from almlip_jax.potential import Potential
from almlip_jax.structures.species import SpeciesTable
from almlip_jax.training import EnsembleSettings, TrainingSettings


def train(task: dict[str, Any]) -> dict[str, Any]:
    frames = read(task["train"], ":") + read(task["valid"], ":")
    model = TypeAdapter(ModelSettings).validate_python(task["model"])
    size = EnsembleSettings(size=task["members"])
    held_out = len(read(task["valid"], ":")) / len(frames)
    epoch = -(-(len(frames) - round(held_out * len(frames))) // task["batch"])
    steps = task["epochs"] * epoch
    settings = TrainingSettings(
        batch_size=task["batch"],
        max_steps=steps,
        max_epochs=10**6,
        patience=10**6,
        validate_every=max(epoch, steps // 20),
        validation_fraction=held_out,
    )
    reports = []
    potential, _ = fit_potential(frames, model, size, settings, seed=0, on_epoch=reports.append)
    seconds = elapsed()
    potential.save(task["out"])
    first, last = reports[0], reports[-1]
    passed = max(last.epoch - first.epoch, 1)
    result: dict[str, Any] = {
        "seconds": seconds,
        "epochs": last.epoch,
        "seconds_per_epoch": (last.seconds - first.seconds) / passed if last is not first else last.seconds,
        "first_epoch": seconds - last.seconds + first.seconds,
    }
    for name, path in task["tests"].items():
        test = read(path, ":")
        found = potential.evaluate(test)
        result |= errors(name, found.energy, found.forces, test)
    reached = result.get("forces_mae_300K", float("inf")) <= task["target"]
    return result | {"target_seconds": seconds if reached else None}


def explorer_of(task: dict[str, Any], start: Atoms) -> tuple[Explorer, Params]:
    """The compiled dynamics of a task, and the parameters of its members."""
    members, steps = task["members"], task["steps"]
    if task.get("potential"):
        potential = Potential.load(task["potential"])
        species, params = potential.species, jax.tree.map(lambda x: x[:members], potential.params)
        ensemble = Ensemble(potential.ensemble.model, members)
    else:
        species = SpeciesTable.of([start])
        ensemble = Ensemble(build_model(TypeAdapter(ModelSettings).validate_python(task["model"]), species), members)
        params = jax.jit(ensemble.init)(jax.random.key(0))
        params = with_constants(params, energy_scale=0.0)  # harmless: atoms do not feel each other
    groups = (WalkerGroup(temperature=task["temperature"], count=task.get("walkers", 1)),)
    chunk = min(500, steps)
    settings = ExplorationSettings(
        walkers=groups, steps=steps, timestep=0.5, chunk=chunk, trajectory_every=min(100, chunk)
    )
    return Explorer(ensemble.predict, species, ensemble.model.cutoff, settings), params


def dynamics(task: dict[str, Any]) -> dict[str, Any]:
    start, walkers = read(task["start"], "0"), task.get("walkers", 1)
    explorer, params = explorer_of(task, start)
    seconds, first_at = [], 0.0
    for n in range(task["repeats"] + 1):
        began = time.perf_counter()
        run = explorer.run(params, [start] * walkers, (np.inf, np.inf), jax.random.key(n))
        seconds.append(time.perf_counter() - began)
        first_at = first_at or elapsed()
        assert all(status.name == "COMPLETED" for status in run.status), (run.status, run.cause, run.end_step)
    return dynamics_result(walkers * task["steps"], seconds[1:], seconds[0], first_at)


def stop(task: dict[str, Any]) -> dict[str, Any]:
    """One run to the threshold; without one, what the gate sees at each step."""
    start, threshold = read(task["start"], "0"), task.get("threshold")
    explorer, params = explorer_of(task, start)
    run = explorer.run(params, [start], (threshold or np.inf, threshold or np.inf), jax.random.key(1))
    seconds = elapsed()
    stopped = int(run.end_step[0]) if run.status[0].name == "STOPPED" else None
    seen = run.scores["force_std_max"][:, 0].tolist() if threshold is None else []
    return {"seconds": seconds, "stopped": stopped, "seen": seen}


if __name__ == "__main__":
    prepare_jax()
    work({"train": train, "md": dynamics, "stop": stop}, ("almlip-jax", "jax", "numpy"))
