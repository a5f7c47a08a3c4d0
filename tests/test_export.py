"""Every compiled program lowers for GPUs and TPUs on a machine that has none: nothing of the CPU hides in it.

Nor is a product of matrices left to what these take for float32.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from jax import export
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from almlip_jax.dynamics import ExplorationSettings, Explorer
from almlip_jax.dynamics.knowledge import Knowledge
from almlip_jax.dynamics.programs import programs
from almlip_jax.ensembles import Ensemble, Heads, training_devices
from almlip_jax.ensembles.sharding import MEMBERS, PARTS
from almlip_jax.feature_names import atom_feature_names, feature_names
from almlip_jax.features import FeatureRequest, last_layer_gradient
from almlip_jax.features.declared import declared
from almlip_jax.models import MaceSettings, MtpSettings, SharedDensitySettings, build_model
from almlip_jax.potential import evaluator
from almlip_jax.precision import full_precision
from almlip_jax.structures import walkers
from almlip_jax.structures.graph import lone_atom
from almlip_jax.structures.species import SpeciesTable
from almlip_jax.training import EnsembleSettings, Trainer, TrainingSettings, plan_capacity

sys.path.insert(0, str(Path(__file__).parent / "selection"))

import small_environments
from small_pools import SELECTORS, candidates, sample

SPECIES = SpeciesTable((1, 8))
MODEL = SharedDensitySettings(cutoff=3.0, radial=3, l_max=1, channels=2, hidden=(4,))
MACE = MaceSettings(cutoff=3.0)
MTP = MtpSettings(cutoff=3.0, level=6, radial_basis_size=3)
KEY = jax.random.key(0)
ACCELERATORS = ("cuda", "tpu")


@pytest.fixture(params=["gpu", pytest.param("cpu", marks=pytest.mark.slow)])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the package takes its machine for: some programs are written otherwise for a CPU."""
    monkeypatch.setattr(jax, "default_backend", lambda: request.param)
    return str(request.param)


def lowered(function: Callable[..., Any], *arguments: Any) -> str:
    """The program of a function for accelerators, as text."""
    found = export.export(function if hasattr(function, "lower") else jax.jit(function), platforms=ACCELERATORS)(
        *arguments
    )
    text = found.mlir_module()
    assert "callback" not in text and "lapack" not in text
    coarse = [line for line in text.splitlines() if re.search(r"dot_general|convolution", line) and "f32" in line]
    assert [line for line in coarse if "[HIGHEST, HIGHEST]" not in line] == []  # TF32 and bfloat16 are far too coarse
    return text


def crystal(seed: int = 0) -> Atoms:
    """Two species, periodic, with made-up labels."""
    atoms = bulk("OH", "cesiumchloride", a=2.2) * (2, 1, 1)
    atoms.rattle(0.05, seed=seed)
    atoms.calc = SinglePointCalculator(atoms, energy=1.0, forces=np.ones((4, 3)), stress=np.ones(6))
    return atoms


def water() -> Atoms:
    return molecule("H2O")


def ensemble_of(heads: Heads | None = None) -> tuple[Ensemble, Any]:
    """Two models and the shapes of their parameters."""
    ensemble = Ensemble(build_model(MODEL, SPECIES), 2, heads=heads or Heads())
    return ensemble, jax.eval_shape(ensemble.init, KEY)


LOOPS = {
    "biases": (
        water,
        {
            "integrator": {"kind": "langevin"},
            "biases": [
                {"kind": "uncertainty"},
                {
                    "kind": "metadynamics",
                    "variables": [{"kind": "angle", "points": [0, 1, 2]}],
                    "widths": [0.1],
                    "height": 0.1,
                    "pace": 5,
                },
            ],
            "admission": {"kind": "log_det"},
            "rewind": {},
            "pressure": True,
        },
    ),
    "cells": (crystal, {"integrator": {"kind": "npt"}, "admission": {"kind": "reservoir"}}),
    "swaps": (crystal, {"integrator": {"kind": "nose_hoover"}, "swaps": {"every": 5}, "admission": {"kind": "top_k"}}),
    "relaxation": (water, {"integrator": {"kind": "fire"}, "admission": {"kind": "farthest"}}),
    "ascent": (crystal, {"integrator": {"kind": "adversarial"}, "rewind": {"to": "starts", "keep": 2}}),
}


@pytest.mark.parametrize("name", LOOPS)
def test_loops(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    start, changes = LOOPS[name]
    monkeypatch.setattr(walkers, "_MANY", 1 if name == "cells" else 10**6)  # a search through bins among them
    settings = ExplorationSettings.model_validate(
        {"walkers": [{"temperature": 300.0, "count": 2}], "steps": 20} | changes
    )
    ensemble, params = ensemble_of()
    rows = jax.eval_shape(lambda p, g: last_layer_gradient(ensemble.predict(p, g), g, 2), params, lone_atom())
    features = np.random.default_rng(0).normal(size=(5, rows.shape[1])).astype(np.float32)
    knowledge = Knowledge(context=settings.admission.context(features, 0))
    explorer = Explorer(ensemble.predict, SPECIES, MODEL.cutoff, settings)
    limits = explorer._thresholds((1e3, 1e4))
    further = [[start()] * settings.further_starts] * 2 if settings.further_starts else ()
    state, setup, loop = explorer._prepare([start()] * 2, limits, KEY, explorer._known(knowledge), further=further)
    assert (state.neighbors.bins is not None) == (name == "cells")
    compiled = programs(loop)
    lowered(compiled.begin, params, state, setup)
    lowered(compiled.run_chunk, params, jax.eval_shape(loop.begin, params, state, setup), setup)


@pytest.mark.parametrize("settings", [MODEL, MTP, pytest.param(MACE, marks=pytest.mark.slow)])
def test_training(settings: Any, backend: str) -> None:
    data = [crystal(seed) for seed in range(5)]
    training = TrainingSettings(validation_fraction=0.4, batch_size=1, second_stage={})
    ensemble = Ensemble(build_model(settings, SPECIES), 2)
    trainer = Trainer(ensemble, SPECIES, plan_capacity(data, 3.0, training), training, EnsembleSettings(size=2))
    packed = trainer.training_set(data, {1: 0.0, 8: 0.0})
    plan, steps = packed.training_plan()
    lowered(trainer._compiled.fresh, KEY, packed.packed.data, plan, jnp.int32(steps), 1.0)
    state = jax.eval_shape(trainer.program.initial, jax.eval_shape(ensemble.init, KEY))
    lowered(trainer._compiled.segment, state, trainer.prepare(packed, 10, KEY), plan, jnp.int32(steps))


def test_training_on_shared_batches(backend: str) -> None:
    """One model on four devices that this machine does not have, which add up what they find in a batch."""
    data = [crystal(seed) for seed in range(8)]
    training = TrainingSettings(validation_fraction=0.5, batch_size=4)
    ensemble = Ensemble(build_model(MODEL, SPECIES), 1)
    whole = Trainer(ensemble, SPECIES, plan_capacity(data, 3.0, training), training, devices=training_devices(1, 1))
    packed = replace(whole.training_set(data, {1: 0.0, 8: 0.0}), parts=4)
    devices = AbstractMesh((1, 4), (MEMBERS, PARTS))
    program = replace(whole.program, devices=devices)
    state = jax.eval_shape(program.initial, jax.eval_shape(ensemble.init, KEY))
    run = whole.prepare(packed, 10, KEY)
    plan = packed.laid_out([[0, 1, 2, 3]])
    everywhere = NamedSharding(devices, PartitionSpec())
    given = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), (state, run, plan, jnp.int32(1))
    )
    text = lowered(jax.jit(full_precision(program.segment)), *given)
    assert "all_reduce" in text


PROGRAMS = {
    "_evaluate": FeatureRequest(tuple(feature_names()), atoms=tuple(atom_feature_names())),
    "_describe": FeatureRequest(
        tuple(name for name in feature_names() if not declared(name).derives), atoms=tuple(atom_feature_names())
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_evaluation(backend: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every feature map of a program, which is caught when it is called."""
    ensemble, shapes = ensemble_of(Heads(2, "evidential"))
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    program, given = getattr(evaluator, name), []

    class Caught(Exception):
        """Instead of a result."""

    def caught(*arguments: Any) -> None:
        given.extend(arguments)
        raise Caught

    monkeypatch.setattr(evaluator, name, caught)
    one = evaluator.Evaluator(ensemble, params, {1: 0.0, 8: 0.0})
    with pytest.raises(Caught):
        list(one.stream([crystal(), water()], PROGRAMS[name], "structures", None))
    lowered(program, *given)


@pytest.mark.parametrize("name", SELECTORS)
def test_selectors(name: str) -> None:
    """In double precision, as they run."""
    x, _ = sample(1)
    known, _ = sample(2, n=4)
    with jax.enable_x64(True):
        pool, labelled = (jax.tree.map(jnp.asarray, candidates(rows)) for rows in (x, known))
        lowered(SELECTORS[name], KEY, pool, labelled)


@pytest.mark.parametrize("name", small_environments.SELECTORS)
def test_selectors_of_environments(name: str) -> None:
    """Likewise."""
    with jax.enable_x64(True):
        given = (small_environments.candidates(small_environments.structures(seed)) for seed in (1, 2))
        pool, labelled = (jax.tree.map(jnp.asarray, one) for one in given)
        lowered(small_environments.SELECTORS[name], KEY, pool, labelled)
