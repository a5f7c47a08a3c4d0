"""Every compiled program lowers for GPUs and TPUs on a machine that has none: nothing of the CPU hides in it.

Nor is a product of matrices left to what these take for float32.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from jax import export
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from almlip_jax.dynamics import ExplorationSettings, Explorer
from almlip_jax.dynamics.knowledge import Knowledge
from almlip_jax.dynamics.programs import programs
from almlip_jax.ensembles import Ensemble, Heads, training_devices
from almlip_jax.ensembles.likelihoods import Evidential
from almlip_jax.ensembles.sharding import MEMBERS, PARTS
from almlip_jax.feature_names import atom_feature_names, feature_names
from almlip_jax.features import FeatureRequest, last_layer_gradient
from almlip_jax.features.declared import declared
from almlip_jax.models import MaceSettings, MtpSettings, SharedDensitySettings, build_model
from almlip_jax.potential import Potential, evaluator
from almlip_jax.potential.following import Following
from almlip_jax.precision import full_precision
from almlip_jax.selection import (
    TEACHER_SCORES,
    WEIGHT,
    Candidates,
    Environments,
    FilterSettings,
    SelectorSettings,
    Strata,
)
from almlip_jax.structures import walkers
from almlip_jax.structures.graph import lone_atom
from almlip_jax.structures.species import SpeciesTable
from almlip_jax.training import EnsembleSettings, Trainer, TrainingSettings, plan_capacity
from almlip_jax.training.projection.program import Reduction, reduction
from almlip_jax.training.projection.trainer import ProjectionTrainer

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


class Caught(Exception):
    """Instead of a result, where a program is called for its arguments alone."""


def catching(given: list[Any]) -> Callable[..., None]:
    """Takes the place of a program, and notes what it is called with."""

    def caught(*arguments: Any) -> None:
        given.extend(arguments)
        raise Caught

    return caught


def test_training_by_projection(backend: str) -> None:
    """In double precision, as it runs, with the batches of one device."""
    data = [crystal(seed) for seed in range(4)]
    training = TrainingSettings(loss={"kind": "mlip"}, projection={"starts": 2}, validation_fraction=0.25)
    ensemble = Ensemble(build_model(MTP, SPECIES), 2)
    capacity = plan_capacity(data, MTP.cutoff, training)
    trainer = ProjectionTrainer(ensemble, SPECIES, capacity, training, EnsembleSettings(size=2))
    trainer._all = Mesh(np.array(jax.devices()[:1]), ("parts",))
    program, given = reduction(Reduction(ensemble.model, training.loss, trainer._all)), []
    trainer._reduce = catching(given)
    with pytest.raises(Caught):
        trainer.train(data, None, KEY, reference_energies={1: 0.0, 8: 0.0})
    with jax.enable_x64(True):
        lowered(program, *given)


PROGRAMS = {
    "_evaluate": FeatureRequest(tuple(feature_names()), atoms=tuple(atom_feature_names())),
    "_describe": FeatureRequest(
        tuple(name for name in feature_names() if not declared(name).derives), atoms=tuple(atom_feature_names())
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_evaluation(backend: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every feature map of a program, which is caught when it is called."""
    ensemble, shapes = ensemble_of(Heads(2, Evidential()))
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    program, given = getattr(evaluator, name), []
    monkeypatch.setattr(evaluator, name, catching(given))
    one = evaluator.Evaluator(ensemble, params, {1: 0.0, 8: 0.0})
    with pytest.raises(Caught):
        list(one.stream([crystal(), water()], PROGRAMS[name], "structures", None))
    lowered(program, *given)


@pytest.mark.parametrize("part", ["atoms", "scores"])
def test_one_structure_that_moves(part: Any, backend: str) -> None:
    """What calculators and engines call; other parts give less of the same."""
    _, shapes = ensemble_of()
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    potential = Potential(MODEL, SPECIES, params, {1: 0.0, 8: 0.0}, members=EnsembleSettings(size=2))
    following = Following(potential, skin=0.5)
    lowered(following._program(part)._run, params, {}, *following.follower.look(crystal(), (0, 1)))


GIVEN: dict[str, dict[str, Any]] = {
    "chain": {
        "filters": [
            {"kind": kind, **{"threshold": {"minimum": 0.1}, "top_fraction": {"fraction": 0.5}}.get(kind, {})}
            for kind in FilterSettings.kinds()
            if kind != "user"
        ],
        "selector": {"kind": "random"},
    },
    "cost_aware": {"selector": {"kind": "max_det"}},
    "stratified": {"by": "system", "selector": {"kind": "max_det"}},
}
"""What some kinds of selectors need to be told; the chain is one of all filters."""
OTHERWISE: dict[str, dict[str, Any]] = {
    "bait": {"overselect": 2},
    "cover": {"radius": 0.6},
    "environment_entropy": {"bandwidth": 0.6},
    "maxvol": {"mode": "neighborhood", "features": "latent"},
}
"""Settings with which kinds are other programs."""


def candidates(seed: int, of: SelectorSettings) -> Candidates:
    """With whatever any selector looks at."""
    rng = np.random.default_rng(seed)
    structures, atoms, width = 16, 4, 5
    names = dict.fromkeys((*of.score_names, *TEACHER_SCORES))
    rows = {name: rng.normal(size=(structures, atoms, width)) for name in of.atom_feature_names}
    found = Candidates.of(
        {name: rng.normal(size=(structures, width)) for name in of.feature_names},
        {name: rng.uniform(size=structures) for name in names},
        Environments.of(rows, rng.choice([1, 8], size=(structures, atoms))),
        Strata(jnp.arange(structures) % 4, jnp.ones(4)),
    )
    return replace(found, scalars={WEIGHT: jnp.asarray(0.3)})


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        *((kind, GIVEN.get(kind, {})) for kind in SelectorSettings.kinds() if kind != "user"),
        *OTHERWISE.items(),
    ],
    ids=lambda one: one if isinstance(one, str) else "-".join(one),
)
def test_selectors(kind: str, given: dict[str, Any]) -> None:
    """Each kind that there is, in double precision, as they run."""
    settings = SelectorSettings.parse({"kind": kind, **given})
    with jax.enable_x64(True):
        lowered(settings.build(4), KEY, candidates(1, settings), candidates(2, settings))
