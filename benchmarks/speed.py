"""Speed of exploration and training on one molecule, as ratios within one run: ``python benchmarks/speed.py``.

Exploration: walker-steps per second with the gate and every score at each step, for 1, 8 and 64 walkers, and the cost
of four members against one.  Training: milliseconds for an optimiser step of all members.  Labels come from GFN2-xTB,
so that nothing but the package is needed.  The table goes to ``benchmarks/results/speed.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from ase.io import read

from almlip_jax.dynamics import ExplorationSettings, Explorer, WalkerGroup
from almlip_jax.dynamics.sanity import SanitySettings
from almlip_jax.ensembles import Ensemble
from almlip_jax.keys import numpy_generator
from almlip_jax.models import SharedDensitySettings, build_model
from almlip_jax.oracles import Labeller, LabelStore, rattle
from almlip_jax.oracles.sources.xtb import TBLiteSettings
from almlip_jax.structures.species import SpeciesTable
from almlip_jax.training import EnsembleSettings, Trainer, TrainingSettings, plan_capacity, reference_energies

HERE = Path(__file__).resolve().parent
MODEL = SharedDensitySettings(cutoff=6.0, channels=16)
STEPS = 1000
NO_LIMITS = SanitySettings(closest_contact=0, max_temperature=1e15, max_force=1e6, bond_factor=20, dissociation=False)
"""The potential has learned little: walkers go on whatever they run into."""


def labelled_set(count: int) -> list:
    """Rattled Zundel cations with GFN2-xTB labels."""
    start = read(HERE.parent / "configs" / "zundel.xyz")
    frames = rattle(start, count, numpy_generator(0, "benchmark"), stdev=0.05)
    with tempfile.TemporaryDirectory() as folder, LabelStore(Path(folder) / "labels.db") as store:
        with Labeller(TBLiteSettings(kind="tblite"), store) as labeller:
            return [result.atoms for result in labeller.label(frames, {"purpose": "train"})]


def walker_steps(ensemble: Ensemble, params, start, walkers: int, repeats: int) -> float:
    """Median walker-steps per second, compilation apart.

    Raises:
        SystemExit: a walker ended before its last step, so that fewer steps were taken than are counted.
    """
    group = WalkerGroup(temperature=300.0, count=walkers)
    explorer = Explorer(
        ensemble.predict,
        SpeciesTable((1, 8)),
        MODEL.cutoff,
        ExplorationSettings(walkers=(group,), steps=STEPS, sanity=NO_LIMITS),
    )
    seconds = []
    for n in range(repeats + 1):
        began = time.perf_counter()
        found = explorer.run(params, [start] * walkers, (np.inf, np.inf), jax.random.key(n))
        seconds.append(time.perf_counter() - began)
        if np.any(found.end_step >= 0):
            raise SystemExit(f"a walker ended at step {found.end_step.max()}; nothing is counted.")
    return walkers * STEPS / statistics.median(seconds[1:])


def main() -> None:
    """Measures and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    frames = labelled_set(100)
    species, settings = SpeciesTable((1, 8)), TrainingSettings(max_steps=600, validate_every=100)
    result: dict[str, object] = {"cpus": os.cpu_count(), "machine": platform.processor(), "jax": jax.__version__}
    result["device"] = jax.devices()[0].device_kind
    for members in (1, 4):
        ensemble = Ensemble(build_model(MODEL, SpeciesTable((1, 8))), members)
        capacity = plan_capacity(frames, MODEL.cutoff, settings)
        trainer = Trainer(ensemble, species, capacity, settings, EnsembleSettings(size=members))
        references = reference_energies(frames, species)
        trained = trainer.train(frames, None, jax.random.key(0), reference_energies=references)
        first, last = trained.history[0], trained.history[-1]
        result[f"training_ms_per_step_{members}"] = 1e3 * (last.seconds - first.seconds) / (last.step - first.step)
        for walkers in (1, 8, 64):
            rate = walker_steps(ensemble, trained.params, frames[0], walkers, options.repeats)
            result[f"walker_steps_per_s_{members}_members_{walkers}_walkers"] = rate
    result["four_members_cost_8_walkers"] = float(
        np.divide(result["walker_steps_per_s_1_members_8_walkers"], result["walker_steps_per_s_4_members_8_walkers"])
    )
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "speed.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
