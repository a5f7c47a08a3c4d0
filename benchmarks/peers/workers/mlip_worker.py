"""InstaDeep mlip: trains its MACE and runs its jax-md dynamics; one JSON task in, one JSON line out."""

from __future__ import annotations

from common import elapsed, dynamics_result, errors, training_result, work  # isort: skip

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ase.io import read
from mlip.data import ASEAtomsReader, GraphDatasetBuilder
from mlip.inference import run_batched_inference
from mlip.models import ForceField, Mace
from mlip.models.loss import MSELoss
from mlip.models.model_io import load_model_from_zip, save_model_to_zip
from mlip.simulation.jax_md import JaxMDSimulationEngine
from mlip.training import OptimizerConfig, TrainingIOHandler, TrainingLoop, get_default_mlip_optimizer
from mlip.training.training_io_handler import LogCategory


def train(task: dict[str, Any]) -> dict[str, Any]:
    frames = {name: read(task[name], ":") for name in ("train", "valid")}
    steps = task["epochs"] * -(-len(frames["train"]) // task["batch"])
    builder = GraphDatasetBuilder(
        {name: ASEAtomsReader(of) for name, of in frames.items()},
        GraphDatasetBuilder.Config(graph_cutoff_angstrom=5.0, batch_size=task["batch"], use_formation_energies=True),
    )
    data = builder.get_datasets()
    network = Mace(
        Mace.Config(num_layers=2, num_channels=32, l_max=3, node_symmetry=1, correlation=3), builder.dataset_info
    )
    curve: list[tuple[float, float]] = []

    def keep(category: LogCategory, found: dict[str, Any], epoch: int) -> None:
        if category == LogCategory.EVAL_METRICS and epoch > 0:
            name = next(key for key in found if key.endswith("mae_f"))
            curve.append((elapsed(), float(found[name])))

    handler = TrainingIOHandler()
    handler.attach_logger(keep)
    loop = TrainingLoop(
        train_dataset=data["train"],
        validation_dataset=data["valid"],
        force_field=ForceField.from_mlip_network(network),
        loss=MSELoss(),
        optimizer=get_default_mlip_optimizer(
            OptimizerConfig(
                init_learning_rate=1e-3,
                peak_learning_rate=1e-2,
                final_learning_rate=1e-4,
                warmup_steps=max(steps // 20, 1),
                transition_steps=max(steps - steps // 20, 1),
            )
        ),
        config=TrainingLoop.Config(num_epochs=task["epochs"], run_eval_at_start=False),
        io_handler=handler,
    )
    loop.run()
    result = training_result(elapsed(), curve, task["target"])
    best = loop.best_model  # with parameters on the host, which its own inference does not take
    field = replace(best, params=jax.tree.map(jnp.asarray, best.params))
    save_model_to_zip(task["out"] + ".zip", field)
    for name, path in task["tests"].items():
        test = read(path, ":")
        found = run_batched_inference([a.copy() for a in test], field, batch_size=16)
        result |= errors(name, [float(p.energy) for p in found], [np.asarray(p.forces) for p in found], test)
    return result


def dynamics(task: dict[str, Any]) -> dict[str, Any]:
    field = load_model_from_zip(Mace, task["potential"] + ".zip")
    episodes, steps = task["repeats"] + 1, task["steps"]
    config = JaxMDSimulationEngine.Config(
        num_steps=steps * episodes,
        num_episodes=episodes,
        timestep_fs=0.5,
        temperature_kelvin=task["temperature"],
        snapshot_interval=10,
    )
    prepared = elapsed()
    engine = JaxMDSimulationEngine(read(task["start"], "0"), field, config)
    ends: list[float] = []
    engine.attach_logger(lambda state: ends.append(elapsed()))
    engine.run()
    assert len(ends) == episodes and np.isfinite(engine.state.temperature).all(), engine.state.temperature
    return dynamics_result(steps, np.diff(ends).tolist(), ends[0] - prepared, ends[0])


if __name__ == "__main__":
    work({"train": train, "md": dynamics}, ("mlip", "jax", "jax-md", "numpy"))
